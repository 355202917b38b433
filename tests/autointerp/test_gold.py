"""Gold set: of a true explanation and near misses every scorer must prefer the true one, if its judge knows everything.

Two planted latents. WORDS fires on two river names; CONTEXT fires on "stop" right after "don't". The near misses are
narrower, wider, beside it, or right about the place and wrong about the context. Windows hold all of these words, so
that a near miss is met often. A judge that sees single words cannot know a context: it gets WORDS alone.
"""

import json
import math
import re
from functools import cache

import numpy as np
import pytest
from tiny import byte_tokenizer

from autointerp.client import CachedClient, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import ScoreContext, ScoreJob
from autointerp.judging import NO, YES
from autointerp.records import Exemplar, Explanation
from autointerp.scorers.simulation import PLUGIN as Simulation
from autointerp.texts import PMI_NO_TEXT
from sae import plugins
from sae.manifest import rng

TOKENIZER = byte_tokenizer()
ROOM = "autointerp.scorers"
GOLD: dict[str, dict[str, str]] = {
    "WORDS": {
        "names of rivers": r"\b(rhine|elbe)\b",
        "the river Rhine alone": r"\brhine\b",
        "names of rivers and towns": r"\b(rhine|elbe|paris)\b",
        "names of towns": r"\bparis\b",
        "any word at all": r"\b\w+\b",
    },
    "CONTEXT": {
        "stop after don't": r"(?<=don't )stop\b",
        "the word stop": r"\bstop\b",
        "the word don't": r"\bdon't\b",
        "go after don't": r"(?<=don't )go\b",
        "stop after do": r"(?<=\bdo )stop\b",
    },
}
"""Latent -> explanations, the true one first, each with what it describes."""
PATTERNS = {text: pattern for near in GOLD.values() for text, pattern in near.items()}
PIECES = {
    "WORDS": ["rhine", "elbe", "paris", "boats", "water", "went", "slowly", "again"],
    "CONTEXT": ["don't stop", "do stop", "don't go", "we stop", "they go", "once more", "later", "here"],
}


def spans(text: str, window: str) -> list[tuple[int, int]]:
    return [m.span() for m in re.finditer(PATTERNS[text], window)]


def exemplars(latent: str, split: str, n: int) -> tuple[Exemplar, ...]:
    """n windows with and n without the latent, each of four random pieces."""
    truth = next(iter(GOLD[latent]))
    draw = rng("gold", latent, split)
    found: dict[bool, list[Exemplar]] = {True: [], False: []}
    while min(map(len, found.values())) < n:
        text = " " + " ".join(draw.choice(PIECES[latent], 4)) + " "
        where = spans(truth, text)
        mine = found[bool(where)]
        if len(mine) == n:
            continue
        acts = [0.0] * len(text)
        for first, after in where:
            acts[first:after] = [2.0] * (after - first)
        kind = "quantile" if where else "silent"
        mine.append(
            Exemplar(
                exemplar_id=f"{latent}/{split}/{kind}/{len(mine):03d}", latent=0, kind=kind, split=split,
                group=len(mine) % 5 if where else -1, acts=tuple(acts), peak=where[0][0] if where else -1,
                token_ids=tuple(TOKENIZER.encode(text, add_special_tokens=False)),
            )
        )  # fmt: skip
    return (*found[True], *found[False])


def jobs(latent: str) -> list[ScoreJob]:
    return [
        ScoreJob(
            explanation=Explanation(explanation_id=f"s/0/gold/{i}", sae_id="s", latent=0, explainer="gold", text=text),
            sae_id="s", latent=0, exemplars=exemplars(latent, "score", 20),
            calibrate=exemplars(latent, "calibrate", 20), pi=0.2,
        )
        for i, text in enumerate(GOLD[latent])
    ]  # fmt: skip


