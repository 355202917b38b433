"""Gradients of a sparse decode: of the values by gathered dot products, of the weights by latent-sorted sums.

Shapes: N tokens, K slots per token, F = d_sae, D = d_in, C = ``launch.CHUNK`` entries per chunk. No atomics anywhere:
every output has one writer and every sum a fixed order, so equal inputs give equal bits. Sums are float32 whatever the
type of the operands; each load is cast at once: 16-bit arithmetic is wrong in Triton's interpreter and coarse on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import launch


@triton.jit
def _values_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, indices_ptr, w_ptr, out_ptr, n_slots, n_latents, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """One program = ROWS slots of one token: out[n, k] = <grad[n], W[indices[n, k]]>."""
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    used = slots < n_slots
    latents = tl.load(indices_ptr + token * n_slots + slots, mask=used, other=0).to(tl.int64)
    valid = used & (latents >= 0) & (latents < n_latents)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)  # summed over channels once, after the loop: one barrier
    for start in range(0, width, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        inside = channels < width
        grad = tl.load(grad_ptr + token * width + channels, mask=inside, other=0.0).to(tl.float32)
        rows = tl.load(
            w_ptr + latents[:, None] * width + channels[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += rows * grad[None, :]
    sums = tl.sum(total, axis=1)
    tl.store(out_ptr + token * n_slots + slots, sums.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, values_ptr, entries_ptr, latent_ptr, first_ptr, chunk_ptr, slot_ptr, part_ptr, out_ptr,
    n_latents, n_slots, width, CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program = one chunk of one latent: sum of value * grad[token] over its entries.

    A latent of one chunk (also one without entries: zeros) is written to ``out``, the chunks of another to ``part``.
    """
    chunk = tl.program_id(0)
    latent = tl.load(latent_ptr + chunk).to(tl.int64)
    if latent < n_latents:  # the grid is an upper bound, so that its size needs no look at the device
        inner = chunk - tl.load(chunk_ptr + latent)
        first = tl.load(first_ptr + latent) + inner * CHUNK
        last = tl.minimum(first + CHUNK, tl.load(first_ptr + latent + 1))
        channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channels < width
        total = tl.zeros((CHANNELS,), dtype=tl.float32)
        for start in range(0, CHUNK, ROWS):
            positions = first + start + tl.arange(0, ROWS)
            used = positions < last
            entries = tl.load(entries_ptr + positions, mask=used, other=0).to(tl.int64)
            values = tl.load(values_ptr + entries, mask=used, other=0.0).to(tl.float32)
            rows = tl.load(
                grad_ptr + (entries // n_slots)[:, None] * width + channels[None, :],
                mask=used[:, None] & inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            total += tl.sum(rows * values[:, None], axis=0)
        n_chunks = tl.load(chunk_ptr + latent + 1) - tl.load(chunk_ptr + latent)
        if n_chunks == 1:
            tl.store(out_ptr + latent * width + channels, total.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            part = (tl.load(slot_ptr + latent) + inner).to(tl.int64)
            tl.store(part_ptr + part * width + channels, total, mask=inside)


@triton.jit
def _combine_kernel(part_ptr, slot_ptr, out_ptr, width, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program = one latent: the sum of its partial rows in the order of the chunks."""
    latent = tl.program_id(0).to(tl.int64)
    first = tl.load(slot_ptr + latent).to(tl.int64)
    last = tl.load(slot_ptr + latent + 1).to(tl.int64)
    if last > first:
        channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channels < width
        total = tl.zeros((CHANNELS,), dtype=tl.float32)
        for part in range(first, last):
            total += tl.load(part_ptr + part * width + channels, mask=inside, other=0.0)
        tl.store(out_ptr + latent * width + channels, total.to(out_ptr.dtype.element_ty), mask=inside)


def values_gradient(grad_ND: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """``out_NK = <grad_ND[n], W_FD[indices_NK]>`` in the type of W; 0 for an index outside 0..F - 1.

    Operands are contiguous and passed ``launch.check``; Gao et al. (arXiv 2406.04093), appendix D.2.
    """
    out_NK = torch.empty(indices_NK.shape, dtype=W_FD.dtype, device=W_FD.device)
    if out_NK.numel() == 0:
        return out_NK
    (n_tokens, n_slots), (n_latents, width) = indices_NK.shape, W_FD.shape
    size = launch.blocks(width)
    with torch.cuda.device_of(W_FD):
        _values_kernel[(n_tokens, triton.cdiv(n_slots, launch.ROWS))](
            grad_ND, indices_NK, W_FD, out_NK, n_slots, n_latents, width,
            ROWS=launch.ROWS, CHANNELS=size.channels, num_warps=size.warps,
        )  # fmt: skip
    return out_NK


def _cumulated(counts_F: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts_F.cumsum(0), (1, 0))


def weights_gradient(grad_ND: Tensor, values_NK: Tensor, indices_NK: Tensor, n_latents: int) -> Tensor:
    """``out_FD[f] = sum over the slots (n, k) of latent f of values_NK * grad_ND[n]``, in the type of the values.

    Entries are sorted by latent (stable) and cut into chunks of C; a latent of several chunks goes through a workspace
    of at most 2 N K / C float32 rows. Nothing waits for the device. Slots of value 0 are left out.
    """
    n_slots, width, device = values_NK.shape[1], grad_ND.shape[1], grad_ND.device
    if values_NK.numel() == 0:
        return torch.zeros(n_latents, width, dtype=values_NK.dtype, device=device)
    keys_E = torch.where(values_NK != 0, indices_NK, n_latents).reshape(-1).to(torch.int32)
    keys_E, entries_E = torch.sort(keys_E, stable=True)
    bounds_F1 = torch.searchsorted(keys_E, torch.arange(n_latents + 1, dtype=torch.int32, device=device))
    chunks_F = bounds_F1.diff().add(launch.CHUNK - 1).div(launch.CHUNK, rounding_mode="floor").clamp_min(1)
    chunk_F1, slot_F1 = _cumulated(chunks_F), _cumulated(torch.where(chunks_F > 1, chunks_F, 0))
    grid = n_latents + len(keys_E) // launch.CHUNK
    latent_G = torch.searchsorted(chunk_F1, torch.arange(grid, device=device), right=True) - 1
    out_FD = torch.empty(n_latents, width, dtype=values_NK.dtype, device=device)
    part_PD = torch.empty(2 * (len(keys_E) // launch.CHUNK), width, dtype=torch.float32, device=device)
    size = launch.blocks(width)
    common: dict[str, Any] = {"CHANNELS": size.channels, "num_warps": size.warps}
    with torch.cuda.device_of(grad_ND):
        _weights_kernel[(grid, size.programs)](
            grad_ND, values_NK, entries_E, latent_G, bounds_F1, chunk_F1, slot_F1, part_PD, out_FD,
            n_latents, n_slots, width, CHUNK=launch.CHUNK, ROWS=launch.ROWS, **common,
        )  # fmt: skip
        if len(part_PD):
            _combine_kernel[(n_latents, size.programs)](part_PD, slot_F1, out_FD, width, **common)
    return out_FD
