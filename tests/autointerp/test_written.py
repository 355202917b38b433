"""What each writing explainer shows the model; how it reads and records is tested once, in test_highlighted."""

import re

import pytest
from judges import ORACLE, TOKENIZER, TOPICS, topics_in, view

from autointerp.client import CachedClient, Capabilities
from autointerp.clients.scripted import ScriptedClient
from autointerp.explainers.combined import PLUGIN as Combined
from autointerp.explainers.contrastive import PLUGIN as Contrastive
from autointerp.explainers.highlighted import PLUGIN as Highlighted
from autointerp.explainers.output_side import PLUGIN as OutputSide
from autointerp.explainers.token_activation import PLUGIN as TokenActivation
from autointerp.interfaces import ExplainContext
from autointerp.records import Exemplar, LatentView
from autointerp.reply_cache import ReplyCache


def exemplar(number: int, text: str, acts, kind: str = "top", group: int = -1) -> Exemplar:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    acts = tuple(float(a) for a in acts)
    assert len(ids) == len(acts)
    return Exemplar(
        exemplar_id=f"{kind}{number:03d}", latent=7, kind=kind, split="explain", group=group, token_ids=ids, acts=acts,
        peak=acts.index(max(acts)) if max(acts) > 0 else -1,
    )  # fmt: skip


def latent(*shown: Exemplar, **fields) -> LatentView:
    return LatentView(sae_id="s", latent=7, exemplars=shown, density=0.01, max_act=9.0, **fields)


def run(explainer, views, answer=ORACLE, cache=None, **capabilities):
    backend = ScriptedClient(answer, tokenizer=TOKENIZER, capabilities=Capabilities(**capabilities))
    ctx = ExplainContext(client=CachedClient(backend, cache), tokenizer=TOKENIZER)
    return explainer.explain_many(views, ctx), backend


def asked(explainer, *shown: Exemplar, **fields) -> str:
    _, backend = run(explainer, [latent(*shown, **fields)])
    assert len(backend.sent) == 1
    return backend.sent[0].messages[-1].content


# --- token_activation ------------------------------------------------------------------------------------------------


def test_pairs_are_floors_of_ninths_of_the_largest_shown() -> None:
    said = asked(TokenActivation(), exemplar(0, "abcd", [0, 4.4, 9, 1]), exemplar(1, "xyzw", [3, 0, 0.9, 8.9]))
    assert said == "Text 1\na\t0\nb\t4\nc\t9\nd\t1\nText 2\nx\t3\ny\t0\nz\t0\nw\t8"


def test_few_active_tokens_are_repeated() -> None:
    said = asked(TokenActivation(), exemplar(0, "abcdefgh", [0] * 7 + [9]), exemplar(1, "ABCDEFGH", [0] * 7 + [5]))
    assert said.endswith("H\t5\nOnly the tokens above 0, all texts\nh\t9\nH\t5")


def test_each_token_is_one_line_whatever_it_holds() -> None:
    said = asked(TokenActivation(), exemplar(0, "a\n\t😀", [0, 9, 9, 0, 0, 5, 0]), exemplar(1, "b", [3]))
    assert said.startswith("Text 1\na\t0\n\\n\t9\n\\t\t9\n😀\t5\nText 2\nb\t3")


def test_the_strongest_five_records_are_shown() -> None:
    shown = [exemplar(i, f"{i}x", [0, i + 1]) for i in range(8)]
    said = asked(TokenActivation(), *shown)
    assert re.findall(r"^(\d)\t0$", said, re.M) == ["7", "6", "5", "4", "3"]


# --- contrastive -----------------------------------------------------------------------------------------------------


def test_ten_of_each_side_hard_negatives_first_and_no_marks() -> None:
    silent = [exemplar(i, f"plain{i}", [0] * (5 + len(str(i))), "silent") for i in range(12)]
    hard = [exemplar(i, f"hard{i}", [0] * 5, "same_token") for i in range(4)]
    top = [exemplar(i, f"t{i}", [0] * (len(str(i))) + [20 - i]) for i in range(10)]
    groups = [exemplar(i, f"g{i}", [0, 1 + i], "quantile", group=i) for i in range(10)]
    said = asked(Contrastive(), *silent, *hard, *groups, *top)
    active, _, quiet = said.partition("\nSet B\n")
    assert active.splitlines()[0] == "Set A" and "<<" not in said
    a, b = ([x.split("] ")[1] for x in part.splitlines() if x.startswith("[")] for part in (active, quiet))
    assert a == ["t0", "t1", "t2", "t3", "t4", "g9", "g7", "g5", "g3", "g1"]
    assert b == ["hard0", "hard1", "hard2", "hard3", *(f"plain{i}" for i in range(6))]


def test_both_sides_shrink_together_where_the_context_is_small() -> None:
    [[record]], backend = run(Contrastive(), [view(0, 10)], context_tokens=1_500)
    n_active = sum("/silent/" not in i for i in record.exemplar_ids)
    assert 2 <= n_active < 10 and len(record.exemplar_ids) - n_active in (n_active, n_active - 1)
    assert topics_in(record.text) == {TOPICS[0]} and len(backend.sent) == 1


def test_without_silent_windows_nothing_is_asked() -> None:
    [[record]], backend = run(Contrastive(), [latent(*(exemplar(i, "ab", [0, 1]) for i in range(4)))])
    assert record.failure.code == "too_few_positive" and not backend.sent


# --- output_side, combined -------------------------------------------------------------------------------------------


def test_tokens_stand_between_bars_with_their_blanks() -> None:
    said = asked(OutputSide(), promoted=(" a", "\n", '"', " |"), suppressed=())
    assert said == 'Raised: | a| |\\n| |"| | ||\nLowered: (none)'


def test_roles_are_recorded() -> None:
    views = [view(1)]
    roles = {type(e).name: run(e, views)[0][0][0].role for e in (Highlighted(), OutputSide(), Combined())}
    assert roles == {"highlighted": "input", "output_side": "output", "combined": "both"}


def test_combined_joins_both_and_asks_nothing_that_they_have_asked(tmp_path) -> None:
    cache = ReplyCache(tmp_path / "r.sqlite")
    for explainer in (Highlighted(), OutputSide()):
        run(explainer, [view(1)], cache=cache)
    [[record]], backend = run(Combined(), [view(1)], cache=cache)
    assert not backend.sent
    assert record.text == f"the word {TOPICS[1]}; the next words: the word {TOPICS[1]}"
    assert record.exemplar_ids and record.llm == "scripted"


@pytest.mark.parametrize("side", ["input", "output"])
def test_combined_fails_where_a_side_fails(side: str) -> None:
    def answer(request):
        broken = ("Raised:" in request.messages[-1].content) == (side == "output")
        return "nonsense" if broken else ORACLE(request)

    [[record]], _ = run(Combined(), [view(1)], answer)
    assert record.text is None and record.failure.code == "no_json"
