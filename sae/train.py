"""Train several SAEs on one shuffled stream of stored activations (TRAINING 6, 10).

Shapes: N tokens of one batch, D = d_in, F = d_sae. Each SAE has its own optimiser, seed, log and artefact; its result
does not depend on which others are trained beside it.
"""

import logging
import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sae import checkpoint, console, losses, manifest, metrics, ops_fused, optim
from sae.base import SAE, NormStats, StepLoss, TrainState
from sae.config import InputNorm, SAEConfig, SubjectMeta, TrainConfig, to_dict
from sae.errors import ConfigError, DataError, SaescopeError
from sae.lagged import Lagged
from sae.metric_log import MetricLog
from sae.plugins import find
from sae.row_adam import RowAdam

STAGE_VERSION = 2
START_SAMPLE_TOKENS = 65_536
"""Tokens that fix v0 and the starting weights."""
L1_RAMP_SHARE = 0.05
"""Share of the run over which the sparsity coefficient rises from 0."""
ROWS_PER_RUN = 20
LOG_EVERY_STEPS = 100
DATA_SEED = 0
"""Order of the stream; a constant, or an SAE would change with the SAEs trained beside it."""
logger = logging.getLogger(__name__)


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

    def batches(self, batch_tokens: int, *, seed: int, epochs: int) -> Iterator[tuple[Tensor, Any]]:
        """(x_ND float32, flat index) per batch."""


class TrainingDiverged(SaescopeError):
    """Some SAEs met a loss that is not finite. The others were trained and saved."""

    def __init__(self, failures: dict[str, str], paths: list[Path]) -> None:
        detail = "; ".join(f"{sae_id}: {why}" for sae_id, why in sorted(failures.items()))
        super().__init__(
            f"{len(failures)} SAE(s) stopped: {detail}. Lower train.lr or train.l1, or check the activations. "
            f"{len(paths)} other SAE(s) are complete"
        )
        self.failures = failures
        """sae_id -> reason."""
        self.paths = paths
        """Folders of the SAEs that are complete."""


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


def input_norm(cfg: TrainConfig) -> InputNorm:
    """The input norm object of a training configuration."""
    return InputNorm(kind=cfg.input_norm)


def train_key(cfg: TrainConfig, store_key: str) -> str:
    """16 hex digits: the training configuration and the activations."""
    return manifest.key_of("saes", STAGE_VERSION, to_dict(cfg), {"activations": store_key})


def sae_id_of(cfg: TrainConfig, meta: SubjectMeta, key: str) -> str:
    """``<lm>.<hookpoint>.topk-f4608-k32.s0-<8 hex>`` in [a-z0-9._-] (HOUSE 2)."""
    k = f"-k{cfg.k}" if cfg.architecture == "topk" else ""
    name = f"{meta.lm_slug}.{meta.hookpoint}.{cfg.architecture}-f{cfg.d_sae}{k}.s{cfg.seed}-{key[:8]}"
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower())


def train_many(
    root: Path,
    store: Store,
    cfgs: Sequence[TrainConfig],
    meta: SubjectMeta,
    *,
    device: str | torch.device = "cpu",
    force: bool = False,
) -> list[Path]:
    """Folders ``root/saes/<sae_id>`` in the order of ``cfgs``; complete ones are not trained again unless ``force``.

    All configurations need the same ``batch_tokens``. An SAE whose loss becomes non-finite is stopped, the others go
    on, and :class:`TrainingDiverged`, which lists both, is raised at the end. ``ConfigError`` for configurations that
    do not go together, ``DataError`` for a store smaller than a batch; both before any work. ``device``: where weights,
    optimiser and batches lie; a GPU multiplies bfloat16 copies of the weights (TRAINING 7); what is saved comes back to
    the CPU. It is no part of the key: SAEs of two devices differ by rounding, and the manifest names the GPU.
    """
    device = torch.device(device)
    _check(store, cfgs, meta)
    keys = [train_key(cfg, store.key) for cfg in cfgs]
    folders = [Path(root) / "saes" / sae_id_of(cfg, meta, key) for cfg, key in zip(cfgs, keys, strict=True)]
    missing = [i for i, folder in enumerate(folders) if force or not manifest.is_complete(folder)]
    if not missing:
        return folders
    sample_ND = _start_sample(store).to(device)
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        runs = []
        for i in missing:
            log = stack.enter_context(MetricLog(_run_folder(folders[i]) / "train.jsonl"))
            runs.append(_start(cfgs[i], meta, keys[i], folders[i], store, sample_ND, log))
        del sample_ND
        _loop(store, runs, failures, device)
    if failures:
        raise TrainingDiverged(failures, [f for f in folders if manifest.is_complete(f) and f.name not in failures])
    return folders


