"""Marks: the place alone tells nothing, hosts are what they are called, the question is read strictly."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from tiny import byte_tokenizer

from autointerp.client import CachedClient, Capabilities, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.fuzz import NEGATIVES, RIGHT, SILENT, WRONG, marked_windows, right_mask
from autointerp.interfaces import ScoreContext, ScoreJob
from autointerp.prompts import load_prompt, marked_text
from autointerp.records import Exemplar, Explanation, Failure
from autointerp.scorers.fuzzing import PLUGIN as Fuzzing
from sae.errors import ConfigError, Unsupported
from sae.manifest import rng

TOKENIZER = byte_tokenizer()


def window(number: int, acts, *, group: int = -1) -> Exemplar:
    positive = max(acts) > 0
    letters = rng("letters", number, positive).integers(65, 91, size=len(acts))
    ids = TOKENIZER.encode("".join(map(chr, letters)), add_special_tokens=False)
    return Exemplar(
        exemplar_id=f"{'p' if positive else 's'}{number:05d}", latent=3, kind="quantile" if positive else "silent",
        split="score", group=group if positive else -1, acts=tuple(float(a) for a in acts), token_ids=tuple(ids),
        peak=int(np.argmax(acts)) if positive else -1,
    )  # fmt: skip


def latent(seed: int, n: int = 20, length=(8, 33)) -> tuple[list[Exemplar], list[Exemplar]]:
    """Positive windows whose latent likes a place of its own (as real latents do), and silent ones of all lengths."""
    draw = rng("fuzz_latent", seed)
    home = draw.random()
    positives = []
    for i in range(n):
        acts = np.zeros(int(draw.integers(*length)))
        for _ in range(int(draw.integers(1, 4))):
            at = int(np.clip(draw.normal(home, 0.15), 0, 0.999) * len(acts))
            acts[at : at + int(draw.integers(1, 3))] = draw.uniform(0.5, 3)
        positives.append(window(i, acts, group=i % 5))
    return positives, [window(i, np.zeros(int(draw.integers(*length)))) for i in range(n)]


def drawn(seed: int, **options):
    return marked_windows(*latent(seed, **options), rng("marks", seed))


def test_a_classifier_of_places_is_at_chance() -> None:
    """Naive Bayes on (place marked, number of marks), fitted on 50 latents, tried on 50 others: 2,000 windows each."""

    def features(marked) -> np.ndarray:
        out = np.zeros(33 + 12)
        out[list(marked.mask)] = 1
        out[33 + min(len(marked.mask), 11)] = 1
        return out

    halves = []
    for seeds in (range(50), range(50, 100)):
        items = [m for s in seeds for m in drawn(s)]
        halves.append((np.array([features(m) for m in items]), np.array([m.positive for m in items])))
    (x, y), (x_new, y_new) = halves
    assert len(y) >= 1_900 and len(y_new) >= 1_900
    rate = [(x[y == side].sum(0) + 1) / ((y == side).sum() + 2) for side in (False, True)]
    says = (x_new @ np.log(rate[1] / rate[0]) + (1 - x_new) @ np.log((1 - rate[1]) / (1 - rate[0]))) > 0
    accuracy = (says[y_new].mean() + (~says[~y_new]).mean()) / 2
    assert accuracy == pytest.approx(0.5, abs=0.05)
    # The same classifier sees through marks put at a fixed place, as a peer's negatives are.
    fixed = x_new.copy()
    fixed[~y_new] = 0
    fixed[~y_new, 24] = 1
    fixed[~y_new, 34] = 1
    rate_fixed = [(fixed[y_new == side].sum(0) + 1) / ((y_new == side).sum() + 2) for side in (False, True)]
    seen = fixed @ np.log(rate_fixed[1] / rate_fixed[0])
    seen += (1 - fixed) @ np.log((1 - rate_fixed[1]) / (1 - rate_fixed[0]))
    assert ((seen > 0)[y_new].mean() + (seen <= 0)[~y_new].mean()) / 2 > 0.8


@pytest.mark.parametrize("seed", range(8))
def test_every_negative_carries_the_mask_of_a_positive_of_its_own(seed: int) -> None:
    found = drawn(seed)
    right = Counter(m.mask for m in found if m.positive)
    wrong = Counter(m.mask for m in found if not m.positive)
    assert sum(right.values()) == 20 and not wrong - right  # each mask at most as often as among the positives
    assert sum(wrong.values()) >= 18  # marks at the end of the longest window may fit nowhere
    for m in found:
        acts = np.array(m.exemplar.acts)
        assert m.mask and m.mask[-1] < len(acts)
        if m.kind == RIGHT:
            assert m.mask == right_mask(m.exemplar) and all(acts[list(m.mask)] >= 0.3 * acts.max())
        else:
            assert (acts[list(m.mask)] == 0).all() and m.exemplar.positive == (m.kind == WRONG)
    for kind in NEGATIVES:
        hosts = [m.exemplar.exemplar_id for m in found if m.kind == kind]
        assert len(hosts) == len(set(hosts))
    assert Counter(m.kind for m in found)[WRONG] == 10


def test_wide_masks_go_to_silent_windows() -> None:
    """A latent that is on everywhere has no wrong tokens; its masks are still among the negatives."""
    positives = [window(i, [1.0] * 12) for i in range(6)]
    found = marked_windows(positives, [window(i, [0.0] * 12) for i in range(6)], rng("wide"))
    assert Counter(m.kind for m in found) == {RIGHT: 6, SILENT: 6}
    short = marked_windows(positives, [window(i, [0.0] * 8) for i in range(6)], rng("wide"))
    assert Counter(m.kind for m in short) == {RIGHT: 6}  # nowhere to put them


def test_the_matching_is_a_largest_one() -> None:
    """Greedy placement would give the long host to the short mask."""
    positives = [window(0, [1, 0, 0, 0, 0, 0, 0, 0]), window(1, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1])]
    silent = [window(0, [0.0] * 8), window(1, [0.0] * 10)]
    for seed in range(20):
        found = marked_windows(positives, silent, rng("largest", seed))
        assert len([m for m in found if not m.positive]) == 2


def test_order_of_windows_changes_nothing() -> None:
    positives, silent = latent(3)
    forward = marked_windows(positives, silent, rng("order"))
    assert forward == marked_windows(positives[::-1], silent[::-1], rng("order"))


@pytest.mark.parametrize(
    ("mask", "shown"),
    [([1, 0, 0, 0], "<<a>>😀"), ([0, 1, 0, 0], "a<<😀>>"), ([0, 0, 0, 1], "a<<😀>>"), ([1, 1, 0, 0], "<<a😀>>")],
)
def test_no_mask_is_invisible(mask, shown: str) -> None:
    ids = TOKENIZER.encode("a😀", add_special_tokens=False)
    assert marked_text(TOKENIZER, ids, [*mask, 0][: len(ids)]) == shown


def test_marks_in_the_text_are_no_marks() -> None:
    ids = TOKENIZER.encode("x <<y>> z", add_special_tokens=False)
    assert marked_text(TOKENIZER, ids, [i == 0 for i in range(len(ids))]) == "<<x>> < <y> > z"


# --- the scorer ------------------------------------------------------------------------------------------------------


def job(n: int = 20) -> ScoreJob:
    positives, silent = latent(1, n)
    said = Explanation(explanation_id="x", sae_id="s", latent=3, explainer="t", text="letters")
    return ScoreJob(explanation=said, sae_id="s", latent=3, exemplars=(*positives, *silent), pi=0.01)


def score(answer, jobs=None, **options):
    backend = ScriptedClient(answer, tokenizer=TOKENIZER)
    ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
    return Fuzzing(**options).score_many([job()] if jobs is None else jobs, ctx), backend


def lines(request) -> list[str]:
    return [re.sub(r"^\[\d+\] ", "", x) for x in request.messages[-1].content.splitlines()[1:]]


def test_always_yes_is_at_the_floor_and_has_no_precision() -> None:
    [result], backend = score(lambda r: json.dumps({"match": list(range(1, len(lines(r)) + 1))}), mode="list")
    rows = {(s.metric, s.group): s for s in result.scores}
    assert rows["recall", ""].value == 1.0 and rows["balanced_accuracy", ""].value == 0.5
    assert rows["fpr", f"kind={SILENT}"].value == rows["fpr", f"kind={WRONG}"].value == 1.0
    assert not {"precision", "f1", "phi"} & {s.metric for s in result.scores}
    assert {s.base_rate for s in result.scores} == {None}
    assert len(backend.sent) == 4 and all("<<" in x for r in backend.sent for x in lines(r))
    assert {f"decile={g}" for g in range(5)} == {g for m, g in rows if m == "recall" and g}


def test_both_kinds_of_negative_weigh_alike() -> None:
    """Fooled by every wrong mark in an active window, by no silent one: fpr 1/2, balanced accuracy 3/4."""
    says = {}
    for m in Fuzzing._drawn(job(), 0):
        on = [i in m.mask for i in range(len(m.exemplar.acts))]
        says[marked_text(TOKENIZER, m.exemplar.token_ids, on)] = m.kind != SILENT

    def answer(request):
        return json.dumps({"match": [i for i, x in enumerate(lines(request), 1) if says[x]]})

    [result], _ = score(answer, mode="list")
    rows = {(s.metric, s.group): s for s in result.scores}
    assert rows["fpr", f"kind={WRONG}"].value == 1.0 and rows["fpr", f"kind={SILENT}"].value == 0.0
    assert rows["balanced_accuracy", ""].value == 0.75
    low, high = rows["balanced_accuracy", ""].ci_low, rows["balanced_accuracy", ""].ci_high
    assert 0.6 < low < rows["balanced_accuracy", ""].value < high < 0.9


def test_items_tell_the_two_judgements_of_a_window_apart() -> None:
    [result], _ = score(lambda r: '{"match": []}', mode="list")
    keys = [(i.exemplar_id, i.mask) for i in result.items]
    assert len(set(keys)) == len(keys) and len({k for k, _ in keys}) < len(keys)
    assert all(i.mask for i in result.items)


def test_refusals_are_counted_and_wrong_only_at_worst() -> None:
    seen = []

    def answer(request):
        seen.append(request)
        return Failure(code="refusal", stage="x") if len(seen) == 1 else '{"match": []}'

    [result], _ = score(answer, [job(60)], mode="list")
    rows = {s.metric: s for s in result.scores if s.group == ""}
    row = rows["balanced_accuracy"]
    assert row.n_failed == 10 and row.value == 0.5 and rows["recall"].value_worst == 0
    lost = {(i.exemplar_id, i.mask) for i in result.items if i.failure}
    kinds = {kind: [(m.exemplar.exemplar_id, m.mask) in lost for m in Fuzzing._drawn(job(60), 0) if m.kind == kind]
             for kind in NEGATIVES}  # fmt: skip
    assert 0 < sum(map(sum, kinds.values())) < 10
    assert row.value_worst == pytest.approx((0 + 1 - np.mean([np.mean(k) for k in kinds.values()])) / 2)


def test_what_has_no_log_probability_is_counted_beside_the_auc() -> None:
    seen = []

    def answer(request):
        seen.append(request)
        if len(seen) <= 3:
            return Failure(code="timeout", stage="x")
        p = 0.2 + 0.6 * (len(seen) % 2)
        return LogprobReply(rows=((math.log(p), *[None] * 4, math.log(1 - p), *[None] * 4),))

    [result], _ = score(answer, [job(60)], mode="logprob")
    rows = {s.group: s for s in result.scores if s.metric == "auc"}
    row = rows[""]
    assert row.n_failed == 3 and row.n_pos + row.n_neg + 3 == len(Fuzzing._drawn(job(60), 0))
    assert 3 <= sum(rows[f"kind={k}"].n_failed for k in NEGATIVES) <= 6  # a positive stands against both kinds


def test_the_mode_follows_the_client_and_the_prompt_is_part_of_the_identity() -> None:
    ctx = lambda **c: ScoreContext(  # noqa: E731
        client=CachedClient(ScriptedClient(lambda r: '{"match": []}', capabilities=Capabilities(**c))),
        tokenizer=TOKENIZER,
    )
    listed = ctx()
    Fuzzing().score_many([job()], listed)
    assert {r.verb for r in listed.client.backend.sent} == {"generate"}
    with pytest.raises(Unsupported, match="logprob mode"):
        Fuzzing(mode="logprob").score_many([job()], listed)
    with pytest.raises(ConfigError):
        Fuzzing(mode="both")
    assert Fuzzing().inputs["fuzzing_list"] == load_prompt("fuzzing_list").sha256


def test_one_class_alone_is_not_asked_about() -> None:
    only = [e for e in job().exemplars if not e.positive]
    [result], backend = score(lambda r: "x", [ScoreJob(**{**job().__dict__, "exemplars": tuple(only)})])
    assert not backend.sent and {s.null_reason for s in result.scores} == {"too_few_positive"}


@pytest.mark.parametrize(
    ("side", "null", "kept"),
    [
        (RIGHT, ["recall", "balanced_accuracy", "auc", f"auc|kind={SILENT}", "recall|decile=0"],
         [f"fpr|kind={SILENT}"]),
        (SILENT, [f"auc|kind={SILENT}", f"fpr|kind={SILENT}", "balanced_accuracy", "auc"],
         ["recall", f"auc|kind={WRONG}"]),
    ],
)  # fmt: skip
def test_a_judge_silent_about_one_side_is_not_measured_on_it(side: str, null, kept) -> None:
    """Three answers of forty failed, which is few, but all of one side."""
    texts = {}
    for m in Fuzzing._drawn(job(), 0):
        on = [i in m.mask for i in range(len(m.exemplar.acts))]
        texts[marked_text(TOKENIZER, m.exemplar.token_ids, on)] = m.kind
    silent = [t for t, kind in texts.items() if kind == side][:3]  # of 20 right, of 10 of a wrong kind

    def answer(request):
        text = request.messages[-1].content.rpartition("Snippet: ")[2]
        if text in silent:
            return Failure(code="refusal", stage="x")
        p = 0.99 if texts[text] == RIGHT else 0.01
        return LogprobReply(rows=((math.log(p), *[None] * 4, math.log(1 - p), *[None] * 4),))

    [result], _ = score(answer, mode="logprob")
    rows = {f"{s.metric}|{s.group}".strip("|"): s for s in result.scores}
    for name in null:
        assert rows[name].value is None and rows[name].null_reason == "too_many_failures", name
    for name in kept:
        assert rows[name].value is not None, name
    assert rows["recall"].n_failed == 3
