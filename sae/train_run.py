"""One SAE in training: start, step, log, finish (TRAINING 4, 6, 7). The stream that feeds it is in :mod:`sae.train`.

Shapes: N tokens of one batch, D = d_in, F = d_sae.
"""

import copy
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sae import checkpoint, losses, manifest, metrics, ops_fused, optim, stacked_step
from sae.base import SAE, NormStats, StepLoss, TrainState
from sae.config import InputNorm, SAEConfig, SubjectMeta, TrainConfig, to_dict
from sae.errors import DataError
from sae.lagged import Lagged
from sae.metric_log import MetricLog
from sae.plugins import find
from sae.row_adam import RowAdam

STAGE_VERSION = 2
FIRST_FIELDS = frozenset(
    "architecture d_sae k l1 lr lr_warmup_steps lr_decay_share batch_tokens train_tokens input_norm aux_alpha aux_k "
    "dead_tokens adam_eps seed".split()
)
"""Fields of TrainConfig that stage version 2 began with."""
L1_RAMP_SHARE = 0.05
"""Share of the run over which the sparsity coefficient rises from 0."""
ROWS_PER_RUN = 20
LOG_EVERY_STEPS = 100
FINAL_TOKENS = 8_192
"""Tokens on which averaged and raw weights are compared at the end."""


