"""The exact equivalences E1 to E4 of FORMATS 1, and that each semantic field changes something."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sae import foldings
from sae.agreement import compare
from sae.config import InputNorm
from sae.errors import Unsupported
from sae.portable import Portable, naive_forward

D, F, K, N = 16, 48, 4, 256
PRE_BIAS = {"apply_b_dec_to_input": True}
TRANSCODER = {"transcoder": True, "apply_b_dec_to_input": False}
X = torch.randn(N, D, generator=torch.Generator().manual_seed(9)) * 2 + 1


def make(activation: str, **changes: Any) -> Portable:
    g = torch.Generator().manual_seed(4)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    fields: dict[str, Any] = {
        "format": "test", "where": "here", "architecture": activation, "activation": activation,
        "W_enc_FD": r(F, D) * 0.3, "W_dec_FD": r(F, D) * 0.3, "b_enc_F": r(F) * 0.5, "b_dec_D": r(D) * 0.5,
        "apply_b_dec_to_input": False, "input_norm": InputNorm(kind="none"), "gate_scale": "none", "k": K,
    }  # fmt: skip
    if activation == "threshold":
        fields["threshold_F"] = torch.rand(F, generator=g) * 0.8 + 0.1
    if activation == "gated":
        fields |= {"b_enc_F": None, "b_gate_F": r(F) * 0.5, "b_mag_F": r(F) * 0.5, "r_mag_F": r(F) * 0.3}
    return Portable(**(fields | changes))


def same(before: Portable, after: Portable, tolerance: float = 1e-5, codes: bool = False) -> None:
    """Contributions and reconstructions; ``codes``: the codes themselves too."""
    found = compare(before, after, X)
    assert found.same_sets == 1.0 and found.l0_before > 0, found
    assert max(found.codes, found.reconstructions) <= tolerance, found
    if codes:
        a, b = naive_forward(before, X).z_NF, naive_forward(after, X).z_NF
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max()


ACTIVATIONS = ["relu", "topk", "threshold", "gated", "groupmax", "topk_signed"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [{}, PRE_BIAS])
def test_e1_unit_norm_is_layer_norm(activation: str, bias: dict[str, Any]):
    p = make(activation, input_norm=InputNorm(kind="unit_norm", eps=1e-5), **bias)
    after = foldings.unit_norm_to_layer_norm(p)
    assert after.input_norm == InputNorm(kind="layer_norm", eps=1e-5, ddof=1)
    same(p, after, 2e-5)
    for other in (InputNorm(kind="unit_norm", center=False), InputNorm(kind="unit_norm", target="sqrt_d")):
        with pytest.raises(Unsupported, match="not equal to any layer_norm"):
            foldings.unit_norm_to_layer_norm(replace(p, input_norm=other))


@pytest.mark.parametrize("activation", ["relu", "topk", "threshold"])
@pytest.mark.parametrize("gate", ["none", "decoder_norm"])
@pytest.mark.parametrize("bias", [{}, PRE_BIAS, {"b_pre_D": torch.ones(D)}])
@pytest.mark.parametrize("scales", [(0.2, 0.2), (0.2, 3.0)])
def test_e2_dataset_norm(activation: str, gate: str, bias: dict[str, Any], scales: tuple[float, float]):
    norm = InputNorm(kind="dataset_rms", scale_in=scales[0], scale_out=scales[1])
    p = make(activation, input_norm=norm, gate_scale=gate, **bias)
    folded = foldings.fold_dataset_norm(p, keep_codes=True)
    assert folded.input_norm.kind == "none"
    same(p, folded, codes=True)
    if scales[0] == scales[1]:
        raw = foldings.fold_dataset_norm(p, keep_codes=False)
        assert torch.equal(raw.W_enc_FD, p.W_enc_FD) and torch.equal(raw.W_dec_FD, p.W_dec_FD)
        same(p, raw)
    else:
        with pytest.raises(Unsupported, match="differ"):
            foldings.fold_dataset_norm(p, keep_codes=False)


def test_e2_skip_transcoder():
    norm = InputNorm(kind="dataset_rms", scale_in=0.2, scale_out=3.0)
    skip_DD = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    p = make("relu", input_norm=norm, W_skip_DD=skip_DD, b_pre_D=torch.ones(D), **TRANSCODER)
    same(p, foldings.fold_dataset_norm(p, keep_codes=True), codes=True)


@pytest.mark.parametrize("activation", ["relu", "topk", "threshold", "groupmax", "topk_signed"])
def test_e3_gate_scale(activation: str):
    p = make(activation, gate_scale="decoder_norm", **PRE_BIAS)
    after = foldings.fold_gate_scale(p)
    assert after.gate_scale == "none"
    same(p, after)
    assert float((torch.linalg.vector_norm(after.W_dec_FD, dim=1) - 1).abs().max()) < 1e-6
    if p.threshold_F is not None:
        assert after.threshold_F is p.threshold_F, "thresholds already are in units of the gate"


def test_e3_a_latent_without_decoder_row_stays_silent():
    p = make("threshold", gate_scale="decoder_norm")
    p.W_dec_FD[7] = 0
    same(p, foldings.fold_gate_scale(p))


@pytest.mark.parametrize("activation", ["relu", "threshold", "gated"])
def test_e3_without_gate_scale(activation: str):
    p = make(activation, **PRE_BIAS)
    same(p, foldings.unit_decoder_rows(p))


@pytest.mark.parametrize("activation", ["topk", "groupmax", "topk_signed"])
def test_e3_never_where_it_changes_the_selection(activation: str):
    with pytest.raises(Unsupported, match="selection"):
        foldings.unit_decoder_rows(make(activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [PRE_BIAS, {"b_pre_D": torch.arange(D) / D}])
def test_e4_pre_bias(activation: str, bias: dict[str, Any]):
    p = make(activation, **bias)
    without = foldings.remove_pre_bias(p)
    assert not without.apply_b_dec_to_input and without.b_pre_D is None
    same(p, without, codes=True)
    back = foldings.add_pre_bias(p)
    assert back.apply_b_dec_to_input
    same(p, back, codes=True)


FIELDS = {
    "pre-bias": lambda p: replace(p, apply_b_dec_to_input=not p.apply_b_dec_to_input),
    "norm": lambda p: replace(p, input_norm=InputNorm(kind="layer_norm")),
    "ddof": lambda p: replace(p, input_norm=InputNorm(kind="layer_norm", ddof=0)),
    "gate scale": lambda p: replace(p, gate_scale="decoder_norm"),
    "orientation": lambda p: replace(p, W_enc_FD=p.W_dec_FD, W_dec_FD=p.W_enc_FD),
    "threshold": lambda p: replace(p, threshold_F=p.threshold_F * 1.05),
    "k": lambda p: replace(p, activation="topk", k=K - 1),
    "activation": lambda p: replace(p, activation="relu"),
}


@pytest.mark.parametrize("name", list(FIELDS))
def test_each_semantic_field_has_teeth(name: str):
    p = make("threshold", **PRE_BIAS)
    if name == "ddof":
        p = FIELDS["norm"](p)
    assert compare(p, p, X).passed
    assert not compare(p, FIELDS[name](p), X).passed
