"""The prompt-logprob simulator: alphabets, oracle digits, low mass, odd tokens."""

import math

import pytest
from tiny import byte_tokenizer

from autointerp.alphabet import verify_alphabet
from autointerp.client import CachedClient, Capabilities, LogprobReply
from autointerp.clients.scripted import ScriptedClient
from autointerp.interfaces import ScoreContext, Simulator
from autointerp.prompts import pieces
from autointerp.records import Exemplar, Explanation, Failure
from autointerp.simulators.all_at_once import PLUGIN as AllAtOnce
from autointerp.simulators.all_at_once import expected_digit
from sae.errors import Unsupported

TOKENIZER = byte_tokenizer()
MARKER, MERGED, DIGIT = 2_000_000, 2_000_001, 3_000_000
"""Ids above all code points, for the tokens that are no single character."""


class Faulty:
    """The byte tokenizer with a fault: ``drop`` encodes to nothing, ``merge`` is one token, ``split`` puts a marker
    before each digit, ``same`` maps all digits to one id."""

    bos_token_id = None

    def __init__(self, drop: str = "", merge: tuple[str, ...] = (), split: bool = False, same: bool = False) -> None:
        self.drop, self.merge, self.split, self.same = drop, merge, split, same

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        for c in self.drop:
            text = text.replace(c, "")
        ids: list[int] = []
        i = 0
        while i < len(text):
            merged = next((m for m in self.merge if text.startswith(m, i)), None)
            if merged:
                ids.append(MERGED + self.merge.index(merged))
                i += len(merged)
                continue
            if text[i].isdigit():
                ids += [MARKER] * self.split + [DIGIT if self.same else DIGIT + int(text[i])]
            else:
                ids.append(ord(text[i]))
            i += 1
        return ids

    def decode(self, ids) -> str:
        def one(i: int) -> str:
            if i >= DIGIT:
                return str(i - DIGIT)
            return self.merge[i - MERGED] if i >= MERGED else "" if i == MARKER else chr(i)

        return "".join(one(i) for i in ids)


def exemplar(text: str, number: int = 0) -> Exemplar:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    return Exemplar(exemplar_id=f"e{number}", latent=1, kind="silent", split="score", token_ids=ids)


def explanation(text: str | None = "names of rivers", **fields) -> Explanation:
    return Explanation(explanation_id="x", sae_id="s", latent=1, explainer="t", text=text, **fields)


def simulate(answer, pairs, tokenizer=TOKENIZER, **options):
    backend = ScriptedClient(answer, tokenizer=tokenizer)
    ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
    return AllAtOnce(**options).simulate_many(pairs, ctx), backend


def digit_rows(digits, mass: float = 0.9) -> LogprobReply:
    """The given digit has nearly all of ``mass`` at each slot."""
    rows = []
    for d in digits:
        rows.append(tuple(math.log(mass * (1 - 1e-12)) if v == d else math.log(mass * 1e-13) for v in range(10)))
    return LogprobReply(rows=tuple(rows))


def test_it_is_a_simulator() -> None:
    assert isinstance(AllAtOnce(), Simulator)


def test_the_alphabet_of_a_byte_tokenizer() -> None:
    found = verify_alphabet(TOKENIZER)
    assert found.separator_text == "\t" and len(set(found.digits)) == 10
    assert TOKENIZER.decode([*found.separator, found.digits[7], *found.new_line]) == "\t7\n"


def test_a_tokenizer_without_tabs_gets_another_separator() -> None:
    assert verify_alphabet(Faulty(drop="\t")).separator_text == " = "
    assert verify_alphabet(Faulty(merge=("\t3",))).separator_text == " = "
    assert verify_alphabet(Faulty(drop="\t=")).separator_text == ": "


@pytest.mark.parametrize(
    "tokenizer", [Faulty(split=True), Faulty(same=True), Faulty(drop="\n"), Faulty(drop="\t=:"), Faulty(drop="?")]
)
def test_a_tokenizer_that_cannot_write_slots_is_refused_before_any_request(tokenizer) -> None:
    with pytest.raises(Unsupported, match="all_at_once"):
        verify_alphabet(tokenizer)
    backend = ScriptedClient(lambda r: pytest.fail("a request was sent"), tokenizer=tokenizer)
    ctx = ScoreContext(client=CachedClient(backend), tokenizer=TOKENIZER)
    with pytest.raises(Unsupported):
        AllAtOnce().simulate_many([(explanation(), exemplar("abc"))], ctx)
    assert backend.sent == []


ODD = 'a\tb\n"c" 👍 = 9: ?\n'


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Faulty(drop="\t"), Faulty(merge=("?\n",))])
def test_oracle_digits_come_back_exactly_the_last_included(tokenizer) -> None:
    window = exemplar(ODD)
    digits = [(3 * i + 1) % 10 for i in range(len(window.token_ids))]
    [simulation], backend = simulate(lambda r: digit_rows(digits), [(explanation(), window)], tokenizer)
    assert simulation.failure is None
    assert simulation.values == pytest.approx([d / 9 for d in digits], abs=1e-5)
    assert simulation.mass == pytest.approx([0.9] * len(digits), abs=1e-5)
    [request] = backend.sent
    assert len(request.positions) == len(window.token_ids)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Faulty(drop="\t")])