class Store(Protocol):
    """What training needs of ``sae.activations.ActivationStore``."""

    @property
    def key(self) -> str: ...

    @property
    def d_in(self) -> int: ...

    @property
    def n_kept(self) -> int: ...

    @property
    def kept_N(self) -> np.ndarray: ...

    def read(self, flat: Any) -> Tensor:
        """float32 [n, D]."""

    def batches(self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """(x_ND float32, flat index) per batch, from batch ``first`` on: the same ones whatever came before."""


@dataclass
class Run:
    """One SAE in training."""

    cfg: TrainConfig
    sae: SAE
    key: str
    folder: Path
    state: TrainState
    optimiser: torch.optim.Adam | RowAdam
    log: MetricLog
    n_steps: int
    store: Store
    """What it is trained on."""
    average: optim.Average | None = None
    """Running mean of the weights; None where ``ema_decay`` is 0."""
    stack: stacked_step.Stack | None = None
    """What computes its loss, and that of those trained beside it, where it is the first of several."""
    late: Lagged | None = None
    """Loss and number of dead latents of each step on their way from a GPU; None where the host has them at once."""
    step: int = 0
    seconds: float = 0.0
    """Time spent on this SAE alone."""
    note: str = ""
    failure: str = ""
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return not self.failure and self.step < self.n_steps


def identity(cfg: TrainConfig) -> dict[str, Any]:
    """What key and files say of a configuration: a field added since counts only where it departs from its default,
    so that a new option leaves the names of existing SAEs alone."""
    plain = {f.name: f.default for f in fields(cfg)}
    return {k: v for k, v in to_dict(cfg).items() if k in FIRST_FIELDS or v != plain[k]}


def input_norm(cfg: TrainConfig, x_ND: Tensor | None = None, target_NO: Tensor | None = None) -> InputNorm:
    """The input norm object of a training configuration. ``dataset_rms`` makes the mean length of the raw sample
    ``x_ND``, and that of the targets where there are some, the root of their width (TRAINING 2)."""
    if cfg.input_norm != "dataset_rms" or x_ND is None:
        return InputNorm(kind=cfg.input_norm)
    scales = [s.shape[1] ** 0.5 / max(float(torch.linalg.vector_norm(s.double(), dim=1).mean()), 1e-30)
              for s in (x_ND, x_ND if target_NO is None else target_NO)]  # fmt: skip
    return InputNorm(kind="dataset_rms", scale_in=scales[0], scale_out=scales[1])


def run_folder(folder: Path) -> Path:
    """Where a run keeps its log and its steps until the SAE is complete; it stays when the run fails."""
    return folder.with_name(folder.name + ".run")


def start_variance(t_NO: Tensor, sample_ND: Tensor, name: str, store_key: str) -> float:
    """Variance of what is to be reconstructed, on the start sample; DataError unless it is positive and finite."""
    v0 = float(losses.variance(t_NO))
    if not (math.isfinite(v0) and v0 > 0):
        n_bad = int((~torch.isfinite(sample_ND).all(1)).sum())
        why = f"; {n_bad:,} of {len(sample_ND):,} sampled tokens are NaN or infinite" if n_bad else ""
        raise DataError(
            f"{name}: the activations {store_key} have variance {v0}{why}: an SAE needs finite activations that "
            "differ; collect them again, with the model in float32"
        )
    return v0


def start(
    cfg: TrainConfig, meta: SubjectMeta, key: str, folder: Path, store: Store, sample_ND: Tensor, log: MetricLog,
    target_NO: Tensor | None = None,
) -> Run:  # fmt: skip
    """A run at step 0 on the device of ``sample_ND``, raw activations that fix v0 and the starting weights;
    ``target_NO``: raw targets of the same tokens, for a transcoder.

    ``DataError`` for a sample that is not finite or has no variance, ``ConfigError`` for an option the architecture
    does not take.
    """
    plugin = find("sae.architectures", cfg.architecture)
    wanted_NO = sample_ND if target_NO is None else target_NO
    decided = {"apply_b_dec_to_input": True} | plugin.cfg_fields(cfg)
    sae: SAE = plugin(
        SAEConfig(
            architecture=cfg.architecture, d_in=store.d_in, d_out=wanted_NO.shape[1], d_sae=cfg.d_sae,
            input_norm=input_norm(cfg, sample_ND, target_NO), sae_id=folder.name, meta=meta, train_tokens=None,
            train_steps=None, seed=cfg.seed, train=identity(cfg), **decided,
        )
    )
    device = sample_ND.device
    sae.to(device)
    n_ND, _ = sae.normalise(sample_ND)
    t_NO = n_ND if target_NO is None else sae.normalise_target(target_NO)
    v0 = start_variance(t_NO, sample_ND, folder.name, store.key)
    if target_NO is None:
        sae.initialise(n_ND, cfg.seed)
    else:
        sae.initialise_pair(n_ND, t_NO, cfg.seed)
    if cfg.encoder_scale != 1:
        sae.scale_codes_(cfg.encoder_scale)
    state = TrainState(
        cfg=cfg, v0=v0, input_rms_norm=float(n_ND.double().square().sum(1).mean().sqrt()),
        last_fired_tokens_F=torch.zeros(cfg.d_sae, dtype=torch.int64, device=device), d_in=store.d_in,
    )  # fmt: skip
    n_steps = max(1, cfg.train_tokens // cfg.batch_tokens)
    optimiser: torch.optim.Adam | RowAdam = optim.adam(sae.parameter_groups(), cfg)
    copies = getattr(sae, "compute_copies", None)
    if copies is not None and ops_fused.usable(n_ND, sae.W_dec_FD):  # its loss runs on copies that a step can write
        optimiser = RowAdam(sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, copies(), cfg)
    average = None
    if cfg.ema_decay > 0:
        average = optim.Average(dict(sae.named_parameters()), cfg.ema_decay)
    return Run(cfg, sae, key, folder, state, optimiser, log, n_steps, store, average, late=_late(device))


def _late(device: torch.device) -> Lagged | None:
    return None if device.type == "cpu" else Lagged()


def step(run: Run, x_ND: Tensor, n_ND: Tensor, stats: NormStats) -> None:
    """One optimiser step in the order of TRAINING 6."""
    step_many([run], x_ND, n_ND, stats)


def step_many(runs: Sequence[Run], x_ND: Tensor, n_ND: Tensor, stats: NormStats) -> None:
    """One step of several runs that are active and share a batch and its normalisation.

    TopK SAEs of one shape are computed together (:mod:`sae.stacked_step`): the same bits as one by one."""
    for group in stacked_step.groups([(run.sae, run.state) for run in runs], len(n_ND)):
        _step_group([runs[i] for i in group], x_ND, n_ND, stats)


def _step_group(runs: Sequence[Run], x_ND: Tensor, n_ND: Tensor, stats: NormStats) -> None:
    started = time.monotonic()
    for run in runs:
        every = max(1, min(LOG_EVERY_STEPS, run.n_steps // ROWS_PER_RUN))
        run.state.logged = run.step % every == 0 or run.step == run.n_steps - 1
        run.state.sparsity_ramp = optim.ramp(run.step, run.n_steps, L1_RAMP_SHARE)
    first, saes = runs[0], [run.sae for run in runs]
    if stacked_step.suits(first.sae, first.state):
        if first.stack is None or not first.stack.holds(saes):
            first.stack = stacked_step.Stack(saes, [run.state for run in runs])
        found = first.stack.step_losses(n_ND)
    else:
        found = [run.sae.training_loss(n_ND, run.state) for run in runs]
    seconds = (time.monotonic() - started) / len(runs)
    for run, loss in zip(runs, found, strict=True):
        _optimise(run, loss, x_ND, stats, seconds)


def _optimise(run: Run, found: StepLoss, x_ND: Tensor, stats: NormStats, seconds: float) -> None:
    """What follows the loss of one run, whose computing took ``seconds``."""
    started = time.monotonic()
    sae, cfg, state = run.sae, run.cfg, run.state
    rate = optim.full_rate(cfg) * optim.lr_factor(run.step, run.n_steps, cfg.lr_warmup_steps, cfg.lr_decay_share)
    if run.late is None and not bool(torch.isfinite(found.total)):
        _fail(run, run.step + 1, float(found.total.detach()))
        return
    if found.total.requires_grad:
        found.total.backward()
    in_passes = isinstance(run.optimiser, RowAdam)  # which projects the gradient and makes rows unit itself
    unit = sae.cfg.decoder_unit_norm
    if unit and (state.logged or cfg.grad_clip is not None or not in_passes):
        ops_fused.project_gradient_(_gradient(sae.W_dec_FD), sae.W_dec_FD)
    gradient_norm = _gradient_norm(sae) if state.logged else 0.0
    if cfg.grad_clip is not None:
        optim.clip_gradients_([p for p in sae.parameters() if p.grad is not None], cfg.grad_clip)
    for group in run.optimiser.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    run.optimiser.step()
    if unit and not in_passes:
        ops_fused.unit_rows_(sae.W_dec_FD)
    sae.constrain_()
    run.optimiser.zero_grad(set_to_none=True)
    if run.average is not None:
        run.average.update(dict(sae.named_parameters()))
    state.after_step(len(x_ND), found)
    run.step += 1
    if run.late is not None:
        run.late.push(run.step, torch.stack([found.total.detach().double(), state.dead_F.sum().double()]))
        for step, (loss, n_dead) in run.late.take(everything=run.step == run.n_steps):
            state.n_dead_late = int(n_dead)
            if not math.isfinite(loss):
                _fail(run, step, loss)
                return
    run.seconds += seconds + time.monotonic() - started
    if state.logged:
        _log(run, found, x_ND, stats, rate, gradient_norm)


def _fail(run: Run, step: int, loss: float) -> None:
    run.failure = f"the loss is {loss} at step {step} of {run.n_steps}"


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _gradient_norm(sae: SAE) -> float:
    return float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in sae.parameters() if p.grad is not None])))


