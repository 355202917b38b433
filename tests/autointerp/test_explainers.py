"""What every explainer promises, whoever wrote it; run on a world in which the answer is known."""

from dataclasses import replace

import pytest
from judges import COIN, ORACLE, TOKENIZER, TOPICS, Words, last_acts, refuse, topics_in, view, window

from autointerp.client import CachedClient
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import NEEDS, ExplainContext, Explainer, check_needs
from autointerp.pattern_explainer import tokenizer_hash
from autointerp.records import FAILURE_CODES, Explanation, LatentView
from sae import plugins
from sae.errors import LeakError, Unsupported

ROOM = "autointerp.explainers"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", plugins.names(ROOM) + list(metafunc.config.getoption("--plugin", default=[])))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path_factory.getbasetemp() / "saescope_cache"))


def test_the_vocabulary_is_sorted_once_per_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each SAE; anew where tokens were added."""
    from tiny import byte_tokenizer

    first, second, asked = byte_tokenizer(), byte_tokenizer(), []
    whole = type(first).get_vocab
    monkeypatch.setattr(type(first), "get_vocab", lambda self: asked.append(self) or whole(self))
    hashes = [tokenizer_hash(t) for t in (first, first, second, first)]
    assert len(set(hashes)) == 1 and len(hashes[0]) == 16 and len(asked) == 2
    first.add_tokens(["<new>"])
    assert tokenizer_hash(first) != hashes[0] == tokenizer_hash(second) and len(asked) == 3


def explain(name: str, views: list[LatentView], answer=ORACLE) -> tuple[list[list[Explanation]], ScriptedClient]:
    backend = ScriptedClient(answer, tokenizer=TOKENIZER)
    ctx = ExplainContext(client=CachedClient(backend), embedder=Words(), tokenizer=TOKENIZER, last_acts=last_acts)
    plugin = plugins.find(ROOM, name)()
    check_needs(plugin, ctx)
    return plugin.explain_many(views, ctx), backend


def views() -> list[LatentView]:
    return [view(latent) for latent in range(len(TOPICS))]


def test_declarations(name: str) -> None:
    plugin = plugins.find(ROOM, name)()
    assert isinstance(plugin, Explainer) and plugin.needs <= NEEDS and plugin.version >= 1
    assert plugin.name == name or ":" in name


def test_it_finds_the_topic(name: str) -> None:
    found, _ = explain(name, views())
    for one, records in zip(views(), found, strict=True):
        good = [r for r in records if r.failure is None]
        assert good, records
        for r in good:  # a pattern needs no more of the topic than its last letters
            said = r.text or ""
            assert topics_in(said) == {TOPICS[one.latent]} or (r.pattern and TOPICS[one.latent][-3:] in said), said


@pytest.mark.parametrize("answer", [ORACLE, COIN, refuse])
def test_every_view_has_records_of_its_own(name: str, answer) -> None:
    found, _ = explain(name, views(), answer)
    ids = [r.explanation_id for records in found for r in records]
    assert len(found) == len(TOPICS) and all(found) and len(set(ids)) == len(ids)
    for one, records in zip(views(), found, strict=True):
        for r in records:
            assert (r.sae_id, r.latent, r.explainer) == (one.sae_id, one.latent, plugins.find(ROOM, name).name)
            assert (r.failure is None) == (r.text is not None or r.pattern is not None)
            assert r.failure is None or (r.failure.code in FAILURE_CODES and r.text is None and r.pattern is None)
            assert set(r.exemplar_ids) <= {e.exemplar_id for e in one.exemplars}
            assert Explanation.from_dict(r.to_dict()) == r


def test_order_changes_nothing(name: str) -> None:
    forward, _ = explain(name, views())
    backward, _ = explain(name, views()[::-1])
    alone = [explain(name, [one])[0][0] for one in views()]
    assert forward == backward[::-1] == alone
    assert explain(name, [])[0] == []


def test_a_view_without_positives_fails_and_costs_nothing(name: str) -> None:
    silent = replace(view(), exemplars=tuple(e for e in view().exemplars if not e.positive), promoted=())
    code = "no_candidate" if plugins.find(ROOM, name).name == "output_side" else "too_few_positive"
    for one in (silent, replace(view(), exemplars=(), promoted=())):
        [records], backend = explain(name, [one])
        assert {r.failure.code for r in records if r.failure} == {code} and not backend.sent
        assert all(r.text is None and r.pattern is None for r in records)


def test_a_refusing_model_gives_failures_not_texts(name: str) -> None:
    found, backend = explain(name, views(), refuse)
    asks = any(n.startswith("client:") for n in plugins.find(ROOM, name)().needs)
    assert bool(backend.sent) == asks
    if asks:
        assert {r.failure.code if r.failure else None for records in found for r in records} == {"refusal"}


def test_what_is_missing_is_said_before_any_work(name: str) -> None:
    plugin = plugins.find(ROOM, name)()
    if plugin.needs:
        with pytest.raises(Unsupported, match=plugin.name):
            check_needs(plugin, ExplainContext(tokenizer=TOKENIZER))


@pytest.mark.parametrize("split", ["calibrate", "score"])
def test_no_explainer_can_be_shown_what_is_scored(split: str) -> None:
    with pytest.raises(LeakError, match=split):
        replace(view(), exemplars=(*view().exemplars, window(0, split, "quantile", 0, group=0)))
