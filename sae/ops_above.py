"""Codes whose width is free, in plain torch: latents above a threshold, the largest of a whole batch, JumpReLU.

Shapes: N tokens, D = d_in, F = d_sae, E entries (:class:`sae.ops.Entries`). As in :mod:`sae.ops` pre-activations are
made in blocks and never stored for all tokens, and every gradient visits entries only.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import ops_checks
from sae.ops import Entries, Impl, _centred, _encoder_gradients, above, encode_threshold, sums_by_latent

GPU_OPERANDS = torch.bfloat16
"""Type of the encoder product of a training step on a GPU, as for TopK (docs/decisions/004); sums stay float32."""
LOWER_BAR = 0.5
"""Factor on a bar that left too few candidates."""


def kept(entries: Entries, keep_E: Tensor) -> Entries:
    """The entries of a bool mask, in their order. Differentiable in the values."""
    picked_e = keep_E.nonzero().squeeze(1)
    offsets_N1 = torch.searchsorted(picked_e, entries.offsets_N1)
    return Entries(entries.values_E[picked_e], entries.indices_E[picked_e], offsets_N1)


def largest_mask(values_E: Tensor, count: int) -> tuple[Tensor, float]:
    """(bool mask of the ``count`` largest, the smallest of them); of equal values the earlier ones are taken.

    All are taken where there are no more than ``count``; their smallest value is then 0.
    """
    if len(values_E) <= count:
        return torch.ones_like(values_E, dtype=torch.bool), 0.0
    if values_E.is_cuda:  # kthvalue gives a GPU's whole work to one of its multiprocessors
        last = torch.topk(values_E, count).values[-1]
    else:
        last = values_E.kthvalue(len(values_E) - count + 1).values
    larger_E, equal_E = (values_E <= last).logical_not_(), values_E == last  # NaN is larger than any number
    room = count - larger_E.sum()
    return larger_E | (equal_E & (equal_E.cumsum(0) <= room)), float(last)


def _operands(u_ND: Tensor) -> torch.dtype | None:
    return GPU_OPERANDS if u_ND.is_cuda and u_ND.dtype == torch.float32 else None


def mask_of_latents(entries: Entries, first: int, last: int) -> Tensor:
    """bool per entry: its latent lies in ``first..last`` (last excluded)."""
    return (entries.indices_E >= first) & (entries.indices_E < last)


def encode_above(
    n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, threshold_F: Tensor, impl: Impl = "auto"
) -> Entries:
    """Pre-activations above ``max(threshold, 0)`` of their latent (FORMATS 1, ``threshold``); differentiable in all
    tensors but the thresholds. ``impl`` as in :func:`sae.ops.sparse_decode`."""
    return encode_threshold(n_ND, b_pre_D, W_enc_FD, b_enc_F, threshold_F.detach().clamp_min(0), impl)


class _EncodeBatchTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, count: int, bar: float,
        impl: Impl,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        u_ND = _centred(n_ND, b_pre_D)
        lowered = (max(bar, 0.0), max(bar * LOWER_BAR, 0.0), 0.0)
        for tried in lowered:
            candidates = above(u_ND, W_enc_FD, b_enc_F, tried, impl, _operands(u_ND))
            if len(candidates.values_E) >= count or tried == 0.0:
                break
        keep_E, theta = largest_mask(candidates.values_E, count)
        found = kept(candidates, keep_E)
        ctx.save_for_backward(u_ND, W_enc_FD, found.indices_E, found.offsets_N1)
        ctx.impl = impl
        theta_ = torch.tensor(theta)
        ctx.mark_non_differentiable(found.indices_E, found.offsets_N1, theta_)
        return *found, theta_  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, W_enc_FD, indices_E, offsets_N1 = ctx.saved_tensors
        entries = (indices_E, offsets_N1)
        return *_encoder_gradients(ctx.needs_input_grad, grad_E, entries, u_ND, W_enc_FD, ctx.impl), None, None, None


class BatchCode(NamedTuple):
    """Result of :func:`encode_batchtopk`."""

    entries: Entries
    theta: float
    """The smallest kept value; 0 where fewer than K N values are positive."""


def encode_batchtopk(
    n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, *, bar: float = 0.0,
    impl: Impl = "auto",
) -> BatchCode:  # fmt: skip
    """The K N largest positive pre-activations of the batch (Bussmann et al., arXiv 2412.06410, eq. 5); ties by
    (token, latent). Differentiable in all tensors. ``ValueError`` unless 1 <= k <= F.

    ``bar``: what the K N-th is expected not to be below. It changes the time alone: too high a bar is found out, by the
    number of candidates, and lowered. On a GPU the product takes :data:`GPU_OPERANDS`. ``impl`` as in
    :func:`sae.ops.sparse_decode`.
    """
    ops_checks.encoder(n_ND, b_pre_D, W_enc_FD, b_enc_F)
    if not 1 <= k <= len(W_enc_FD):
        raise ValueError(f"k must lie in 1..{len(W_enc_FD)}, got {k}")
    *entries, theta = _EncodeBatchTopK.apply(n_ND, b_pre_D, W_enc_FD, b_enc_F, k * len(n_ND), bar, impl)
    return BatchCode(Entries(*entries), float(theta))


class _EncodeJump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, theta_F: Tensor,
        width: float, impl: Impl,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        u_ND = _centred(n_ND, b_pre_D)
        near = above(u_ND, W_enc_FD, b_enc_F, theta_F - width / 2, impl, _operands(u_ND))
        excess_E = near.values_E - theta_F[near.indices_E]
        active_E = (excess_E <= 0).logical_not_()  # NaN is active: it must reach the loss
        l0 = active_E.sum().to(n_ND.dtype) / max(len(n_ND), 1)
        ctx.save_for_backward(
            u_ND, W_enc_FD, near.indices_E, near.offsets_N1, active_E, excess_E.abs() < width / 2, theta_F
        )
        ctx.width, ctx.impl = width, impl
        ctx.mark_non_differentiable(near.indices_E, near.offsets_N1)
        return torch.where(active_E, near.values_E, 0.0), near.indices_E, near.offsets_N1, l0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor, _i: Tensor, _o: Tensor, grad_l0: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, W_enc_FD, indices_E, offsets_N1, active_E, inside_E, theta_F = ctx.saved_tensors
        at_theta_E = grad_E * theta_F[indices_E] + grad_l0 / max(len(u_ND), 1)
        grad_theta_E = torch.where(inside_E, at_theta_E, 0.0) / -ctx.width
        grad_theta_F = sums_by_latent(grad_theta_E, indices_E, len(theta_F))
        entries = (indices_E, offsets_N1)
        grad_h_E = torch.where(active_E, grad_E, 0.0)
        grads = _encoder_gradients(ctx.needs_input_grad, grad_h_E, entries, u_ND, W_enc_FD, ctx.impl)
        return *grads, grad_theta_F, None, None


class JumpCode(NamedTuple):
    """Result of :func:`encode_jump`."""

    entries: Entries
    """Latents above their threshold, and those just below it as empty slots (value 0)."""
    l0: Tensor
    """Scalar: mean latents above their threshold per token, differentiable in the thresholds."""


def encode_jump(
    n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, theta_F: Tensor, width: float,
    impl: Impl = "auto",
) -> JumpCode:  # fmt: skip
    """JumpReLU code ``z = h H(h - theta)`` and its L0, with straight-through gradients of the thresholds.

    Rajamanoharan et al., arXiv 2407.14435, eqs. 11 and 12, for a rectangle R (1 on -1/2..1/2) of ``width`` epsilon:
    ``dz/dtheta = -(theta/eps) R((h - theta)/eps)``, ``dH/dtheta = -(1/eps) R((h - theta)/eps)``; the pre-activation
    gets the gradient of an active latent and none from H. ``ValueError`` unless width > 0; thresholds at least 0. On a
    GPU the product takes :data:`GPU_OPERANDS`. ``impl`` as in :func:`sae.ops.sparse_decode`.
    """
    ops_checks.encoder(n_ND, b_pre_D, W_enc_FD, b_enc_F)
    if not width > 0:
        raise ValueError(f"the width of the straight-through window must be positive, got {width}")
    *entries, l0 = _EncodeJump.apply(n_ND, b_pre_D, W_enc_FD, b_enc_F, theta_F, width, impl)
    return JumpCode(Entries(*entries), l0)
