"""What can be refused before a language model is loaded, and right after it: for a large model, minutes later is late.

The run and its ``--dry-run`` ask the same questions.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autointerp import pipeline
from autointerp.retries import why_silent
from evals.base import Eval, provided
from evals.measure import select
from evals.probe_activations import OwnTask, ProbeConfig
from evals.run_config import RunConfig
from sae import hub, loading, plugins, texts
from sae.base import SAE
from sae.errors import ConfigError
from sae.language_model import LanguageModel
from sae.manifest import is_complete, read_manifest

logger = logging.getLogger(__name__)
SPARE_DISK_GB = 0.5
REST_GB = 0.3
"""All but activations: SAEs, latents, rows, pages."""


def check_before_loading(cfg: RunConfig) -> None:
    """Names, paths and places that need no model. Typed errors of the rooms that would meet them later."""
    evaluations, lacking = applicable(cfg)
    for name in cfg.evals:
        if name in lacking:
            raise ConfigError(f"--evals {name}: {lacking[name]}")
    for architecture in cfg.architectures if not cfg.sae else ():
        if plugins.find("sae.architectures", architecture).transcodes:
            raise ConfigError(f"{architecture!r} reconstructs another activation: the evaluations are for autoencoders")
    texts.source_exists(cfg.texts)
    for path in cfg.sae:
        if not hub.is_ref(path):
            loading.recognise(Path(path))
    for text in cfg.task_csv:
        task = OwnTask.parse(text)
        _is_file("--task-csv", task.path)
        task.build()
    if cfg.pretraining_curve is not None:
        _is_file("--pretraining-curve", cfg.pretraining_curve)
    _writable(cfg.root)
    if any("scores" in e.needs for e in evaluations):
        plugins.find("autointerp.clients", cfg.interp.client)
        pipeline.plugins_of(cfg.interp)
        if cfg.interp.client == "openai" and (silence := why_silent(cfg.interp.base_url)):
            logger.warning("%s", silence)  # no error: all may be in the reply cache, or the server be on its way


def applicable(cfg: RunConfig) -> tuple[list[Eval], dict[str, str]]:
    """The evaluations of a run, and of those for which it surely has nothing to measure, why (Measurement.fitting)."""
    sizes = ProbeConfig.of_preset(cfg.preset, own=cfg.task_csv)
    whys: dict[str, str] = {}
    if cfg.truth is None:
        whys["truth"] = "this run has no known dictionary; give --truth"
    if not cfg.sae and len(cfg.train_seeds) < 2:
        whys["peers"] = "it compares SAEs that differ in their training seed alone; give --train-seeds 0 1"
    if not (sizes.tasks or sizes.own or cfg.tasks):
        whys["probes"] = f"the preset {cfg.preset} has no probe task; bring one with --task-csv"
    if not cfg.sae:
        whys["transcode"] = "it measures transcoders; give one with --sae"
    found = select(cfg.evals, cfg.preset)
    lacking = {e.name: whys[n] for e in found for n in sorted(e.needs | e.uses) if n in whys}
    return [e for e in found if e.name not in lacking], lacking


def check_context(cfg: RunConfig, lm: LanguageModel) -> None:
    """Rows longer than the model reads are a ConfigError: learned positions end, others were never trained."""
    most = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < cfg.tokens.context_tokens:
        raise ConfigError(
            f"{lm.name} reads at most {most:,} tokens, rows have {cfg.tokens.context_tokens:,}; "
            f"give --tokens.context-tokens {most} or less"
        )


def fitted(cfg: RunConfig, given: Sequence[SAE]) -> RunConfig:
    """With rows no longer than those that any SAE given was trained on: at later positions it was never trained
    (SAELens PR 201). ``--keep-context`` leaves them, and the warning stays."""
    known = [(sae.cfg.meta.context_length_tokens, sae.sae_id) for sae in given if sae.cfg.meta is not None]
    shorter = [(n, name) for n, name in known if 0 < n < cfg.tokens.context_tokens]
    if not shorter:
        return cfg
    n, name = min(shorter)
    if cfg.keep_context:
        logger.warning("%s was trained on rows of %d tokens, the run reads %d", name, n, cfg.tokens.context_tokens)
        return cfg
    rows = max(n, cfg.exemplars.window_tokens)
    logger.warning(
        "rows have %d tokens instead of %d: %s was trained on %d (--keep-context reads the longer ones)",
        rows, cfg.tokens.context_tokens, name, n,
    )  # fmt: skip
    return replace(cfg, tokens=replace(cfg.tokens, context_tokens=rows))


def check_disk(cfg: RunConfig, hookpoint: str, d_in: int) -> None:
    """ConfigError if the artefacts cannot fit beside the activations of this hookpoint that are there already."""
    t = cfg.tokens
    splits = [t.explain_tokens, t.calibrate_tokens, t.score_tokens] + ([] if cfg.sae else [t.train_tokens])
    need = (sum(splits) * 2 + t.test_tokens * 4) * d_in / 1e9
    need = max(0.0, need - _stored_gb(cfg.root, hookpoint)) + REST_GB
    free = free_disk_gb(cfg.root)
    if free < need + SPARE_DISK_GB:
        raise ConfigError(
            f"{cfg.root} has {free:.2f} GB free, the run writes about {need:.2f} GB (activations above all) and wants "
            f"{SPARE_DISK_GB:.1f} GB to spare; "
            "free some space, choose another --root, or lower --tokens.train-tokens"
        )


def free_disk_gb(root: Path) -> float:
    """GB free where a folder lies, or will lie."""
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free / 1e9


def _stored_gb(root: Path, hookpoint: str) -> float:
    """Complete activations of this hookpoint: the run goes on with those of its own text, which it has not to write."""
    found = (f for f in (root / "activations").glob("*") if is_complete(f))
    stored = [m for m in map(read_manifest, found) if m["config"].get("hookpoint") == hookpoint]
    return sum(float(entry["bytes"]) for m in stored for entry in m["files"].values()) / 1e9


def hookpoint_of(cfg: RunConfig, lm: LanguageModel, given: Sequence[SAE]) -> str:
    """Where the run measures: as asked, else where the first SAE given says that it reads, else the middle block.

    ConfigError for a place that the model lacks, and for an SAE that does not fit it.
    """
    if cfg.hookpoint:
        hookpoint = cfg.hookpoint
    else:
        silent = [sae.sae_id for sae in given if sae.cfg.meta is None]
        if silent:
            raise ConfigError(f"{silent[0]}: its file does not say where it reads; give --hookpoint")
        places = [sae.cfg.meta.hookpoint for sae in given if sae.cfg.meta is not None]
        hookpoint = places[0] if places else lm.default_hookpoint()
    width = lm.check_hookpoint(hookpoint)
    for sae in given:
        _check_sae(cfg, lm, sae, hookpoint, width)
    _check_asked(cfg, given)
    ids = [sae.sae_id for sae in given]
    for path, name in zip(cfg.sae, ids, strict=True):
        if ids.count(name) > 1:
            same = ", ".join(p for p, i in zip(cfg.sae, ids, strict=True) if i == name)
            raise ConfigError(f"{same} hold the same SAE ({name}); name it once, beginning with {path}")
    return hookpoint


def _check_asked(cfg: RunConfig, given: Sequence[SAE]) -> None:
    """Evaluations asked for that measure none of the SAEs given, only floors: told, or an error if all are such."""
    asked = select(cfg.evals) if cfg.evals and given else []
    idle = [e.name for e in asked if not any(e.uses <= provided(sae.transcodes) for sae in given)]
    kind = "transcoders, and takes SAEs" if given and given[0].transcodes else "SAEs, and takes transcoders"
    if idle and len(idle) == len(asked):
        raise ConfigError(f"--evals {' '.join(idle)} can measure none of the {kind}; ask for others (see --list)")
    for name in idle:
        logger.warning("--evals %s can measure none of the %s: it measures floors alone", name, kind)


def _check_sae(cfg: RunConfig, lm: LanguageModel, sae: SAE, hookpoint: str, width: int) -> None:
    if sae.transcodes:
        _check_target(cfg, lm, sae)
    meta = sae.cfg.meta
    if meta is not None and meta.hookpoint != hookpoint:
        raise ConfigError(
            f"{sae.sae_id} was trained at {meta.hookpoint}, the run measures {hookpoint}; give --hookpoint "
            f"{meta.hookpoint}, and SAEs of other places in a run of their own (--root may be the same)"
        )
    if sae.d_in != width:
        raise ConfigError(
            f"{sae.sae_id} reads {sae.d_in} channels, but {hookpoint} of {lm.name} has {width}; "
            "give the model and hookpoint that it was trained on (--model, --hookpoint)"
        )
    if meta is not None and meta.lm_revision not in (loading.UNKNOWN, lm.revision):
        raise ConfigError(
            f"{sae.sae_id} was trained on {meta.lm} ({meta.lm_revision[:12]}), the run loads {lm.name} "
            f"({lm.revision[:12]}); give the right --model"
        )


def _check_target(cfg: RunConfig, lm: LanguageModel, sae: SAE) -> None:
    """What a transcoder predicts must be an activation of this model, of the width that it gives."""
    out = sae.cfg.meta.hookpoint_out if sae.cfg.meta is not None else None
    if "intervention" in cfg.interp.scorers:
        raise ConfigError(f"{sae.sae_id} is a transcoder: the scorer 'intervention' pushes what an SAE reads")
    if out is not None and (width := lm.check_hookpoint(out)) != sae.cfg.d_out:
        raise ConfigError(f"{sae.sae_id} predicts {sae.cfg.d_out} channels, but {out} of the model has {width}")


def _is_file(option: str, path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{option}: there is no file {path}")


def _writable(root: Path) -> None:
    """ConfigError unless the folder, or what lies nearest above it, can be written to. Nothing is made."""
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ConfigError(f"--root {root}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--root {root}: {there} cannot be written to; name another folder, or let this user write")
