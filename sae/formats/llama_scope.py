"""Llama Scope as released in 2024: ``hyperparams.json`` + ``checkpoints/final.safetensors`` (FORMATS 5.7); import only.

The order of the foldings is what other readers got wrong. With s_in = sqrt(D) / in and s_out = sqrt(D) / out, the
stated mean norms of input and output: b_enc / s_in, b_dec / s_out, W_dec * s_in / s_out; then the gate in the units of
these weights, times the decoder norm where the run included it; the threshold as it stands. Source:
OpenMOSS/Language-Model-SAEs 1e710367.
"""

from pathlib import Path
from typing import Any

from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.hook_names import from_transformer_lens
from sae.portable import ImportOptions, Portable, said, shaped, stated, take, width
from sae.safe_files import read_json, read_safetensors

CFG = "hyperparams.json"
_NUMBERS = (int, float)


class LlamaScope:
    """Reader."""

    title = "Llama Scope 2024 (hyperparams.json + checkpoints/final.safetensors)"
    files = ("hyperparams.json", "checkpoints/final.safetensors", "final.safetensors")

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and (path / CFG).is_file()

    def read(self, path: Path, options: ImportOptions) -> Portable:
        where = path / CFG
        cfg = read_json(where)
        found = [p for p in (path / "checkpoints" / "final.safetensors", path / "final.safetensors") if p.is_file()]
        if len(found) != 1:
            raise ArtefactError(f"{path} holds {len(found)} files final.safetensors, expected one in checkpoints/")
        file, tensors = found[0], read_safetensors(found[0])
        names = ["encoder.weight", "encoder.bias", "decoder.weight"]
        take(file, tensors, names, ["decoder.bias", "log_jumprelu_threshold"])
        d_in, d_sae = width(where, cfg, "d_model"), _width(where, cfg)
        d_out = int(tensors["decoder.weight"].shape[0])
        s_in, s_out = _scales(where, cfg, d_in, d_out)
        threshold_F = tensors.get("log_jumprelu_threshold")
        if threshold_F is not None:
            threshold_F = shaped(file, "log_jumprelu_threshold", threshold_F, (d_sae,)).double().exp()
        pre_bias = stated(where, cfg, "apply_decoder_bias_to_pre_encoder", bool)
        if pre_bias and s_in != s_out:
            raise Unsupported(f"{where}: one decoder bias in two units ({s_in:g}, {s_out:g}) cannot be run")
        include = stated(where, {"sparsity_include_decoder_norm": True} | cfg, "sparsity_include_decoder_norm", bool)
        hook_in, hook_out = stated(where, cfg, "hook_point_in", str), stated(where, cfg, "hook_point_out", str)
        bias_D = tensors.get("decoder.bias")
        decoder_FD = shaped(file, "decoder.weight", tensors["decoder.weight"], (d_out, d_sae)).t().double()
        encoder_FD = shaped(file, "encoder.weight", tensors["encoder.weight"], (d_sae, d_in))
        lm = said(where, cfg, "model_name", str)
        if threshold_F is None:
            value = stated(where, cfg, "jump_relu_threshold", _NUMBERS)
            threshold_F = encoder_FD.new_full((d_sae,), float(value)).double()
        return Portable(
            format="llama_scope", where=str(path), architecture="jumprelu", activation="threshold",
            W_enc_FD=encoder_FD.float(), W_dec_FD=(decoder_FD * (s_in / s_out)).float(),
            b_enc_F=(shaped(file, "encoder.bias", tensors["encoder.bias"], (d_sae,)).double() / s_in).float(),
            b_dec_D=encoder_FD.new_zeros(d_out).float() if bias_D is None
            else (shaped(file, "decoder.bias", bias_D, (d_out,)).double() / s_out).float(),
            threshold_F=threshold_F.float(), apply_b_dec_to_input=pre_bias, input_norm=InputNorm(kind="none"),
            gate_scale="decoder_norm" if include else "none", k=None, transcoder=hook_in != hook_out, lm=lm,
            hook=hook_in, hookpoint=from_transformer_lens(hook_in, lm or "llama"), files=(where, file),
            hookpoint_out=from_transformer_lens(hook_out, lm or "llama") if hook_in != hook_out else None,
            recipe=(f"dataset norm folded: s_in {s_in:.6g}, s_out {s_out:.6g}",), extra={"llama_scope": cfg},
        )  # fmt: skip


def _width(where: Path, cfg: dict[str, Any]) -> int:
    factor = stated(where, cfg, "expansion_factor", _NUMBERS)
    d_sae = int(cfg["d_model"] * factor)
    if said(where, cfg, "d_sae", int) not in (None, d_sae):
        raise ConfigError(f"{where}: d_sae {cfg['d_sae']} is not d_model * expansion_factor = {d_sae}")
    return d_sae


def _scales(where: Path, cfg: dict[str, Any], d_in: int, d_out: int) -> tuple[float, float]:
    """s_in, s_out. ``ConfigError`` for norms that are not positive, ``Unsupported`` for another normalisation."""
    kind = stated(where, cfg, "norm_activation", str)
    if kind == "inference":
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise Unsupported(f"{where}: norm_activation {kind!r} cannot be run; known: dataset-wise, inference")
    norms = stated(where, cfg, "dataset_average_activation_norm", dict)
    found = [stated(where, norms, name, _NUMBERS) for name in ("in", "out")]
    if min(found) <= 0:
        raise ConfigError(f"{where}: dataset_average_activation_norm is {norms}, expected positive numbers")
    return d_in**0.5 / found[0], d_out**0.5 / found[1]


PLUGIN = LlamaScope()