def fits(text: str, window: str) -> bool:
    """Marked windows: every mark lies on what the explanation describes, and all of that is marked."""
    plain = window.replace("<<", "").replace(">>", "")
    marked = [m.span() for m in re.finditer(r"<<.*?>>", window)]
    if not marked:
        return bool(spans(text, plain))
    on = set()
    for k, (first, after) in enumerate(marked):
        on.update(range(first - 4 * k, after - 4 * k - 4))
    wanted = {i for first, after in spans(text, plain) for i in range(first, after)}
    return on == wanted


def oracle(request):
    """Knows what each explanation describes, and nothing of latents."""
    if request.verb == "slots":
        text, *rows = TOKENIZER.decode(list(request.ids)).rpartition("The detector looks for: ")[2].split("\n")
        window = "".join(row[:1] for row in rows[: len(request.positions)])
        on = {i for first, after in spans(text, window) for i in range(first, after)}
        row = lambda d: tuple(math.log(0.9) if v == d else math.log(1e-12) for v in range(10))  # noqa: E731
        return LogprobReply(rows=tuple(row(9 if i in on else 0) for i in range(len(request.positions))))
    if request.verb == "continuation":
        window = " " + request.prompt.rpartition("\n\n")[0] + " "
        nothing = request.prompt == PMI_NO_TEXT
        p = [0.1 if nothing else 0.9 if fits(c.strip(), window) else 0.05 for c in request.continuations]
        return LogprobReply(sums=tuple(map(math.log, p)), counts=(1,) * len(p))
    head, *lines = request.messages[-1].content.splitlines()
    text = head.partition(": ")[2]
    if "0" in getattr(request, "choices", ()):
        return digit(text, lines[0].removeprefix("Text: "))
    if head.startswith("The detector"):
        return json.dumps({"active": active(text, lines)})
    if request.verb == "next_token":
        p = 0.99 if fits(text, f" {lines[0].removeprefix('Snippet: ')} ") else 0.01
        return LogprobReply(
            rows=((math.log(p), *[None] * (len(YES) - 1), math.log(1 - p), *[None] * (len(NO) - 1)),)
        )
    return json.dumps({"match": [i for i, x in enumerate(lines, 1) if fits(text, f" {x.partition('] ')[2]} ")]})


def digit(text: str, read: str) -> LogprobReply:
    """9 if the marked last character belongs to what the explanation describes, its word gone on as it must."""
    plain = " " + read.replace("<<", "").replace(">>", "")
    latent = next(name for name, near in GOLD.items() if text in near)
    words = [w for piece in PIECES[latent] for w in piece.split()]
    begun = plain.rpartition(" ")[2]
    whole = next((w for w in words if begun and w.startswith(begun)), begun)
    on = {i for first, after in spans(text, plain + whole[len(begun) :] + " ") for i in range(first, after)}
    p = {9 if len(plain) - 1 in on and begun else 0: 0.9}
    return LogprobReply(rows=((*(math.log(p.get(d, 1e-12)) for d in range(10)), *[None] * 10),))


def active(text: str, lines: list[str]) -> list[dict[str, int]]:
    """9 on every numbered character that the explanation describes; windows are opened by a line "Text k"."""
    out: list[dict[str, int]] = []
    windows: list[list[tuple[str, str]]] = []
    for line in lines:
        number, tab, piece = line.partition("\t")
        windows[-1].append((number, piece)) if tab else windows.append([])
    for window in windows:
        on = spans(text, "".join(piece for _, piece in window))
        out += [{"i": int(window[i][0]), "v": 9} for first, after in on for i in range(first, after)]
    return out


class Knowing:
    """Every text as yes or no to every explanation; cosines between an explanation and a text are +-1 / sqrt(n)."""

    name, model_hash = "knowing", "k" * 64

    def embed(self, texts) -> np.ndarray:
        names = list(PATTERNS)
        rows = [
            [float(n == t) for n in names] if t in PATTERNS else [1.0 if spans(n, t) else -1.0 for n in names]
            for t in texts
        ]
        out = np.array(rows, dtype=np.float32).reshape(len(texts), len(names))
        return out / np.linalg.norm(out, axis=1, keepdims=True)


