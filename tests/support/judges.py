"""A small world in which a judge can know everything: windows that hold a word of the topic, and windows that do not.

Oracles answer from the words they are shown; coins answer at random, but the same whenever asked the same.
"""

import json
import math
import re
from collections.abc import Callable

import numpy as np
from tiny import byte_tokenizer

from autointerp.client import LogprobReply
from autointerp.interfaces import ScoreJob
from autointerp.judging import NO, YES
from autointerp.records import Exemplar, Explanation, Failure, LatentView
from autointerp.texts import PMI_NO_TEXT
from sae.manifest import hash64, rng

TOKENIZER = byte_tokenizer()
TOPICS = ("river", "music", "money")
FILLERS = "stone plain walk often quiet under seven label table wheel round north paper light".split()
DIM = 4096


def topics_in(text: str) -> set[str]:
    return {t for t in TOPICS if t in text.casefold()}


class Words:
    """Bag of words; a word that holds a topic counts as the topic."""

    name, model_hash = "words", "w" * 64

    def embed(self, texts) -> np.ndarray:
        return np.stack([self._one(t) for t in texts]) if len(texts) else np.zeros((0, DIM), np.float32)

    def remember(self, texts, vectors) -> None:
        pass

    def _one(self, text: str) -> np.ndarray:
        out = np.zeros(DIM, dtype=np.float32)
        for word in re.findall(r"\w+", text.casefold()):
            out[hash64(min(topics_in(word), default=word)) % DIM] += 1
        return out / max(float(np.linalg.norm(out)), 1e-9)


class Coin(Words):
    """A random direction per text."""

    name, model_hash = "coin", "c" * 64

    def _one(self, text: str) -> np.ndarray:
        out = rng("coin", text).standard_normal(64).astype(np.float32)
        return out / np.linalg.norm(out)


def _fits(explanation: str, window: str) -> float:
    """Of the marked words alone, where there are any."""
    seen = " ".join(re.findall(r"<<(.*?)>>", window)) or window
    return 0.99 if topics_in(explanation) & topics_in(seen) else 0.01


def _coin(explanation: str, window: str) -> float:
    return 0.05 + 0.9 * float(rng("coin", explanation, window).random())


def script(says: Callable[[str, str], float | Failure]):
    """Answers to every kind of request from ``says(explanation, window) -> p``."""

    def answer(request):
        if request.verb == "slots":
            return _slots(request, says)
        if request.verb == "continuation":
            return _continuation(request, says)
        said = request.messages[-1].content
        explanation = said.splitlines()[0].partition(": ")[2]
        if "0" in getattr(request, "choices", ()):
            return _digit(explanation, said.rpartition("Text: ")[2], says)
        if "1" in getattr(request, "choices", ()):
            return _odd_one(said, says)
        if "The detector looks for" in said:
            return _active(explanation, said, says)
        if request.verb == "next_token":
            p = says(explanation, said.rpartition("Snippet: ")[2])
            if isinstance(p, Failure):
                return p
            row = [math.log(p), *[None] * (len(YES) - 1), math.log(1 - p), *[None] * (len(NO) - 1)]
            return LogprobReply(rows=(tuple(row),))
        p = says("generate", said)
        if isinstance(p, Failure):
            return p
        marked = " ".join(re.findall(r"<<(.*?)>>", said.replace(">><<", "")))
        seen = topics_in(marked or re.sub(r"\t\d\n?", "", said))  # columns of characters are read down
        return json.dumps({"explanation": f"the word {min(seen, default='nothing')}"})

    return answer


def _on(explanation: str, window: str) -> list[int]:
    """Characters of words that hold a topic of the explanation."""
    found = [m.span() for t in topics_in(explanation) for m in re.finditer(rf"\w*{t}\w*", window)]
    return [i for first, after in found for i in range(first, after)]


def _digit(explanation: str, read: str, says):
    """9 if the marked last character ends a word known to hold the topic, else 0; as log-probabilities."""
    window = read.replace("<<", "").replace(">>", "")
    p = says(explanation, window)
    if isinstance(p, Failure):
        return p
    digit = 9 if len(window) - 1 in _on(explanation, window) and not read.endswith("<< >>") else 0
    return LogprobReply(rows=((*(math.log(0.9) if d == digit else None for d in range(10)), *[None] * 10),))


def _active(explanation: str, said: str, says):
    """9 on the characters of a topic, in the numbering of the request."""
    active: list[dict[str, int]] = []
    for text in re.split(r"^Text \d+$", said, flags=re.M)[1:]:
        lines = re.findall(r"^(\d+)\t(.*)$", text, re.M)
        window = "".join(c for _, c in lines)
        p = says(explanation, window)
        if isinstance(p, Failure):
            return p
        active += [{"i": int(lines[k][0]), "v": 9} for k in _on(explanation, window)]
    return json.dumps({"active": active})


