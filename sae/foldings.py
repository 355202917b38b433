"""Exact equivalences between ways to write one SAE (FORMATS 1, E1 to E4); each returns a new :class:`Portable`.

They are computed in float64 and rounded to float32 once. F latents, D channels.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae.config import InputNorm
from sae.errors import Unsupported
from sae.portable import Portable

LAYER_NORM = InputNorm(kind="layer_norm", eps=1e-5, ddof=1)
NO_NORM = InputNorm(kind="none")


def _round(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    return _round(tensor.double() * factor)


def _all_scaled(p: Portable, names: Iterable[str], factor: Tensor | float) -> dict[str, Any]:
    """The fields of these names that are there, scaled."""
    return {name: _scaled(getattr(p, name), factor) for name in names if getattr(p, name) is not None}


def _noted(p: Portable, note: str) -> tuple[str, ...]:
    return (*p.recipe, note)


def unit_norm_to_layer_norm(p: Portable) -> Portable:
    """E1: the centred unit norm with target one is layer_norm over sqrt(D - 1), so what is added to the input grows."""
    norm = p.input_norm
    if norm.kind != "unit_norm" or not norm.center or norm.target != "one":
        raise Unsupported(f"{p.where}: the norm {norm} is not equal to any layer_norm")
    factor = (p.d_in - 1) ** 0.5
    scaled = _all_scaled(p, _OFFSETS, factor)
    return replace(p, **scaled, input_norm=LAYER_NORM, recipe=_noted(p, "unit_norm to layer_norm (E1)"))


_OFFSETS = ("b_enc_F", "b_dec_D", "b_pre_D", "threshold_F", "b_gate_F", "b_mag_F")
"""What has the units of a pre-activation or of the normalised input."""


def fold_dataset_norm(p: Portable, *, keep_codes: bool) -> Portable:
    """E2: a constant factor of the input moves into the weights.

    ``keep_codes``: fold A, weights change and codes stay; else fold B, weights stay and codes are in raw units. Fold B
    needs one scale for input and output.
    """
    norm = p.input_norm
    if norm.kind != "dataset_rms":
        return p
    s_in, s_out = norm.scale_in, norm.scale_out
    if not keep_codes and s_in == s_out:
        changed = _all_scaled(p, _OFFSETS, 1 / s_in)
        return replace(p, **changed, input_norm=NO_NORM, recipe=_noted(p, "dataset norm folded into biases (E2 B)"))
    if not keep_codes:
        raise Unsupported(f"{p.where}: scales {s_in} and {s_out} differ; only weights can take them in (fold A)")
    if p.apply_b_dec_to_input and s_in != s_out:
        p = remove_pre_bias(p)
    under_gate = p.gate_scale == "decoder_norm"
    changed = (
        _all_scaled(p, ["W_enc_FD"], s_in) | _all_scaled(p, ["W_dec_FD", "b_dec_D"], 1 / s_out)
        | _all_scaled(p, ["b_pre_D"], 1 / s_in) | _all_scaled(p, ["W_skip_DD"], s_in / s_out)
        | (_all_scaled(p, ["threshold_F"], 1 / s_out) if under_gate else {})
    )  # fmt: skip
    return replace(p, **changed, input_norm=NO_NORM, recipe=_noted(p, "dataset norm folded into weights (E2 A)"))


def fold_gate_scale(p: Portable) -> Portable:
    """E3 under ``decoder_norm`` gating: unit decoder rows, so that the gate needs no scale; thresholds stay."""
    if p.gate_scale == "none":
        return p
    if p.activation == "gated":
        raise Unsupported(f"{p.where}: gated with activations rescaled by decoder norms is a combination nobody trains")
    return replace(_unit_rows(p), gate_scale="none", recipe=_noted(p, "gate scale folded into unit decoder rows (E3)"))


def unit_decoder_rows(p: Portable) -> Portable:
    """E3 without a gate scale: thresholds scale too; refused where it would change which latents are selected."""
    if p.gate_scale != "none":
        return fold_gate_scale(p)
    if p.activation in ("topk", "groupmax", "topk_signed"):
        raise Unsupported(f"{p.where}: unit decoder rows would change the selection of {p.activation}")
    others = _all_scaled(p, ("threshold_F", "b_gate_F", "b_mag_F"), _row_norms(p))
    return replace(_unit_rows(p), **others, recipe=_noted(p, "unit decoder rows (E3)"))


def _row_norms(p: Portable) -> Tensor:
    n_F = torch.linalg.vector_norm(p.W_dec_FD.double(), dim=1)
    return torch.where(n_F > 0, n_F, 1.0)


def _unit_rows(p: Portable) -> Portable:
    n_F = _row_norms(p)
    # A latent without a decoder row adds nothing; under decoder_norm gating its gate is 0, so it never fires either.
    silent_F = p.W_dec_FD.abs().sum(1) == 0
    gate_F = torch.where(silent_F, 0.0, n_F) if p.gate_scale == "decoder_norm" else n_F
    changed = (
        _all_scaled(p, ["W_dec_FD"], 1 / n_F[:, None]) | _all_scaled(p, ["W_enc_FD"], gate_F[:, None])
        | _all_scaled(p, ["b_enc_F"], gate_F)
    )  # fmt: skip
    return replace(p, **changed)


def remove_pre_bias(p: Portable) -> Portable:
    """E4: what is subtracted from the input becomes part of the encoder biases."""
    bias_D = p.b_dec_D if p.apply_b_dec_to_input else p.b_pre_D
    if bias_D is None:
        return p
    return _shift(replace(p, apply_b_dec_to_input=False, b_pre_D=None), bias_D, -1.0, "pre-bias removed (E4)")


def add_pre_bias(p: Portable) -> Portable:
    """E4 the other way: an SAE without pre-bias written as one that subtracts its decoder bias."""
    if p.apply_b_dec_to_input:
        return p
    if p.transcoder:
        raise Unsupported(f"{p.where}: a transcoder's decoder bias belongs to its output, not to its input")
    plain = remove_pre_bias(p)
    return _shift(replace(plain, apply_b_dec_to_input=True), plain.b_dec_D, 1.0, "pre-bias put in (E4)")


def _shift(p: Portable, bias_D: Tensor, sign: float, note: str) -> Portable:
    shift_F = sign * (p.W_enc_FD.double() @ bias_D.double())
    if p.activation != "gated":
        assert p.b_enc_F is not None
        return replace(p, b_enc_F=_round(p.b_enc_F.double() + shift_F), recipe=_noted(p, note))
    assert p.b_gate_F is not None and p.b_mag_F is not None and p.r_mag_F is not None
    magnitude_F = p.b_mag_F.double() + p.r_mag_F.double().exp() * shift_F
    gate_F = _round(p.b_gate_F.double() + shift_F)
    return replace(p, b_gate_F=gate_F, b_mag_F=_round(magnitude_F), recipe=_noted(p, note))
