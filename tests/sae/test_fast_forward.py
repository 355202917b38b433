"""The lean forward pass gives the model's own activations, and steps aside where it would not."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae.fast_forward import FastForward, suits, verified
from sae.language_model import LanguageModel


def ids(rows: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(1))


def test_equals_the_hooked_pass_at_every_block(tiny_lm: LanguageModel):
    hookpoints = [f"layers.{i}" for i in range(3)]
    lean, hooked = tiny_lm.capture(ids(), hookpoints), tiny_lm.capture_by_hooks(ids(), hookpoints)
    assert tiny_lm._fast_pass is not None
    for hookpoint in hookpoints:
        torch.testing.assert_close(lean[hookpoint], hooked[hookpoint], rtol=1e-4, atol=1e-4)


def test_its_activations_may_be_changed_and_differentiated(tiny_lm: LanguageModel):
    x = tiny_lm.capture(ids(), ["layers.1"])["layers.1"]
    x[:, 0] = 0
    weight = torch.ones(x.shape[-1], requires_grad=True)
    (x * weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)))


def test_other_hookpoints_take_the_models_own_pass(tiny_lm: LanguageModel):
    for hookpoint in ("layers.1.mlp", "layers.1.mlp:in", "layers.0:in"):
        torch.testing.assert_close(
            tiny_lm.capture(ids(), [hookpoint])[hookpoint], tiny_lm.capture_by_hooks(ids(), [hookpoint])[hookpoint]
        )


def test_a_damaged_lean_pass_is_noticed(tiny_lm: LanguageModel):
    fast = FastForward(tiny_lm.decoder, list(tiny_lm.blocks), 2)
    reference = {2: tiny_lm.capture_by_hooks(ids(), ["layers.1"])["layers.1"]}
    assert verified(fast, reference, ids())
    whole = fast.blocks[1].qkv
    fast.blocks[1].qkv = lambda x, add: whole(x, add) * 1.05
    assert not verified(fast, reference, ids())


@pytest.mark.parametrize(
    "changed",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
)
def test_models_of_another_shape_do_not_suit(changed: dict):
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **changed
    )
    assert not suits(LlamaForCausalLM(config))