def test_slots_stand_where_they_are_said_to(tokenizer) -> None:
    """Each slot row is the last token of a separator, and a question mark and a line break follow it."""
    window = exemplar(ODD)
    _, backend = simulate(lambda r: digit_rows([0] * len(window.token_ids)), [(explanation(), window)], tokenizer)
    [request] = backend.sent
    alphabet = verify_alphabet(tokenizer)
    separator = alphabet.separator_text
    for k, position in enumerate(request.positions):
        before = tokenizer.decode(list(request.ids[: position + 1]))
        assert before.endswith(separator)
        assert tokenizer.decode(list(request.ids[position + 1 : position + 3])) == "?\n"
        last_line = before.rpartition("\n")[2]
        assert last_line == f"{escaped_piece(window, k)}{separator}"
    text = tokenizer.decode(list(request.ids))
    assert text.rstrip("\n").splitlines()[-1].endswith(f"{separator}?")
    assert text.count("The detector looks for: ") == 4 and "names of rivers" in text.rpartition("looks for: ")[2]


def escaped_piece(window: Exemplar, k: int) -> str:
    from autointerp.prompts import escaped

    return escaped(pieces(TOKENIZER, window.token_ids)[k])


def test_worked_texts_turn_from_question_marks_to_digits() -> None:
    _, backend = simulate(lambda r: digit_rows([0]), [(explanation(), exemplar("a"))])
    text = TOKENIZER.decode(list(backend.sent[0].ids))
    shot = text.split("The detector looks for: ")[1].splitlines()[1:13]
    slots = [line.rpartition("\t")[2] for line in shot if "\t" in line]
    n_open = slots.count("?")
    assert n_open >= 1 and slots[:n_open] == ["?"] * n_open and all(s.isdigit() for s in slots[n_open:])
    assert "9" in slots


def test_low_mass_fails_the_window_and_never_gives_zeros() -> None:
    window = exemplar("abcdefghij")
    [bad], _ = simulate(lambda r: digit_rows([5] * 10, mass=0.05), [(explanation(), window)])
    assert bad.values is None and bad.failure.code == "low_mass" and bad.mass == pytest.approx([0.05] * 10, abs=1e-6)
    rows = digit_rows([5] * 8).rows + digit_rows([5] * 2, mass=0.05).rows
    [some], _ = simulate(lambda r: LogprobReply(rows=rows), [(explanation(), window)])
    assert some.failure is None and len(some.values) == 10  # two of ten are not over a fifth


@pytest.mark.parametrize(
    "reply",
    [digit_rows([1]), LogprobReply(rows=((None,) * 10,) * 3), LogprobReply(rows=((math.nan,) * 10,) * 3),
     LogprobReply(rows=((-1.0,) * 9,) * 3), LogprobReply(rows=((-math.inf,) * 10,) * 3)],
)  # fmt: skip
def test_a_stale_or_broken_answer_is_a_failure(reply) -> None:
    [simulation], _ = simulate(lambda r: reply, [(explanation(), exemplar("abc"))])
    assert simulation.values is None and simulation.failure.code == "schema"


def test_expected_digit_by_hand() -> None:
    row = [math.log(0.2)] + [-math.inf] * 8 + [math.log(0.2)]
    assert expected_digit(row) == (0.5, 0.4)


def test_failures_stay_with_their_own_pair_and_order_is_kept() -> None:
    pairs = [
        (explanation(), exemplar("abc", 0)), (explanation(None), exemplar("abc", 1)),
        (explanation(None, failure=Failure(code="echo", stage="explain")), exemplar("abc", 2)),
        (explanation(), exemplar("stop", 3)),
    ]  # fmt: skip

    def answer(request):
        n = len(request.positions)
        return digit_rows([9] * n) if n == 3 else Failure(code="prompt_too_long", stage="slots")

    simulations, backend = simulate(answer, pairs)
    assert [s.exemplar_id for s in simulations] == ["e0", "e1", "e2", "e3"]
    assert [s.failure.code if s.failure else None for s in simulations] == [
        None,
        "unsupported",
        "echo",
        "prompt_too_long",
    ]
    assert len(backend.sent) == 2 and simulations[0].values == pytest.approx([1.0] * 3, abs=1e-5)
    assert simulate(answer, [])[0] == []


def test_a_client_without_the_means_is_refused() -> None:
    pair = (explanation(), exemplar("abc"))
    for client in (
        None,
        ScriptedClient(lambda r: "x", capabilities=Capabilities(), tokenizer=TOKENIZER),
        ScriptedClient(lambda r: "x"),
    ):
        with pytest.raises(Unsupported):
            AllAtOnce().simulate_many([pair], ScoreContext(client=client, tokenizer=TOKENIZER))


def test_with_a_local_model_it_equals_a_plain_pass(tiny_lm_long) -> None:
    import torch

    from autointerp.clients.transformers import TransformersClient

    client = TransformersClient(lm=tiny_lm_long)
    ctx = ScoreContext(client=CachedClient(client), tokenizer=tiny_lm_long.tokenizer)
    pairs = [(explanation(), exemplar(text, i)) for i, text in enumerate(("some words", "other text 12"))]
    simulations = AllAtOnce(min_mass=0.0).simulate_many(pairs, ctx)
    layout = AllAtOnce()._layout(client.tokenizer)
    for pair, simulation in zip(pairs, simulations, strict=True):
        request = AllAtOnce()._request(*pair, layout, client.tokenizer, client.tokenizer)
        log_p = torch.log_softmax(tiny_lm_long.logits(torch.tensor([list(request.ids)]))[0], -1)
        want = [expected_digit(log_p[p, list(request.token_ids)].tolist()) for p in request.positions]
        assert simulation.values == pytest.approx([w[0] for w in want], abs=1e-4)
        assert simulation.mass == pytest.approx([w[1] for w in want], abs=1e-4)


@pytest.fixture(scope="module")
def tiny_lm_long(tmp_path_factory):
    """The tiny model with a context that holds the prompt in bytes."""
    from tiny import save_tiny_lm

    from sae.language_model import LanguageModel

    folder = save_tiny_lm(tmp_path_factory.mktemp("long"))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096'))
    return LanguageModel.load(str(folder), dtype="float32")