def coin(request):
    """A random answer of the right form, the same whenever asked the same."""
    draw = rng("coin", repr(request))
    if request.verb == "slots":
        return LogprobReply(rows=tuple(tuple(np.log(draw.dirichlet([0.3] * 10))) for _ in request.positions))
    if request.verb == "continuation":
        n = len(request.continuations)
        return LogprobReply(sums=tuple(float(v) for v in np.log(draw.random(n))), counts=(1,) * n)
    if request.verb == "next_token":
        p = np.log(draw.dirichlet([1.0] * len(request.choices)))
        return LogprobReply(rows=(tuple(float(v) for v in p),))
    if "The detector looks for" in request.messages[-1].content:
        n = len(re.findall(r"^\d+\t", request.messages[-1].content, re.M))
        return json.dumps({"active": [{"i": i + 1, "v": int(draw.integers(10))} for i in range(n)]})
    return json.dumps({"match": [i for i in range(1, 11) if draw.random() < 0.5]})


class CoinVectors:
    name, model_hash = "coin", "c" * 64

    def embed(self, texts) -> np.ndarray:
        out = np.array([rng("coin", t).standard_normal(64) for t in texts], dtype=np.float32).reshape(-1, 64)
        return out / np.linalg.norm(out, axis=1, keepdims=True)


def plugin_of(name: str):
    if name.startswith("simulation/"):
        return Simulation(name.removeprefix("simulation/"))
    if name.endswith("/list"):
        return plugins.find(ROOM, name.removesuffix("/list"))(mode="list")
    return plugins.find(ROOM, name)()


READERS = [
    n
    for n in plugins.names(ROOM)
    if getattr(plugins.find(ROOM, n), "uses_explanation", True) and "sae" not in plugins.find(ROOM, n)().needs
]  # what steers a model has its planted directions in test_intervention
READERS += [f"simulation/{name}" for name in ("all_at_once", "structured", "token_by_token")]
READERS += ["detection/list", "fuzzing/list"]
WORD_BY_WORD = ("late_interaction", "simulation")
"""These see a word at a time, whatever their judge knows."""
CASES = [(name, latent) for name in READERS for latent in GOLD if latent == "WORDS" or name not in WORD_BY_WORD]
HEADLINES = {"auc": 0.5, "balanced_accuracy": 0.5, "pearson": 0.0}
"""Of a coin."""
RANKED = {*HEADLINES, "f1", "average_precision", "pearson_bills"}
"""A narrower text has full precision, a wider one full recall; these want both."""


def scored(name: str, latent: str, answer, embedder, metrics=frozenset(HEADLINES)) -> list[dict[str, float | None]]:
    client = CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER))
    ctx = ScoreContext(client=client, embedder=embedder, tokenizer=TOKENIZER)
    results = plugin_of(name).score_many(jobs(latent), ctx)
    return [{s.metric: s.value for s in r.scores if s.group == "" and s.metric in metrics} for r in results]


@pytest.mark.parametrize(("name", "latent"), CASES)
def test_the_true_explanation_comes_first(name: str, latent: str) -> None:
    true, *near = scored(name, latent, oracle, Knowing(), RANKED)
    assert true
    for metric, value in true.items():
        assert value == pytest.approx(1.0), (metric, value)
        for text, other in zip(list(GOLD[latent])[1:], near, strict=True):
            assert other[metric] is None or other[metric] < value - 0.05, (metric, text, other[metric])


