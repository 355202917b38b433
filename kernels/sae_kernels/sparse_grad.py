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


def weights_gradient(grad_ND: Tensor, values_NK: Tensor, indices_NK: Tensor, n_latents: int) -> Tensor:
    """``out_FD[f] = sum over the slots (n, k) of latent f of values_NK * grad_ND[n]``, in the type of the values.

    Slots of value 0 are left out. Nothing waits for the device; see :mod:`sae_kernels.dual_grad` for the order of sums.
    """
    work = worklist(values_NK, indices_NK, n_latents)
    return single_gradient(work, values_NK, grad_ND).to(values_NK.dtype)