def _log(run: Run, found: StepLoss, x_ND: Tensor, stats: NormStats, rate: float, gradient_norm: float) -> None:
    state, sae = run.state, run.sae
    batch_fvu = None if found.y_ND is None else metrics.fvu(x_ND, sae.denormalise(found.y_ND, stats))
    n_dead = int(state.dead_F.sum())
    row_error = float((torch.linalg.vector_norm(sae.W_dec_FD.detach(), dim=1) - 1).abs().max())
    run.last = {
        "step": run.step, "tokens": state.tokens, "seconds": round(run.seconds, 3),
        "tokens_per_s": round(state.tokens / max(run.seconds, 1e-9)), "loss": float(found.total.detach()),
        "mse": float(found.mse), "aux": float(found.aux), "sparsity": float(found.sparsity), "fvu": batch_fvu,
        "l0": float(found.l0), "n_dead": n_dead, "aux_active": float(found.aux_active), "lr": rate,
        "grad_norm": gradient_norm, "decoder_row_error": row_error,
    }  # fmt: skip
    if found.flagged is not None:
        run.last["flagged_rows"] = int(found.flagged)
    run.log.write(run.last)
    fvu_text = "-" if batch_fvu is None else f"{batch_fvu:.3f}"
    l0_text = f"L0 {run.last['l0']:.0f}"
    run.note = f"{run.cfg.architecture}: loss {run.last['loss']:.3f} FVU {fvu_text} {l0_text} dead {n_dead}"


