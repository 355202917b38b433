"""Hookpoints, early stop, replacement, and what a model folder may lack."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from sae.errors import ConfigError
from sae.language_model import LanguageModel, default_dtype


def ids(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tiny_lm: LanguageModel, tiny_gpt2: LanguageModel) -> LanguageModel:
    return tiny_lm if request.param == "llama" else tiny_gpt2


def hidden_states(lm: LanguageModel, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Residuals before block 0, 1, ...; the last one is normed."""
    return lm.model(input_ids=tokens, output_hidden_states=True).hidden_states


def test_what_a_model_says_of_itself(lm: LanguageModel) -> None:
    assert lm.n_layers == 3 and lm.vocab_size == 259 and lm.dtype == torch.float32
    assert lm.default_hookpoint() == f"{lm.stack_name}.1" and len(lm.revision) == 64
    assert lm.check_hookpoint(lm.default_hookpoint()) == lm.d_model
    assert not any(p.requires_grad for p in lm.model.parameters()) and not lm.model.training


def test_block_outputs_and_inputs_are_the_models_hidden_states(lm: LanguageModel) -> None:
    tokens, stack = ids(), lm.stack_name
    states = hidden_states(lm, tokens)
    points = [f"{stack}.0:in", f"{stack}.0", f"{stack}.1", f"{stack}.2:in"]
    found = lm.capture(tokens, points)
    assert list(found) == points
    for point, state in zip(points, (states[0], states[1], states[2], states[2]), strict=True):
        torch.testing.assert_close(found[point], state, rtol=1e-4, atol=1e-5)
    assert [lm.block_of(p) for p in (*points, f"{stack}.1.mlp")] == [0, 1, 2, 2, None]


def test_an_mlp_and_its_input(lm: LanguageModel) -> None:
    tokens, name = ids(), f"{lm.stack_name}.1.mlp"
    found = lm.capture(tokens, [name, f"{name}:in"])
    mlp = lm.decoder.get_submodule(name)
    torch.testing.assert_close(mlp(found[f"{name}:in"]), found[name])
    assert found[name].shape == (*tokens.shape, lm.d_model)


def test_a_wider_hookpoint(tiny_lm: LanguageModel) -> None:
    assert tiny_lm.check_hookpoint("layers.0.mlp.gate_proj") == 2 * tiny_lm.d_model
    assert tiny_lm.check_hookpoint("layers.0.mlp.down_proj:in") == 2 * tiny_lm.d_model


@pytest.mark.parametrize(
    ("hookpoint", "says"),
    [
        ("layers.99", r"layers\.99.*layers\.0 … layers\.2"),
        ("layer.1", r"did you mean .*'layers\.1'"),
        ("layers.1.mpl", r"did you mean .*'layers\.1\.mlp'"),
        ("layers.1:out", "layers.1:out"),
        ("layers.1:out", r"it is written 'layers\.1' here"),
        ("model.layers.1.mlp:in", r"it is written 'layers\.1\.mlp:in' here"),
        ("blocks.1.hook_resid_pre", r"it is written 'layers\.1:in' here"),
        ("blocks.1.hook_mlp_out", r"it is written 'layers\.1\.mlp' here"),
        ("blocks.1.hook_nothing", "no hookpoint 'blocks.1.hook_nothing'"),
        ("", "no hookpoint ''"),
        ("layers", "layers"),
        ("rotary_emb", "expected one vector per token"),
    ],
)
def test_bad_hookpoints(tiny_lm: LanguageModel, hookpoint: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny_lm.check_hookpoint(hookpoint)


def test_upper_blocks_never_run(lm: LanguageModel) -> None:
    calls: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(lm.blocks)]
    handles.append(lm.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(99)))
    try:
        lm.capture_by_hooks(ids(), [f"{lm.stack_name}.0", f"{lm.stack_name}.1"])
        assert calls == [0, 1]
        calls.clear()
        lm.capture_by_hooks(ids(), [f"{lm.stack_name}.1:in"])
        assert calls == [0]
        calls.clear()
        lm.capture(ids(), [f"{lm.stack_name}.1"])
        assert max(calls, default=0) <= 1  # the lean pass calls no block at all
        calls.clear()
        lm.logits(ids())
        assert calls == [0, 1, 2, 99]
    finally:
        for handle in handles:
            handle.remove()


