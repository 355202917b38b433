"""The layers above a hookpoint against full hooked passes, on two kinds of blocks."""


import pytest
import torch

from sae.errors import ConfigError, Unsupported
from sae.language_model import LanguageModel
from sae.upper import UpperRunner

POINTS = ("0:in", "0", "1", "2:in", "2")
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(2))


def noise(shape: torch.Size | tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tiny_lm: LanguageModel, tiny_gpt2: LanguageModel) -> LanguageModel:
    return tiny_lm if request.param == "llama" else tiny_gpt2


@pytest.fixture(params=POINTS)
def point(request: pytest.FixtureRequest, lm: LanguageModel) -> str:
    return f"{lm.stack_name}.{request.param}"


def clean(lm: LanguageModel, point: str, tokens: torch.Tensor) -> torch.Tensor:
    return lm.capture(tokens, [point])[point]


def test_equals_a_full_pass(lm: LanguageModel, point: str) -> None:
    upper, tokens = lm.upper(point), ids()
    assert upper.is_exact
    own = clean(lm, point, tokens)
    torch.testing.assert_close(upper.logits(own), lm.logits(tokens), **CLOSE)
    patched = own + noise(own.shape)
    expected = lm.replace(tokens, point, patched)
    torch.testing.assert_close(upper.logits(patched), expected, **CLOSE)
    assert upper.logits(patched).dtype == torch.float32
    torch.testing.assert_close(upper.unembed(upper.hidden(patched)), expected, **CLOSE)
    for positions in ([1, 5], slice(3, 7), torch.tensor([9, 0])):
        found = upper.unembed(upper.hidden(patched, positions))
        torch.testing.assert_close(found, expected[:, positions], **CLOSE)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_prefix_and_continuation_equal_a_full_pass(lm: LanguageModel, point: str, cut: int) -> None:
    """Three alternatives after one clean prefix of batch 1, and after a prefix cut out of the whole row."""
    upper, row = lm.upper(point), ids(1)
    own = clean(lm, point, row)
    tails = own[:, cut:] + noise((3, 10 - cut, lm.d_model))
    whole = torch.cat([own[:, :cut].expand(3, -1, -1), tails], dim=1)
    expected = lm.replace(row.expand(3, -1), point, whole)[:, cut:]
    short = upper.prefix(own[:, :cut])
    assert short.n_tokens == cut
    torch.testing.assert_close(upper.continue_from(short, tails), expected, **CLOSE)
    long = upper.prefix(own)
    before = [(k.clone(), v.clone()) for k, v in long.keys_values]
    for _ in range(2):  # twice: the prefix is not used up
        torch.testing.assert_close(upper.continue_from(long, tails, cut), expected, **CLOSE)
    for (keys, values), (k, v) in zip(before, long.keys_values, strict=True):
        assert torch.equal(keys, k) and torch.equal(values, v)
    assert len(long.keys_values) == lm.n_layers - min(lm.block_of(point) or 0, lm.n_layers - 1)


def test_a_prefix_per_row(lm: LanguageModel) -> None:
    point, tokens = lm.default_hookpoint(), ids(3)
    upper, own = lm.upper(point), clean(lm, point, tokens)
    found = upper.continue_from(upper.prefix(own[:, :4]), own[:, 4:])
    torch.testing.assert_close(found, lm.logits(tokens)[:, 4:], **CLOSE)


def test_an_empty_prefix_is_no_prefix(lm: LanguageModel) -> None:
    point, tokens = lm.default_hookpoint(), ids()
    upper, own = lm.upper(point), clean(lm, point, tokens)
    past = upper.prefix(own[:1])
    torch.testing.assert_close(upper.continue_from(past, own, 0), lm.logits(tokens), **CLOSE)


@pytest.mark.parametrize("first", [-1, 5])
def test_a_prefix_that_is_too_short(tiny_lm: LanguageModel, first: int) -> None:
    upper = tiny_lm.upper("layers.1")
    past = upper.prefix(noise((1, 4, 32)))
    with pytest.raises(ConfigError, match="prefix of 4 tokens"):
        upper.continue_from(past, noise((1, 2, 32)), first)


def test_only_upper_blocks_run_and_the_model_stays_as_it_was(lm: LanguageModel) -> None:
    point, tokens = f"{lm.stack_name}.1", ids()
    before = lm.logits(tokens)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())

    n_hooks = hooks()
    upper = lm.upper(point)
    calls: list[int] = []
    handles = [b.mlp.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(lm.blocks)]
    try:
        fresh = lm.upper(point)
        calls.clear()
        fresh.logits(clean(lm, point, tokens))
    finally:
        for handle in handles:
            handle.remove()
    assert [i for i in calls if i > 1] == [2]
    assert torch.equal(lm.logits(tokens), before) and len(lm.blocks) == 3
    assert [(b.self_attn if hasattr(b, "self_attn") else b.attn).layer_idx for b in lm.blocks] == [0, 1, 2]
    assert hooks() == n_hooks and upper.is_exact
    assert lm.decoder.config.num_hidden_layers == 3


def test_where_blocks_cannot_run_apart_full_passes_are_used(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    point, row = lm.default_hookpoint(), ids(1)
    monkeypatch.setattr(UpperRunner, "_verified", lambda self: False)
    slow = lm.upper(point)
    monkeypatch.undo()
    fast, own = lm.upper(point), clean(lm, point, row)
    assert fast.is_exact and not slow.is_exact
    torch.testing.assert_close(slow.logits(own), fast.logits(own), **CLOSE)
    torch.testing.assert_close(slow.hidden(own, [2]), fast.hidden(own, [2]), **CLOSE)
    tails = own[:, 6:] + noise((4, 4, lm.d_model))
    for first in (None, 6):
        prefix = own[:, :6] if first is None else own
        a, b = (u.continue_from(u.prefix(prefix), tails, first) for u in (slow, fast))
        torch.testing.assert_close(a, b, **CLOSE)


def test_above_an_mlp_the_ids_are_needed(lm: LanguageModel) -> None:
    point, tokens = f"{lm.stack_name}.1.mlp", ids()
    upper, own = lm.upper(point), clean(lm, point, tokens)
    assert not upper.is_exact
    torch.testing.assert_close(upper.logits(own, ids_BL=tokens), lm.logits(tokens), **CLOSE)
    for use in (lambda: upper.logits(own), lambda: upper.prefix(own), lambda: upper.hidden(own)):
        with pytest.raises(Unsupported, match="no residual hookpoint"):
            use()


def test_an_unknown_hookpoint(tiny_lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"layers\.7"):
        tiny_lm.upper("layers.7")


def test_a_damaged_view_is_noticed(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    build = UpperRunner._build_view

    def damaged(self: UpperRunner, below: int):
        return build(self, below - 1)  # one block too many

    monkeypatch.setattr(UpperRunner, "_build_view", damaged)
    assert not tiny_lm.upper("layers.1").is_exact
