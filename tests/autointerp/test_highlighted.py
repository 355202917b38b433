"""The LLM explainer: what it shows, what it accepts, what becomes a failure."""

import json

import pytest

from autointerp.client import CachedClient, Capabilities
from autointerp.clients.scripted import ScriptedClient
from autointerp.explainers.highlighted import PLUGIN as Highlighted
from autointerp.interfaces import ExplainContext, Explainer
from autointerp.prompts import load_prompt
from autointerp.records import Exemplar, LatentView
from sae.errors import Unsupported


class Words:
    """Token i is the word w<i>."""

    def decode(self, ids) -> str:
        return "".join(f" w{i}" for i in ids)


def exemplar(number: int, kind: str, peak_act: float, group: int = -1) -> Exemplar:
    return Exemplar(
        exemplar_id=f"e{number:03d}", latent=7, kind=kind, split="explain", group=group,
        token_ids=tuple(range(10 * number, 10 * number + 10)), acts=(0.0, 0.0, peak_act, *([0.0] * 7)), peak=2,
    )  # fmt: skip


def view(n_top: int = 12, n_groups: int = 10, latent: int = 7) -> LatentView:
    shown = [exemplar(i, "top", 20.0 - i) for i in range(n_top)]
    shown += [exemplar(50 + g, "quantile", 1.0 + g, group=g) for g in range(n_groups)]
    shown += [
        Exemplar(exemplar_id=f"s{i}", latent=7, kind="silent", split="explain", token_ids=(900 + i,), acts=(0.0,))
        for i in range(5)
    ]
    return LatentView(sae_id="s", latent=latent, exemplars=tuple(shown), density=0.01, max_act=20.0)


def explain(answer, views=None, **options):
    backend = ScriptedClient(answer) if callable(answer) else ScriptedClient(queue=answer)
    ctx = ExplainContext(client=CachedClient(backend), tokenizer=Words())
    return Highlighted(**options).explain_many(views if views is not None else [view()], ctx), backend


def said(text: str) -> str:
    return json.dumps({"explanation": text})


def test_it_is_an_explainer() -> None:
    assert isinstance(Highlighted(), Explainer)


def test_a_good_reply_becomes_an_explanation() -> None:
    [[record]], backend = explain(lambda r: said("  words of the\n second kind "))
    assert record.text == "words of the second kind" and record.failure is None
    assert record.explanation_id == "s/7/highlighted/0" and record.llm == "scripted"
    assert record.prompt_sha256 == load_prompt("highlighted").sha256
    assert record.prompt_tokens > 0 and record.output_tokens > 0 and len(backend.sent) == 1


def test_it_shows_ten_top_windows_and_one_per_group_and_no_silent_one() -> None:
    [[record]], backend = explain(lambda r: said("x y"))
    shown = backend.sent[0].messages[-1].content.splitlines()
    assert len(shown) == 20 and shown[0].startswith("[1] w0 w1 <<w2>> w3") and shown[0].endswith("(w2=9)")
    assert not any(" w900" in line for line in shown)
    assert record.exemplar_ids[:2] == ("e000", "e001") and len(record.exemplar_ids) == 20


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("no braces here", "no_json"), ('{"explanation": 3}', "schema"), ('{"text": "x"}', "schema"),
        ('{"explanation": "a", "more": 1}', "schema"), ('{"explanation": " "}', "empty"),
        ('{"explanation": "a"', "no_json"),
        (said("word " * 41), "too_long"), (said("times of day, in words or figures"), "echo"),
        (said("the <<marked>> word"), "echo"), (said(" ".join(f"w{i}" for i in range(10, 19))), "echo"),
    ],
)  # fmt: skip
def test_a_bad_reply_is_asked_again_once_and_then_fails(reply: str, code: str) -> None:
    [[record]], backend = explain(lambda r: reply)
    assert record.text is None and record.failure.code == code and record.failure.request_key
    assert [r.attempt for r in backend.sent] == [0, 1]
    assert backend.sent[1].messages[-1].content.endswith(load_prompt("highlighted").section("reminder"))


def test_the_second_try_counts() -> None:
    [[record]], _ = explain(["nonsense", said("names of rivers")])
    assert record.text == "names of rivers" and record.failure is None


@pytest.mark.parametrize(
    "reply",
    ["```json\n" + said("names of rivers") + "\n```", "Sure! " + said("names of rivers") + " Hope that helps.",
     "Thinking...\n**EXPLANATION:** names of rivers", "EXPLANATION: wrong\nEXPLANATION: names of rivers"],
)  # fmt: skip
def test_usual_wrappings_are_read(reply: str) -> None:
    [[record]], _ = explain(lambda r: reply)
    assert record.text == "names of rivers"


def test_transport_failures_are_passed_on_and_not_repeated() -> None:
    from autointerp.records import Failure

    [[record]], backend = explain(lambda r: Failure(code="refusal", stage="generate"))
    assert record.failure.code == "refusal" and len(backend.sent) == 1


def test_hedged_texts_stay() -> None:
    [[record]], _ = explain(lambda r: said("unclear, perhaps names"))
    assert record.text == "unclear, perhaps names" and record.hedged
    [[plain]], _ = explain(lambda r: said("names of rivers"))
    assert not plain.hedged


def test_candidates_have_seeds_and_numbers_of_their_own() -> None:
    [records], backend = explain(lambda r: said(f"text {r.seed}"), candidates=3)
    assert [r.candidate for r in records] == [0, 1, 2] and [r.selected for r in records] == [True, False, False]
    assert len({r.seed for r in backend.sent}) == 3 and {r.temperature for r in backend.sent} == {0.8}


def test_too_few_windows_cost_nothing() -> None:
    [[record]], backend = explain(lambda r: said("x"), [view(n_top=1, n_groups=0)])
    assert record.failure.code == "too_few_positive" and backend.sent == []


def test_order_of_views_does_not_matter() -> None:
    views = [view(latent=i, n_top=3 + i) for i in range(3)]
    answer = lambda r: said("n " + str(len(r.messages[-1].content)))  # noqa: E731
    forward, _ = explain(answer, views)
    backward, _ = explain(answer, views[::-1])
    assert forward == backward[::-1] and explain(answer, [])[0] == []


def test_windows_are_dropped_where_the_context_is_small() -> None:
    capabilities = Capabilities(context_tokens=800)
    backend = ScriptedClient(lambda r: said("x y"), capabilities=capabilities)
    [[record]] = Highlighted().explain_many([view()], ExplainContext(client=CachedClient(backend), tokenizer=Words()))
    assert 2 <= len(record.exemplar_ids) < 20 and record.exemplar_ids[0] == "e000"


def test_without_a_model_it_says_so() -> None:
    with pytest.raises(Unsupported, match="highlighted"):
        Highlighted().explain_many([view()], ExplainContext(tokenizer=Words()))
