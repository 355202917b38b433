"""The study: architectures x sparsities x training seeds on one model, every metric; its runs and where they go.

Each sparsity is a run of the main job of its own below one root, with its own random SAE of equal L0; what both need
(tokens, activations, prompts) is made once. Everything is resumed by the artefacts. Torch-free.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from evals.run_config import PRESET_FUNCTIONS, RunConfig
from sae.config import require

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "matryoshka", "gated", "relu")
"""The first is what the others are compared with."""
KEPT = ("leaderboard.csv", "leaderboard.md", "leaderboard.parquet", "study.md", "study.json", "run-k*.json")
"""What is kept in git of a finished study as it is, beside all rows in one table and pages; SAEs, activations, latents,
resampling draws and details are not."""
CHAIN = ("exemplars", "explanations", "scores", "effects")


@dataclass(kw_only=True, frozen=True)
class Sparsity:
    """One level of sparsity: k where it can be said, penalties that leave about as many latents where it cannot."""

    k: int
    l1: float
    """relu; chosen from docs/log.md, the L0 that comes out is measured."""
    gate_l1: float
    """gated."""


SPARSITIES = (Sparsity(k=32, l1=0.15, gate_l1=0.39), Sparsity(k=64, l1=0.075, gate_l1=0.27))


@dataclass(kw_only=True, frozen=True)
class StudyConfig:
    """Train, measure and describe; a repeated command does only what is missing."""

    root: Path = Path("results/study")
    """Where artefacts, rows and pages go."""
    preset: str = "quick"
    """Sizes of the evaluations: tiny, quick or paper."""
    model: str = "default"
    texts: str = "default"
    architectures: tuple[str, ...] = ARCHITECTURES
    """The first is the reference."""
    sparsities: tuple[Sparsity, ...] = SPARSITIES
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; at least two, or no difference can be called real."""
    evals: tuple[str, ...] = ()
    """Default: every evaluation that a run can have, absorption included."""
    random_model: bool = True
    """Also an SAE of the model with random weights, as a floor of each sparsity."""
    publish: Path | None = None
    """Copy tables and the text here at the end, and build pages, with the latents of the reference's first seeds."""
    report_only: bool = False
    """Only write the text anew from the rows that are there."""
    dry_run: bool = False
    """Say what would run, with estimated minutes, memory and disk."""
    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    base: RunConfig | None = field(default=None)
    """Configuration to start from instead of the preset's (for tests)."""

    def __post_init__(self) -> None:
        require(len(self.seeds) >= 2, "--seeds needs two training seeds at least, or no difference can be called real")
        require(len(self.architectures) >= 2, "--architectures needs a reference and another")
        require(bool(self.sparsities), "--sparsities is empty")

    def runs(self) -> list[RunConfig]:
        """One per sparsity."""
        base = self.base or PRESET_FUNCTIONS[self.preset]()
        evals = self.evals or tuple(every_evaluation())
        runs = [
            replace(
                base, root=self.root, model=self.model, texts=self.texts, architectures=self.architectures,
                train_seeds=self.seeds, evals=evals, random_model=self.random_model, engine=self.engine,
                workers=self.workers,
                train=replace(base.train, k=s.k, l1=s.l1, gate_l1=s.gate_l1),
            )  # fmt: skip
            for s in self.sparsities
        ]
        return runs if self.evals else [_measurable(run) for run in runs]


def _measurable(run: RunConfig) -> RunConfig:
    """Without the evaluations that this preset has nothing for: `tiny` names no probe task."""
    from evals.checks import applicable

    return replace(run, evals=tuple(e.name for e in applicable(run)[0]))


def every_evaluation() -> list[str]:
    """All but those that need what this study has not: a known dictionary, transcoders."""
    from evals.measure import select

    return [e.name for e in select(()) if "truth" not in e.needs and "transcode" not in e.uses]


def publish(root: Path, target: Path, shown: Sequence[str] = ()) -> list[str]:
    """Copy what is kept in git, and build pages: all tables and SAEs, but the latents of the SAEs ``shown`` alone.

    The pages of all thousand latents would weigh fifty megabytes. Returns what was written; an older copy is replaced.
    """
    from evals.study_report import study_rows

    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for pattern in KEPT:
        for old in target.glob(pattern):
            old.unlink()
        for source in sorted(root.glob(pattern)):
            shutil.copy2(source, target / source.name)
            copied.append(source.name)
    study_rows(root).to_parquet(target / "rows.parquet", compression="zstd", index=False)
    _pages(root, target / "site", shown)
    return [*copied, "rows.parquet", "site"]


def _pages(root: Path, target: Path, shown: Sequence[str]) -> None:
    """The site of a folder that shows less: links to the rows and SAEs, and to the artefacts of the latents shown."""
    from evals.leaderboard import build
    from evals.page_data import chains_of

    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        for part in ("rows", "saes", "tokens", "latents", "run.json"):
            if (root / part).exists():
                (staging / part).symlink_to((root / part).resolve())
        for sae_id, links in chains_of(root).items():
            for folder in (links[kind] for kind in CHAIN if kind in links and sae_id in shown):
                (staging / folder.parent.name).mkdir(exist_ok=True)
                (staging / folder.parent.name / folder.name).symlink_to(folder.resolve())
        build(staging)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(staging / "site", target)
