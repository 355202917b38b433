"""What the plug-ins of ``autointerp`` look like from outside: protocols, contexts, jobs. Torch-free.

A plug-in class has ``name`` (its file name), ``version`` (raised whenever a number or a text may change) and
``needs``, a subset of :data:`NEEDS`: what the
context must hold. The pipeline checks needs with :func:`check_needs` before any work.
All walls are synchronous and take everything at once, so that a plug-in may batch over latents; the answer is in the
order of the question, one entry each, and never depends on that order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from autointerp.judge_sizes import JudgeSizes
from autointerp.records import (
    CALIBRATE,
    SCORE,
    Exemplar,
    Explanation,
    Failure,
    LatentScore,
    LatentView,
    ScoreItem,
    Simulation,
)
from sae.errors import LeakError, Unsupported

if TYPE_CHECKING:
    from autointerp.client import Client
    from sae.base import SAE
    from sae.language_model import LanguageModel

LOGPROB_VERBS = ("next_token", "continuation", "slots")
NEEDS = frozenset(
    {"client:generate", "client:logprobs", "embedder", "last_acts", "lm", "sae"}
    | {f"client:{v}" for v in LOGPROB_VERBS}
)
"""What a plug-in may ask of its context. client:<verb> is a capability of the client; client:logprobs is any of
:data:`LOGPROB_VERBS`."""

STAND_INS = frozenset({"judge_check", "stand-in"})
"""sae_id of jobs about no SAE: those of the judge check and of the estimate. Their windows are all there is."""
SUBJECT_NEEDS = frozenset({"lm", "sae"})
"""What a scorer does without on such jobs."""

Probe = tuple[int, tuple[int, ...]]
"""(latent, token ids): ask for this latent's activation on the last of these tokens."""

LastActs = Callable[[Sequence[Probe]], np.ndarray]
"""float32 [n_probes]: the activation of each probe's latent at its last token (LM + SAE on the probe alone)."""


class EmbedderLike(Protocol):
    """What scorers and simulators use of :class:`autointerp.embedder.Embedder`."""

    name: str
    """Short name, written as `judge`."""

    @property
    def model_hash(self) -> str:
        """Identifies the weights: part of the key of what is computed with them."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, E], rows of unit norm, in the order of ``texts``."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExplainContext:
    """What an explainer may use beside its view. A field is None where the run does not have it."""

    seed: int = 0
    client: "Client | None" = None
    embedder: EmbedderLike | None = None
    lm: "LanguageModel | None" = None
    """The subject model (n2g)."""
    sae: "SAE | None" = None
    tokenizer: Any = None
    """Tokenizer of the subject model: exemplars hold its ids."""
    hookpoint: str = ""
    last_acts: LastActs | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreContext:
    """What a scorer or a simulator may use beside its job."""

    seed: int = 0
    client: "Client | None" = None
    embedder: EmbedderLike | None = None
    lm: "LanguageModel | None" = None
    sae: "SAE | None" = None
    """The SAE whose latents are scored (intervention)."""
    hookpoint: str = ""
    latents: tuple[int, ...] = ()
    """The run's sample of latents; the pipeline fills it in."""
    check_descriptions: int = JudgeSizes().check_descriptions
    """On so many descriptions a judge is checked."""
    tokenizer: Any = None


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """One explanation to be scored on the windows of one latent."""

    explanation: Explanation
    """Under a floor this is another latent's explanation."""
    sae_id: str
    latent: int
    """The latent whose windows these are."""
    exemplars: tuple[Exemplar, ...]
    """Split `score` only, all kinds; asserted."""
    calibrate: tuple[Exemplar, ...] = ()
    """Split `calibrate` only, for thresholds and calibration; asserted."""
    pi: float | None = None
    """Share of the score split's grid windows on which the latent is active."""
    floor_kind: str = ""
    """"" or 'shuffled'."""
    cache: Path | None = None
    """Folder of the latent cache that the windows are from; None where they are from none."""

    def __post_init__(self) -> None:
        for name, items, split in (("exemplars", self.exemplars, SCORE), ("calibrate", self.calibrate, CALIBRATE)):
            wrong = sorted({e.split for e in items} - {split})
            if wrong:
                found = ", ".join(wrong)
                raise LeakError(f"latent {self.latent}: {name} of a score job hold split {found}, expected {split}")


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """What a scorer says of one job."""

    scores: tuple[LatentScore, ...] = ()
    items: tuple[ScoreItem, ...] = ()
    simulations: tuple[Simulation, ...] = ()


