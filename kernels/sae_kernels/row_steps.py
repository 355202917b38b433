"""What surrounds the optimiser, one pass each: gradient projection, unit rows, weighted column sums.

Shapes: N tokens, F = d_sae, D = d_in. torch needs three passes and a temporary [F, D] for what each of these reads and
writes once. Sums are float32 in a fixed order.
"""

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
    channels = max(16, triton.next_power_of_2(width))
    return launch.Blocks(channels, 1, min(16, max(1, channels // 512)))


def _check(**matrices: Tensor) -> None:
    found = ", ".join(f"{name} {tuple(t.shape)} {t.dtype} strides {t.stride()}" for name, t in matrices.items())
    shape = next(iter(matrices.values())).shape
    if len(shape) != 2 or any(t.shape != shape or not t.is_contiguous() for t in matrices.values()):
        raise ValueError(f"matrices must be contiguous [F, D] of one shape; got {found}")
    if not 1 <= shape[1] <= launch.MAX_WIDTH:
        raise ValueError(f"D must lie in 1..{launch.MAX_WIDTH}; got {found}")
    if any(t.dtype != torch.float32 for name, t in matrices.items() if name != "copy"):
        raise TypeError(f"weights and gradients must be float32; got {found}")


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


@torch.no_grad()
def weighted_column_sum(weights_N: Tensor, rows_ND: Tensor) -> Tensor:
    """float32 ``out_D = sum over n of weights_N * rows_ND[n]``, float32 weights, rows of any float type."""
    if rows_ND.dim() != 2 or weights_N.shape != rows_ND.shape[:1] or not rows_ND.is_contiguous():
        raise ValueError(f"want weights [N], contiguous [N, D]; got {tuple(weights_N.shape)}, {tuple(rows_ND.shape)}")
    if weights_N.dtype != torch.float32 or rows_ND.dtype not in launch.FLOATS:
        raise TypeError(f"weights must be float32, rows float; got {weights_N.dtype}, {rows_ND.dtype}")
    n_rows, width = rows_ND.shape
    part_PD = torch.empty(triton.cdiv(n_rows, BLOCK), width, dtype=torch.float32, device=rows_ND.device)
    if part_PD.numel():
        with torch.cuda.device_of(rows_ND):
            _columns_kernel[(len(part_PD), triton.cdiv(width, CHANNELS))](
                weights_N.contiguous(), rows_ND, part_PD, n_rows, width, ROWS=ROWS, CHANNELS=CHANNELS, BLOCK=BLOCK,
                num_warps=1,
            )  # fmt: skip
    return part_PD.sum(0)
