"""What every kernel needs before it starts: checks of its operands and the sizes of its blocks.

Shapes: N tokens, K slots per token, F = d_sae, D = d_in. No kernel looks at the device: a tensor on the CPU works under
Triton's interpreter (TRITON_INTERPRET=1) and meets Triton's own "0 active drivers" without it.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
MAX_WIDTH = 16_384
MAX_BLOCK = 1_024
"""Channels per program; a wider row is cut into several."""
ROWS = 4
"""Gathered rows per step: a loop over single rows has only one load in flight."""
CHUNK = 128
"""Entries of one latent that a program of the weight gradient walks in sequence; a latent may fire on every token."""


class Blocks(NamedTuple):
    """Launch settings of a kernel over rows of D channels."""

    channels: int
    """Channels per program, a power of two."""
    programs: int
    """Programs that cover the D channels."""
    warps: int


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. ``triton.cdiv`` is the same in 30 times the time, which counts where kernels are short."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (at least 1)."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def described(**operands: Tensor) -> str:
    """What was found, for an error."""
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype} strides {t.stride()} on {t.device}" for name, t in operands.items()
    )


@cache
def blocks(width: int) -> Blocks:
    """Settings for rows of ``width`` channels (at least 1).

    They are data, not a timing made in the run: another block would be another order of sums, hence other bits.
    """
    channels = min(MAX_BLOCK, max(16, power_of_2(width)))
    return Blocks(channels, cdiv(width, channels), min(4, max(1, channels // 256)))


def refusal(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, *, mixed: bool = False) -> Exception | None:
    """The error for operands of a sparse product that the kernels do not take, with what was found; None if they do.

    ``mixed``: values may have another of the float types than W.
    """
    error = _rule_broken(values_NK, indices_NK, W_FD, mixed)
    if error is None:
        return None
    kind, rule = error
    return kind(f"{rule}; got {described(values=values_NK, indices=indices_NK, W=W_FD)}")


def _rule_broken(
    values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, mixed: bool
) -> tuple[type[Exception], str] | None:
    # The text is made where it is needed: formatting took a third of the time before a launch.
    if W_FD.dtype not in FLOATS or values_NK.dtype not in (FLOATS if mixed else (W_FD.dtype,)):
        return TypeError, "values and W must both be float32, bfloat16 or float16"
    if indices_NK.dtype not in INTEGERS:
        return TypeError, "indices must be int32 or int64"
    if values_NK.dim() != 2 or values_NK.shape != indices_NK.shape or W_FD.dim() != 2:
        return ValueError, "values and indices must be [N, K], W must be [F, D]"
    if not values_NK.device == indices_NK.device == W_FD.device:
        return ValueError, "values, indices and W must lie on one device"
    if not W_FD.is_contiguous():
        return ValueError, "W must be contiguous, a copy at every call would cost more than the kernel"
    if values_NK.numel() >= 2**31 or not 1 <= W_FD.shape[1] <= MAX_WIDTH or not 1 <= len(W_FD) < 2**31:
        return ValueError, f"N * K and F must be below 2^31, D must lie in 1..{MAX_WIDTH}, F must not be 0"
    return None


def check(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> None:
    """Raise what :func:`refusal` finds: ``TypeError`` for a type, ``ValueError`` for a shape, a device or strides."""
    error = refusal(values_NK, indices_NK, W_FD)
    if error is not None:
        raise error
