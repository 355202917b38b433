"""Model families that people bring: what is captured, replaced and unembedded is what the model itself does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import byte_tokenizer

from sae.errors import ConfigError, Unsupported
from sae.language_model import LanguageModel
from sae.unembedding import Unembedding

IDS = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, **IDS,
}  # fmt: skip
NEOX = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
SLIDING = {**SIZES, "sliding_window": 8}
GEMMA = {**SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}
TOKENS = 24
"""Three sliding windows."""


def gemma3_with_a_vision_tower() -> Any:
    """As many vision blocks as text blocks: the first list of that length is the wrong one."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = hf.Gemma3Config(text_config=GEMMA, vision_config=vision, mm_tokens_per_image=1)
    return hf.Gemma3ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**NEOX)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SLIDING)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA, final_logit_softcapping=0.5)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)),
    "gemma3 with images": gemma3_with_a_vision_tower,
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=8.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**NEOX)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(hidden_size=32, num_layers=4, num_heads=4, window_size=8, max_position_embeddings=128,
                        attention_types=[[["global", "local"], 2]], **IDS)),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder: Path = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return LanguageModel.load(str(folder), dtype="float32")


def ids() -> torch.Tensor:
    return torch.randint(3, 259, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def disturbed(acts_BLD: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(acts_BLD.shape, generator=torch.Generator().manual_seed(2))
    return acts_BLD + noise * acts_BLD.std()


def test_a_block_gives_the_models_own_hidden_state(lm: LanguageModel) -> None:
    found = lm.capture(ids(), [f"{lm.stack_name}.1"])[f"{lm.stack_name}.1"]
    states = lm.model(input_ids=ids(), output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(found, states[2])


def test_the_upper_layers_alone_equal_a_full_pass(lm: LanguageModel) -> None:
    """Beyond the sliding window as well, in one go and after a prefix."""
    point = f"{lm.stack_name}.1"
    clean, upper = lm.capture(ids(), [point])[point], lm.upper(point)
    changed = disturbed(clean)
    expected = lm.replace(ids(), point, changed)
    assert upper.is_exact
    torch.testing.assert_close(upper.logits(changed), expected, rtol=1e-4, atol=1e-5)
    cut = 16
    tail = torch.cat([clean[:1, :cut].expand(2, -1, -1), changed[:, cut:]], dim=1)
    expected = lm.replace(ids(), point, tail)[:, cut:]
    found = upper.continue_from(upper.prefix(clean[:1]), changed[:, cut:], cut)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unembedded_hidden_states_are_the_models_logits(lm: LanguageModel) -> None:
    states = lm.upper(f"{lm.stack_name}.2").hidden(lm.capture(ids(), [f"{lm.stack_name}.2"])[f"{lm.stack_name}.2"])
    torch.testing.assert_close(lm.unembedding(states), lm.logits(ids()), rtol=1e-4, atol=1e-5)
    declared = {"granite": 1 / 8, "cohere": 1 / 16}
    kind = lm.model.config.model_type
    assert lm.unembedding.scale == declared.get(kind, 1.0)


@pytest.mark.parametrize("suffix", ["mlp", "mlp:in"])
def test_a_replaced_activation_stays_the_callers(lm: LanguageModel, suffix: str) -> None:
    """Falcon adds its attention to the MLP's output in place: the tensor given must not change, nor the next pass."""
    point = f"{lm.stack_name}.1.{suffix}"
    given = disturbed(lm.capture(ids(), [point])[point])
    kept = given.clone()
    first, second = lm.replace(ids(), point, given), lm.replace(ids(), point, given)
    assert torch.equal(given, kept)
    assert torch.equal(first, second)


def test_several_hookpoints_at_once_are_those_alone(lm: LanguageModel) -> None:
    points = [f"{lm.stack_name}.{block}.mlp{end}" for block in (0, 1) for end in ("", ":in")]
    together = lm.capture(ids(), points)
    for point in points:
        assert torch.equal(together[point], lm.capture(ids(), [point])[point]), point


def test_a_head_that_is_no_multiple_is_refused(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(*args: Any, **kwargs: Any) -> Any:
        output = type(tiny_lm.model).forward(tiny_lm.model, *args, **kwargs)
        return type(output)(logits=output.logits**2)

    monkeypatch.setattr(tiny_lm.model, "forward", squared)
    with pytest.raises(Unsupported, match="no multiple of its unembedding's output"):
        Unembedding(tiny_lm.model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "gpu"])
def test_a_device_that_is_not_there(tiny_lm_dir: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {device}: .*give --device cpu"):
        LanguageModel.load(str(tiny_lm_dir), device=device)