SimulationPair = tuple[Explanation, Exemplar]


@runtime_checkable
class Explainer(Protocol):
    """From exemplars to texts or patterns."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[frozenset[str]]

    def explain_many(self, views: list[LatentView], ctx: ExplainContext) -> list[list[Explanation]]:
        """Per view at least one record: candidates, or one whose ``failure`` says why there is none."""
        ...


class Named(Protocol):
    """What every plug-in says of itself."""

    name: ClassVar[str]
    version: ClassVar[int]


def explanation_by(
    explainer: Named, view: LatentView, found: str | Failure, *, candidate: int = 0, **said: Any
) -> Explanation:
    """A record of what ``explainer`` says of the latent of ``view``: the text that was ``found``, or why there is none.
    ``said``: all fields but these and those that name it."""
    return Explanation(
        explanation_id=f"{view.sae_id}/{view.latent}/{explainer.name}/{candidate}",
        sae_id=view.sae_id,
        latent=view.latent,
        explainer=explainer.name,
        explainer_version=explainer.version,
        candidate=candidate,
        text=None if isinstance(found, Failure) else found,
        failure=found if isinstance(found, Failure) else None,
        **said,
    )


@runtime_checkable
class Simulator(Protocol):
    """From an explanation and a window to an expected activation per token."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[frozenset[str]]

    def simulate_many(self, pairs: list[SimulationPair], ctx: ScoreContext) -> list[Simulation]:
        """One record per pair: values as long as ``token_ids``, or a failure and no values."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """From an explanation and windows to metrics.

    Optional attributes: ``max_latents``, ``selected_only``, ``uses_explanation`` (see :func:`autointerp.pipeline.
    jobs_for`), ``separation(items)`` (see :func:`autointerp.judge_check.check_judge`).
    """

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[frozenset[str]]

    def score_many(self, jobs: list[ScoreJob], ctx: ScoreContext) -> list[ScoreResult]:
        """One result per job. A failed item has no verdict, and is counted in ``n_failed``."""
        ...


def missing_needs(needs: frozenset[str], ctx: ExplainContext | ScoreContext) -> list[str]:
    """Which of ``needs`` the context does not hold, sorted. An unknown need is a ValueError: a plug-in's mistake."""
    if needs - NEEDS:
        raise ValueError(f"unknown needs {sorted(needs - NEEDS)}; known: {sorted(NEEDS)}")
    return [need for need in sorted(needs) if not _holds(need, ctx)]


def _holds(need: str, ctx: ExplainContext | ScoreContext) -> bool:
    if not need.startswith("client:"):
        return getattr(ctx, need, None) is not None
    verb = need.removeprefix("client:")
    verbs = LOGPROB_VERBS if verb == "logprobs" else (verb,)
    return ctx.client is not None and any(getattr(ctx.client.capabilities, v) for v in verbs)


def check_needs(plugin: Any, ctx: ExplainContext | ScoreContext, *, but: frozenset[str] = frozenset()) -> None:
    """:class:`Unsupported`, naming the plug-in and what it lacks, before any work is done. ``but``: may be lacking."""
    missing = missing_needs(plugin.needs - but, ctx)
    if missing:
        ways = ["leave this plug-in out"]
        if missing == ["embedder"]:
            ways.insert(0, "give one (--embedder default; of run_all: --interp.embedder default)")
        elif any(need.startswith("client:") for need in missing):
            ways.insert(0, "choose another client")
        raise Unsupported(
            f"{plugin.name!r} needs {', '.join(missing)}, which this run does not have; {' or '.join(ways)}"
        )
