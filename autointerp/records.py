"""The records that flow between the stages of ``autointerp``. Torch-free; every record has ``to_dict``/``from_dict``.

W tokens per window. Activations are in the LM's own units.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Self

from sae.config import from_dict

EXPLAIN, CALIBRATE, SCORE = "explain", "calibrate", "score"
INTERP_SPLITS = (EXPLAIN, CALIBRATE, SCORE)

POSITIVE_KINDS = ("top", "quantile", "random_positive")
DIAGNOSTIC_KINDS = ("embedding_near",)
"""Silent windows of no known share of the population: scored as a group of their own, never part of another metric."""
NEGATIVE_KINDS = ("silent", "same_token", "co_occurring", "decoder_near", *DIAGNOSTIC_KINDS)

TRANSPORT_CODES = frozenset({"timeout", "rate_limited", "server_error", "connection", "pending"})
"""The request got no reply at all; asked again, it may."""

ANSWER_CODES = frozenset({"refusal", "empty", "truncated"})
"""The model did answer, and was paid for it, but there is nothing to read: asked again, it would say the same."""

FAILURE_CODES = frozenset(
    # transport
    "timeout rate_limited server_error connection pending quota_exhausted auth budget_stop prompt_too_long unsupported "
    # reply
    "empty refusal truncated no_json schema out_of_range duplicate too_long echo low_mass "
    # data
    "dead too_few_positive too_few_documents no_hard_negative n2g_unreproducible n2g_degenerate no_candidate "
    # metric
    "constant_truth constant_prediction one_class too_few_rows no_active_latent no_effect constant_target "
    "non_finite gate_failed kl_unreachable too_many_failures undefined out_of_memory internal".split()
)


class Record:
    """Mixin: JSON in and out, strict."""

    def to_dict(self) -> dict[str, Any]:
        """What ``dataclasses.asdict`` gives; numbers and texts, which no one can change, are not copied."""
        return _as_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return from_dict(cls, values)


_UNCHANGEABLE = frozenset({str, int, float, bool, type(None)})


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def _as_dict(record: Any) -> dict[str, Any]:
    return {name: _plain(getattr(record, name)) for name in _field_names(type(record))}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """Records as dicts, at any depth; the rest copied where it can change."""
    kind = type(value)
    if kind in _UNCHANGEABLE or kind is tuple and _UNCHANGEABLE.issuperset(map(type, value)):
        return value
    if is_dataclass(value):
        return _as_dict(value)
    if kind in (tuple, list):
        return kind(map(_plain, value))
    if kind is dict:
        return {_plain(k): _plain(v) for k, v in value.items()}
    return deepcopy(value)


@dataclass(frozen=True, kw_only=True)
class Failure(Record):
    """What went wrong with one item. Never turned into a number or a text."""

    code: str
    """One of FAILURE_CODES."""
    stage: str
    """explain, simulate, score, exemplars, ..."""
    detail: str = ""
    request_key: str | None = None

    def __post_init__(self) -> None:
        if self.code not in FAILURE_CODES:
            raise ValueError(f"unknown failure code {self.code!r}; add it to FAILURE_CODES with its meaning")


class ActivationScale(StrEnum):
    """Unit of simulated values."""

    UNIT = "unit"
    """0 to 1."""
    ACTIVATION = "activation"
    """The LM's own units."""


@dataclass(frozen=True, kw_only=True)
class Exemplar(Record):
    """One window of one document, with what a latent does on it."""

    exemplar_id: str
    latent: int
    kind: str
    """One of POSITIVE_KINDS or NEGATIVE_KINDS."""
    split: str
    group: int = -1
    """Quantile group, 0 = weakest; -1 where there are no groups."""
    doc_id: str = ""
    source: str = ""
    """File the document came from."""
    row: int = 0
    start: int = 0
    """Position of the window's first token in its row."""
    token_ids: tuple[int, ...] = ()
    acts: tuple[float, ...] = ()
    """One per token; zeros for a silent window."""
    peak: int = -1
    """Index of the largest activation inside the window; -1 if silent."""
    stratum: str = ""
    """Silent windows: same_token, co_occurring, decoder_near or rest (AUTOINTERP 2)."""
    stratum_share: float | None = None
    """Population share of that stratum among the silent windows of the split."""
    neighbour: int | None = None
    """Latent that made this a hard negative."""

    @property
    def positive(self) -> bool:
        return self.kind in POSITIVE_KINDS