def _odd_one(said: str, says):
    """The line that fits the whole the least, as log-probabilities of the numbers 1 to 5 in two spellings."""
    p = [says(said, line.partition("] ")[2]) for line in said.splitlines()]
    failed = next((x for x in p if isinstance(x, Failure)), None)
    total = sum(1 - x for x in p) if failed is None else 1.0
    return failed or LogprobReply(rows=((*(math.log((1 - x) / total) for x in p), *[None] * len(p)),))


def _continuation(request, says):
    if request.prompt == PMI_NO_TEXT:
        return LogprobReply(sums=(-3.0,) * len(request.continuations), counts=(1,) * len(request.continuations))
    window = request.prompt.rpartition("\n\n")[0]
    p = [says(c, window) for c in request.continuations]
    failed = next((x for x in p if isinstance(x, Failure)), None)
    return failed or LogprobReply(sums=tuple(math.log(x) for x in p), counts=(1,) * len(p))


def _slots(request, says):
    """Digit 9 on the characters of a topic that the explanation names, 0 elsewhere."""
    tail = TOKENIZER.decode(list(request.ids)).splitlines()[-len(request.positions) - 1 :]
    window = "".join(line[:1] for line in tail[1:])
    p = says(tail[0], window)
    if isinstance(p, Failure):
        return p
    marks = np.zeros(len(window), dtype=bool)
    for topic in topics_in(tail[0]):
        for found in re.finditer(rf"\w*{topic}\w*", window):
            marks[found.start() : found.end()] = True
    digits = np.where(marks, 9, 0)
    row = lambda d: tuple(math.log(0.9) if v == d else math.log(0.9 * 1e-12) for v in range(10))  # noqa: E731
    return LogprobReply(rows=tuple(row(d) for d in digits))


ORACLE, COIN = script(_fits), script(_coin)


def refuse(request) -> Failure:
    return Failure(code="refusal", stage=request.verb)


def last_acts(probes) -> np.ndarray:
    """Latent i fires on the last letter of topic i."""
    ends = [TOKENIZER.decode(list(ids)).endswith(TOPICS[latent][-3:]) for latent, ids in probes]
    return np.array(ends, dtype=np.float32) * 2


def window(latent: int, split: str, kind: str, number: int, *, group: int = -1) -> Exemplar:
    """Three words and a number; a positive one holds a word of the latent's topic, with activation 2 throughout."""
    r = rng("window", latent, split, kind, number)
    words = [str(w) for w in r.choice(FILLERS, 2, replace=False)]
    positive = kind in ("top", "quantile", "random_positive")
    words.insert(int(r.integers(3)), f"{TOPICS[latent]}{number}" if positive else f"{FILLERS[number % 14]}{number}")
    text = " " + " ".join(words) + f" {number}"
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    acts, peak = [0.0] * len(ids), -1
    if positive:
        peak = text.index(TOPICS[latent]) + len(TOPICS[latent]) - 1
        first = text.index(TOPICS[latent])
        length = len(TOPICS[latent]) + len(str(number))
        acts[first : first + length] = [2.0] * length
    return Exemplar(
        exemplar_id=f"{latent}/{split}/{kind}/{number:03d}", latent=latent, kind=kind, split=split, group=group,
        doc_id=f"{split}{number}", token_ids=ids, acts=tuple(acts), peak=peak,
    )  # fmt: skip


def view(latent: int = 0, n: int = 8) -> LatentView:
    kinds = ("top", "quantile", "random_positive", "silent")
    shown = [window(latent, "explain", k, i, group=i if k == "quantile" else -1) for k in kinds for i in range(n)]
    promoted, suppressed = (tuple(f" {topic}{i}" for i in range(5)) for topic in (TOPICS[latent], "stone"))
    return LatentView(
        sae_id="s", latent=latent, exemplars=tuple(shown), density=0.01, max_act=2.0, promoted=promoted,
        suppressed=suppressed,
    )  # fmt: skip


def windows(latent: int, split: str, n: int) -> tuple[Exemplar, ...]:
    found = [window(latent, split, "quantile", i, group=i % 5) for i in range(n)]
    return (*found, *(window(latent, split, "silent", i) for i in range(n)))


def explanation(latent: int = 0, text: str | None = "", **fields) -> Explanation:
    said = TOPICS[latent] if text == "" else text
    return Explanation(explanation_id=f"s/{latent}/t/0", sae_id="s", latent=latent, explainer="t", text=said, **fields)


def job(latent: int = 0, n: int = 20, **fields) -> ScoreJob:
    return ScoreJob(
        explanation=explanation(latent, **fields), sae_id="s", latent=latent, exemplars=windows(latent, "score", n),
        calibrate=windows(latent, "calibrate", 10), pi=0.2,
    )  # fmt: skip
