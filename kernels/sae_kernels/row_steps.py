"""The optimiser's step of a matrix in one pass, and what surrounds it: projection, unit rows, weighted column sums.

Shapes: N tokens, F = d_sae, D = d_in. torch needs three passes and a temporary [F, D] for what each of these reads and
writes once. Sums are float32 in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import launch

ROWS, CHANNELS, BLOCK = 8, 256, 64
"""Weighted column sums: rows per step, columns and rows per program."""


@triton.jit
def _project_kernel(grad_ptr, rows_ptr, width, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program = one row: g -= (g . w) w."""
    start = tl.program_id(0).to(tl.int64) * width
    channels = tl.arange(0, CHANNELS)
    inside = channels < width
    grad = tl.load(grad_ptr + start + channels, mask=inside, other=0.0)
    row = tl.load(rows_ptr + start + channels, mask=inside, other=0.0)
    tl.store(grad_ptr + start + channels, grad - tl.sum(grad * row, axis=0) * row, mask=inside)


@triton.jit
def _renorm_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, copy_ptr, width, CHANNELS: tl.constexpr, COPY: tl.constexpr
):
    """One program = one row: w /= |w|, unless it is 0; and its copy in another type."""
    start = tl.program_id(0).to(tl.int64) * width
    channels = tl.arange(0, CHANNELS)
    inside = channels < width
    row = tl.load(rows_ptr + start + channels, mask=inside, other=0.0)
    length = tl.sqrt(tl.sum(row * row, axis=0))
    row = row / tl.where(length > 0, length, 1.0)
    tl.store(rows_ptr + start + channels, row, mask=inside)
    if COPY:
        tl.store(copy_ptr + start + channels, row.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adam_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, rows_ptr, mean_ptr, square_ptr, copy_ptr, bias_ptr, bias_copy_ptr, width, n_tiles, tile,
    step_size, new_mean, keep_square, new_square, scale, eps,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """One program = one row: (projection,) Adam, (unit length,) copy in another type, in tile order with the bias."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    inside = channels < width
    at = row * width + channels
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    values = tl.load(rows_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    if UNIT:
        grad -= tl.sum(grad * values, axis=0) * values
    mean += new_mean * (grad - mean)
    square = keep_square * square + new_square * grad * grad
    values -= step_size * mean / (tl.sqrt(square) * scale + eps)
    if UNIT:
        values = tl.where(inside, values, 0.0)
        length = tl.sqrt(tl.sum(values * values, axis=0))
        values = values / tl.where(length > 0, length, 1.0)
    tl.store(rows_ptr + at, values, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    target = row
    if TILED:
        target = row % n_tiles * tile + row // n_tiles
        tl.store(bias_copy_ptr + target, tl.load(bias_ptr + row))
    tl.store(copy_ptr + target * width + channels, values.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    weights_ptr, r_ptr, part_ptr, n_rows, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program = BLOCK rows, CHANNELS columns: part[block] = sum of weight * row."""
    block = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < width
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, BLOCK, ROWS):
        rows = block * BLOCK + start + tl.arange(0, ROWS)
        used = rows < n_rows
        weights = tl.load(weights_ptr + rows, mask=used, other=0.0)
        mask = used[:, None] & inside[None, :]
        values = tl.load(r_ptr + rows[:, None] * width + channels[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float32) * weights[:, None], axis=0)
    tl.store(part_ptr + block * width + channels, total, mask=inside)


