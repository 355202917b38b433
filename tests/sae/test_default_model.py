"""The embedded default model: what DATA 2 and 3 say of it, on the pinned wheel."""

import pytest
import torch

from sae.assets import fetch
from sae.language_model import LanguageModel
from sae.tokens import drop_ids, prefix_id

pytestmark = [pytest.mark.assets, pytest.mark.slow]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load("default", dtype="float32")


def test_what_it_is(lm: LanguageModel) -> None:
    assert (lm.n_layers, lm.d_model, lm.vocab_size) == (30, 576, 49_152) and lm.slug == "smollm2-135m"
    assert lm.default_hookpoint() == "layers.15" and lm.check_hookpoint("layers.15") == 576
    assert lm.revision == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert sum(p.numel() for p in lm.model.parameters()) == 134_515_008


def test_weights_are_the_dequantised_tensors(lm: LanguageModel) -> None:
    from sae.gguf_model import read_llama

    _, tensors = read_llama(next(fetch("smollm2").glob("*.gguf")))
    state = lm.model.state_dict()
    assert set(state) - set(tensors) == {"lm_head.weight"} and not set(tensors) - set(state)
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    assert torch.equal(state["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_it_knows_the_capital_of_france(lm: LanguageModel) -> None:
    ids = torch.tensor([lm.tokenizer("The capital of France is")["input_ids"]])
    assert lm.tokenizer.decode(int(lm.logits(ids)[0, -1].argmax())) == " Paris"


def test_tokenizer_facts(lm: LanguageModel) -> None:
    def ids(text: str) -> list[int]:
        return lm.tokenizer(text)["input_ids"]

    assert ids("") == [] and len(ids("10")) == 2 and ids(" _") == [2483]
    assert drop_ids(lm.tokenizer) == tuple(range(17)) and prefix_id(lm.tokenizer) == 0
    text = "a\ttab,  two spaces, \u00e9t\u00e9, \u6f22\u5b57"
    assert lm.tokenizer.decode(ids(text)) == text


def test_position_0_is_a_sink(lm: LanguageModel) -> None:
    """Norm in the tens of thousands at block 15, whatever the token; the others below 1,000."""
    words = lm.tokenizer("The quick brown fox jumps over the lazy dog and runs away.")["input_ids"]
    rows = torch.tensor([[0, *words], [words[3], *words]])
    norms = lm.capture(rows, ["layers.15"])["layers.15"].norm(dim=-1)
    assert bool((norms[:, 0] > 15_000).all()) and bool((norms[:, 2:] < 1_000).all())


def test_the_lean_pass_and_the_upper_layers_are_used_and_exact(lm: LanguageModel) -> None:
    rows = torch.randint(17, lm.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    lean = lm.capture(rows, ["layers.15"])["layers.15"]
    hooked = lm.capture_by_hooks(rows, ["layers.15"])["layers.15"]
    assert lm._fast_pass is not None
    torch.testing.assert_close(lean[:, 1:], hooked[:, 1:], rtol=0, atol=0.02)
    upper = lm.upper("layers.15")
    assert upper.is_exact
    torch.testing.assert_close(upper.logits(hooked), lm.logits(rows), rtol=0, atol=1e-4)
