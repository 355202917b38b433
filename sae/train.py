"""Train several SAEs on one shuffled stream of stored activations (TRAINING 6, 10, 11).

Shapes: N tokens of one batch, D = d_in, F = d_sae. Each SAE has its own optimiser, seed, log and artefact; its result
does not depend on which others are trained beside it, nor on how often training was interrupted.
"""

import logging
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import console, manifest, resume, train_run
from sae.base import SAE, NormStats
from sae.config import InputNorm, SubjectMeta, TrainConfig
from sae.errors import ConfigError, DataError, SaescopeError
from sae.metric_log import MetricLog
from sae.mirror import MakeMirror
from sae.plugins import find
from sae.train_run import STAGE_VERSION, Run, Store, identity, input_norm, run_folder

__all__ = ["STAGE_VERSION", "Store", "TrainingDiverged", "input_norm", "sae_id_of", "train_key", "train_many"]
START_SAMPLE_TOKENS = 65_536
"""Tokens that fix v0 and the starting weights."""
DATA_SEED = 0
"""Order of the stream; a constant, or an SAE would change with the SAEs trained beside it."""
NOTED_SAES = 3
"""SAEs whose figures fit beside a progress bar."""
logger = logging.getLogger(__name__)


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


def train_key(cfg: TrainConfig, store_key: str) -> str:
    """16 hex digits: the training configuration and the activations."""
    return manifest.key_of("saes", STAGE_VERSION, identity(cfg), {"activations": store_key})


