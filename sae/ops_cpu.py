"""What the plain-torch operations do faster on a CPU: the K largest of a row by groups, and the encoder product.

Shapes: n rows, F = d_sae. Measured on two cores with AVX-512 (F 4,608, D 576, K 32, 1,820 rows, one thread): product
95 ms by MKL and 51 ms by oneDNN, selection 22 ms by ``torch.topk`` and 12 ms by groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

GROUP = 32
"""Neighbouring latents that share one maximum."""
PROBE_RMS = 1e-6
"""Largest error of the quicker product, relative to pre-activations of size 1, that still passes as float32: rounding
the operands to bfloat16 gives 3e-3, sums in another order 4e-7."""


def largest(h_nF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in falling order, as ``torch.topk(h_nF, k)``; the same values bit for bit.

    Exact: the k groups with the largest maxima hold a set of k largest values, and the smallest of those maxima bounds
    each of them from below, so only entries at or above it need sorting (35 a row at k = 32). Rows with values that
    are not finite, few groups, other types than float32 and float64 and other devices take ``torch.topk``.
    """
    n_rows, n_latents = h_nF.shape
    plain = h_nF.device.type != "cpu" or h_nF.dtype not in (torch.float32, torch.float64)
    if plain or n_rows == 0 or n_latents % GROUP or n_latents < 2 * k * GROUP or not h_nF.is_contiguous():
        found = torch.topk(h_nF, k, dim=1)
        return found.values, found.indices
    grouped_nGg = h_nF.view(n_rows, -1, GROUP)
    maxima_nG = grouped_nGg.amax(2)
    if not bool(maxima_nG.isfinite().all()):
        found = torch.topk(h_nF, k, dim=1)
        return found.values, found.indices
    top = torch.topk(maxima_nG, k, dim=1, sorted=False)
    groups_nk = top.indices.sort(dim=1).values  # entries in the order of latents: of equal ones the lower comes first
    first_n1 = torch.arange(n_rows)[:, None] * maxima_nG.shape[1]
    entries_nE = torch.nn.functional.embedding(groups_nk + first_n1, h_nF.view(-1, GROUP)).view(n_rows, -1)
    flat_e = (entries_nE >= top.values.amin(1, keepdim=True)).view(-1).nonzero().squeeze(1)
    row_e = flat_e.div(entries_nE.shape[1], rounding_mode="floor")
    counts_n = torch.bincount(row_e, minlength=n_rows)
    width = int(counts_n.max())
    place_e = torch.arange(len(flat_e)) + (torch.arange(n_rows) * width - counts_n.cumsum(0) + counts_n)[row_e]
    values = h_nF.new_full((n_rows * width,), -torch.inf)
    values[place_e] = entries_nE.view(-1)[flat_e]
    positions = flat_e.new_zeros(n_rows * width)
    positions[place_e] = flat_e - row_e * entries_nE.shape[1]
    ordered = torch.sort(values.view(n_rows, width), dim=1, descending=True, stable=True)
    position_nk = positions.view(n_rows, width).gather(1, ordered.indices[:, :k])
    group_nk = groups_nk.gather(1, position_nk.div(GROUP, rounding_mode="floor"))
    return ordered.values[:, :k], group_nk * GROUP + position_nk % GROUP


@cache
def _medium_is_float32(width: int) -> bool:
    """Whether oneDNN's "medium" product over ``width`` channels is float32 in truth on this processor.

    With AMX it would round its operands to bfloat16; a probe of fixed numbers against float64 tells.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(512, width, generator=generator)
    W = torch.randn(1_024, width, generator=generator) / width**0.5
    with _precision("medium"):
        found = u @ W.t()
    return bool((found.double() - u.double() @ W.double().t()).square().mean().sqrt() < PROBE_RMS)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def quick_product(u_ND: Tensor, W_FD: Tensor) -> Iterator[None]:
    """float32 products on the CPU go through oneDNN where that is exact and pays; all others stay as they are."""
    n_latents, width = W_FD.shape
    suits = u_ND.device.type == "cpu" and u_ND.dtype == torch.float32 and n_latents * width >= 2**17
    if suits and torch.get_float32_matmul_precision() == "highest" and _medium_is_float32(width):
        with _precision("medium"):
            yield
    else:
        yield


def product(u_nD: Tensor, W_FD: Tensor, b_F: Tensor, out_nF: Tensor, narrow_nF: Tensor | None = None) -> None:
    """``out = u @ W.T + b``; operands in 16 bits give a product rounded to them, converted to the type of ``out``, by
    way of ``narrow`` where room is given."""
    if out_nF.dtype == u_nD.dtype:
        with quick_product(u_nD, W_FD):
            torch.addmm(b_F, u_nD, W_FD.t(), out=out_nF)
    else:
        found = torch.addmm(b_F, u_nD, W_FD.t()) if narrow_nF is None else narrow_nF
        if narrow_nF is not None:
            torch.addmm(b_F, u_nD, W_FD.t(), out=narrow_nF)
        out_nF.copy_(found)
