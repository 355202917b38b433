"""The in-process client: exact log-probabilities by whatever way, generation that honours each request."""

import pytest

from autointerp.client import (
    ContinuationRequest,
    GenerateRequest,
    LogprobReply,
    Message,
    NextTokenRequest,
    Reply,
    SlotRequest,
)


def ask(text: str, **options) -> GenerateRequest:
    options = {"max_tokens": 8, **options}
    return GenerateRequest(messages=(Message(role="user", content=text),), **options)


@pytest.fixture(scope="module")
def local(tiny_lm):
    from autointerp.clients.transformers import TransformersClient

    return TransformersClient(lm=tiny_lm, batch_tokens=120, pack_tokens=40)


def naive(lm, ids: list[int]):
    """log P of every next token, [T, V]."""
    import torch

    return torch.log_softmax(lm.logits(torch.tensor([ids]))[0], -1)


def test_continuations_equal_plain_passes(tiny_lm, local) -> None:
    prompt = (0, 40, 41, 42, 43)
    ends = [(50, 51, 52), (50, 51, 53), (50,), (60, 61, 62, 63, 64)]
    requests = [ContinuationRequest(prompt=(*prompt, p), continuations=tuple(ends)) for p in (70, 71, 72)]
    replies = local.logprobs(requests)
    for request, reply in zip(requests, replies, strict=True):
        assert reply.counts == (3, 3, 1, 5)
        for end, total in zip(ends, reply.sums, strict=True):
            ids = [*request.prompt, *end]
            log_p = naive(tiny_lm, ids)
            want = sum(float(log_p[len(request.prompt) - 1 + k, t]) for k, t in enumerate(end))
            assert total == pytest.approx(want, abs=1e-3)
    assert local.scorer.mode == "tree"


def test_slots_equal_plain_passes_and_the_beginning_is_read_once(tiny_lm, local) -> None:
    shared = list(range(3, 63))
    requests = [
        SlotRequest(
            ids=(*shared, *(100 + (i * j) % 50 for j in range(20))), positions=(0, 59, 65, 79), token_ids=(5, 6, 7)
        )
        for i in range(8)
    ]
    before = local.scorer.n_read
    replies = local.logprobs(requests)
    assert local.scorer.n_read - before <= 60 + 8 * 20
    for request, reply in zip(requests, replies, strict=True):
        log_p = naive(tiny_lm, list(request.ids))
        for position, row in zip(request.positions, reply.rows, strict=True):
            assert row == pytest.approx([float(log_p[position, t]) for t in request.token_ids], abs=1e-3)


def test_a_model_without_tree_attention_is_read_plainly(tiny_lm) -> None:
    from autointerp.lm_scoring import LocalScorer, Query

    class Scaled:
        """Logits of the model are halved behind the output embedding, as some families do."""

        def __init__(self, model) -> None:
            self._model = model

        def __getattr__(self, name):
            return getattr(self._model, name)

        def __call__(self, **options):
            out = self._model(**options)
            out.logits = out.logits / 2
            return out

    scorer = LocalScorer(Scaled(tiny_lm.model))
    ids = [0, *range(30, 60)]
    values = scorer.score([(ids, [Query(20, (4, 5))])])[0][0]
    assert scorer.mode == "plain"
    import torch

    want = torch.log_softmax(tiny_lm.logits(torch.tensor([ids]))[0] / 2, -1)[20, [4, 5]].tolist()
    assert values == pytest.approx(want, abs=1e-4)


def test_order_and_company_do_not_matter(local) -> None:
    requests = [
        ContinuationRequest(prompt=(0, *range(10, 10 + n)), continuations=((80, 81), (82,))) for n in (1, 30, 7, 12, 3)
    ]
    together = local.logprobs(requests)
    turned = local.logprobs(requests[::-1])[::-1]
    alone = [local.logprobs([r])[0] for r in requests]
    for a, b, c in zip(together, turned, alone, strict=True):
        assert a.sums == pytest.approx(b.sums, abs=1e-4) and a.sums == pytest.approx(c.sums, abs=1e-4)


def test_text_prompts_open_with_the_models_first_token(tiny_lm, local) -> None:
    from sae.tokens import prefix_id

    ids = tiny_lm.tokenizer.encode("abc", add_special_tokens=False)
    end = tuple(tiny_lm.tokenizer.encode(" d", add_special_tokens=False))
    by_text, by_ids = local.logprobs(
        [
            ContinuationRequest(prompt="abc", continuations=(" d",)),
            ContinuationRequest(prompt=(prefix_id(tiny_lm.tokenizer), *ids), continuations=(end,)),
        ]
    )
    assert by_text.sums == by_ids.sums


def test_next_token_choices(tiny_lm, local) -> None:
    request = NextTokenRequest(messages=(Message(role="user", content="q"),), choices=("Y", "N", "Yes"))
    row = local.logprobs([request])[0].rows[0]
    assert row[2] is None  # three bytes, three tokens
    assert row[0] < 0 and row[1] < 0


def test_mixed_generation_honours_each_request(tiny_lm, local) -> None:
    requests = [
        ask("hello", max_tokens=1),
        ask("some longer text than that", max_tokens=12),
        ask("hello", max_tokens=9, temperature=1.0, seed=3),
        ask("hello", max_tokens=9, temperature=1.0, seed=4),
    ]
    together = local.generate(requests)
    alone = [local.generate([r])[0] for r in requests]
    assert [_said(a) for a in together] == [_said(a) for a in alone]
    lengths = [a.usage.output_tokens for a in together if isinstance(a, Reply)]
    assert all(n <= r.max_tokens for n, r in zip(lengths, requests, strict=True)) or len(lengths) < 4
    assert _said(together[2]) != _said(together[3])


def _said(answer) -> str:
    return answer.text if isinstance(answer, Reply) else answer.code


def test_greedy_generation_equals_the_plain_loop(tiny_lm, local) -> None:
    import torch

    answer = local.generate([ask("abcdef", max_tokens=6)])[0]
    ids = local._chat_ids(ask("abcdef").messages)
    new: list[int] = []
    for _ in range(6):
        token = int(tiny_lm.logits(torch.tensor([ids + new]))[0, -1].argmax())
        if token == tiny_lm.tokenizer.eos_token_id:
            break
        new.append(token)
    assert _said(answer) == (tiny_lm.tokenizer.decode(new, skip_special_tokens=True) or "empty")


def test_what_does_not_fit_is_a_failure(local) -> None:
    limit = local.context_tokens
    answers = local.logprobs(
        [
            ContinuationRequest(prompt=tuple([5] * limit), continuations=((6,),)),
            ContinuationRequest(prompt=(5,), continuations=((6,),)),
        ]
    )
    assert answers[0].code == "prompt_too_long" and isinstance(answers[1], LogprobReply)
    assert local.generate([ask("x", max_tokens=limit)])[0].code == "prompt_too_long"
