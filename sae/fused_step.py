"""Loss of one batch of a TopK SAE on a GPU: the fused operation, the auxiliary loss and the statistics of a step.

Shapes: N tokens, D = d_in, F = d_sae, K slots, d candidates for dead latents. The formulas are those of
:func:`sae.base.step_loss` and :func:`sae.losses.aux_k`; products take the compute type of :mod:`sae.ops_fused`. The
host is never waited for, so the number of dead latents is that of a few steps ago (``TrainState.n_dead_late``).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as nn_functional
from torch import Tensor

from sae import ops_fused
from sae.base import SAE, StepLoss, TrainState

DEAD_STEP = 256
"""Room for dead latents grows in steps of this many, so that shapes seldom change."""


class Aux(NamedTuple):
    """Auxiliary loss (not weighted) and the mean number of dead latents per token with a positive value."""

    loss: Tensor
    active: Tensor


def training_loss(sae: SAE, k: int, n_ND: Tensor, state: TrainState, copies: ops_fused.ComputeCopies) -> StepLoss:
    """As the loss of :mod:`sae.architectures.topk`, figures as tensors. ``copies`` are refreshed from the weights."""
    copies.refresh(sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD)
    found = ops_fused.topk_loss(
        n_ND, sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, k,
        pre_bias=sae.cfg.apply_b_dec_to_input, copies=copies,
    )  # fmt: skip
    n_tokens = max(len(n_ND), 1)
    mse = found.sse_N.sum() / (n_tokens * state.v0)
    zero = mse.new_zeros(())
    total, aux, active = mse, zero, zero
    if state.cfg.aux_alpha > 0 and state.n_dead_late > 0:
        loss, active = aux_loss(sae, found, state)
        aux = state.cfg.aux_alpha * loss
        total = total + aux
    return StepLoss(
        total=total, mse=mse.detach(), aux=aux.detach(), sparsity=zero,
        y_ND=n_ND + found.r_ND if state.logged else None, fired_F=_fired(found, state, sae.d_sae),
        l0=(found.latents.values_NK > 0).sum() / n_tokens, v_e=_error_variance(found, state), aux_active=active,
        flagged=(found.flags_N != 0).sum() if state.logged else None,
    )  # fmt: skip


def _fired(found: ops_fused.LossParts, state: TrainState, n_latents: int) -> Tensor:
    values_NK, indices_NK = found.latents
    # Slots that did not fire write to a place past the end: no list of those that did, whose length the host wants.
    at_E = torch.where(values_NK > state.fire_eps, indices_NK, n_latents).view(-1).long()
    fired = torch.zeros(n_latents + 1, dtype=torch.bool, device=values_NK.device)
    return fired.index_fill_(0, at_E, True)[:n_latents]


def _error_variance(found: ops_fused.LossParts, state: TrainState) -> Tensor | float:
    """``mean |e|^2 - |mean e|^2`` of the residual, float64; 0 while no latent can be dead and nothing asks for it."""
    n_tokens = len(found.sse_N)
    if n_tokens == 0 or state.cfg.aux_alpha <= 0 or state.tokens + n_tokens <= state.cfg.dead_tokens:
        return 0.0
    ones_N = torch.ones_like(found.sse_N)
    mean_D = ops_fused.weighted_column_sum(ones_N, found.r_ND).double() / n_tokens
    return (found.sse_N.detach().double().mean() - mean_D.square().sum()).clamp_min(0.0)


def candidates(state: TrainState, n_latents: int) -> tuple[Tensor, Tensor]:
    """(int64 latents_d, bool dead_d): the latents that have been silent longest, and which of them are dead.

    d has room for the dead of a few steps ago and a quarter more; what would not fit waits for the next steps.
    """
    room = state.n_dead_late + max(DEAD_STEP, state.n_dead_late // 4)
    room = min(n_latents, -(-room // DEAD_STEP) * DEAD_STEP)
    silent_F = state.tokens - state.last_fired_tokens_F
    latents_d = torch.topk(silent_F, room, sorted=False).indices
    return latents_d, silent_F[latents_d] > state.cfg.dead_tokens


def aux_loss(sae: SAE, found: ops_fused.LossParts, state: TrainState) -> Aux:
    """Dead latents model the error that the live ones leave (Gao et al., arXiv 2406.04093, A.2), on the dead alone."""
    latents_d, dead_d = candidates(state, sae.d_sae)
    W_enc_dD, W_dec_dD = (W.index_select(0, latents_d) for W in (sae.W_enc_FD, sae.W_dec_FD))
    bias_d = sae.b_enc_F.index_select(0, latents_d)
    if sae.b_pre_D is not None:
        # u is a constant here. This term is 0, its gradient is what the pre-bias gets through u: -sum of dh @ W_enc.
        bias_d = bias_d + W_enc_dD.detach() @ (sae.b_pre_D.detach() - sae.b_pre_D)
    kind = found.u_ND.dtype
    h_Nd = nn_functional.linear(found.u_ND, W_enc_dD.to(kind)).float() + bias_d
    z_Nd = torch.where(dead_d, h_Nd, 0.0).relu()
    if state.cfg.aux_k < len(latents_d):
        kept = torch.topk(z_Nd.detach(), state.cfg.aux_k, dim=1, sorted=False).indices
        z_Nd = z_Nd * torch.zeros_like(z_Nd).scatter_(1, kept, 1.0)
    difference_ND = (z_Nd.to(kind) @ W_dec_dD.to(kind)).float() + found.r_ND  # e = t - y = -r
    n_tokens = max(len(found.sse_N), 1)
    v_e = torch.as_tensor(state.v_e, dtype=torch.float64, device=difference_ND.device)
    scale = torch.where(v_e > 0, 1.0 / v_e.clamp_min(torch.finfo(torch.float32).tiny), 0.0).float()
    loss = difference_ND.square().sum() / n_tokens * scale
    return Aux(torch.where(torch.isfinite(loss), loss, 0.0), (z_Nd.detach() > 0).sum() / n_tokens)
