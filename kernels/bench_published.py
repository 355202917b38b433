"""The published sparse kernels of Gao et al. (arXiv 2406.04093, appendix D), written anew from their description.

A baseline for the bench, not a part of the package. Shapes: N tokens, K slots, F = d_sae, D = d_in. Dense
pre-activations in bfloat16 and ``torch.topk`` over them; a sparse decode with one program a token and one gathered row
at a time; gradients of the values by one dot product a slot; weight gradients from the entries sorted by latent (COO),
128 of them a program, flushed by float atomics whenever the latent changes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128


@triton.jit
def _decode_kernel(values_ptr, indices_ptr, w_ptr, out_ptr, n_slots, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(0, n_slots):
        value = tl.load(values_ptr + token * n_slots + slot).to(tl.float32)
        latent = tl.load(indices_ptr + token * n_slots + slot).to(tl.int64)
        total += value * tl.load(w_ptr + latent * width + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + channels, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _values_kernel(grad_ptr, indices_ptr, w_ptr, out_ptr, n_slots, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < width
    grad = tl.load(grad_ptr + token * width + channels, mask=inside, other=0.0).to(tl.float32)
    for slot in range(0, n_slots):
        latent = tl.load(indices_ptr + token * n_slots + slot).to(tl.int64)
        row = tl.load(w_ptr + latent * width + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * n_slots + slot, tl.sum(row * grad, axis=0).to(out_ptr.dtype.element_ty))


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    latents_ptr, tokens_ptr, coef_ptr, rows_ptr, out_ptr, n_entries, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0) * CHUNK
    channels = tl.arange(0, BLOCK)
    inside = channels < width
    last = tl.minimum(first + CHUNK, n_entries)
    current = tl.load(latents_ptr + first).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for entry in range(first, last):
        latent = tl.load(latents_ptr + entry).to(tl.int64)
        if latent != current:
            tl.atomic_add(out_ptr + current * width + channels, total, mask=inside, sem="relaxed")
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            current = latent
        token = tl.load(tokens_ptr + entry).to(tl.int64)
        row = tl.load(rows_ptr + token * width + channels, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(coef_ptr + entry).to(tl.float32) * row
    tl.atomic_add(out_ptr + current * width + channels, total, mask=inside, sem="relaxed")


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def _weights(indices_NK: Tensor, coef_NK: Tensor, rows_ND: Tensor, n_latents: int) -> Tensor:
    latents_E, order_E = torch.sort(indices_NK.reshape(-1))
    tokens_E, coef_E = order_E // indices_NK.shape[1], coef_NK.reshape(-1)[order_E]
    out_FD = torch.zeros(n_latents, rows_ND.shape[1], dtype=torch.float32, device=rows_ND.device)
    block = triton.next_power_of_2(rows_ND.shape[1])
    _weights_kernel[(triton.cdiv(len(latents_E), CHUNK),)](
        latents_E, tokens_E, coef_E, rows_ND, out_FD, len(latents_E), rows_ND.shape[1], CHUNK=CHUNK, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out_FD


class PublishedLoss(torch.autograd.Function):
    """``apply(n_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, k, copies)`` -> sum of squared errors; copies in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, n_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int,
        copies: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        u_ND = (n_ND - b_dec_D).to(copies[0].dtype)
        h_NF = torch.nn.functional.linear(u_ND, copies[0], b_enc_F.to(u_ND.dtype))
        values_NK, indices_NK = torch.topk(h_NF, k, dim=1)
        values_NK = values_NK.relu()
        y_ND = torch.empty_like(u_ND)
        width, block = n_ND.shape[1], triton.next_power_of_2(n_ND.shape[1])
        _decode_kernel[(len(n_ND),)](
            values_NK, indices_NK, copies[1], y_ND, k, width, BLOCK=block, num_warps=_warps(block)
        )
        r_ND = y_ND + b_dec_D - n_ND
        ctx.save_for_backward(u_ND, values_NK, indices_NK, r_ND, W_enc_FD, copies[1])
        return r_ND.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, values_NK, indices_NK, r_ND, W_enc_FD, W_dec_FD = ctx.saved_tensors
        grad_ND = (2.0 * grad * r_ND).to(u_ND.dtype)
        n_latents, width = W_enc_FD.shape
        block = triton.next_power_of_2(width)
        grad_NK = torch.empty_like(values_NK)
        _values_kernel[(len(u_ND),)](
            grad_ND, indices_NK, W_dec_FD, grad_NK, values_NK.shape[1], width, BLOCK=block, num_warps=_warps(block)
        )
        grad_NK = torch.where(values_NK > 0, grad_NK, 0.0)
        grad_dec_FD = _weights(indices_NK, values_NK, grad_ND, n_latents)
        grad_enc_FD = _weights(indices_NK, grad_NK, u_ND, n_latents)
        grad_b_F = torch.zeros(n_latents, dtype=torch.float32, device=u_ND.device)
        grad_b_F.index_add_(0, indices_NK.view(-1), grad_NK.view(-1).float())
        grad_b_D = grad_ND.float().sum(0) - grad_b_F @ W_enc_FD
        return None, grad_enc_FD, grad_b_F, grad_dec_FD, grad_b_D, None, None