def _check(store: Store, cfgs: Sequence[TrainConfig], meta: SubjectMeta) -> None:
    if not cfgs:
        raise ConfigError("train_many needs at least one TrainConfig")
    sizes = sorted({cfg.batch_tokens for cfg in cfgs})
    if len(sizes) > 1:
        raise ConfigError(f"SAEs trained on one stream need the same batch_tokens, got {sizes}: train them apart")
    if len(set(map(train_key, cfgs, [store.key] * len(cfgs)))) < len(cfgs):
        raise ConfigError("two of the training configurations are equal; give them different seeds")
    for cfg in cfgs:
        if find("sae.architectures", cfg.architecture).activation == "topk" and cfg.k is None:
            raise ConfigError(f"architecture {cfg.architecture!r} needs k")
    if store.n_kept < sizes[0]:
        raise DataError(
            f"the store has {store.n_kept:,} tokens after the filter, a batch is {sizes[0]:,}: "
            "give more text (tokens.train_tokens) or lower train.batch_tokens"
        )
    if not re.fullmatch(r"[a-z0-9._-]+", meta.lm_slug):
        raise ConfigError(f"lm_slug {meta.lm_slug!r} may only hold a-z, 0-9, '.', '_' and '-'")


def _run_folder(folder: Path) -> Path:
    """Where a run keeps its log until the SAE is complete; it stays when the run fails."""
    return folder.with_name(folder.name + ".run")


def _start_sample(store: Store) -> Tensor:
    """Raw activations spread evenly over the store, in random order: a function of the store alone."""
    kept = np.asarray(store.kept_N)
    picked = kept[np.linspace(0, len(kept) - 1, min(len(kept), START_SAMPLE_TOKENS)).astype(np.int64)]
    order = manifest.rng("train", "start-sample", DATA_SEED).permutation(len(picked))
    return store.read(picked).float()[torch.from_numpy(order)]


