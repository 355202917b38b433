"""One rank's share of an SAE in training: its latents, and the loss of its tokens (TRAINING 9).

Shapes: N tokens of this rank, M of the global batch, D = d_in, F = latents of this rank, R latent ranks, E entries. The
module is the architecture's own class with the configuration of the whole SAE and the tensors of this rank's latents:
latent f of latent rank r is number ``f * R + r``. The reconstruction is summed over latent ranks and so the same on all
of them; losses are sums over this rank's tokens divided by M, so that gradients are summed over data ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae import calibrate, losses, ops, ops_above, optim
from sae.base import B_DEC_SAMPLE_TOKENS, SAE, TrainState
from sae.config import SAEConfig
from sae.distributed_cost import candidates
from sae.distributed_mesh import Mesh
from sae.manifest import seed_of
from sae.plugins import find
from sae.sharded_select import count_all, pick_batch, pick_largest, threshold_between

ROWS_AT_ONCE = 4_096
"""Rows of the starting decoder that are drawn at once; a multiple of 16, the block of torch's generator."""


def per_latent(name: str) -> bool:
    """Whether a tensor of this name has a row per latent: the letters after the last underscore say so."""
    return name.rpartition("_")[2] in ("F", "FD")


def local_module(cfg: SAEConfig, mesh: Mesh) -> SAE:
    """The architecture's module with zeros for this rank's latents; the whole is never in memory."""
    with torch.device("meta"):
        sae: SAE = find("sae.architectures", cfg.architecture)(cfg)

    def fresh(name: str, like: Tensor) -> Tensor:
        rows = (like.shape[0] // mesh.shape.latent, *like.shape[1:]) if per_latent(name) else like.shape
        return torch.zeros(rows, dtype=like.dtype, device=mesh.device)

    for name, parameter in list(sae.named_parameters()):
        setattr(sae, name, nn.Parameter(fresh(name, parameter)))
    for name, buffer in list(sae.named_buffers()):
        setattr(sae, name, fresh(name, buffer))
    return sae


def numbers(sae: SAE, mesh: Mesh, latents: Tensor) -> Tensor:
    """Numbers in the whole SAE of latents of this rank."""
    return latents * mesh.shape.latent + mesh.latent_rank


# -- starting weights -------------------------------------------------------------------------------------------------
@torch.no_grad()
def initialise(sae: SAE, n_ND: Tensor, seed: int, mesh: Mesh) -> None:
    """The weights that :meth:`sae.base.SAE.initialise` gives the whole SAE; ``n_ND``: the same sample on all ranks."""
    sae.b_dec_D.copy_(optim.geometric_median(n_ND[:B_DEC_SAMPLE_TOKENS]))
    sae.W_dec_FD.copy_(unit_rows(sae, seed_of("sae-init", seed), mesh))
    sae.W_enc_FD.copy_(sae.W_dec_FD)
    sae.b_enc_F.zero_()
    kind, many = sae.cfg.architecture, n_ND[:4096]
    if kind in ("batchtopk", "matryoshka", "jumprelu"):
        h_nF = calibrate.sample_pre_activations(sae, n_ND)
        found = threshold_between(h_nF.view(-1), int(sae.k) * len(h_nF), mesh)  # type: ignore[arg-type]
        sae.threshold_F.fill_(found)  # type: ignore[operator]
    elif kind == "gated":
        from sae.architectures.gated import START_DENSITY as OPEN

        h_nF = calibrate.sample_pre_activations(sae, n_ND)
        count = max(1, round(OPEN * h_nF.numel() * mesh.shape.latent))
        sae.b_enc_F.sub_(threshold_between(h_nF.view(-1), count, mesh))
    _scale_encoder(sae, many, mesh)
    if kind == "relu":
        from sae.relu_code import QUANTILE_ENTRIES, START_DENSITY

        sample_nD = n_ND[: max(1, QUANTILE_ENTRIES // sae.d_sae)][:1024]
        h_nF = ops.encode_dense(sample_nD, sae.b_pre_D, sae.W_enc_FD, sae.b_enc_F)
        kept = max(1, round(START_DENSITY * h_nF.numel() * mesh.shape.latent))
        best = torch.topk(h_nF.view(-1), min(kept, h_nF.numel())).values
        sae.b_enc_F.sub_(torch.topk(mesh.gather(best, "latent").view(-1), kept).values[-1].clamp_min(0))
        _scale_encoder(sae, many, mesh)
    elif kind == "jumprelu":
        from sae.jump_code import BANDWIDTH

        sae.bandwidth.fill_(BANDWIDTH * _std(calibrate.sample_pre_activations(sae, n_ND), mesh))  # type: ignore[operator]
    for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
        mesh.copy_from_first_(tensor.detach(), "data" if per_latent(name) else "world")


def unit_rows(sae: SAE, seed: int, mesh: Mesh) -> Tensor:
    """This rank's rows of :func:`sae.optim.unit_rows`, drawn in blocks: the whole is never in memory.

    The stream of normal numbers does not depend on how it is cut at multiples of 16 numbers, except at its very end.
    """
    ranks, rank, width = mesh.shape.latent, mesh.latent_rank, sae.W_dec_FD.shape[1]
    if sae.d_sae * width % 16:
        return optim.unit_rows(sae.d_sae, width, seed)[rank::ranks].to(mesh.device)
    generator = torch.Generator().manual_seed(seed)
    found_FD = torch.empty(sae.d_sae // ranks, width)
    for start in range(0, sae.d_sae, ROWS_AT_ONCE):
        block = optim.normalise_rows_(torch.randn(min(ROWS_AT_ONCE, sae.d_sae - start), width, generator=generator))
        first = (rank - start) % ranks
        mine = block[first::ranks]
        at = (start + first - rank) // ranks
        found_FD[at : at + len(mine)] = mine
    return found_FD.to(mesh.device)


def _std(h_nF: Tensor, mesh: Mesh) -> float:
    """Unbiased standard deviation over all latent ranks, sums in float64."""
    h = h_nF.double()
    n = h.numel() * mesh.shape.latent
    mean = mesh.reduce_(h.sum(), "latent") / n
    return float((mesh.reduce_((h - mean).square().sum(), "latent") / max(n - 1, 1)).sqrt())


def _scale_encoder(sae: SAE, n_ND: Tensor, mesh: Mesh) -> None:
    """As :meth:`sae.base.SAE._scale_encoder`, for a sample that all ranks hold."""
    if sae.activation == "topk":
        entries = _topk(sae, n_ND, sae.b_pre_D, (sae.k,), None, mesh)[0][0]  # type: ignore[arg-type]
    else:
        entries = sae.encode_entries(n_ND)
    y_ND = mesh.summed(ops.decode_entries(entries, sae.W_dec_FD), "latent")
    target_ND = n_ND - sae.b_dec_D
    power = float(y_ND.double().square().sum())
    factor = float((y_ND.double() * target_ND.double()).sum()) / power if power > 0 else 1.0
    if factor > 0:
        sae.scale_codes_(factor)


# -- the loss ---------------------------------------------------------------------------------------------------------
class Step(NamedTuple):
    """What a loss must know beside the weights."""

    state: TrainState
    """Counters of this rank's latents; ``n_dead_late`` is the number of dead latents of all ranks."""
    mesh: Mesh
    n_tokens: int
    """M, tokens of the global batch."""
    capacity: float | None
    """See :func:`sae.distributed_cost.candidates`."""

    def mse(self, residual_ND: Tensor) -> Tensor:
        """This rank's tokens' part of :func:`sae.losses.normalised_mse`."""
        return residual_ND.square().sum() / (self.n_tokens * self.state.v0)


class Code(NamedTuple):
    """What an architecture's loss consists of on this rank, without the auxiliary loss."""

    entries: ops.Entries
    """Codes of this rank's latents."""
    mse: Tensor
    """This data rank's part of the reconstruction loss, the same on all its latent ranks."""
    residual_ND: Tensor
    y_ND: Tensor
    sparsity: Tensor
    """What of the penalty this rank differentiates."""
    sparsity_share: Tensor
    """What of it this rank reports: the sum over all ranks is the penalty."""
    overflow: Tensor


class ShardLoss(NamedTuple):
    """Loss of one rank."""

    total: Tensor
    """Scalar to differentiate."""
    code: Code
    aux: Tensor
    """This data rank's part of the weighted auxiliary loss, the same on all its latent ranks."""
    aux_active: int
    """Dead latents of this rank with a positive value, counted over tokens."""
    overflow: Tensor


def training_loss(sae: SAE, n_ND: Tensor, step: Step) -> ShardLoss:
    """Loss of one batch; gradients of the pre-bias are whole, those of all parameters still want the sum over data."""
    mesh = step.mesh
    pre_D = mesh.shared(sae.b_dec_D, "latent") if sae.cfg.apply_b_dec_to_input else None
    code = _CODES[sae.cfg.architecture](sae, n_ND, pre_D, step)
    total, aux, active, overflow = code.mse + code.sparsity, code.mse.new_zeros(()), 0, code.overflow
    if sae.cfg.architecture != "relu" and step.state.cfg.aux_alpha > 0 and step.state.n_dead_late > 0:
        loss, active, lost = _aux(sae, n_ND, pre_D, code.residual_ND, step)
        aux = step.state.cfg.aux_alpha * loss
        total, overflow = total + aux, overflow + lost
    return ShardLoss(total, code, aux.detach(), active, overflow)


def _topk(
    sae: SAE, n_ND: Tensor, pre_D: Tensor | None, ks: tuple[int, ...], capacity: float | None, mesh: Mesh,
    dtype: torch.dtype | None = None,
) -> tuple[list[ops.Entries], Tensor]:  # fmt: skip
    """The ks[0] largest latents of each token, those that the ks[1] largest add, and so on; and the overflow."""
    width = len(sae.W_enc_FD)
    sent = candidates(ks[-1], mesh.shape.latent, width, capacity)
    values_Nk, latents_Nk = ops.encode_topk(n_ND, pre_D, sae.W_enc_FD, sae.b_enc_F, sent, dtype=dtype)
    order_Nk = numbers(sae, mesh, latents_Nk)
    slots = ops.entries_of(ops.SparseLatents(values_Nk, latents_Nk))
    parts, before_Nk = [], torch.zeros_like(latents_Nk, dtype=torch.bool)
    found = pick_largest(values_Nk.detach(), order_Nk, ks, width, mesh)
    for picked in found:
        parts.append(ops_above.kept(slots, (picked.keep_Nk & ~before_Nk).view(-1)))
        before_Nk = picked.keep_Nk
    return parts, found[-1].overflow


def _decode(sae: SAE, entries: ops.Entries, mesh: Mesh) -> Tensor:
    """Reconstruction without bias, summed over latent ranks."""
    return mesh.summed(ops.decode_entries(entries, sae.W_dec_FD), "latent")


def _plain(sae: SAE, n_ND: Tensor, entries: ops.Entries, step: Step, **more: Tensor) -> Code:
    """One reconstruction, one squared error."""
    y_ND = _decode(sae, entries, step.mesh) + sae.b_dec_D
    residual_ND = n_ND - y_ND
    zero = n_ND.new_zeros(())
    rest = {"sparsity": zero, "sparsity_share": zero, "overflow": zero.long()} | more
    return Code(entries, step.mse(residual_ND), residual_ND, y_ND, **rest)


def _topk_code(sae: Any, n_ND: Tensor, pre_D: Tensor | None, step: Step) -> Code:
    from sae.architectures.topk import MULTI_FACTOR, MULTI_WEIGHT, product_type

    dtype = product_type(step.state)
    if not step.state.cfg.multi_topk:
        (entries,), overflow = _topk(sae, n_ND, pre_D, (sae.k,), step.capacity, step.mesh, dtype)
        return _plain(sae, n_ND, entries, step, overflow=overflow)
    ks = (sae.k, MULTI_FACTOR * sae.k)
    (entries, rest), overflow = _topk(sae, n_ND, pre_D, ks, step.capacity, step.mesh, dtype)
    code = _plain(sae, n_ND, entries, step, overflow=overflow)
    wide_residual_ND = code.residual_ND - _decode(sae, rest, step.mesh)
    return code._replace(mse=code.mse + MULTI_WEIGHT * step.mse(wide_residual_ND))


def _batch_entries(sae: Any, n_ND: Tensor, pre_D: Tensor | None, step: Step) -> ops.Entries:
    """The K M largest of the global batch: data ranks share one threshold, as the batch is one."""
    mesh, count = step.mesh, sae.k * step.n_tokens
    expected = float(sae.threshold_F[0]) if sae._theta is None else sae._theta
    dtype = ops_above._operands(n_ND)
    from sae.threshold import SHARE_BELOW

    bar = SHARE_BELOW * expected
    for tried in (max(bar, 0.0), max(bar * ops_above.LOWER_BAR, 0.0), 0.0):
        found = ops.encode_threshold(n_ND, pre_D, sae.W_enc_FD, sae.b_enc_F, tried, dtype=dtype)
        n_all = count_all(len(found.values_E), mesh)
        if n_all >= count or tried == 0.0:
            break
    first = mesh.part(step.n_tokens).start
    places_E = (ops._tokens_of(found.offsets_N1) + first) * sae.d_sae + numbers(sae, mesh, found.indices_E)
    cut = pick_batch(found.values_E, places_E, count, n_all, mesh)
    sae._theta = cut.theta
    return ops_above.kept(found, cut.keep_E)


def _batchtopk_code(sae: Any, n_ND: Tensor, pre_D: Tensor | None, step: Step) -> Code:
    return _plain(sae, n_ND, _batch_entries(sae, n_ND, pre_D, step), step)


def _matryoshka_code(sae: Any, n_ND: Tensor, pre_D: Tensor | None, step: Step) -> Code:
    entries = _batch_entries(sae, n_ND, pre_D, step)
    number_E = numbers(sae, step.mesh, entries.indices_E)
    y_ND, mse, first = sae.b_dec_D, n_ND.new_zeros(()), 0
    for size in sae.group_sizes:
        group = ops_above.kept(entries, (number_E >= first) & (number_E < first + size))
        y_ND = y_ND + _decode(sae, group, step.mesh)
        residual_ND = n_ND - y_ND
        mse = mse + step.mse(residual_ND) / len(sae.group_sizes)
        first += size
    zero = n_ND.new_zeros(())
    return Code(entries, mse, residual_ND, y_ND, zero, zero, zero.long())


def _relu_code(sae: Any, n_ND: Tensor, pre_D: Tensor | None, step: Step) -> Code:
    state = step.state
    entries = ops.encode_relu(n_ND, pre_D, sae.W_enc_FD, sae.b_enc_F)
    weighted_E = entries.values_E
    if not sae.cfg.decoder_unit_norm:
        weighted_E = weighted_E * torch.linalg.vector_norm(sae.W_dec_FD, dim=1).index_select(0, entries.indices_E)
    penalty = state.sparsity_ramp * state.cfg.l1 * losses.l1(weighted_E, step.n_tokens, state.input_rms_norm)
    return _plain(sae, n_ND, entries, step, sparsity=penalty, sparsity_share=penalty.detach())


def _jumprelu_code(sae: Any, n_ND: Tensor, pre_D: Tensor | None, step: Step) -> Code:
    state, mesh = step.state, step.mesh
    found = ops_above.encode_jump(n_ND, pre_D, sae.W_enc_FD, sae.b_enc_F, sae.threshold_F, float(sae.bandwidth))
    l0 = mesh.summed(found.l0 * (len(n_ND) / step.n_tokens), "world")
    penalty = state.sparsity_ramp * state.cfg.l0_weight * (l0 / sae.k - 1).square()
    share = penalty.detach() / mesh.shape.world
    return _plain(sae, n_ND, found.entries, step, sparsity=penalty, sparsity_share=share)


def _gated_code(sae: Any, n_ND: Tensor, pre_D: Tensor | None, step: Step) -> Code:
    state = step.state
    gates = ops.encode_relu(n_ND, pre_D, sae.W_enc_FD, sae.b_enc_F)
    penalty = state.sparsity_ramp * state.cfg.gate_l1 * losses.l1(gates.values_E, step.n_tokens, state.input_rms_norm)
    by_gates_ND = step.mesh.summed(ops.decode_entries(gates, sae.W_dec_FD.detach()), "latent") + sae.b_dec_D.detach()
    entries = sae.magnitudes(gates)
    code = _plain(sae, n_ND, entries, step, sparsity=penalty, sparsity_share=penalty.detach())
    return code._replace(mse=code.mse + step.mse(n_ND - by_gates_ND))


_CODES: dict[str, Callable[[SAE, Tensor, Tensor | None, Step], Code]] = {
    "topk": _topk_code, "batchtopk": _batchtopk_code, "matryoshka": _matryoshka_code, "relu": _relu_code,
    "jumprelu": _jumprelu_code, "gated": _gated_code,
}  # fmt: skip


def _aux(sae: SAE, n_ND: Tensor, pre_D: Tensor | None, residual_ND: Tensor, step: Step) -> tuple[Tensor, int, Tensor]:
    """:func:`sae.losses.aux_k` over all latent ranks: (loss of this rank's tokens, positives here, overflow)."""
    state, mesh = step.state, step.mesh
    overflow = torch.zeros((), dtype=torch.int64, device=n_ND.device)
    v_e = float(state.v_e)
    if not v_e > 0:
        return n_ND.new_zeros(()), 0, overflow
    dead_d = state.dead_F.nonzero().squeeze(1)
    z_Nd = n_ND.new_zeros(len(n_ND), 0)
    if len(dead_d):
        z_Nd = ops.encode_dense(n_ND, pre_D, sae.W_enc_FD[dead_d], sae.b_enc_F[dead_d]).relu()
    k_aux = state.cfg.aux_k
    if k_aux < state.n_dead_late:
        sent = candidates(k_aux, mesh.shape.latent, len(sae.W_enc_FD), step.capacity)
        here = min(sent, len(dead_d))  # other ranks may have fewer or more; all send as many slots
        best = torch.topk(z_Nd.detach(), here, dim=1, sorted=False)
        values_Nk = torch.nn.functional.pad(best.values, (0, sent - here))
        order_Nk = torch.nn.functional.pad(numbers(sae, mesh, dead_d)[best.indices], (0, sent - here))
        (picked,) = pick_largest(values_Nk, order_Nk, (k_aux,), len(sae.W_enc_FD), mesh)
        overflow = picked.overflow
        kept_Nk = picked.keep_Nk[:, :here].to(z_Nd.dtype)
        z_Nd = z_Nd * torch.zeros_like(z_Nd).scatter_(1, best.indices, kept_Nk)
    difference_ND = mesh.summed(z_Nd @ sae.W_dec_FD[dead_d], "latent") - residual_ND.detach()
    loss = difference_ND.square().sum() / (step.n_tokens * v_e)
    return loss if bool(torch.isfinite(loss)) else loss.new_zeros(()), int((z_Nd.detach() > 0).sum()), overflow
