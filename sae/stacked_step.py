"""Losses and gradients of several TopK SAEs of one shape on one batch, on a CPU, without autograd (TRAINING 10).

Shapes: S SAEs, N tokens, D = d_in, F = d_sae, K slots, G = S F latents of all, M = S N codes, E = M K entries. Every
SAE gets the bits that it would get alone, and those of :mod:`sae.architectures.topk` by autograd: products are made one
SAE after another, everything else works on rows (tokens, latents) that do not know their neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae import losses, ops, ops_cpu
from sae.base import SAE, StepLoss, TrainState

STACK_BYTES = 2**21
"""Largest [S, N, D] array of a stack. Small SAEs cost the calls of a step, which a stack makes once; above this size a
step is bound by its arithmetic, and arrays of one SAE stay in the cache (docs/decisions/017)."""


def suits(sae: SAE, state: TrainState) -> bool:
    """Whether :class:`Stack` takes an SAE: a plain TopK one on a CPU, in float32."""
    plain = sae.activation == "topk" and state.cfg.architecture == "topk" and not state.cfg.multi_topk
    return plain and sae.W_enc_FD.device.type == "cpu" and sae.W_enc_FD.dtype == torch.float32


def shape_of(sae: SAE, state: TrainState) -> tuple[object, ...]:
    """What SAEs of one stack have in common."""
    cfg = sae.cfg
    return cfg.d_in, cfg.d_sae, cfg.k, cfg.apply_b_dec_to_input, cfg.input_norm, state.cfg.encoder_dtype


def groups(pairs: Sequence[tuple[SAE, TrainState]], n_tokens: int) -> list[list[int]]:
    """Places of the SAEs that are computed together, in order of the first of each group."""
    found: dict[object, list[list[int]]] = {}
    for i, (sae, state) in enumerate(pairs):
        key = shape_of(sae, state) if suits(sae, state) else i
        lists = found.setdefault(key, [[]])
        if len(lists[-1]) == width(n_tokens, sae.d_in):
            lists.append([])
        lists[-1].append(i)
    return sorted(group for lists in found.values() for group in lists)


def width(n_tokens: int, d_in: int) -> int:
    """SAEs in a stack, at least 1."""
    return max(1, STACK_BYTES // (4 * max(1, n_tokens) * d_in))


class _Entries(NamedTuple):
    """Codes of all SAEs, and their order by latent."""

    values_E: Tensor
    indices_E: Tensor
    """int64 latent in 0..G - 1."""
    offsets_M1: Tensor
    order_E: Tensor
    """Entries by (latent, token)."""
    rows_E: Tensor
    """int64 code 0..M - 1 of each entry in that order."""
    offsets_G1: Tensor

    @classmethod
    def of(cls, values_MK: Tensor, indices_MK: Tensor, n_latents: int) -> "_Entries":
        n_rows, k = values_MK.shape
        indices_E = indices_MK.reshape(-1)
        small = torch.int16 if n_latents <= 2**15 else torch.int32
        order_E = torch.sort(indices_E.to(small), stable=True).indices
        offsets_G1 = indices_E.new_zeros(n_latents + 1)
        torch.cumsum(torch.bincount(indices_E, minlength=n_latents), 0, out=offsets_G1[1:])
        rows_E = order_E.div(k, rounding_mode="floor")
        return cls(values_MK.reshape(-1), indices_E, torch.arange(n_rows + 1) * k, order_E, rows_E, offsets_G1)

    def by_latent(self, values_E: Tensor, source_MD: Tensor) -> Tensor:
        """``out[g] = sum of values[e] * source[code of e]`` over the entries of latent g: a weight gradient."""
        return ops._sum_entries(values_E[self.order_E], self.rows_E, self.offsets_G1, source_MD)


class Stack:
    """S SAEs whose weights lie side by side in memory; the parameters of each are views of them."""

    def __init__(self, saes: Sequence[SAE], states: Sequence[TrainState]) -> None:
        self.saes, self.states = list(saes), list(states)
        self.k = int(saes[0].cfg.k or 0)
        self.dtype = None if states[0].cfg.encoder_dtype == "float32" else torch.bfloat16
        if len(self.saes) > 1:
            for name, _ in saes[0].named_parameters():
                together = torch.stack([dict(sae.named_parameters())[name].detach() for sae in saes])
                for sae, part in zip(self.saes, together, strict=True):
                    dict(sae.named_parameters())[name].data = part

    def holds(self, saes: Sequence[SAE]) -> bool:
        """Whether it is the stack of these SAEs, and their weights still lie in it."""
        if [id(sae) for sae in self.saes] != [id(sae) for sae in saes]:
            return False
        if len(saes) == 1:
            return True
        for name, first in saes[0].named_parameters():
            step = first.numel() * first.element_size()
            where = [getattr(sae, name).data_ptr() - first.data_ptr() for sae in saes]
            if where != [i * step for i in range(len(saes))]:
                return False
        return True

    def _all(self, name: str) -> Tensor:
        """[G, ...]: the parameters of that name of all SAEs, in one piece."""
        first: Tensor = getattr(self.saes[0], name).detach()
        shape = len(self.saes) * first.shape[0], *first.shape[1:]
        return first.as_strided(shape, first.stride())

    @torch.no_grad()
    def step_losses(self, n_ND: Tensor) -> list[StepLoss]:
        """Losses of all SAEs on normalised inputs; gradients are left in ``grad`` of their parameters."""
        n_saes, n_tokens, n_latents = len(self.saes), len(n_ND), self.saes[0].d_sae
        u_MD, codes_MK, indices_MK = self._encode(n_ND)
        found = _Entries.of(codes_MK, indices_MK, n_saes * n_latents)
        W_dec_GD = self._all("W_dec_FD")
        leaf_E = found.values_E.detach().requires_grad_()
        with torch.enable_grad():  # for the gradient of a bag's weights, the fastest sampled product on a CPU
            bags_MD = ops._sum_entries(leaf_E, found.indices_E, found.offsets_M1, W_dec_GD)
        y_SND = bags_MD.detach().view(n_saes, *n_ND.shape).add_(self._all("b_dec_D").view(n_saes, 1, -1))
        logged = any(state.logged for state in self.states)  # else nobody reads y, and r takes its place
        residual_SND = torch.sub(n_ND, y_SND, out=torch.empty_like(y_SND) if logged else y_SND)
        # d mse / d y = -2 r / (N v0), rounded as autograd does
        scale_S = torch.stack([torch.ones(()) / (max(n_tokens, 1) * state.v0) for state in self.states])
        grad_SND = residual_SND * (-2.0 * scale_S)[:, None, None]
        grad_MD = grad_SND.view(bags_MD.shape)
        (slots_E,) = torch.autograd.grad(bags_MD, leaf_E, grad_MD)
        slots_E = torch.where(found.values_E > 0, slots_E, 0.0)
        grad_b_GF = torch.zeros(n_saes * n_latents).index_add_(0, found.indices_E, slots_E)
        grad_dec = found.by_latent(found.values_E, grad_MD).view(n_saes, n_latents, -1)
        grad_enc = found.by_latent(slots_E, u_MD).view(n_saes, n_latents, -1)
        results = []
        for s, (sae, state) in enumerate(zip(self.saes, self.states, strict=True)):
            grad_b_F = grad_b_GF[s * n_latents : (s + 1) * n_latents]
            sae.W_enc_FD.grad, sae.W_dec_FD.grad, sae.b_enc_F.grad = grad_enc[s], grad_dec[s], grad_b_F
            pre_D = None if sae.b_pre_D is None else -(grad_b_F @ sae.W_enc_FD)
            rows = slice(s * n_tokens, (s + 1) * n_tokens)
            slots = ops.SparseLatents(codes_MK[rows], indices_MK[rows] - s * n_latents)
            results.append(_finish(sae, state, n_ND, residual_SND[s], y_SND[s], slots, (grad_SND[s].sum(0), pre_D)))
        return results

    def _encode(self, n_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(u_MD, values_MK, indices_MK), indices in 0..G - 1."""
        n_tokens, n_latents, n_saes = len(n_ND), self.saes[0].d_sae, len(self.saes)
        u_SND = n_ND.expand(n_saes, *n_ND.shape)
        if self.saes[0].b_pre_D is not None:
            u_SND = n_ND - self._all("b_dec_D").view(n_saes, 1, -1)
        values_MK = n_ND.new_empty(n_saes * n_tokens, self.k)
        indices_MK = torch.empty(n_saes * n_tokens, self.k, dtype=torch.int64)
        exact = self.dtype is None
        if n_saes == 1:
            for h_nF, rows in ops._blocks(u_SND[0], self.saes[0].W_enc_FD, self.saes[0].b_enc_F, self.dtype):
                values_MK[rows], indices_MK[rows] = ops.topk(h_nF, self.k, exact=exact)
            return u_SND[0], values_MK, indices_MK
        # One selection for many: a block has the tokens of as many SAEs as it has room for.
        room = min(n_saes, max(1, ops.block_rows(n_latents) // max(1, n_tokens)))
        buffer_RNF = n_ND.new_empty(room, n_tokens, n_latents)
        for first in range(0, n_saes, room):
            block_RNF = buffer_RNF[: n_saes - first]
            for h_NF, u_ND, sae in zip(block_RNF, u_SND[first:], self.saes[first:], strict=False):
                W_FD, b_F, kind = sae.W_enc_FD, sae.b_enc_F, self.dtype or torch.float32
                ops_cpu.product(u_ND.to(kind), W_FD.to(kind), b_F.to(kind), h_NF)
            rows = slice(first * n_tokens, (first + len(block_RNF)) * n_tokens)
            values_MK[rows], indices_MK[rows] = ops.topk(block_RNF.view(-1, n_latents), self.k, exact=exact)
        indices_MK.view(n_saes, -1).add_(torch.arange(n_saes)[:, None] * n_latents)
        return u_SND.reshape(-1, n_ND.shape[1]), values_MK, indices_MK


def _finish(
    sae: SAE, state: TrainState, n_ND: Tensor, residual_ND: Tensor, y_ND: Tensor, slots: ops.SparseLatents,
    bias_gradients: tuple[Tensor, Tensor | None],
) -> StepLoss:  # fmt: skip
    """Loss, auxiliary loss and figures of one SAE; the gradient of its decoder bias, whose parts are given."""
    n_tokens, aux, aux_active = len(n_ND), n_ND.new_zeros(()), 0.0
    mse = losses.normalised_mse(residual_ND, state.v0)
    total, (grad_D, pre_D) = mse, bias_gradients
    may_die = state.cfg.aux_alpha > 0 and state.tokens + n_tokens > state.cfg.dead_tokens
    dead_F = state.dead_F
    if may_die and bool(dead_F.any()):
        aux, aux_active, grad_aux_D = _auxiliary(sae, state, n_ND, residual_ND, dead_F)
        total = total + aux
        # Autograd adds the parts of a shared parameter in this order, and sums of three depend on it.
        grad_D = grad_D if grad_aux_D is None else grad_aux_D + grad_D
    sae.b_dec_D.grad = grad_D if pre_D is None else grad_D + pre_D
    values_NK, indices_NK = slots
    fired_F = torch.zeros(sae.d_sae, dtype=torch.bool)
    fired_F[indices_NK[values_NK > state.fire_eps]] = True
    return StepLoss(
        total=total, mse=mse, aux=aux, sparsity=mse.new_zeros(()), y_ND=y_ND if state.logged else None,
        fired_F=fired_F, l0=float((values_NK > 0).sum()) / max(n_tokens, 1),
        v_e=float(losses.variance(residual_ND)) if may_die else 0.0, aux_active=aux_active,
    )  # fmt: skip


def _auxiliary(
    sae: SAE, state: TrainState, n_ND: Tensor, residual_ND: Tensor, dead_F: Tensor
) -> tuple[Tensor, float, Tensor | None]:
    """(weighted loss, mean active, gradient of the pre-bias); the other gradients are added where they belong."""
    parameters = [sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD] + ([sae.b_dec_D] if sae.b_pre_D is not None else [])
    with torch.enable_grad():
        found = losses.aux_k(
            residual_ND, n_ND, sae.b_pre_D, sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, dead_F, state.cfg.aux_k,
            float(state.v_e),
        )  # fmt: skip
        loss = state.cfg.aux_alpha * found.loss
    if not loss.requires_grad:
        return loss, found.active, None
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters[:3], gradients, strict=False):
        assert parameter.grad is not None
        parameter.grad = gradient + parameter.grad
    return loss.detach(), found.active, gradients[3] if sae.b_pre_D is not None else None
