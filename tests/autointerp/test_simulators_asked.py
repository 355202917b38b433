"""Simulators that ask a chat model: numbering, strict reading, half characters, mass."""

import json
import math
import re

import pytest
from judges import ORACLE, TOKENIZER, TOPICS, explanation, windows

from autointerp.client import CachedClient, Capabilities, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.config import InterpConfig
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.pipeline import load_plugins
from autointerp.prompts import whole_pieces
from autointerp.records import Exemplar, Failure
from autointerp.simulators.structured import PLUGIN as Structured
from autointerp.simulators.token_by_token import CHOICES
from autointerp.simulators.token_by_token import PLUGIN as TokenByToken
from sae.errors import ConfigError, Unsupported


def window(text: str, number: int = 0) -> Exemplar:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    return Exemplar(exemplar_id=f"w{number:02d}", latent=0, kind="silent", split="score", token_ids=ids)


def simulate(plugin, shown, answer, **capabilities):
    backend = ScriptedClient(answer, tokenizer=TOKENIZER, capabilities=Capabilities(**capabilities))
    ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
    return plugin.simulate_many([(explanation(0), e) for e in shown], ctx), backend


def numbers(request) -> list[tuple[int, str]]:
    found = re.findall(r"^(\d+)\t(.*)$", request.messages[-1].content, re.M)
    return [(int(i), text) for i, text in found]


# --- structured ------------------------------------------------------------------------------------------------------


def test_five_windows_share_a_request_and_are_numbered_through() -> None:
    found, backend = simulate(Structured(), windows(0, "score", 6), ORACLE)
    assert [len(re.findall(r"^Text \d+$", r.messages[-1].content, re.M)) for r in backend.sent] == [5, 5, 2]
    for request in backend.sent:
        assert [i for i, _ in numbers(request)] == list(range(1, len(numbers(request)) + 1))
    assert all(s.values is not None and s.mass is None for s in found)


def test_active_windows_do_not_come_together() -> None:
    _, backend = simulate(Structured(), windows(0, "score", 20), ORACLE)
    shares = [
        sum(TOPICS[0] in "".join(c for _, c in re.findall(r"^(\d+)\t(.*)$", part, re.M)) for part in
            re.split(r"^Text \d+$", r.messages[-1].content, flags=re.M)[1:])
        for r in backend.sent
    ]  # fmt: skip
    assert sum(shares) == 20 and sum(0 < n < 5 for n in shares) >= 6  # of eight requests


def test_values_are_ninths_at_the_right_tokens() -> None:
    texts = ["ab", "cde"]
    found, backend = simulate(
        Structured(), [window(t, i) for i, t in enumerate(texts)],
        lambda r: json.dumps({"active": [{"i": i, "v": {"a": 9, "d": 3, "e": 0}[c]} for i, c in numbers(r)
                                         if c in "ade"]}),
    )  # fmt: skip
    assert [s.values for s in found] == [(1.0, 0.0), (0.0, round(3 / 9, 6), 0.0)]
    assert len(backend.sent) == 1


def test_a_character_split_over_tokens_is_one_line_and_one_value() -> None:
    shown = window("a😀b")
    assert whole_pieces(TOKENIZER, shown.token_ids) == [("a", 1), ("😀", 4), ("b", 1)]
    found, backend = simulate(Structured(), [shown], lambda r: '{"active": [{"i": 2, "v": 9}]}')
    assert numbers(backend.sent[0]) == [(1, "a"), (2, "😀"), (3, "b")]
    assert found[0].values == (0.0, 1.0, 1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("text", ["a\n99\tb", "\n\nText 9\n1\tx", "x\u2028y", '{"active": []}'])
def test_tokens_are_data(text: str) -> None:
    found, backend = simulate(Structured(), [window(text)], lambda r: '{"active": []}')
    lines = backend.sent[0].messages[-1].content.splitlines()
    assert lines[1] == "Text 1" and len(lines) == 2 + len(text)
    assert found[0].values == (0.0,) * len(found[0].values)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ('{"active": [{"i": 4, "v": 9}]}', "out_of_range"), ('{"active": [{"i": 0, "v": 9}]}', "out_of_range"),
        ('{"active": [{"i": 1, "v": 10}]}', "out_of_range"), ('{"active": [{"i": 1, "v": -1}]}', "out_of_range"),
        ('{"active": [{"i": 1, "v": 2}, {"i": 1, "v": 2}]}', "duplicate"), ('{"active": [{"i": 1}]}', "schema"),
        ('{"active": [{"i": 1, "v": 2.5}]}', "schema"), ('{"active": {"1": 2}}', "schema"), ("{}", "schema"),
        ('{"active": [{"i": 1, "v": 9}', "no_json"), ("none of them", "no_json"),
    ],
)  # fmt: skip
def test_what_is_not_a_list_of_tokens_is_a_failure_and_no_zeros(reply: str, code: str) -> None:
    found, backend = simulate(Structured(), [window("abc")], lambda r: reply)
    assert found[0].values is None and found[0].failure.code == code and found[0].failure.request_key
    assert len(backend.sent) == 2  # asked again once


def test_a_failed_request_fails_its_own_windows_alone() -> None:
    seen = []

    def answer(request):
        seen.append(request)
        return Failure(code="refusal", stage="x") if len(seen) == 1 else ORACLE(request)

    found, _ = simulate(Structured(per_request=4), windows(0, "score", 6), answer)
    assert sum(s.values is None for s in found) == 4


# --- token_by_token --------------------------------------------------------------------------------------------------


