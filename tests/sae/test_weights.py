"""``sae.from_weights`` and ``sae.save``: a script's own weights, run by the formula it states, saved and read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, DataError, SaescopeError
from sae.manifest import is_complete
from sae.weights import ACTIVATIONS

D, F, K = 12, 40, 5
PLACE: dict[str, Any] = {"lm": "tiny", "hookpoint": "layers.1", "subtract_b_dec": True}
MORE: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": K},
    "batchtopk": {"k": K, "threshold": 0.3},
    "jumprelu": {"threshold": np.linspace(0.1, 0.6, F)},
    "matryoshka": {"threshold": 0.3, "group_sizes": [8, 32]},
    "gated": {},
}


def drawn(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 3


W_ENC, W_DEC, B_ENC, B_DEC = drawn("e", D, F), drawn("d", F, D), drawn("b", F), drawn("c", D)
B_GATE, B_MAG, R_MAG = drawn("g", F), drawn("m", F), drawn("r", F)
X = drawn("x", 64, D) * 6


def weights(architecture: str) -> dict[str, Any]:
    biases = {"b_gate": B_GATE, "b_mag": B_MAG, "r_mag": R_MAG} if architecture == "gated" else {"b_enc": B_ENC}
    both = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "architecture": architecture}
    return both | biases | MORE[architecture]


def codes(architecture: str, u: Tensor) -> Tensor:
    """By the formulas of the papers, from the centred input."""
    h = u @ W_ENC
    if architecture == "gated":
        return torch.where(h + B_GATE > 0, torch.relu(R_MAG.exp() * h + B_MAG), 0.0)
    h = h + B_ENC
    if architecture == "relu":
        return h.relu()
    if architecture == "topk":
        return torch.zeros_like(h).scatter(1, h.topk(K).indices, h.topk(K).values.relu())
    return torch.where(h > torch.as_tensor(MORE[architecture]["threshold"]).float(), h, 0.0).relu()


@pytest.mark.parametrize("architecture", ACTIVATIONS)
@pytest.mark.parametrize("subtract", [True, False])
def test_codes_and_reconstructions_are_those_of_the_formula(architecture: str, subtract: bool, tmp_path: Path) -> None:
    made = sae.from_weights(**weights(architecture), **PLACE | {"subtract_b_dec": subtract}, name="My SAE")
    z = codes(architecture, X - B_DEC if subtract else X)
    for found in (made, sae.load(sae.save(made, tmp_path / "kept"))):
        torch.testing.assert_close(found.encode(X), z)
        torch.testing.assert_close(found(X), z @ W_DEC + B_DEC)
        assert found.sae_id == made.sae_id and made.sae_id.startswith("my-sae.tiny.layers.1.")
    assert is_complete(tmp_path / "kept")
    assert made.cfg.meta is not None and made.cfg.meta.hookpoint == "layers.1"


def test_arrays_half_precision_and_layer_norm() -> None:
    parts = weights("topk") | {"W_enc": W_ENC.bfloat16(), "W_dec": W_DEC.numpy().astype(np.float16)}
    made = sae.from_weights(**parts, **PLACE, input_norm=InputNorm(kind="layer_norm"))
    n = (X - X.mean(1, keepdim=True)) / (X.std(1, keepdim=True) + 1e-5)
    h = (n - B_DEC) @ W_ENC.bfloat16().float() + B_ENC
    z = torch.zeros_like(h).scatter(1, h.topk(K).indices, h.topk(K).values.relu())
    torch.testing.assert_close(made.encode(X), z, rtol=1e-4, atol=1e-5)


def test_other_weights_have_another_name() -> None:
    ids = {sae.from_weights(**weights("topk") | {"b_dec": B_DEC * f}, **PLACE).sae_id for f in (1.0, 1.0, 1.5)}
    assert len(ids) == 2


def test_names_of_transformer_lens_are_understood() -> None:
    place = PLACE | {"lm": "gpt2-small", "hookpoint": "blocks.7.hook_resid_pre"}
    meta = sae.from_weights(**weights("topk"), **place).cfg.meta
    assert meta is not None and meta.hookpoint == "h.7:in"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topkk"}, "did you mean 'topk'"),
        ({"k": None}, "topk needs k"),
        ({"k": 0}, "k in 1..40"),
        ({"threshold": 0.1}, "topk has no threshold"),
        ({"architecture": "jumprelu"}, "jumprelu needs threshold"),
        ({"architecture": "gated", "k": None}, "gated needs b_gate, b_mag, r_mag"),
        ({"W_dec": W_DEC.T}, "give .weight.T"),
        ({"W_enc": W_ENC.T, "W_dec": W_DEC.T}, "say 12 latents, but they have 40 biases"),
        ({"b_dec": drawn("q", F)}, "b_dec has shape (40,), expected (12,)"),
        ({"W_enc": W_ENC.int()}, "expected floating point"),
        ({"W_enc": W_ENC / 0.0}, "NaN or infinite"),
        ({"architecture": "matryoshka", "threshold": 0.1}, "group_sizes"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SaescopeError) as error:
        sae.from_weights(**weights("topk") | change, **PLACE)
    assert message in str(error.value)


def test_a_folder_is_never_overwritten_unasked(tmp_path: Path) -> None:
    made = sae.from_weights(**weights("topk"), **PLACE)
    folder = sae.save(made, tmp_path / "kept", X)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    with pytest.raises(ArtefactError, match="exists"):
        sae.save(made, folder)
    sae.save(made, folder, X, force=True)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtefactError, match="exists"):
        sae.save(made, tmp_path / "notes", force=True)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


def test_nothing_is_left_of_an_sae_that_cannot_be_saved(tmp_path: Path) -> None:
    made = sae.from_weights(**weights("topk"), **PLACE)
    with torch.no_grad():
        made.b_dec_D[0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        sae.save(made, tmp_path / "kept", X)
    assert not list(tmp_path.iterdir())


def test_no_architecture_is_guessed() -> None:
    with pytest.raises(TypeError, match="subtract_b_dec"):
        sae.from_weights(W_ENC, W_DEC, architecture="relu", lm="tiny", hookpoint="layers.1")
    with pytest.raises(ConfigError):
        sae.from_weights(W_ENC, W_DEC, architecture="", **PLACE)
