"""The study in one command: train, measure, compare, describe. Resumes where it was stopped.

``python scripts/study.py --dry-run`` says what it would take; ``--report-only`` writes the text anew from the rows.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evals.study import StudyConfig, publish  # noqa: E402
from sae import console, exits  # noqa: E402
from sae.errors import ConfigError, SaescopeError  # noqa: E402

SHARED = ("tokens", "activations", "eval: probe_loss", "eval: absorption")
"""Stages that the first run makes for all, and evaluations whose passes of the model are kept as artefacts."""


def dry_run(cfg: StudyConfig) -> None:
    """The plan of every run, and their sum without what is shared."""
    from evals.plan import make_plan, memory_gb
    from sae.language_model import LanguageModel, default_dtype

    runs = cfg.runs()
    lm = LanguageModel.load(cfg.model, dtype=default_dtype(runs[0].device), device=runs[0].device)
    hookpoint = runs[0].hookpoint or lm.default_hookpoint()
    d_in = lm.check_hookpoint(hookpoint)
    rows, total, disk = [], 0.0, 0.0
    for number, run in enumerate(runs):
        for line in make_plan(run, lm, hookpoint, d_in):
            if number and line.stage.startswith(SHARED):
                continue
            total, disk = total + line.seconds, disk + line.disk_gb
            rows.append((f"k {run.train.k}", line.stage, f"{line.seconds / 60:.1f}", line.detail))
    memory = memory_gb(runs[0], lm, d_in)
    rows.append(("", "total", f"{total / 60:.0f}", f"disk {disk:.1f} GB, memory {memory:.1f} GB"))
    columns = ("run", "stage", "minutes", "detail")
    console.table(f"Plan of the study: {lm.name} at {hookpoint}", columns, rows, right=(2,))
    busy = crowding()
    if busy > 1.2:
        console.say(
            f"other work slows this machine about {busy:.1f} times; alone on it the study takes about "
            f"{total / 60 / busy:.0f} minutes"
        )


def crowding() -> float:
    """Wall time of a product over its processor time per thread: 1 on a quiet machine."""
    import torch

    a = torch.randn(1024, 1024)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(40):
        a @ a
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall * torch.get_num_threads() / max(processor, 1e-9)


def run_all(cfg: StudyConfig) -> tuple[int, list[str]]:
    """(worst exit status, failed tasks) of the runs; a run that fails whole is told and the next one goes on."""
    from evals.job import run_job

    status, failures = exits.DONE, []
    for run in cfg.runs():
        begun = time.monotonic()
        try:
            status = max(status, run_job(run))
        except ConfigError:
            raise
        except SaescopeError as error:
            failures.append(f"the run k {run.train.k}: {error}")
            status = exits.FAILED
            continue
        log = json.loads((run.root / "run.json").read_text(encoding="utf-8"))
        failures += [f"{f['subject']}, {f['task']}: {f['error']}" for f in log["failures"]]
        (run.root / f"run-k{run.train.k}.json").write_text(json.dumps(log, indent=1, sort_keys=True) + "\n")
        console.say(f"k {run.train.k}: {(time.monotonic() - begun) / 60:.1f} minutes")
    return status, failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: :mod:`sae.exits`."""
    return exits.run(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    from evals.study_report import write_report

    cfg = tyro.cli(StudyConfig, args=arguments, prog="python scripts/study.py")
    console.setup(False)
    if cfg.dry_run:
        dry_run(cfg)
        return exits.DONE
    status, failures = (exits.DONE, []) if cfg.report_only else run_all(cfg)
    penalties = {(s.l1, s.gate_l1): s.k for s in cfg.sparsities}
    for path in write_report(cfg.root, cfg.architectures[0], penalties, failures):
        console.say(str(path))
    if cfg.publish is not None:
        cells = json.loads((cfg.root / "study.json").read_text(encoding="utf-8"))["cells"]
        shown = [c["sae_ids"][0] for c in cells if c["architecture"] == cfg.architectures[0]]
        console.say(f"{cfg.publish}: {', '.join(publish(cfg.root, cfg.publish, shown))}")
    return status


if __name__ == "__main__":
    sys.exit(main())