@dataclass(frozen=True, kw_only=True)
class LatentView(Record):
    """All that an explainer may see of a latent: exemplars of the split `explain`, statistics, output tokens."""

    sae_id: str
    latent: int
    exemplars: tuple[Exemplar, ...]
    """Split `explain` only; asserted."""
    density: float
    max_act: float
    top_tokens: tuple[str, ...] = ()
    """Decoded tokens with the largest mean activation on the split explain."""
    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from sae.errors import LeakError

        wrong = sorted({e.split for e in self.exemplars} - {EXPLAIN})
        if wrong:
            raise LeakError(f"latent {self.latent}: an explainer was handed exemplars of split {', '.join(wrong)}")


@dataclass(frozen=True, kw_only=True)
class Explanation(Record):
    """One candidate explanation of a latent, or the failure to make one."""

    explanation_id: str
    sae_id: str
    latent: int
    explainer: str
    explainer_version: int = 1
    role: str = "input"
    text: str | None = None
    """None only for a failure or a bare pattern."""
    pattern: dict[str, Any] | None = None
    """Serialised N2G patterns (AUTOINTERP 3)."""
    candidate: int = 0
    selected: bool = True
    calibrate_score: float | None = None
    """On the split calibrate, used to choose among candidates, never reported as the score: balanced accuracy of
    prompted detection, or the AUC of embedded phrases (:mod:`autointerp.choose`)."""
    margin: float | None = None
    """pmi: how far the winner leads, in its own units."""
    hedged: bool = False
    llm: str | None = None
    llm_revision: str | None = None
    prompt_sha256: str | None = None
    exemplar_ids: tuple[str, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class Simulation(Record):
    """Expected activation per token of one window under one explanation, or a failure; never zeros for a failure."""

    explanation_id: str
    exemplar_id: str
    simulator: str
    scale: ActivationScale = ActivationScale.UNIT
    values: tuple[float, ...] | None = None
    """W values."""
    mass: tuple[float, ...] | None = None
    """Probability mass on the digit alphabet, per token (all-at-once)."""
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreItem(Record):
    """Verdict on one window."""

    explanation_id: str
    exemplar_id: str
    scorer: str
    positive: bool
    value: float | None = None
    """Judge's real-valued answer: cosine, likelihood contrast, p(yes)."""
    verdict: bool | None = None
    """None if failed."""
    failure: Failure | None = None
    mask: tuple[int, ...] = ()
    """fuzzing: indices of the tokens that were shown marked."""


@dataclass(frozen=True, kw_only=True)
class LatentScore(Record):
    """One metric of one explanation of one latent."""

    sae_id: str
    latent: int
    explanation_id: str
    explainer: str
    scorer: str
    scorer_version: int
    judge: str
    """Which model judged: 'minilm', an LM's name, 'pattern'."""
    metric: str
    """precision, recall, f1, fpr, balanced_accuracy, auc, precision_at_half, pearson, ..."""
    group: str = ""
    """"" for the aggregate, else 'decile=3', 'kind=same_token', ..."""
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n_pos: int = 0
    n_neg: int = 0
    n_failed: int = 0
    value_worst: float | None = None
    """Failures counted as wrong."""
    base_rate: float | None = None
    """pi: share of the split's grid windows on which the latent is active."""
    floor_kind: str = ""
    """"" for the true explanation, 'shuffled' for another latent's explanation on the same windows."""
    null_reason: str | None = None
    """Failure code why value is None."""


@dataclass(frozen=True, kw_only=True)
class JudgeCheck(Record):
    """How well a judge did on known features before it was believed (AUTOINTERP 5.4)."""

    judge: str
    scorer: str
    auc: float | None
    ci_low: float | None
    ci_high: float | None
    wrong_auc: float | None
    """The same under wrong descriptions."""
    n: int
    n_failed: int = 0
    weak: bool = True
    """AUC below 0.75 or less than 0.15 above wrong_auc: shown, never ranked."""
    detail: dict[str, Any] = field(default_factory=dict)