def test_no_hook_stays_behind(lm: LanguageModel) -> None:
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
    lm.capture_by_hooks(ids(), [f"{lm.stack_name}.0:in", f"{lm.stack_name}.1"])
    with pytest.raises(RuntimeError):
        lm.replace(ids(), f"{lm.stack_name}.1", torch.zeros(2, 9, lm.d_model + 1))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()) == before


@pytest.mark.parametrize("suffix", ["0", "1", "2", "1:in", "1.mlp", "1.mlp:in"])
def test_own_activations_put_back_change_nothing(lm: LanguageModel, suffix: str) -> None:
    tokens, point = ids(), f"{lm.stack_name}.{suffix}"
    own = lm.capture(tokens, [point])[point]
    expected = lm.logits(tokens)
    assert expected.shape == (*tokens.shape, 259) and expected.dtype == torch.float32
    torch.testing.assert_close(lm.replace(tokens, point, own), expected, rtol=1e-3, atol=1e-3)
    other = lm.replace(tokens, point, own + torch.randn(own.shape, generator=torch.Generator().manual_seed(0)))
    assert float((other - expected).abs().max()) > 0.01


def test_attention_is_causal(lm: LanguageModel) -> None:
    tokens, point = ids(), lm.default_hookpoint()
    changed = tokens.clone()
    changed[:, -1] = 5
    a, b = lm.capture(tokens, [point])[point], lm.capture(changed, [point])[point]
    torch.testing.assert_close(a[:, :-1], b[:, :-1])
    assert not torch.allclose(a[:, -1], b[:, -1])


def test_types(tiny_lm_dir: Path) -> None:
    half = LanguageModel.load(str(tiny_lm_dir), dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.capture(ids(), ["layers.1"])["layers.1"].dtype == torch.bfloat16
    assert half.logits(ids()).dtype == torch.float32
    assert LanguageModel.load(str(tiny_lm_dir)).dtype == default_dtype()
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        LanguageModel.load(str(tiny_lm_dir), dtype="float3")


@pytest.fixture
def folder(tmp_path: Path, tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Path(shutil.copytree(tiny_lm_dir, tmp_path / "model"))


def refused(ref: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        LanguageModel.load(str(ref), dtype="float32")
    return str(caught.value)


def test_the_revision_follows_the_weights(folder: Path) -> None:
    first = LanguageModel.load(str(folder), dtype="float32")
    assert first.name == "model" and first.slug == "model"
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert LanguageModel.load(str(folder), dtype="float32").revision != first.revision


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "is a file" in refused(folder / "model.safetensors")


@pytest.mark.parametrize("ref", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there(ref: str) -> None:
    assert "does not exist" in refused(ref) and repr(ref) in refused(ref)


def test_an_empty_name() -> None:
    assert "the model is empty" in refused("") and "default" in refused(" ")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json and 0 .gguf files" in refused(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refused(folder)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot read the model" in refused(folder) and str(folder) in refused(folder)


def test_missing_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights" in refused(folder) and "layers.1.mlp.up_proj.weight" in refused(folder)


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "cannot read the configuration" in refused(folder)


def test_no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    assert "tokenizer" in refused(folder)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_no_causal_model(folder: Path, kind: str) -> None:
    small = {"vocab_size": 259}
    if kind == "bert":
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **small)
        BertModel(config).save_pretrained(folder)
    else:
        T5ForConditionalGeneration(
            T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **small)
        ).save_pretrained(folder)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    assert "no causal language model" in refused(folder) and architecture in refused(folder)


def test_two_gguf_files_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "2 .gguf files" in refused(tmp_path)
