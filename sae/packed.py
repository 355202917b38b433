"""float32 products of a language model on a CPU, by oneDNN with weights in its own order.

A plain ``nn.Linear`` in float32 goes to the BLAS that torch was built with, which on many processors leaves half of the
arithmetic units idle: 105 GFLOP/s by MKL against 245 by oneDNN on one core of an AMD EPYC with AVX-512 (576 x 1,536,
1,024 rows; docs/log.md). oneDNN reads weights in blocks of its own, so each matrix is put into that order once, at its
first product, and kept beside the original. Operands stay float32; a probe against float64 at first use makes sure of
it, since some processors would round them to bfloat16. Products with gradients, in other types or on other devices go
the usual way. Letters: n rows, I inputs, O outputs.
"""

import weakref
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**16
"""Weights with fewer values stay as they are: the call costs more than the product."""
LARGEST_TOTAL = 4e9
"""Bytes of packed copies per model; matrices beyond it stay as they are."""
ROWS = 1_024
"""Number of rows that oneDNN's order is chosen for; at 4 to 256 rows it is as good as one chosen for them."""
PROBE_RMS = 1e-5
"""Root mean square error accepted for products of deviation 1: float32 leaves 1e-7 to 1e-6, bfloat16 operands 3e-3."""


class PackedWeight:
    """A float32 matrix ``W_OI`` in oneDNN's order. Private operators of torch, hence :func:`available`."""

    def __init__(self, W_OI: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(W_OI.detach().contiguous(), ROWS)

    def __call__(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """``x @ W.T + b``, [..., O] of [..., I]; no gradients."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, bias_O, "none", [], "")


@cache
def available() -> bool:
    """Whether this torch has the operators and they multiply in float32 here."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator)
    W = torch.randn(256, 512, generator=generator) / 512**0.5
    try:
        with torch.no_grad():
            found = PackedWeight(W)(x)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((found.double() - x.double() @ W.double().t()).square().mean().sqrt() < PROBE_RMS)


def suits(W: Tensor) -> bool:
    """Whether a product with this matrix gains from packing."""
    return W.device.type == "cpu" and W.dtype == torch.float32 and W.numel() >= SMALLEST and available()


_PACKED: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], PackedWeight]]" = weakref.WeakKeyDictionary()


def _packed_of(module: nn.Module, W_OI: Tensor) -> PackedWeight:
    """The packed copy, made anew when the weight has moved or was written to since."""
    source: Any = module.weight
    key = (source.data_ptr(), 0 if source.is_inference() else source._version)
    found = _PACKED.get(module)
    if found is None or found[0] != key:
        found = (key, PackedWeight(W_OI))
        _PACKED[module] = found
    return found[1]


def _plain(x: Tensor, W: Tensor) -> bool:
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return needs_grad or x.dtype != torch.float32 or not suits(W)


class PackedLinear(nn.Linear):
    """``nn.Linear`` whose products in float32 without gradients on a CPU use the packed weight. Same state."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        if _plain(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        return _packed_of(self, self.weight)(input, self.bias)


def _is_conv1d(kind: type) -> bool:
    """GPT-2's linear layer, told by its name: nothing of transformers needs importing for it."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


@cache
def _packed_conv1d(kind: type[nn.Module]) -> type[nn.Module]:
    """The same for ``Conv1D``, whose weight is stored as [I, O]."""

    class PackedConv1D(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            if _plain(x, self.weight):
                return super().forward(x)
            return _packed_of(self, self.weight.t())(x, self.bias)

    return PackedConv1D


def pack_linears(model: nn.Module, largest_total: float = LARGEST_TOTAL) -> int:
    """Let the linear layers of ``model`` use packed weights, in place; returns how many do. Hooks, names, weights and
    ``isinstance`` stay; subclasses of ``nn.Linear`` are left alone. Copies are made at the first product of each."""
    room, changed = largest_total, 0
    for module in model.modules():
        kind = type(module)
        if kind is not nn.Linear and not _is_conv1d(kind):
            continue
        weight: Any = module.weight
        size = weight.numel() * weight.element_size()
        if not suits(weight) or size > room:
            continue
        room -= size
        chosen: Any = PackedLinear if kind is nn.Linear else _packed_conv1d(kind)  # type: ignore[arg-type]
        module.__class__ = chosen
        changed += 1
    return changed