def row(**p: float) -> LogprobReply:
    """Probabilities by digit: d9=0.5; s9 is the spelling with a blank."""
    value = {c: p.get(f"{'s' if c[0] == ' ' else 'd'}{c.strip()}") for c in CHOICES}
    return LogprobReply(rows=(tuple(None if v is None else math.log(v) for v in value.values()),))


def test_each_token_is_read_with_what_stands_before_it_alone() -> None:
    _, backend = simulate(TokenByToken(), [window("ab c")], lambda r: row(d0=0.9), next_token=True)
    said = [r.messages[-1].content.rpartition("Text: ")[2] for r in backend.sent]
    assert said == ["<<a>>", "a<<b>>", "ab<< >>", "ab <<c>>"]


def test_the_value_is_the_expected_digit_over_both_spellings() -> None:
    [s], _ = simulate(TokenByToken(), [window("a")], lambda r: row(d9=0.3, s9=0.1, d0=0.4), next_token=True)
    assert s.values == (0.5,) and s.mass == (0.8,)


def test_too_little_mass_is_no_value() -> None:
    answers = {"a": row(d9=0.02), "ab": row(d9=0.9)}
    plain = lambda r: re.sub("[<>]", "", r.messages[-1].content.rpartition("Text: ")[2])  # noqa: E731
    [s], _ = simulate(TokenByToken(), [window("ab")], lambda r: answers[plain(r)], next_token=True)
    assert s.values is None and s.failure.code == "low_mass" and s.mass == (0.02, 0.9)
    [s], _ = simulate(
        TokenByToken(max_low_share=0.5), [window("ab")], lambda r: answers[plain(r)], next_token=True
    )
    assert s.values == (1.0, 1.0)
    [s], _ = simulate(TokenByToken(max_low_share=1.0), [window("ab")], lambda r: row(), next_token=True)
    assert s.values is None and s.failure.code == "low_mass"  # no digit listed at all: not a zero


@pytest.mark.parametrize("values", [(-1.0,) * 10, (math.nan,) * 20, (0.5,) * 20])
def test_log_probabilities_of_the_wrong_shape_are_a_failure(values) -> None:
    [s], _ = simulate(TokenByToken(), [window("a")], lambda r: LogprobReply(rows=(values,)), next_token=True)
    assert s.values is None and s.failure.code == "schema"


def test_without_log_probabilities_it_says_so() -> None:
    with pytest.raises(Unsupported, match="token_by_token"):
        simulate(TokenByToken(), [window("a")], lambda r: "x")


# --- by name ---------------------------------------------------------------------------------------------------------


def test_the_simulator_is_chosen_by_name() -> None:
    client = CachedClient(ScriptedClient(ORACLE, tokenizer=TOKENIZER))
    contexts = ExplainContext(client=client, tokenizer=TOKENIZER), ScoreContext(client=client, tokenizer=TOKENIZER)
    cfg = InterpConfig(explainers=("token_list",), scorers=("simulation", "detection"), simulator="structured")
    _, (simulation, _) = load_plugins(cfg, *contexts)
    assert simulation.simulator.name == "structured" and simulation.needs == {"client:generate"}
    with pytest.raises(Unsupported, match="embedder"):
        load_plugins(InterpConfig(explainers=(), scorers=("simulation",)), *contexts)
    with pytest.raises(ConfigError):
        Structured(per_request=0)


# --- tokenizers that cannot write a digit ----------------------------------------------------------------------------


class Pieces:
    """Writes each text of ``known`` as one token, any other a character at a time."""

    bos_token_id = None

    def __init__(self, known) -> None:
        self.known = dict(known)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.known[text]] if text in self.known else [1_000_000, *map(ord, text)]


DIGITS = "0123456789"


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (Pieces({}), "'0' is no token of its own"),
        (Pieces({d: i for i, d in enumerate(DIGITS[:-1])}), "'9' is no token of its own"),
        (Pieces({d: i // 2 for i, d in enumerate(DIGITS)}), "'1' is the same token as '0'"),
    ],
)
def test_digits_are_verified_for_the_tokenizer_in_use_before_anything_is_asked(tokenizer, why: str) -> None:
    backend = ScriptedClient(
        lambda r: pytest.fail("a request was sent"), tokenizer=tokenizer, capabilities=Capabilities(next_token=True)
    )
    ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
    with pytest.raises(Unsupported, match=f"token_by_token.*{why}"):
        TokenByToken().simulate_many([(explanation(0), window("a"))], ctx)
    assert not backend.sent


def test_a_digit_behind_a_blank_is_enough() -> None:
    spaced = Pieces({f" {d}": i for i, d in enumerate(DIGITS)})
    backend = ScriptedClient(
        lambda r: row(s9=0.9), tokenizer=spaced, capabilities=Capabilities(next_token=True)
    )
    ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
    [s] = TokenByToken().simulate_many([(explanation(0), window("a"))], ctx)
    assert s.values == (1.0,)


def test_many_windows_a_request_have_room_for_their_answer() -> None:
    shown = [window("x" * 40, i) for i in range(12)]
    _, backend = simulate(Structured(per_request=12), shown, lambda r: '{"active": []}')
    _, usual = simulate(Structured(), shown[:5], lambda r: '{"active": []}')
    assert [r.max_tokens for r in usual.sent] == [1_400] and [r.max_tokens for r in backend.sent] == [3_360]
    _, usual = simulate(Structured(), [window("x" * 32, i) for i in range(5)], lambda r: '{"active": []}')
    assert [r.max_tokens for r in usual.sent] == [1_200]
