"""The native SAE folder: what is written is what is read, and every damage is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_store import META, planted_store
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae import checkpoint
from sae.base import SAE
from sae.config import InputNorm, SAEConfig
from sae.errors import ArtefactError, CheckpointMismatch, ConfigError, DataError
from sae.manifest import sha256_text
from sae.plugins import find

X_ND = planted_store(n=256, d=12, g=16).x_ND


def make(**changes: Any) -> SAE:
    fields: dict[str, Any] = {
        "architecture": "topk", "activation": "topk", "d_in": 12, "d_out": 12, "d_sae": 20, "k": 3,
        "apply_b_dec_to_input": True, "input_norm": InputNorm(kind="layer_norm"), "decoder_unit_norm": True,
        "sae_id": "tiny.topk", "meta": META, "train_tokens": 0, "train_steps": 0, "seed": 0,
    }  # fmt: skip
    cfg = SAEConfig(**(fields | changes))
    sae: SAE = find("sae.architectures", cfg.architecture)(cfg)
    sae.initialise(sae.normalise(X_ND)[0], 0)
    return sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(make(), tmp_path / "sae", X_ND)
    return tmp_path / "sae"


def rewrite(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a safetensors file; the metadata stay."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    kept = {name: t for name, t in (load_file(path) | tensors).items() if t is not None}
    save_file(kept, path, metadata=metadata)


def edit_cfg(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / checkpoint.CFG).read_text())
    (folder / checkpoint.CFG).write_text(json.dumps(values | changes))


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    sae, back = make(), checkpoint.load(folder)
    assert back.cfg == sae.cfg
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.equal(back(X_ND), sae(X_ND))
    assert not any(p.requires_grad for p in back.parameters())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkpoint.save(back, folder.with_name("again"), X_ND)
    assert {path.name: path.read_bytes() for path in folder.with_name("again").iterdir()} == before


def test_bfloat16_weights_are_rounded_once(tmp_path: Path) -> None:
    sae = make(weights_dtype="bfloat16")
    checkpoint.save(sae, tmp_path, X_ND)
    back = checkpoint.load(tmp_path)
    assert back.W_enc_FD.dtype == torch.float32
    assert torch.equal(back.W_enc_FD, sae.W_enc_FD.bfloat16().float())
    assert torch.equal(back.b_dec_D, sae.b_dec_D), "biases stay float32"


def test_a_relu_sae_that_is_silent_on_the_sample(tmp_path: Path) -> None:
    sae = make(architecture="relu", activation="relu", k=None)
    with torch.no_grad():
        sae.b_enc_F.fill_(-1e3)
    checkpoint.save(sae, tmp_path, X_ND)
    assert torch.equal(checkpoint.load(tmp_path)(X_ND), sae(X_ND))


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        checkpoint.load(folder)


def test_a_missing_folder(folder: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist"):
        checkpoint.load(folder / "nowhere")
    with pytest.raises(ArtefactError, match="is a file"):
        checkpoint.load(folder / checkpoint.CFG)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.REFERENCE])
@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_truncated_file(folder: Path, name: str, size: int) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        checkpoint.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"cfg": 1}', '{"format": "sae_lens"}'])
def test_a_foreign_cfg(folder: Path, text: str) -> None:
    (folder / checkpoint.CFG).write_text(text)
    with pytest.raises(ArtefactError, match=checkpoint.CFG):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"topk": 3}, "topk"), ({"k": 21}, "21"), ({"format_version": 2}, "format_version"), ({"d_sae": 0}, "d_sae"),
        ({"k": None}, "needs k"), ({"architecture": "tpok"}, "cfg_sha256"), ({"activation": "relu"}, "cfg_sha256"),
        ({"d_sae": 19}, "W_enc_DF"), ({"d_in": 11, "d_out": 11}, "W_enc_DF"),
        ({"input_norm": {"kind": "layer_norm", "epsilon": 1}}, "epsilon"), ({"input_norm": "layer_norm"}, "input_norm"),
        ({"input_norm": {"kind": "layernorm"}}, "layernorm"), ({"weights_dtype": "float16"}, "float16"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input"), ({"d_sae": 20.0}, "d_sae"),
    ],
)  # fmt: skip
def test_a_cfg_that_cannot_be_used(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit_cfg(folder, **changes)
    with pytest.raises((ConfigError, ArtefactError), match=named):
        checkpoint.load(folder)


def test_the_first_release_wrote_two_fields_less(folder: Path) -> None:
    """They are null for the architectures it had; an SAE with thresholds must say them."""
    values = json.loads((folder / checkpoint.CFG).read_text())
    for field in checkpoint.LATER_FIELDS:
        assert values.pop(field) is None
    text = json.dumps(values)
    (folder / checkpoint.CFG).write_text(text)
    save_file(load_file(folder / checkpoint.WEIGHTS), folder / checkpoint.WEIGHTS, {"cfg_sha256": sha256_text(text)})
    assert checkpoint.load(folder).cfg.group_sizes is None
    (folder / checkpoint.CFG).write_text(json.dumps(values | {"activation": "threshold"}))
    with pytest.raises(ConfigError, match="lacks group_sizes, threshold_source"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["apply_b_dec_to_input", "weights_dtype", "format_version", "input_norm", "source"])
def test_a_cfg_without_a_field(folder: Path, name: str) -> None:
    values = json.loads((folder / checkpoint.CFG).read_text())
    del values[name]
    (folder / checkpoint.CFG).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["eps", "ddof", "center"])
def test_an_input_norm_without_a_field(folder: Path, name: str) -> None:
    norm = json.loads((folder / checkpoint.CFG).read_text())["input_norm"]
    del norm[name]
    edit_cfg(folder, input_norm=norm)
    with pytest.raises(ConfigError, match=f"input_norm.{name}"):
        checkpoint.load(folder)


def test_an_edited_cfg_does_not_fit_its_weights(folder: Path) -> None:
    edit_cfg(folder, seed=7)
    with pytest.raises(ArtefactError, match="cfg_sha256"):
        checkpoint.load(folder)


def test_weights_of_another_shape_or_name(folder: Path) -> None:
    rewrite(folder / checkpoint.WEIGHTS, b_enc_F=torch.zeros(19))
    with pytest.raises(ConfigError, match=r"b_enc_F has shape \(19,\)"):
        checkpoint.load(folder)
    rewrite(folder / checkpoint.WEIGHTS, b_enc_F=None, b_enc=torch.zeros(20))
    with pytest.raises(ArtefactError, match="b_enc_F"):
        checkpoint.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    bias_F = torch.zeros(20)
    bias_F[4] = value
    rewrite(folder / checkpoint.WEIGHTS, b_enc_F=bias_F)
    with pytest.raises(ArtefactError, match="b_enc_F holds NaN or infinity"):
        checkpoint.load(folder)


def test_weights_that_do_not_give_the_reference_sample(folder: Path) -> None:
    rewrite(folder / checkpoint.WEIGHTS, b_enc_F=torch.full((20,), 0.01))
    with pytest.raises(CheckpointMismatch, match="codes of the reference sample"):
        checkpoint.load(folder)


def test_a_reference_sample_that_was_changed(folder: Path) -> None:
    x_hat_ND = load_file(folder / checkpoint.REFERENCE)["x_hat_ND"]
    rewrite(folder / checkpoint.REFERENCE, x_hat_ND=x_hat_ND * 1.001)
    with pytest.raises(CheckpointMismatch, match="reconstructions of the reference sample"):
        checkpoint.load(folder)


def test_a_reference_sample_that_does_not_fit(folder: Path) -> None:
    path = folder / checkpoint.REFERENCE
    indices_NK = load_file(path)["indices_NK"]
    rewrite(path, indices_NK=indices_NK + 20)
    with pytest.raises(ArtefactError, match="outside 0..19"):
        checkpoint.load(folder)
    rewrite(path, indices_NK=indices_NK[:-1])
    with pytest.raises(ArtefactError, match="do not fit"):
        checkpoint.load(folder)


def test_decoder_rows_that_are_not_unit(folder: Path) -> None:
    rows_FD = load_file(folder / checkpoint.WEIGHTS)["W_dec_FD"]
    rewrite(folder / checkpoint.WEIGHTS, W_dec_FD=rows_FD * 1.01)
    with pytest.raises(CheckpointMismatch, match="off length 1"):
        checkpoint.load(folder)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    sae = make()
    with pytest.raises(DataError, match="at least one activation"):
        checkpoint.save(sae, tmp_path / "empty", X_ND[:0])
    with torch.no_grad():
        sae.W_dec_FD[2, 3] = float("nan")
    with pytest.raises(DataError, match="W_dec_FD"):
        checkpoint.save(sae, tmp_path / "nan", X_ND)
    assert list(tmp_path.iterdir()) == []
