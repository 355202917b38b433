"""Gradients of a sparse decode: of the values by gathered dot products, of the weights by latent-sorted sums.

Shapes: N tokens, K slots per token, F = d_sae, D = d_in. No atomics anywhere:
every output has one writer and every sum a fixed order, so equal inputs give equal bits. Sums are float32 whatever the
type of the operands; each load is cast at once: 16-bit arithmetic is wrong in Triton's interpreter and coarse on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import launch
from sae_kernels.dual_grad import single_gradient, worklist


@triton.jit
def _values_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, indices_ptr, tokens_ptr, w_ptr, out_ptr, n_slots, n_latents, width,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program = ROWS slots of one token: out[n, k] = <grad[n], W[indices[n, k]]>.

    RAGGED: one row of E slots, each with the token it belongs to.
    """
    if RAGGED:
        begin = tl.full((), 0, tl.int64)
        slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    else:
        begin = tl.program_id(0).to(tl.int64) * n_slots
        slots = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    used = slots < n_slots
    latents = tl.load(indices_ptr + begin + slots, mask=used, other=0).to(tl.int64)
    valid = used & (latents >= 0) & (latents < n_latents)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)  # summed over channels once, after the loop: one barrier
    for start in range(0, width, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        inside = channels < width
        if RAGGED:
            tokens = tl.load(tokens_ptr + slots, mask=used, other=0).to(tl.int64)
            at = tokens[:, None] * width + channels[None, :]
            grad = tl.load(grad_ptr + at, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
        else:
            token = tl.program_id(0).to(tl.int64)
            grad = tl.load(grad_ptr + token * width + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
        rows = tl.load(
            w_ptr + latents[:, None] * width + channels[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += rows * grad
    sums = tl.sum(total, axis=1)
    tl.store(out_ptr + begin + slots, sums.to(out_ptr.dtype.element_ty), mask=used)


def values_gradient(grad_ND: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """``out_NK = <grad_ND[n], W_FD[indices_NK]>`` in the type of W; 0 for an index outside 0..F - 1.

    Operands are contiguous and passed ``launch.check``; Gao et al. (arXiv 2406.04093), appendix D.2.
    """
    out_NK = torch.empty(indices_NK.shape, dtype=W_FD.dtype, device=W_FD.device)
    if out_NK.numel() == 0:
        return out_NK
    _launch(grad_ND, indices_NK, None, W_FD, out_NK)
    return out_NK


def entry_values_gradient(grad_ND: Tensor, indices_E: Tensor, tokens_E: Tensor, W_FD: Tensor) -> Tensor:
    """``out_E = <grad_ND[tokens_E], W_FD[indices_E]>``: the same for codes of any width."""
    out_E = torch.empty(indices_E.shape, dtype=W_FD.dtype, device=W_FD.device)
    if out_E.numel():
        _launch(grad_ND, indices_E[None], tokens_E, W_FD, out_E)
    return out_E


def _launch(grad_ND: Tensor, indices_NK: Tensor, tokens_E: Tensor | None, W_FD: Tensor, out: Tensor) -> None:
    (n_rows, n_slots), (n_latents, width) = indices_NK.shape, W_FD.shape
    size = launch.gather("decode_values", W_FD)
    ragged = tokens_E is not None
    # Blocks of slots come first where there are many: the other axes of a grid end at 65,535.
    blocks = launch.cdiv(n_slots, size.rows)
    with torch.cuda.device_of(W_FD):
        _values_kernel[(blocks, 1) if ragged else (n_rows, blocks)](
            grad_ND, indices_NK, indices_NK if tokens_E is None else tokens_E, W_FD, out, n_slots, n_latents, width,
            ROWS=size.rows, CHANNELS=size.channels, RAGGED=ragged, num_warps=size.warps,
        )  # fmt: skip


def weights_gradient(grad_ND: Tensor, values_NK: Tensor, indices_NK: Tensor, n_latents: int) -> Tensor:
    """``out_FD[f] = sum over the slots (n, k) of latent f of values_NK * grad_ND[n]``, in the type of the values.

    Slots of value 0 are left out. Nothing waits for the device; see :mod:`sae_kernels.dual_grad` for the order of sums.
    """
    work = worklist(values_NK, indices_NK, n_latents)
    return single_gradient(work, values_NK, grad_ND, values_NK.dtype)