def blocks(width: int) -> launch.Blocks:
    """Settings of a kernel that holds a whole row of ``width`` channels."""
    channels = max(16, launch.power_of_2(width))
    return launch.Blocks(channels, 1, min(16, max(1, channels // 512)))


def _check(**matrices: Tensor) -> None:
    kind: type[Exception] = ValueError
    shape = next(iter(matrices.values())).shape
    if len(shape) != 2 or any(t.shape != shape or not t.is_contiguous() for t in matrices.values()):
        rule = "matrices must be contiguous [F, D] of one shape"
    elif not 1 <= shape[1] <= launch.MAX_WIDTH:
        rule = f"D must lie in 1..{launch.MAX_WIDTH}"
    elif any(t.dtype != torch.float32 for name, t in matrices.items() if name != "copy"):
        kind, rule = TypeError, "weights and gradients must be float32"
    else:
        return
    raise kind(f"{rule}; got {launch.described(**matrices)}")


@torch.no_grad()
def project_rows_(grad_FD: Tensor, W_FD: Tensor) -> Tensor:
    """``g_f -= (g_f . w_f) w_f`` in place, float32, for unit rows w_f. Errors for other types, shapes, strides."""
    _check(grad=grad_FD, W=W_FD)
    size = blocks(W_FD.shape[1])
    if len(W_FD):
        with torch.cuda.device_of(W_FD):
            _project_kernel[(len(W_FD),)](grad_FD, W_FD, W_FD.shape[1], CHANNELS=size.channels, num_warps=size.warps)
    return grad_FD


@torch.no_grad()
def renorm_rows_(W_FD: Tensor, copy_FD: Tensor | None = None) -> Tensor:
    """Rows to length 1 in place, float32; a zero row stays zero. ``copy_FD`` (any float type) is filled with them."""
    _check(W=W_FD, **({} if copy_FD is None else {"copy": copy_FD}))
    size = blocks(W_FD.shape[1])
    if len(W_FD):
        with torch.cuda.device_of(W_FD):
            _renorm_kernel[(len(W_FD),)](
                W_FD, W_FD if copy_FD is None else copy_FD, W_FD.shape[1], CHANNELS=size.channels,
                COPY=copy_FD is not None, num_warps=size.warps,
            )  # fmt: skip
    return W_FD


class Tiles(NamedTuple):
    """Where rows go in a copy in tile order: row f to ``(f mod n) size + f div n`` (:mod:`sae_kernels.topk_encode`)."""

    n: int
    size: int
    bias_F: Tensor
    """float32, copied in the same order to"""
    bias_P: Tensor


@torch.no_grad()
def adam_rows_(
    W_FD: Tensor, grad_FD: Tensor, mean_FD: Tensor, square_FD: Tensor, copy_PD: Tensor, *, rate: float, step: int,
    betas: tuple[float, float], eps: float, unit: bool, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    """Step number ``step`` (from 1) of Adam without weight decay on a matrix, in place, and its compute copy.

    As :class:`torch.optim.Adam`: float32 weights, gradient, first and second moment. ``unit``: the gradient is made
    tangent to the rows first, and rows are made unit afterwards (TRAINING 6, steps 5, 7, 8). 30 bytes a parameter
    where separate passes move 34 to 50. ``TypeError``, ``ValueError`` for other types, shapes, strides.
    """
    _check(W=W_FD, grad=grad_FD, mean=mean_FD, square=square_FD)
    rows = len(W_FD) if tiles is None else tiles.n * tiles.size
    if copy_PD.shape != (rows, W_FD.shape[1]) or rows < len(W_FD) or not copy_PD.is_contiguous():
        raise ValueError(f"the copy must be contiguous [{rows}, {W_FD.shape[1]}] for W {tuple(W_FD.shape)}, "
                         f"got {tuple(copy_PD.shape)}")  # fmt: skip
    if tiles is not None and (tiles.bias_F.shape != W_FD.shape[:1] or tiles.bias_P.shape != (rows,)):
        raise ValueError(f"want biases [F], [{rows}]; got {tuple(tiles.bias_F.shape)}, {tuple(tiles.bias_P.shape)}")
    if not len(W_FD):
        return
    size, found = blocks(W_FD.shape[1]), launch.tuned("adam_rows", W_FD)
    bias_F, bias_P = (W_FD, W_FD) if tiles is None else (tiles.bias_F, tiles.bias_P)
    with torch.cuda.device_of(W_FD):
        _adam_kernel[(len(W_FD),)](
            grad_FD, W_FD, mean_FD, square_FD, copy_PD, bias_F, bias_P, W_FD.shape[1],
            1 if tiles is None else tiles.n, 1 if tiles is None else tiles.size,
            rate / (1 - betas[0] ** step), 1 - betas[0], betas[1], 1 - betas[1], (1 - betas[1] ** step) ** -0.5, eps,
            CHANNELS=size.channels, UNIT=unit, TILED=tiles is not None,
            num_warps=size.warps if found is None else found["warps"],
        )  # fmt: skip


@torch.no_grad()
def weighted_column_sum(weights_N: Tensor, rows_ND: Tensor) -> Tensor:
    """float32 ``out_D = sum over n of weights_N * rows_ND[n]``, float32 weights, rows of any float type."""
    if rows_ND.dim() != 2 or weights_N.shape != rows_ND.shape[:1] or not rows_ND.is_contiguous():
        raise ValueError(f"want weights [N], contiguous [N, D]; got {tuple(weights_N.shape)}, {tuple(rows_ND.shape)}")
    if weights_N.dtype != torch.float32 or rows_ND.dtype not in launch.FLOATS:
        raise TypeError(f"weights must be float32, rows float; got {weights_N.dtype}, {rows_ND.dtype}")
    n_rows, width = rows_ND.shape
    part_PD = torch.empty(launch.cdiv(n_rows, BLOCK), width, dtype=torch.float32, device=rows_ND.device)
    if part_PD.numel():
        with torch.cuda.device_of(rows_ND):
            _columns_kernel[(len(part_PD), launch.cdiv(width, CHANNELS))](
                weights_N.contiguous(), rows_ND, part_PD, n_rows, width, ROWS=ROWS, CHANNELS=CHANNELS, BLOCK=BLOCK,
                num_warps=1,
            )  # fmt: skip
    return part_PD.sum(0)
