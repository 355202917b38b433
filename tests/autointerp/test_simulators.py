"""What every simulator promises, whoever wrote it."""

import math
from functools import cache

import numpy as np
import pytest
from judges import ORACLE, TOKENIZER, Words, explanation, last_acts, view, windows

from autointerp.client import CachedClient
from autointerp.clients.scripted import ScriptedClient
from autointerp.explainers.n2g import PLUGIN as N2G
from autointerp.interfaces import NEEDS, ExplainContext, ScoreContext, Simulator, check_needs
from autointerp.records import FAILURE_CODES, Exemplar, Explanation, Failure, Simulation
from sae import plugins
from sae.errors import Unsupported

ROOM = "autointerp.simulators"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", plugins.names(ROOM) + list(metafunc.config.getoption("--plugin", default=[])))


@cache
def pattern(latent: int) -> dict:
    ctx = ExplainContext(tokenizer=TOKENIZER, last_acts=last_acts)
    [[found]] = N2G().explain_many([view(latent)], ctx)
    assert found.pattern is not None
    return found.pattern


def pairs(latents=(0, 1), n: int = 4) -> list[tuple[Explanation, Exemplar]]:
    """Explanations that have a text and a pattern, so that any simulator finds what it reads."""
    return [(explanation(i, pattern=pattern(i)), e) for i in latents for e in windows(i, "score", n)]


def simulate(name: str, asked, answer=ORACLE) -> tuple[list[Simulation], ScriptedClient]:
    backend = ScriptedClient(answer, tokenizer=TOKENIZER)
    ctx = ScoreContext(client=CachedClient(backend), embedder=Words(), tokenizer=TOKENIZER)
    plugin = plugins.find(ROOM, name)()
    check_needs(plugin, ctx)
    return plugin.simulate_many(asked, ctx), backend


def test_declarations(name: str) -> None:
    plugin = plugins.find(ROOM, name)()
    assert isinstance(plugin, Simulator) and plugin.needs <= NEEDS and plugin.version >= 1
    assert plugin.name == name or ":" in name


def test_one_value_per_token(name: str) -> None:
    found, _ = simulate(name, pairs())
    assert len(found) == len(pairs())
    for (said, e), s in zip(pairs(), found, strict=True):
        assert (s.explanation_id, s.exemplar_id) == (said.explanation_id, e.exemplar_id) and s.failure is None
        assert s.values is not None and len(s.values) == len(e.token_ids)
        assert all(math.isfinite(v) and v >= 0 for v in s.values)
        assert s.scale == "activation" or max(s.values) <= 1
        assert Simulation.from_dict(s.to_dict()) == s


def test_the_topic_is_where_the_values_are(name: str) -> None:
    found, _ = simulate(name, pairs())
    for (_, e), s in zip(pairs(), found, strict=True):
        values, acts = np.array(s.values), np.array(e.acts)
        if e.positive:
            assert values[acts > 0].max() > 0.9 and values[acts == 0].max() < 0.05
        else:
            assert values.max() < 0.05


def test_another_latents_explanation_simulates_nothing(name: str) -> None:
    crossed = [(explanation(1, pattern=pattern(1)), e) for e in windows(0, "score", 4)]
    assert all(max(s.values or (9,)) < 0.05 for s in simulate(name, crossed)[0])


def test_order_changes_nothing(name: str) -> None:
    asked = pairs()
    assert simulate(name, asked)[0] == simulate(name, asked[::-1])[0][::-1]
    assert simulate(name, asked)[0] == [simulate(name, [p])[0][0] for p in asked]
    assert simulate(name, [])[0] == []


def test_a_failed_explanation_is_passed_on_and_costs_nothing(name: str) -> None:
    failed = explanation(0, None, failure=Failure(code="no_candidate", stage="explain"))
    empty = explanation(0, None)
    for said, code in ((failed, "no_candidate"), (empty, "unsupported")):
        found, backend = simulate(name, [(said, e) for e in windows(0, "score", 2)])
        assert {s.failure.code for s in found if s.failure} == {code} and all(s.values is None for s in found)
        assert len(found) == 4 and not backend.sent


@pytest.mark.parametrize("code", ["refusal", "timeout"])
def test_a_failing_model_gives_failures_not_zeros(name: str, code: str) -> None:
    found, backend = simulate(name, pairs(), lambda r: Failure(code=code, stage=r.verb))
    asks = any(n.startswith("client:") for n in plugins.find(ROOM, name)().needs)
    assert bool(backend.sent) == asks
    for s in found:
        assert (s.values is None) == asks == (s.failure is not None)
        assert s.failure is None or s.failure.code == code in FAILURE_CODES


def test_what_is_missing_is_said_before_any_work(name: str) -> None:
    plugin = plugins.find(ROOM, name)()
    if plugin.needs:
        with pytest.raises(Unsupported, match=plugin.name):
            check_needs(plugin, ScoreContext(tokenizer=TOKENIZER))
