"""What a run of ``python -m sae train`` will take, and which SAEs it has still to train."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae import console
from sae.config import SubjectMeta, TrainConfig
from sae.subjects import Subject, expected_kept, short_meta

if TYPE_CHECKING:
    import torch

    from sae.live_pair import LivePair
    from sae.predict import Line, Prediction, Trial
    from sae.streams import LiveStore, LiveStream
    from sae.train_door import TrainDoor


def by_batch(cfgs: Sequence[TrainConfig]) -> list[list[TrainConfig]]:
    """SAEs of one batch size share a stream; the groups are trained one after another."""
    sizes = dict.fromkeys(cfg.batch_tokens for cfg in cfgs)
    return [[cfg for cfg in cfgs if cfg.batch_tokens == size] for size in sizes]


def folders_of(cfg: "TrainDoor", cfgs: Sequence[TrainConfig], found: Subject, number: int) -> list[Path] | None:
    """Where the SAEs of a source are, or will be; None while its activations are not there, which they are named by."""
    from sae.train import sae_id_of, train_key

    source = found.sources[number]
    if source is None:
        return None
    meta = short_meta(found, number)
    return [cfg.root / "saes" / sae_id_of(one, meta, train_key(one, source.key)) for one in cfgs]


def missing(cfg: "TrainDoor", cfgs: Sequence[TrainConfig], found: Subject, number: int = 0) -> list[TrainConfig]:
    """The SAEs of a source that are not complete; all of them while its activations are not there."""
    from sae.manifest import is_complete

    folders = folders_of(cfg, cfgs, found, number)
    if folders is None or cfg.force:
        return list(cfgs)
    return [one for one, folder in zip(cfgs, folders, strict=True) if not is_complete(folder)]


def live_stream(cfg: "TrainDoor", cfgs: Sequence[TrainConfig], found: Subject) -> "LiveStream | None":
    """The stream of those hookpoints that have SAEs to train; None where there are none."""
    from dataclasses import replace

    from sae.streams import LiveStore

    wanted = [i for i in range(len(found.sources)) if missing(cfg, cfgs, found, i)]
    if not wanted:
        return None
    first = found.stores[0]
    assert isinstance(first, LiveStore)
    if len(wanted) == len(found.sources):
        return first.stream
    return replace(first.stream, hookpoints=tuple(found.hookpoints[i] for i in wanted))


def live_sources(stream: "LiveStream", found: Subject) -> "list[LiveStore | LivePair]":
    """What training reads of a stream."""
    from sae.live_pair import LivePair

    return [LivePair(stream)] if found.paired else list(stream.stores)


# -- prediction -------------------------------------------------------------------------------------------------------
def predict(cfg: "TrainDoor", cfgs: Sequence[TrainConfig], found: Subject) -> "Prediction":
    """Sizes counted and times measured in small; :class:`sae.predict.TooLarge` if the run does not fit."""
    import torch

    from sae import predict as small

    device = torch.device(cfg.device)
    small.check_enough(min(len(expected_kept(found, cfg.filter, i)) for i in range(len(found.sources))), cfgs)
    small.check_targets(found.hookpoints if found.paired else found.hookpoints[:1], cfgs)
    if cfg.stream.source == "live":
        result = _predict_live(cfg, cfgs, found, device)
    else:
        result = _predict_disk(cfg, cfgs, found, device)
    small.check_prediction(result, cfg.root)
    return result


def _predict_disk(
    cfg: "TrainDoor", cfgs: Sequence[TrainConfig], found: Subject, device: "torch.device"
) -> "Prediction":
    """One pass collects all hookpoints that are not there; then hookpoints are trained one after another."""
    from sae import predict as small

    n = found.tokens.n_tokens
    todo = [missing(cfg, cfgs, found, i) for i in range(len(found.sources))]
    absent = [i for i, store in enumerate(found.stores) if store is None]
    sizes = {i: n * found.widths[i] * 2 + n for i in absent}
    small.check_cap(sum(sizes.values()), cfg.stream.disk_gb, n)
    for some, widths in zip(todo, found.source_widths, strict=True):
        small.check_fits([(some, widths)], cfg.root, sum(sizes.values()), device)
    lines, samples = [], {}
    if absent:
        assert found.lm is not None
        names = [found.hookpoints[i] for i in absent]
        timed = small.time_lm(found.lm, names, found.tokens.tokens_BL, cfg.stream.batch_rows)
        kept = len(expected_kept(found, cfg.filter, 0))
        for i, x_ND in zip(absent, timed.x_ND, strict=True):
            samples[i] = x_ND
            note = f"{found.hookpoints[i]}: {n:,} tokens, {kept:,} kept, {1 / timed.seconds_per_token:,.0f} tokens/s"
            note += f" for {len(absent)} hookpoints in one pass" if len(absent) > 1 else ""
            seconds = n * timed.seconds_per_token / len(absent)
            lines.append(small.Line("activations", seconds, timed.peak_bytes, sizes[i], note))
    for i, store in enumerate(found.stores):
        if store is not None and any(todo):
            spread = store.kept_N[:: max(1, len(store.kept_N) // small.SAMPLE_ROWS)]
            samples[i], sizes[i] = store.read(spread), sum(int(e["bytes"]) for e in store.manifest["files"].values())
    tried: dict[object, list[Trial]] = {}
    for number, some in enumerate(todo):
        places = (0, 1) if found.paired else (number,)
        widths, n_kept = found.source_widths[number], len(expected_kept(found, cfg.filter, number))
        for group in by_batch(some):
            trials = tried.setdefault((tuple(group), widths, n_kept), [])
            if len(trials) < 2:  # the first in a process also takes what every process takes once
                sample = small.Sample(samples[places[0]], n_kept, samples[places[-1]])
                trials.append(small.try_training(sample, group, _no_meta(found, number), device))
            line = small.training_line(group, trials[-1], sum(sizes.values()))  # a mapped store stays mapped
            lines.append(_named(line, found, number))
    steps = [small.saved_steps_bytes(some, widths) for some, widths in zip(todo, found.source_widths, strict=True)]
    return small.Prediction(tuple(lines), max(steps, default=0))


def _predict_live(
    cfg: "TrainDoor", cfgs: Sequence[TrainConfig], found: Subject, device: "torch.device"
) -> "Prediction":
    """The sample, then one pass after another through all hookpoints and their SAEs at once."""
    from sae import predict as small
    from sae import predict_live
    from sae.train import Job

    stream = live_stream(cfg, cfgs, found)
    if stream is None:
        return small.Prediction((), 0)
    numbers = [0] if found.paired else [found.hookpoints.index(hookpoint) for hookpoint in stream.hookpoints]
    todo = {i: missing(cfg, cfgs, found, i) for i in numbers}
    groups = by_batch([one for one in cfgs if any(one in some for some in todo.values())])
    for group in groups:
        held = stream.memory_bytes(group[0].batch_tokens)
        mine = [([one for one in group if one in todo[i]], found.source_widths[i]) for i in numbers]
        small.check_fits(mine, cfg.root, 0, device, held)
    timed = predict_live.time_stream(stream)
    lines = [predict_live.sample_line(stream, timed)]
    for group in groups:
        jobs = []
        for place, i in enumerate(numbers):
            x_ND = timed.x_ND if found.paired else timed.x_ND[place : place + 1]
            if some := [one for one in group if one in todo[i]]:
                jobs.append(Job(predict_live.sample_of(stream, x_ND), some, _no_meta(found, i)))
        lines.append(predict_live.training_line(stream, timed, jobs, small.try_jobs(jobs, device)))
    steps = []
    for group in groups:
        sizes = ([one for one in group if one in todo[i]] for i in numbers)
        widths = (found.source_widths[i] for i in numbers)
        steps.append(sum(map(small.saved_steps_bytes, sizes, widths)))
    return small.Prediction(tuple(lines), max(steps, default=0))


def _no_meta(found: Subject, number: int) -> SubjectMeta:
    hookpoint = found.hookpoints[number]
    return SubjectMeta(lm="", lm_revision="", hookpoint=hookpoint, lm_dtype="", context_length_tokens=1)


def _named(line: "Line", found: Subject, number: int) -> "Line":
    """With its hookpoint, where there are several."""
    return line if len(found.sources) == 1 else line._replace(note=f"{found.hookpoints[number]}: {line.note}")


def print_prediction(found: "Prediction") -> None:
    """One row per stage, and the totals."""
    rows = []
    for line in found.lines:
        sizes = f"{line.memory_bytes / 1e9:.2f}", f"{line.disk_bytes / 1e9:.3f}"
        rows.append((line.stage, minutes(line.seconds), *sizes, line.note))
    totals = f"{found.memory_bytes / 1e9:.2f}", f"{found.disk_bytes / 1e9:.3f}"
    kept = f"saved steps take up to {found.working_disk_bytes / 1e9:.3f} GB more while it runs"
    rows.append(("in all", minutes(found.seconds), *totals, kept))
    console.table("expected", ("stage", "minutes", "peak GB", "disk GB", "of"), rows, right=(1, 2, 3))


def minutes(seconds: float) -> str:
    """Two places below ten minutes."""
    return f"{seconds / 60:.2f}" if seconds < 600 else f"{seconds / 60:,.0f}"