def _start(
    cfg: TrainConfig, meta: SubjectMeta, key: str, folder: Path, store: Store, sample_ND: Tensor, log: MetricLog
) -> Run:
    plugin = find("sae.architectures", cfg.architecture)
    sae: SAE = plugin(
        SAEConfig(
            architecture=cfg.architecture, activation=plugin.activation, d_in=store.d_in, d_out=store.d_in,
            d_sae=cfg.d_sae, k=cfg.k if plugin.activation == "topk" else None, apply_b_dec_to_input=True,
            input_norm=input_norm(cfg), decoder_unit_norm=True, sae_id=folder.name, meta=meta,
            train_tokens=None, train_steps=None, seed=cfg.seed, train=to_dict(cfg),
        )
    )
    device = sample_ND.device
    sae.to(device)
    n_ND, _ = sae.normalise(sample_ND)
    v0 = float(losses.variance(n_ND))
    if not (math.isfinite(v0) and v0 > 0):
        raise DataError(f"{folder.name}: the activations have variance {v0}; an SAE needs activations that differ")
    sae.initialise(n_ND, cfg.seed)
    state = TrainState(
        cfg=cfg, v0=v0, input_rms_norm=float(n_ND.double().square().sum(1).mean().sqrt()),
        last_fired_tokens_F=torch.zeros(cfg.d_sae, dtype=torch.int64, device=device), d_in=store.d_in,
    )  # fmt: skip
    n_steps = max(1, cfg.train_tokens // cfg.batch_tokens)
    optimiser: torch.optim.Adam | RowAdam = optim.adam(list(sae.parameters()), cfg)
    copies = getattr(sae, "compute_copies", None)
    if copies is not None and ops_fused.usable(n_ND, sae.W_dec_FD):  # its loss runs on copies that a step can write
        optimiser = RowAdam(sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, copies(), cfg)
    return Run(cfg, sae, key, folder, state, optimiser, log, n_steps, late=_late(device))


def _late(device: torch.device) -> Lagged | None:
    return None if device.type == "cpu" else Lagged()


def _loop(store: Store, runs: list[Run], failures: dict[str, str], device: torch.device) -> None:
    """Feed all runs; each is saved as soon as it has had its steps."""
    batch_tokens = runs[0].cfg.batch_tokens
    n_steps = max(run.n_steps for run in runs)
    epochs = math.ceil(n_steps / (store.n_kept // batch_tokens))
    names = f"training {len(runs)} SAE{'s' if len(runs) > 1 else ''}"
    with console.progress(names, total=n_steps * batch_tokens, unit="tok") as bar:
        for x_ND, _ in store.batches(batch_tokens, seed=DATA_SEED, epochs=epochs):
            if device.type == "cuda":  # pinned, so that the copy goes on while the last step runs
                x_ND = x_ND.pin_memory()
            x_ND = x_ND.to(device, non_blocking=True)
            normalised: dict[InputNorm, tuple[Tensor, NormStats]] = {}
            for run in runs:
                if not run.active:
                    continue
                norm = run.sae.cfg.input_norm
                if norm not in normalised:
                    normalised[norm] = run.sae.normalise(x_ND)
                _step(run, x_ND, *normalised[norm])
                if run.failure:
                    failures[run.folder.name] = run.failure
                    logger.error("%s stopped: %s; the other SAEs go on", run.folder.name, run.failure)
                elif not run.active:
                    _finish(run, store)
            bar.advance(len(x_ND), note=" | ".join(run.note for run in runs))
            if not any(run.active for run in runs):
                return
    short = [run.folder.name for run in runs if run.active]
    if short:
        raise DataError(f"the store ended before {', '.join(short)} had all steps; this is a fault of its batches()")


def _step(run: Run, x_ND: Tensor, n_ND: Tensor, stats: NormStats) -> None:
    """One optimiser step in the order of TRAINING 6."""
    started = time.monotonic()
    sae, cfg, state = run.sae, run.cfg, run.state
    rate = cfg.lr * optim.lr_factor(run.step, run.n_steps, cfg.lr_warmup_steps, cfg.lr_decay_share)
    state.sparsity_ramp = optim.ramp(run.step, run.n_steps, L1_RAMP_SHARE)
    every = max(1, min(LOG_EVERY_STEPS, run.n_steps // ROWS_PER_RUN))
    state.logged = run.step % every == 0 or run.step == run.n_steps - 1
    found = sae.training_loss(n_ND, state)
    if run.late is None and not bool(torch.isfinite(found.total)):
        _fail(run, run.step + 1, float(found.total.detach()))
        return
    found.total.backward()
    in_passes = isinstance(run.optimiser, RowAdam)  # which projects the gradient and makes rows unit itself
    if state.logged or not in_passes:
        ops_fused.project_gradient_(_gradient(sae.W_dec_FD), sae.W_dec_FD)
    gradient_norm = _gradient_norm(sae) if state.logged else 0.0
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    run.optimiser.step()
    if not in_passes:
        ops_fused.unit_rows_(sae.W_dec_FD)
    run.optimiser.zero_grad(set_to_none=True)
    state.after_step(len(x_ND), found)
    run.step += 1
    if run.late is not None:
        run.late.push(run.step, torch.stack([found.total.detach().double(), state.dead_F.sum().double()]))
        for step, (loss, n_dead) in run.late.take(everything=run.step == run.n_steps):
            state.n_dead_late = int(n_dead)
            if not math.isfinite(loss):
                _fail(run, step, loss)
                return
    run.seconds += time.monotonic() - started
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


def _finish(run: Run, store: Store) -> None:
    """Write the artefact of a finished run and remove its working folder."""
    run.sae.cfg = replace(run.sae.cfg, train_tokens=run.state.tokens, train_steps=run.step)
    run.log.close()
    device = run.state.last_fired_tokens_F.device
    run.sae.to("cpu")
    kept = np.asarray(store.kept_N)
    sample_ND = store.read(kept[: min(len(kept), 8 * checkpoint.REFERENCE_TOKENS)])
    config, inputs = to_dict(run.cfg), {"activations": store.key}
    with manifest.writing(
        run.folder, kind="saes", key=run.key, stage_version=STAGE_VERSION, config=config, inputs=inputs
    ) as writer:
        checkpoint.save(run.sae, writer.path, sample_ND)
        shutil.copyfile(run.log.path, writer.path / "train.jsonl")
        gpu = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        writer.counts = {"sae_id": run.folder.name, "threads": torch.get_num_threads(), **gpu, **run.last}
    shutil.rmtree(_run_folder(run.folder), ignore_errors=True)
