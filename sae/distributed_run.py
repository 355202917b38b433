"""One SAE in training on a mesh: start, step, log. The order of a step is that of :func:`sae.train_run.step`.

Shapes: N tokens of this rank, M of the global batch, D = d_in, F = latents of this rank.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae import ops_fused, optim, sharded
from sae.base import NormStats, StepLoss, TrainState
from sae.config import SAEConfig, SubjectMeta, TrainConfig
from sae.distributed_cost import CAPACITY
from sae.distributed_mesh import Mesh
from sae.metric_log import MetricLog
from sae.plugins import find
from sae.train_run import (
    L1_RAMP_SHARE,
    LOG_EVERY_STEPS,
    ROWS_PER_RUN,
    Run,
    Store,
    identity,
    input_norm,
    start_variance,
)

SUMS = ("mse", "aux", "squares", "overflow", "sparsity", "active", "aux_active", "spare")
"""Figures of a step summed over all ranks. The first four are the same on all latent ranks, of which the first alone
gives them; the others are of each rank's own latents."""


class Silent(MetricLog):
    """The log of a rank that writes none."""

    def __init__(self) -> None: ...

    def write(self, row: object) -> None: ...

    def restore(self, text: str) -> None: ...

    def close(self) -> None: ...


def start(
    cfg: TrainConfig, meta: SubjectMeta, key: str, folder: Path, store: Store, sample_ND: Tensor, log: MetricLog,
    mesh: Mesh,
) -> Run:  # fmt: skip
    """This rank's share of a run at step 0; ``sample_ND``: raw activations, the same on all ranks.

    ``DataError`` for a sample that is not finite or has no variance.
    """
    decided = {"apply_b_dec_to_input": True} | find("sae.architectures", cfg.architecture).cfg_fields(cfg)
    sae = sharded.local_module(
        SAEConfig(
            architecture=cfg.architecture, d_in=store.d_in, d_out=store.d_in, d_sae=cfg.d_sae,
            input_norm=input_norm(cfg, sample_ND), sae_id=folder.name, meta=meta, train_tokens=None, train_steps=None,
            seed=cfg.seed, train=identity(cfg), **decided,
        ),
        mesh,
    )  # fmt: skip
    n_ND, _ = sae.normalise(sample_ND)
    v0 = start_variance(n_ND, sample_ND, folder.name, store.key)
    sharded.initialise(sae, n_ND, cfg.seed, mesh)
    if cfg.encoder_scale != 1:
        sae.scale_codes_(cfg.encoder_scale)
    state = TrainState(
        cfg=cfg, v0=v0, input_rms_norm=float(n_ND.double().square().sum(1).mean().sqrt()), d_in=store.d_in,
        last_fired_tokens_F=torch.zeros(len(sae.W_enc_FD), dtype=torch.int64, device=mesh.device),
    )  # fmt: skip
    average = optim.Average(dict(sae.named_parameters()), cfg.ema_decay) if cfg.ema_decay > 0 else None
    return Run(
        cfg=cfg, sae=sae, key=key, folder=folder, state=state, optimiser=optim.adam(sae.parameter_groups(), cfg),
        log=log, n_steps=max(1, cfg.train_tokens // cfg.batch_tokens), store=store, average=average,
    )  # fmt: skip


def count_dead(run: Run, mesh: Mesh) -> None:
    """``n_dead_late``: dead latents of all ranks, at the end of the last step."""
    run.state.n_dead_late = int(mesh.reduce_(run.state.dead_F.sum(), "latent"))


def step(run: Run, x_ND: Tensor, mesh: Mesh, capacity: float | None = CAPACITY) -> None:
    """One optimiser step. ``x_ND``: raw activations of this data rank, an equal share of the global batch."""
    started = time.monotonic()
    sae, cfg, state = run.sae, run.cfg, run.state
    n_tokens = len(x_ND) * mesh.shape.data
    rate = optim.full_rate(cfg) * optim.lr_factor(run.step, run.n_steps, cfg.lr_warmup_steps, cfg.lr_decay_share)
    state.sparsity_ramp = optim.ramp(run.step, run.n_steps, L1_RAMP_SHARE)
    every = max(1, min(LOG_EVERY_STEPS, run.n_steps // ROWS_PER_RUN))
    state.logged = run.step % every == 0 or run.step == run.n_steps - 1
    n_ND, stats = sae.normalise(x_ND)
    found = sharded.training_loss(sae, n_ND, sharded.Step(state, mesh, n_tokens, capacity))
    figures = _figures(found, n_tokens, mesh)
    if not math.isfinite(figures.total):
        run.failure = f"the loss is {figures.total} at step {run.step + 1} of {run.n_steps}"
        return
    found.total.backward()
    mesh.reduce_all_([p.grad for p in sae.parameters() if p.grad is not None], "data")
    unit = sae.cfg.decoder_unit_norm
    if unit:
        assert sae.W_dec_FD.grad is not None
        ops_fused.project_gradient_(sae.W_dec_FD.grad, sae.W_dec_FD)
    norm = gradient_norm(run, mesh) if state.logged or cfg.grad_clip is not None else None
    gradients = [p.grad for p in sae.parameters() if p.grad is not None]
    if cfg.grad_clip is not None and norm is not None:
        torch._foreach_mul_(gradients, torch.where(norm > cfg.grad_clip, cfg.grad_clip / norm, torch.ones_like(norm)))
    for group in run.optimiser.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    run.optimiser.step()
    if unit:
        ops_fused.unit_rows_(sae.W_dec_FD)
    sae.constrain_()
    run.optimiser.zero_grad(set_to_none=True)
    if run.average is not None:
        run.average.update(dict(sae.named_parameters()))
    state.after_step(n_tokens, _step_loss(run, found, figures, mesh))
    run.step += 1
    count_dead(run, mesh)
    run.seconds += time.monotonic() - started
    if state.logged:
        _log(run, found, figures, (x_ND, stats), rate, norm, mesh)


def gradient_norm(run: Run, mesh: Mesh) -> Tensor:
    """Global norm of the whole SAE's gradient: parameters that all latent ranks hold are counted once."""
    squares = {True: [], False: []}  # type: dict[bool, list[Tensor]]
    for name, parameter in run.sae.named_parameters():
        if parameter.grad is not None:
            squares[sharded.per_latent(name)].append(parameter.grad.square().sum())
    own = mesh.reduce_(torch.stack(squares[True]).sum(), "latent")
    return (own + sum(squares[False])).sqrt()


class Figures(NamedTuple):
    """Of one step, over the global batch and all latents."""

    total: float
    mse: float
    aux: float
    sparsity: float
    l0: float
    v_e: float
    aux_active: float
    overflow: int


@torch.no_grad()
def _figures(found: sharded.ShardLoss, n_tokens: int, mesh: Mesh) -> Figures:
    """One all-reduce of float64 numbers and the mean error, from which the variance of the error follows."""
    code, error_ND = found.code, found.code.residual_ND
    zero = code.mse.new_zeros(())
    once = [code.mse, found.aux, error_ND.square().sum(1).double().sum(), found.overflow.to(zero)]
    own = [code.sparsity_share, (code.entries.values_E > 0).sum(), zero + found.aux_active, zero]
    mean_D = error_ND.double().sum(0) / n_tokens
    if mesh.latent_rank:
        once, mean_D = [zero] * len(once), torch.zeros_like(mean_D)
    packed = torch.cat([torch.stack([figure.double() for figure in once + own]), mean_D])
    mesh.reduce_(packed, "world")
    got = dict(zip(SUMS, packed[: len(SUMS)].tolist(), strict=True))
    v_e = max(0.0, got["squares"] / n_tokens - float(packed[len(SUMS) :].square().sum()))
    return Figures(
        total=got["mse"] + got["aux"] + got["sparsity"], mse=got["mse"], aux=got["aux"], sparsity=got["sparsity"],
        l0=got["active"] / n_tokens, v_e=v_e, aux_active=got["aux_active"] / n_tokens, overflow=int(got["overflow"]),
    )  # fmt: skip


@torch.no_grad()
def _step_loss(run: Run, found: sharded.ShardLoss, figures: Figures, mesh: Mesh) -> StepLoss:
    """What the counters read of a step: a latent fired if it did on any data rank."""
    values_E, entries = found.code.entries.values_E.detach(), found.code.entries
    fired_F = torch.zeros(len(run.sae.W_enc_FD), dtype=torch.uint8, device=mesh.device)
    fired_F[entries.indices_E[values_E > run.state.fire_eps]] = 1
    mesh.reduce_(fired_F, "data", "max")
    as_is = torch.tensor(figures[:4], dtype=torch.float64)
    return StepLoss(
        total=as_is[0], mse=as_is[1], aux=as_is[2], sparsity=as_is[3], y_ND=None, fired_F=fired_F.bool(),
        l0=figures.l0, v_e=figures.v_e, aux_active=figures.aux_active,
    )  # fmt: skip


@torch.no_grad()
def _log(
    run: Run, found: sharded.ShardLoss, figures: Figures, batch: tuple[Tensor, NormStats], rate: float,
    norm: Tensor | None, mesh: Mesh,
) -> None:  # fmt: skip
    x_ND, stats = batch
    state, sae = run.state, run.sae
    batch_fvu = _fvu(x_ND, sae.denormalise(found.code.y_ND, stats), mesh)
    error = (torch.linalg.vector_norm(sae.W_dec_FD.detach(), dim=1) - 1).abs().max()
    run.last = {
        "step": run.step, "tokens": state.tokens, "seconds": round(run.seconds, 3),
        "tokens_per_s": round(state.tokens / max(run.seconds, 1e-9)), "loss": figures.total, "mse": figures.mse,
        "aux": figures.aux, "sparsity": figures.sparsity, "fvu": batch_fvu, "l0": figures.l0,
        "n_dead": state.n_dead_late, "aux_active": figures.aux_active, "lr": rate,
        "grad_norm": 0.0 if norm is None else float(norm),
        "decoder_row_error": float(mesh.reduce_(error, "latent", "max")),
        "capacity_overflow": figures.overflow, "mesh": str(mesh.shape),
    }  # fmt: skip
    run.log.write(run.last)
    fvu_text = "-" if batch_fvu is None else f"{batch_fvu:.3f}"
    run.note = (
        f"{run.cfg.architecture}: loss {figures.total:.3f} FVU {fvu_text} L0 {figures.l0:.0f} dead {state.n_dead_late}"
    )


def _fvu(x_ND: Tensor, x_hat_ND: Tensor, mesh: Mesh) -> float | None:
    """:func:`sae.metrics.fvu` of the global batch."""
    x, x_hat = x_ND.double(), x_hat_ND.double()
    mean_D = mesh.reduce_(x.sum(0), "data") / (len(x) * mesh.shape.data)
    sums = mesh.reduce_(torch.stack([(x - x_hat).square().sum(), (x - mean_D).square().sum()]), "data").tolist()
    return sums[0] / sums[1] if sums[1] > 0 and math.isfinite(sums[0]) else None