def sae_id_of(cfg: TrainConfig, meta: SubjectMeta, key: str) -> str:
    """``<lm>.<hookpoint>.topk-f4608-k32.s0-<8 hex>`` in [a-z0-9._-] (HOUSE 2)."""
    k = f"-k{cfg.k}" if find("sae.architectures", cfg.architecture).uses_k else ""
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
    keeper: resume.Keeper | None = None,
    mirror: MakeMirror | None = None,
) -> list[Path]:
    """Folders ``root/saes/<sae_id>`` in the order of ``cfgs``; complete ones are not trained again unless ``force``.

    What was interrupted goes on from its newest saved step and ends with the bytes of an uninterrupted run (on a CPU,
    with as many threads); ``keeper`` says how often steps are saved, ``mirror`` where the rows of logs go as well.
    SIGTERM and SIGINT save and raise :class:`sae.resume.TrainingInterrupted`, a ``KeyboardInterrupt``.

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
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        signals = stack.enter_context(resume.Signals())
        for i in missing:
            stack.enter_context(resume.locked(run_folder(folders[i])))
        if force:
            for i in missing:
                resume.forget(run_folder(folders[i]))
        saved = {i: resume.newest(run_folder(folders[i]), keys[i], store.key) for i in missing}
        flat = _start_tokens(store)
        sample_ND = store.read(flat).float().to(device)
        runs = []
        for i in missing:
            mirrored = None if mirror is None else mirror(folders[i].name, identity(cfgs[i]))
            log = stack.enter_context(MetricLog(run_folder(folders[i]) / "train.jsonl", mirrored))
            target_NO = _targets(store, flat, device) if _plugin(cfgs[i]).transcodes else None
            runs.append(train_run.start(cfgs[i], meta, keys[i], folders[i], store, sample_ND, log, target_NO))
            if (step := saved[i]) is not None:
                resume.restore(runs[-1], step)
                logger.info("%s goes on after step %d of %d", folders[i].name, runs[-1].step, runs[-1].n_steps)
        del sample_ND
        behind = min(zip(runs, saved.values(), strict=True), key=lambda pair: pair[0].step)[1]
        if behind is not None:
            resume.restore_random(behind)
        _loop(store, runs, failures, device, keeper or resume.Keeper(), signals)
        if signals.stop:  # it came in the last step
            raise resume.TrainingInterrupted("all SAEs of this call are complete")
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
        plugin = _plugin(cfg)
        if plugin.uses_k and cfg.k is None:
            raise ConfigError(f"architecture {cfg.architecture!r} needs k")
        if plugin.transcodes and not hasattr(store, "read_target"):
            raise ConfigError(f"{cfg.architecture!r} is trained on pairs of activations: give a sae.paired.PairedStore")
        if plugin.transcodes and cfg.ema_decay > 0:
            raise ConfigError(f"ema_decay is not for {cfg.architecture!r} yet; set it to 0")
    if store.n_kept < sizes[0]:
        raise DataError(
            f"the store has {store.n_kept:,} tokens after the filter, a batch is {sizes[0]:,}: "
            "give more text (tokens.train_tokens) or lower train.batch_tokens"
        )
    if not re.fullmatch(r"[a-z0-9._-]+", meta.lm_slug):
        raise ConfigError(f"lm_slug {meta.lm_slug!r} may only hold a-z, 0-9, '.', '_' and '-'")


def _plugin(cfg: TrainConfig) -> type[SAE]:
    return find("sae.architectures", cfg.architecture)  # type: ignore[no-any-return]


def _targets(store: Store, flat: Any, device: torch.device) -> Tensor:
    """Raw targets of a :class:`sae.paired.PairedStore`."""
    return store.read_target(flat).to(device)  # type: ignore[attr-defined,no-any-return]


def _start_tokens(store: Store) -> np.ndarray:
    """Tokens spread evenly over the store, in random order: a function of the store alone."""
    kept = np.asarray(store.kept_N)
    picked = kept[np.linspace(0, len(kept) - 1, min(len(kept), START_SAMPLE_TOKENS)).astype(np.int64)]
    order = manifest.rng("train", "start-sample", DATA_SEED).permutation(len(picked))
    return picked[order]  # type: ignore[no-any-return]


def _loop(
    store: Store, runs: list[Run], failures: dict[str, str], device: torch.device, keeper: resume.Keeper,
    signals: resume.Signals,
) -> None:  # fmt: skip
    """Feed all runs; each is saved as soon as it has had its steps. The stream begins where the one furthest behind
    stopped, and those that are further on wait for their own next batch."""
    for run in [run for run in runs if not run.active]:  # its last step was saved, its artefact was not
        _finish(run, store, failures)
    if not any(run.active for run in runs):
        return
    batch_tokens = runs[0].cfg.batch_tokens
    n_steps = max(run.n_steps for run in runs)
    epochs = math.ceil(n_steps / (store.n_kept // batch_tokens))
    first = min(run.step for run in runs if run.active)
    names = f"training {len(runs)} SAE{'s' if len(runs) > 1 else ''}"
    with console.progress(names, total=(n_steps - first) * batch_tokens, unit="tok") as bar:
        stream = store.batches(batch_tokens, seed=DATA_SEED, epochs=epochs, first=first)
        for index, (x_ND, flat) in enumerate(stream, first):
            if device.type == "cuda":  # pinned, so that the copy goes on while the last step runs
                x_ND = x_ND.pin_memory()
            x_ND = x_ND.to(device, non_blocking=True)
            normalised: dict[InputNorm, tuple[Tensor, NormStats]] = {}
            for run in runs:
                if not run.active or run.step != index:
                    continue
                norm = run.sae.cfg.input_norm
                if norm not in normalised:
                    normalised[norm] = run.sae.normalise(x_ND)
                wanted_NO = x_ND
                if run.sae.transcodes:
                    wanted_NO = _targets(store, flat, device)
                    run.state.target_ND = run.sae.normalise_target(wanted_NO)
                train_run.step(run, wanted_NO, *normalised[norm])
                run.state.target_ND = None  # no part of what a saved step must hold
                if run.failure:
                    _check_finite(store, x_ND, flat, index + 1)
                    failures[run.folder.name] = run.failure
                    logger.error("%s stopped: %s; the other SAEs go on", run.folder.name, run.failure)
                elif not run.active:
                    _finish(run, store, failures)
            bar.advance(len(x_ND), note=_note(runs))
            _save_steps(runs, store.key, index + 1, keeper, signals, failures)
            if not any(run.active for run in runs):
                return
    short = [run.folder.name for run in runs if run.active]
    if short:
        raise DataError(f"the store ended before {', '.join(short)} had all steps; this is a fault of its batches()")


def _note(runs: list[Run]) -> str:
    """Last figures of the first SAEs that are still training, and how many others there are."""
    active = [run for run in runs if run.active] or runs
    rest = len(active) - NOTED_SAES
    return " | ".join(run.note for run in active[:NOTED_SAES]) + (f" | and {rest} more" if rest > 0 else "")


def _finish(run: Run, store: Store, failures: dict[str, str]) -> None:
    train_run.finish(run, store)
    if run.failure:
        failures[run.folder.name] = run.failure
        logger.error("%s is not saved: %s; the other SAEs go on", run.folder.name, run.failure)


def _check_finite(store: Store, x_ND: Tensor, flat: Any, step: int) -> None:
    """A loss that is not finite has two causes; the one that no option of training cures is named."""
    broken = (~torch.isfinite(x_ND).all(1)).nonzero().flatten().tolist()
    if broken:
        tokens = ", ".join(str(int(flat[i])) for i in broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise DataError(
            f"activations {store.key}: {len(broken)} of {len(x_ND):,} tokens in the batch of step {step} are NaN or "
            f"infinite (flat index {tokens}); collect them again, with the model in float32. Saved steps are kept"
        )


def _save_steps(
    runs: list[Run], store_key: str, step: int, keeper: resume.Keeper, signals: resume.Signals,
    failures: dict[str, str],
) -> None:  # fmt: skip
    active = [run for run in runs if run.active and run.step == step]
    if not active or not keeper.due(step, signals):
        return
    for run in active:
        try:
            resume.save(run, store_key)
        except DataError as error:  # its next loss would not be finite either; the others go on
            run.failure = failures[run.folder.name] = str(error)
            logger.error("%s; the other SAEs go on", error)
    keeper.done(signals)
    if signals.stop:
        raise resume.TrainingInterrupted(f"{len(active)} SAE(s) saved after step {step}; the same command goes on")
