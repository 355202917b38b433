"""Records as dicts and back: as ``dataclasses.asdict`` makes them, strict to read, safe to change."""

from dataclasses import asdict

import pytest

from autointerp.llm_requests import PaidFailure, Usage
from autointerp.records import (
    ActivationScale,
    Exemplar,
    Explanation,
    Failure,
    JudgeCheck,
    LatentScore,
    LatentView,
    Record,
    ScoreItem,
    Simulation,
)
from autointerp.tables import read_jsonl, read_parquet, write_jsonl, write_parquet
from sae.errors import ConfigError

FAILURE = Failure(code="refusal", stage="explain", detail="no")
PAID = PaidFailure(code="empty", stage="explain", usage=Usage(prompt_tokens=3, latency_ms=0.5))
WINDOW = Exemplar(
    exemplar_id="e", latent=3, kind="top", split="explain", token_ids=(1, 2), acts=(0.5, 0.0), peak=0, neighbour=None,
)  # fmt: skip
EXPLANATION = Explanation(
    explanation_id="s/3/n2g/0", sae_id="s", latent=3, explainer="n2g", exemplar_ids=("e", "f"), margin=float("inf"),
    pattern={"patterns": [{"ids": [1, None], "bound": 0.5}], "pad": (7,)},
)  # fmt: skip
SIMULATION = Simulation(explanation_id="x", exemplar_id="e", simulator="w", scale=ActivationScale.ACTIVATION,
                        values=(0.0, 1.5))  # fmt: skip
ITEM = ScoreItem(explanation_id="x", exemplar_id="e", scorer="fuzzing", positive=True, value=0.25, verdict=True,
                 mask=(0, 3))  # fmt: skip
SCORE = LatentScore(sae_id="s", latent=3, explanation_id="x", explainer="n2g", scorer="embedding", scorer_version=1,
                    judge="minilm", metric="auc", value=0.5, null_reason=None)  # fmt: skip
CHECK = JudgeCheck(judge="j", scorer="s", auc=0.9, ci_low=None, ci_high=None, wrong_auc=0.5, n=4,
                   detail={"by": {"topic": [1, 2]}})  # fmt: skip
RECORDS: list[Record] = [
    FAILURE, PAID, WINDOW, EXPLANATION, SIMULATION, ITEM, SCORE, CHECK,
    Explanation(explanation_id="y", sae_id="s", latent=4, explainer="pmi", failure=FAILURE),
    Explanation(explanation_id="z", sae_id="s", latent=5, explainer="pmi", failure=PAID),
    LatentView(sae_id="s", latent=3, exemplars=(WINDOW, WINDOW), density=0.1, max_act=2.0, top_tokens=(" a",)),
]  # fmt: skip


def same(a, b) -> bool:
    """Equal, and of equal types at any depth."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, tuple | list) else a == b


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_as_the_standard_library_has_it(record: Record) -> None:
    assert same(record.to_dict(), asdict(record))  # type: ignore[call-overload]


def test_a_dict_can_be_changed_without_the_record() -> None:
    EXPLANATION.to_dict()["pattern"]["patterns"][0]["ids"].append(9)
    CHECK.to_dict()["detail"]["by"]["topic"].clear()
    assert EXPLANATION.pattern["patterns"] == [{"ids": [1, None], "bound": 0.5}]
    assert CHECK.detail["by"]["topic"] == [1, 2]


@pytest.mark.parametrize("records", [[SIMULATION], [ITEM], [SCORE, SCORE], [CHECK], []])
def test_files_give_back_what_they_were_given(tmp_path, records) -> None:
    kind = type(records[0]) if records else ScoreItem
    write_jsonl(tmp_path / "r.jsonl", records)
    write_parquet(tmp_path / "r.parquet", records, kind)
    assert read_jsonl(tmp_path / "r.jsonl", kind) == records
    if kind is not JudgeCheck:
        assert read_parquet(tmp_path / "r.parquet", kind) == records


@pytest.mark.parametrize(
    ("change", "said"),
    [({"value": "high"}, "ScoreItem.value"), ({"verdict": 1}, "ScoreItem.verdict"), ({"positive": None}, "positive"),
     ({"colour": 1}, "no field 'colour'"), ({"scorer": 3}, "scorer")],
)  # fmt: skip
def test_reading_is_strict(change, said) -> None:
    values = {**ITEM.to_dict(), "mask": [0, 3]}
    assert ScoreItem.from_dict(values) == ITEM and ScoreItem.from_dict({**values, "value": 1}).value == 1
    with pytest.raises(ConfigError, match=said):
        ScoreItem.from_dict({**values, **change})
    del values["positive"]
    with pytest.raises(ConfigError, match="positive"):
        ScoreItem.from_dict(values)