@torch.no_grad()
def _take_average(run: Run) -> None:
    """Replace the weights by their average, decoder rows made unit again: the mean of unit rows is shorter than 1, so
    each row's length goes to its codes (FORMATS E3; a near-tie of TopK may flip)."""
    assert run.average is not None
    sae, mean = run.sae, run.average.corrected()
    for name, parameter in sae.named_parameters():
        parameter.copy_(mean[name])
    if sae.cfg.decoder_unit_norm:  # free rows are the architecture's to export
        norms_F = torch.linalg.vector_norm(sae.W_dec_FD, dim=1)
        sae.scale_codes_(torch.where(norms_F > 0, norms_F, 1.0))
        optim.normalise_rows_(sae.W_dec_FD)
    sae.cfg = replace(sae.cfg, weights="ema")


@torch.no_grad()
def _measured(sae: SAE, store: Store, suffix: str) -> dict[str, float | None]:
    """FVU and mean L0 on the first kept tokens of the training activations, for raw against averaged weights."""
    kept = np.asarray(store.kept_N)
    x_ND = store.read(kept[: min(len(kept), FINAL_TOKENS)]).to(sae.W_dec_FD.device)
    codes = sae.encode_sparse(x_ND)
    l0 = float((codes.values_NK > 0).sum()) / len(x_ND)
    return {f"fvu_{suffix}": metrics.fvu(x_ND, sae.decode(codes, x_ND)), f"l0_{suffix}": l0}


def _finish_weights(run: Run, store: Store) -> dict[str, float | None]:
    """The last changes of the weights; with an average FVU and L0 of raw and of averaged weights, both finished."""
    found: dict[str, float | None] = {}
    if run.average is not None:
        raw = copy.deepcopy(run.sae)
        raw.finish(store)
        found |= _measured(raw, store, "raw")
        _take_average(run)
    run.sae.finish(store)  # with the weights that are saved: a threshold fits no others
    return found | (_measured(run.sae, store, "ema") if run.average is not None else {})


def finish(run: Run, store: Store) -> None:
    """Write the artefact of a finished run and remove its working folder, unless the SAE cannot be finished."""
    run.sae.cfg = replace(run.sae.cfg, train_tokens=run.state.tokens, train_steps=run.step)
    run.log.close()
    device = run.state.last_fired_tokens_F.device
    kept = np.asarray(store.kept_N)
    try:
        averaged = _finish_weights(run, store)
    except DataError as error:
        run.failure = str(error)
        return
    run.sae.to("cpu")
    sample_ND = store.read(kept[: min(len(kept), 8 * checkpoint.REFERENCE_TOKENS)])
    config, inputs = identity(run.cfg), {"activations": store.key}
    with manifest.writing(
        run.folder, kind="saes", key=run.key, stage_version=STAGE_VERSION, config=config, inputs=inputs,
        began=time.monotonic() - run.seconds,
    ) as writer:  # fmt: skip
        checkpoint.save(run.sae, writer.path, sample_ND)
        shutil.copyfile(run.log.path, writer.path / "train.jsonl")
        gpu = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        writer.counts = {
            "sae_id": run.folder.name, "threads": torch.get_num_threads(), **gpu, **run.last, **averaged,
        }  # fmt: skip
    shutil.rmtree(run_folder(run.folder), ignore_errors=True)