@pytest.mark.parametrize("name", READERS)
def test_a_coin_sits_at_the_floor(name: str) -> None:
    """40 windows per explanation, 10 explanations: one standard error of the mean is at most 0.03 to 0.05."""
    found = [row for latent in GOLD for row in scored(name, latent, coin, CoinVectors())]
    for metric in found[0]:
        values = [row[metric] for row in found if row[metric] is not None]
        assert len(values) >= 6 and np.mean(values) == pytest.approx(HEADLINES[metric], abs=0.15), (metric, values)


# --- judges that always say the same ----------------------------------------------------------------------------------


class Same:
    """One vector for all texts."""

    name, model_hash = "same", "s" * 64

    def embed(self, texts) -> np.ndarray:
        return np.tile(np.float32([0.6, 0.8]), (len(texts), 1))


def always(p: float):
    def answer(request):
        if request.verb == "slots":
            return LogprobReply(rows=(tuple([math.log(0.1)] * 10),) * len(request.positions))
        if request.verb == "continuation":
            n = len(request.continuations)
            return LogprobReply(sums=(-2.0,) * n, counts=(1,) * n)
        if "0" in getattr(request, "choices", ()):
            return LogprobReply(rows=((*[math.log(0.1)] * 10, *[None] * 10),))
        if request.verb == "next_token":
            return LogprobReply(rows=((math.log(p), *[None] * 4, math.log(1 - p), *[None] * 4),))
        shown = request.messages[-1].content
        if shown.startswith("The detector"):
            return json.dumps({"active": [{"i": i, "v": 5} for i in range(1, 1 + len(re.findall(r"\t", shown)))]})
        n = len(re.findall(r"^\[\d+\] ", shown, re.M))
        return json.dumps({"match": list(range(1, n + 1)) if p > 0.5 else []})

    return answer


@pytest.mark.parametrize("p", [0.9, 0.1])
@pytest.mark.parametrize("name", READERS)
def test_a_constant_judge_is_its_floor_to_the_last_digit(name: str, p: float) -> None:
    """Whatever the text: balanced accuracy and AUC 1/2, no correlation, precision pi where it always says yes. "Always
    no" scores .714 by plain accuracy with 40 % positive windows, "always yes" 20 of 30 by recall."""
    answers = [
        {(s.metric, s.group): s for s in r.scores}
        for r in plugin_of(name).score_many(
            jobs("WORDS"),
            ScoreContext(client=CachedClient(ScriptedClient(always(p), tokenizer=TOKENIZER)), embedder=Same(),
                         tokenizer=TOKENIZER),
        )
    ]  # fmt: skip
    true, *floors = answers
    for floor in floors:  # value - floor is 0
        assert {k: s.value for k, s in floor.items()} == {k: s.value for k, s in true.items()}
    for (metric, group), row in true.items():
        if metric in ("auc", "balanced_accuracy"):
            assert row.value == 0.5, (metric, group)
        if metric == "average_precision" or (metric == "precision" and row.value is not None):
            assert row.value == pytest.approx(0.2)  # pi
        if metric.startswith("pearson"):
            assert row.value is None and row.null_reason == "constant_prediction"


# --- Bills et al.: a text that leans on recall ------------------------------------------------------------------------

N_POPULATION, PI_CONTEXT = 20_000, 0.01


def silent_texts(n: int, *key: object) -> list[str]:
    """Random windows on which CONTEXT is silent."""
    draw, truth, out = rng("context", *key), next(iter(GOLD["CONTEXT"])), []
    while len(out) < n:
        text = " " + " ".join(draw.choice(PIECES["CONTEXT"], 4)) + " "
        if not spans(truth, text):
            out.append(text)
    return out


def holds_stop(text: str) -> bool:
    return re.search(r"\bstop\b", text) is not None


@cache
def stop_share() -> float:
    """Of all silent windows those with one of the latent's tokens."""
    return float(np.mean([holds_stop(t) for t in silent_texts(N_POPULATION, "population")]))


