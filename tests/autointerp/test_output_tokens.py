"""Promoted and suppressed tokens against formulas in float64 and against the model, for each kind of last norm."""

import pytest
import torch
import transformers as hf
from held_out import random_sae
from tiny import byte_tokenizer

from autointerp.output_tokens import OUTPUT_TOKENS, UNUSED, output_tokens
from sae.language_model import LanguageModel

D, V, PADDED = 16, 259, 320
"""The byte tokenizer has 259 ids, the unembedding 61 rows more, as many models have."""
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": PADDED}


def llama():
    config = hf.LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=False)
    return hf.LlamaForCausalLM(config)


def gemma():
    config = hf.GemmaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, head_dim=8)
    return hf.GemmaForCausalLM(config)


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=D, n_layer=2, n_head=2, n_positions=64, vocab_size=PADDED))


def neox():
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, intermediate_size=32))


def opt():
    config = hf.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=D, max_position_embeddings=64)
    return hf.OPTForCausalLM(config)


MADE = {"llama": (llama, "model.norm"), "gemma": (gemma, "model.norm"), "gpt2": (gpt2, "transformer.ln_f"),
        "neox": (neox, "gpt_neox.final_layer_norm"), "opt": (opt, "model.decoder.final_layer_norm")}  # fmt: skip
CENTRING = ("gpt2", "neox", "opt")


@pytest.fixture(scope="module", params=sorted(MADE))
def case(request):
    """(name, model, weights of its last norm in float64): gain and bias are drawn, so that neither can be left out."""
    torch.manual_seed(3)
    make, where = MADE[request.param]
    model = make()
    with torch.no_grad():
        norm = model.get_submodule(where)
        norm.weight.copy_(torch.randn(D))
        if hasattr(norm, "bias"):
            norm.bias.copy_(3 * torch.randn(D))
        model.get_output_embeddings().weight.copy_(torch.randn(PADDED, D))
    lm = LanguageModel(model, byte_tokenizer(), name="x", revision="y", slug="x")
    return request.param, lm, norm.weight.detach().double().numpy()


def names(logits_V, usable, lm, down=False):
    order = sorted(usable, key=lambda i: (logits_V[i] if down else -logits_V[i], i))
    return [lm.tokenizer.decode([i]) for i in order[:OUTPUT_TOKENS]]


ORDINARY = range(3, V)
"""Without <bos>, <eos>, <pad> and the rows that no token has."""


def test_they_follow_the_formula(case) -> None:
    name, lm, gamma = case
    sae = random_sae(d_in=D)
    U = lm.model.get_output_embeddings().weight.double().numpy()
    found = output_tokens(lm, sae, range(sae.d_sae))
    assert sorted(found) == list(range(sae.d_sae))
    for latent, (promoted, suppressed) in found.items():
        d = sae.W_dec_FD[latent].double().numpy()
        d = d - d.mean() if name in CENTRING else d
        logits_V = U @ (d * (gamma + 1 if name == "gemma" else gamma))
        assert promoted == names(logits_V, ORDINARY, lm)
        assert suppressed == names(logits_V, ORDINARY, lm, down=True)


def test_they_are_what_the_model_writes_where_nothing_but_the_latent_is_in_the_stream(case) -> None:
    """The last block's output is replaced by a long multiple of the decoder row; a bias is what is there without."""
    _, lm, _ = case
    sae, ids = random_sae(d_in=D), torch.full((1, 2), 5)
    hookpoint = f"{lm.stack_name}.{lm.n_layers - 1}"
    for latent, (promoted, suppressed) in output_tokens(lm, sae, range(6)).items():
        stream = torch.zeros(1, 2, D)
        nothing = lm.replace(ids, hookpoint, stream)[0, -1].double()
        stream[:] = 1e4 * sae.W_dec_FD[latent]
        logits_V = (lm.replace(ids, hookpoint, stream)[0, -1].double() - nothing).numpy()
        assert promoted == names(logits_V, ORDINARY, lm)
        assert suppressed == names(logits_V, ORDINARY, lm, down=True)


def test_rows_without_a_token_and_special_ids_are_never_named_however_large(case) -> None:
    """Before: the largest logits were cut off, as many as the unembedding has rows too many."""
    _, lm, _ = case
    sae = random_sae(d_in=D)
    before = output_tokens(lm, sae, range(4))
    weight = lm.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[[0, 1, 2, *range(V, PADDED)]] *= 100.0
    try:
        assert output_tokens(lm, sae, range(4)) == before
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_blocks_and_half_precision(case, monkeypatch) -> None:
    """Latents and rows in small pieces: the same; a bfloat16 model is read in float32."""
    _, lm, _ = case
    sae = random_sae(d_in=D)
    whole = output_tokens(lm, sae, range(10))
    monkeypatch.setattr("autointerp.output_tokens.LATENTS", 3)
    monkeypatch.setattr("autointerp.output_tokens.ROWS", 50)
    assert output_tokens(lm, sae, range(10)) == whole
    assert output_tokens(lm, sae, [7, 2]) == {7: whole[7], 2: whole[2]} and output_tokens(lm, sae, []) == {}


def test_bfloat16_weights_are_multiplied_in_float32() -> None:
    torch.manual_seed(4)
    model = gpt2().to(torch.bfloat16)
    lm = LanguageModel(model, byte_tokenizer(), name="x", revision="y", slug="x")
    sae = random_sae(d_in=D)
    U = model.get_output_embeddings().weight.double().numpy()
    for latent, (promoted, _) in output_tokens(lm, sae, range(8)).items():
        d = sae.W_dec_FD[latent].double().numpy()
        assert promoted == names(U @ (d - d.mean()), ORDINARY, lm)


def test_an_sae_that_does_not_write_the_stream_has_none(case) -> None:
    assert output_tokens(case[1], random_sae(d_in=8), range(3)) == {}


def test_places_kept_free_in_a_vocabulary() -> None:
    free = ("<unused12>", "[unused3]", "<|reserved_special_token_5|>", "<|unused_1|>", "<reserved_7>")
    assert all(UNUSED.match(t) for t in free)
    assert not any(UNUSED.match(t) for t in ("unused", " <unused", "<b>", "[0]", "reserved", "<unused"))
