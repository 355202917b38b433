"""The loss of every architecture by plain autograd over N x F, from the definitions of TRAINING 3 and 5; tests only.

N tokens, D = d_in, F = d_sae. Written from the formulas alone: no operation of the package is called.
"""

from typing import Any

import torch
from torch import Tensor

from sae.base import SAE, TrainState


class Step(torch.autograd.Function):
    """H(h - theta) with the straight-through gradient of theta (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.width = width
        return (h > theta).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        h, theta = ctx.saved_tensors
        window = (((h - theta) / ctx.width).abs() < 0.5).to(h.dtype)
        return None, (-window / ctx.width * grad).sum(0), None


class Jump(torch.autograd.Function):
    """h H(h - theta) with its straight-through gradient (eq. 12)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.width = width
        return h * (h > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, theta = ctx.saved_tensors
        window = (((h - theta) / ctx.width).abs() < 0.5).to(h.dtype)
        return grad * (h > theta), (-theta / ctx.width * window * grad).sum(0), None


def row_topk(h: Tensor, k: int) -> Tensor:
    kept = torch.topk(h, k, dim=1).indices
    return (h * torch.zeros_like(h).scatter(1, kept, 1.0)).relu()


def batch_topk(h: Tensor, k: int) -> Tensor:
    """Sorted over the whole batch, stably: ties by (token, latent)."""
    order = torch.sort(h.detach().reshape(-1), descending=True, stable=True).indices[: k * len(h)]
    return (h * torch.zeros(h.numel(), dtype=h.dtype).scatter(0, order, 1.0).view_as(h)).relu()


def dense_loss(sae: SAE, n: Tensor, state: TrainState, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, the code z_NF that counts as active); ``dead``: latents of the auxiliary loss, None for none."""
    cfg, name = state.cfg, sae.cfg.architecture
    t, b_pre = (n, sae.b_dec_D) if state.target_ND is None else (state.target_ND, sae.b_in_D)
    h = (n - b_pre) @ sae.W_enc_FD.T + sae.b_enc_F
    skip = n @ sae.W_skip_DD.T if hasattr(sae, "W_skip_DD") else 0
    mse = lambda y: (t - y).square().sum(1).mean() / state.v0  # noqa: E731
    decode = lambda z: z @ sae.W_dec_FD + sae.b_dec_D + skip  # noqa: E731
    extra = n.new_zeros(())
    if name in ("topk", "transcoder", "skip_transcoder"):
        z = row_topk(h, sae.cfg.k)
        if cfg.multi_topk:
            extra = mse(decode(row_topk(h, 4 * sae.cfg.k))) / 8
    elif name == "groupmax":
        groups = h.unflatten(1, (sae.cfg.k, -1))
        largest = torch.zeros_like(groups).scatter(2, groups.argmax(2, keepdim=True), 1.0)
        z = (groups * largest).relu().flatten(1)
    elif name in ("batchtopk", "matryoshka"):
        z = batch_topk(h, sae.cfg.k)
    elif name.startswith("jumprelu"):
        width = float(sae.bandwidth)
        z = Jump.apply(h, sae.threshold_F, width)
        l0 = Step.apply(h, sae.threshold_F, width).sum(1).mean()
        extra = state.sparsity_ramp * cfg.l0_weight * (l0 / sae.cfg.k - 1) ** 2
    elif name == "gated":
        product = (n - sae.b_dec_D) @ sae.W_enc_FD.T
        gate = product + sae.b_enc_F
        z = (gate > 0) * (sae.r_mag_F.exp() * product + sae.b_mag_F).relu()
        penalty = gate.relu().sum(1).mean() / state.input_rms_norm
        y_gate = gate.relu() @ sae.W_dec_FD.detach() + sae.b_dec_D.detach()
        extra = state.sparsity_ramp * cfg.gate_l1 * penalty + mse(y_gate)
    else:
        z = h.relu()
        weight = sae.W_dec_FD.norm(dim=1) if cfg.l1_decoder_norm else 1.0
        extra = state.sparsity_ramp * cfg.l1 * (z * weight).sum(1).mean() / state.input_rms_norm
    y = decode(z)
    if name == "matryoshka":
        ends = torch.tensor(sae.cfg.group_sizes).cumsum(0).tolist()
        loss = sum(mse(decode(z * (torch.arange(z.shape[1]) < end))) for end in ends) / len(ends)
    else:
        loss = mse(y)
    loss = loss + extra
    if dead is not None:
        top = torch.topk(torch.where(dead, h, -torch.inf), min(cfg.aux_k, int(dead.sum())), dim=1)
        z_aux = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
        error = (t - y).detach()
        loss = loss + cfg.aux_alpha * (z_aux @ sae.W_dec_FD - error).square().sum(1).mean() / state.v_e
    return loss, z