def context_job(text: str, seed: int) -> ScoreJob:
    """50 positive, 50 uniform silent and 10 same_token windows, strata with their true shares."""
    found = list(exemplars("CONTEXT", "score", 50)[:50])
    share = stop_share()
    drawn = [("silent", t) for t in silent_texts(50, "uniform", seed)]
    drawn += [("same_token", t) for t in silent_texts(60, "hard", seed) if holds_stop(t)][:10]
    for i, (kind, shown) in enumerate(drawn):
        stratum = "same_token" if holds_stop(shown) else "rest"
        found.append(
            Exemplar(
                exemplar_id=f"{seed}/{kind}/{i:03d}", latent=0, kind=kind, split="score", acts=(0.0,) * len(shown),
                token_ids=tuple(TOKENIZER.encode(shown, add_special_tokens=False)), stratum=stratum,
                stratum_share=share if stratum == "same_token" else 1 - share,
            )
        )  # fmt: skip
    said = Explanation(explanation_id=text, sae_id="s", latent=0, explainer="gold", text=text)
    return ScoreJob(explanation=said, sae_id="s", latent=0, exemplars=tuple(found), pi=PI_CONTEXT)


def detected(jobs_: list[ScoreJob], answer=oracle) -> list[dict[tuple[str, str], float | None]]:
    ctx = ScoreContext(client=CachedClient(ScriptedClient(answer, tokenizer=TOKENIZER)), tokenizer=TOKENIZER)
    results = plugins.find(ROOM, "detection")().score_many(jobs_, ctx)
    return [{(s.metric, s.group): s.value for s in r.scores} for r in results]


def test_stop_for_a_dont_stop_latent_has_recall_and_no_precision() -> None:
    wide, true = detected([context_job("the word stop", 0), context_job("stop after don't", 0)])
    assert wide["recall", ""] == true["recall", ""] == 1.0
    assert wide["fpr", "kind=same_token"] == 1.0 and true["fpr", "kind=same_token"] == 0.0
    assert wide["precision", ""] < 0.05 and true["precision", ""] == 1.0
    # Half and half, as peers report it, the wide text is better than a coin: that is why the true rate is the headline.
    assert wide["precision_at_half", ""] > 0.55


def test_precision_at_the_true_rate_is_the_populations() -> None:
    """Mean over 40 draws of windows against all 20,000 silent ones, within three standard errors of the mean."""
    truth = stop_share()
    found = detected([context_job("the word stop", seed) for seed in range(40)])
    phi = np.array([row["phi", ""] for row in found])
    assert phi.mean() == pytest.approx(truth, abs=max(0.002, 3 * phi.std() / 40**0.5))
    wanted = PI_CONTEXT / (PI_CONTEXT + (1 - PI_CONTEXT) * truth)
    assert np.mean([row["precision", ""] for row in found]) == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("added", [True, False])
def test_labels_added_to_or_removed_from_an_oracle_lower_the_headline(added: bool) -> None:
    """The more of its answers are turned, silent to active or active to silent, the lower; nothing rewards either."""
    headlines = []
    for turned in (0.0, 0.1, 0.3, 0.6):

        def says(request, turned=turned):
            said = request.messages[-1].content
            window = f" {said.rpartition('Snippet: ')[2]} "
            right = fits("stop after don't", window)
            change = right != added and rng("turn", window).random() < turned
            p = 0.99 if right != change else 0.01
            return LogprobReply(rows=((math.log(p), *[None] * 4, math.log(1 - p), *[None] * 4),))

        [row] = detected([context_job("stop after don't", 0)], says)
        headlines.append([row[metric, ""] for metric in ("precision", "f1", "balanced_accuracy", "auc")])
    for before, after in zip(headlines, headlines[1:], strict=False):
        if added:
            assert all(b > a for b, a in zip(before, after, strict=True)), (before, after)
        else:  # precision alone does not mind what is missed
            assert after[0] == 1.0 and all(b > a for b, a in zip(before[1:], after[1:], strict=True))
