"""Llamascopium (new Llama Scope code): ``config.json`` + ``sae_weights.safetensors`` or ``.pt`` (FORMATS 5.7).

Checked against 2.0.0b34. ``W_E`` lies [D, F], ``W_D`` [F, D]; there is no pre-bias. The mean norms of a dataset-wise
run lie among the tensors; files in another mode may hold uninitialised numbers in their place, which are not read.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae import foldings
from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.hook_names import from_transformer_lens, to_transformer_lens
from sae.portable import THRESHOLD, Activation, ImportOptions, Portable, said, shaped, stated, take, width
from sae.safe_files import read_json, read_safetensors, read_torch

logger = logging.getLogger(__name__)
CFG, FILES = "config.json", ("sae_weights.safetensors", "sae_weights.pt")
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
_ACTIVATION: dict[str, tuple[str, Activation]] = {
    "relu": ("relu", "relu"), "topk": ("topk", "topk"), "jumprelu": ("jumprelu", "threshold"),
    "batchtopk": ("batchtopk", "threshold"),
}  # fmt: skip


class Llamascopium:
    """Reader and writer."""

    title = "Llamascopium (config.json + sae_weights.safetensors or .pt)"
    files = ("sae_weights.*", "config.json")

    def recognises(self, path: Path) -> bool:
        if not path.is_dir() or not (path / CFG).is_file() or (path / "cfg.json").is_file():
            return False
        return any((path / name).exists() for name in (*FILES, "sae_weights.dcp"))

    def read(self, path: Path, options: ImportOptions) -> Portable:
        where = path / CFG
        cfg = read_json(where)
        if stated(where, cfg, "sae_type", str) != "sae":
            raise Unsupported(f"{where}: sae_type {cfg['sae_type']!r} cannot be run; known: sae")
        if said(where, cfg, "use_glu_encoder", bool):
            raise Unsupported(f"{where}: an encoder with a gated linear unit cannot be run")
        file, tensors = _tensors(path)
        activation, k, lacks = _activation(where, cfg, options)
        d_in = width(where, cfg, "d_model")
        d_sae = int(d_in * stated(where, cfg, "expansion_factor", (int, float)))
        hook_in, hook_out = stated(where, cfg, "hook_point_in", str), stated(where, cfg, "hook_point_out", str)
        norms = {f"{_NORM}{hook}" for hook in (hook_in, hook_out)}
        stores = activation == "threshold" and not lacks
        has_bias = stated(where, cfg, "use_decoder_bias", bool)
        needed = ["W_E", "b_E", "W_D", *(["b_D"] if has_bias else [])]
        take(file, tensors, [*needed, *([_LOG_THRESHOLD] if stores else [])], norms)
        folded = cfg.get("norm_activation") == "inference" and cfg.get("written_by") != "saescope"
        if activation == "threshold" and folded:
            logger.warning(
                "%s was folded by Llamascopium, which leaves the thresholds of a JumpReLU SAE unscaled", path
            )
        lm = said(where, cfg, "model_name", str)
        log_F = tensors.get(_LOG_THRESHOLD)
        return Portable(
            format="llamascopium", where=str(path), architecture=_ACTIVATION[cfg["act_fn"].lower()][0],
            activation=activation, W_enc_FD=shaped(file, "W_E", tensors["W_E"], (d_in, d_sae)).t(),
            W_dec_FD=shaped(file, "W_D", tensors["W_D"], (d_sae, d_in)),
            b_enc_F=shaped(file, "b_E", tensors["b_E"], (d_sae,)),
            b_dec_D=shaped(file, "b_D", tensors["b_D"], (d_in,)) if has_bias else torch.zeros(d_in),
            threshold_F=None if not stores else shaped(file, _LOG_THRESHOLD, log_F, (d_sae,)).exp(),
            apply_b_dec_to_input=False, input_norm=_norm(where, file, cfg, tensors, d_in), k=k,
            gate_scale="decoder_norm" if stated(where, cfg, "sparsity_include_decoder_norm", bool) else "none",
            transcoder=hook_in != hook_out, lm=lm, hook=hook_in, hookpoint=from_transformer_lens(hook_in, lm),
            hookpoint_out=from_transformer_lens(hook_out, lm) if hook_in != hook_out else None,
            files=(where, file), extra={"llamascopium": cfg}, lacks=lacks,
        )  # fmt: skip

    def write(self, p: Portable, folder: Path) -> None:
        """``norm_activation: inference``. ``Unsupported``: per-token norms, gated, thresholds that are not positive."""
        p = _expressible(p)
        act_fn = {"relu": "relu", "topk": "topk", "threshold": "jumprelu"}[p.activation]
        assert p.b_enc_F is not None
        tensors = {"W_E": p.W_enc_FD.t(), "b_E": p.b_enc_F, "W_D": p.W_dec_FD, "b_D": p.b_dec_D}
        if p.threshold_F is not None and p.activation == "threshold":
            tensors[_LOG_THRESHOLD] = p.threshold_F.log()
        hook = p.hook or (to_transformer_lens(p.hookpoint, p.lm) if p.hookpoint else None) or p.hookpoint or "unknown"
        tensors[f"{_NORM}{hook}"] = torch.ones(())
        cfg: dict[str, Any] = {
            "sae_type": "sae", "d_model": p.d_in, "expansion_factor": p.d_sae / p.d_in, "use_decoder_bias": True,
            "act_fn": act_fn, "norm_activation": "inference", "sparsity_include_decoder_norm": False,
            "hook_point_in": hook, "hook_point_out": hook, "use_glu_encoder": False, "top_k": p.k or 50,
            "written_by": "saescope",
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().float().contiguous() for name, t in tensors.items()}, folder / FILES[0])
        (folder / CFG).write_text(json.dumps(cfg, indent=1) + "\n", encoding="utf-8")


def _tensors(path: Path) -> tuple[Path, dict[str, Any]]:
    if (path / "sae_weights.dcp").exists():
        raise Unsupported(
            f"{path / 'sae_weights.dcp'}: torch reads a .dcp checkpoint with pickle; save it as safetensors with "
            "Llamascopium first"
        )
    found = [path / name for name in FILES if (path / name).is_file()]
    if len(found) != 1:
        raise ArtefactError(f"{path} holds {len(found)} of {' and '.join(FILES)}, expected one")
    if found[0].suffix == ".safetensors":
        return found[0], dict(read_safetensors(found[0]))
    values = read_torch(found[0])
    take(found[0], values, ["sae", "version"])
    if not isinstance(values["sae"], Mapping):
        raise ArtefactError(f"{found[0]}: 'sae' is a {type(values['sae']).__name__}, expected a dict of tensors")
    return found[0], dict(values["sae"])


def _activation(
    where: Path, cfg: dict[str, Any], options: ImportOptions
) -> tuple[Activation, int | None, tuple[str, ...]]:
    """Activation, k, and what has to be measured."""
    name = stated(where, cfg, "act_fn", str).lower()
    if name not in _ACTIVATION:
        raise Unsupported(f"{where}: act_fn {name!r} cannot be run; known: {', '.join(_ACTIVATION)}")
    lacks = (THRESHOLD,) if name == "batchtopk" else ()
    if lacks and options.calibrate_on is None:
        raise Unsupported(
            f"{where}: act_fn 'batchtopk' stores no threshold; measure one with --calibrate --check-on MODEL"
        )
    # top_k is written for every activation; only these mean it.
    k = stated(where, cfg, "top_k", int) if name in ("topk", "batchtopk") else None
    return _ACTIVATION[name][1], k, lacks


def _norm(where: Path, file: Path, cfg: dict[str, Any], tensors: dict[str, Tensor], d_in: int) -> InputNorm:
    kind = stated(where, cfg, "norm_activation", str)
    if kind == "inference":
        return InputNorm(kind="none")
    if kind == "token-wise":
        return InputNorm(kind="unit_norm", eps=0.0, center=False, target="sqrt_d")
    if kind != "dataset-wise":
        raise Unsupported(f"{where}: norm_activation {kind!r} depends on the batch and cannot be run")
    scales = []
    for hook in (cfg["hook_point_in"], cfg["hook_point_out"]):
        take(file, tensors, [_NORM + hook], tensors)
        mean = float(shaped(file, _NORM + hook, tensors[_NORM + hook], ()))
        if not 0 < mean < float("inf"):
            raise ConfigError(f"{file}: {_NORM + hook} is {mean}, expected a positive number")
        scales.append(d_in**0.5 / mean)
    return InputNorm(kind="dataset_rms", scale_in=scales[0], scale_out=scales[1])


def _expressible(p: Portable) -> Portable:
    if p.activation not in ("relu", "topk", "threshold") or p.transcoder:
        what = "a transcoder" if p.transcoder else f"activation {p.activation}"
        raise Unsupported(f"{p.where}: {what} cannot be written for Llamascopium; --to saelens or native can")
    p = foldings.remove_pre_bias(foldings.fold_gate_scale(foldings.fold_dataset_norm(p, keep_codes=True)))
    norm = p.input_norm
    if norm.kind != "none":
        raise Unsupported(f"{p.where}: Llamascopium cannot write input norm {norm.kind}; --to saelens or native can")
    if int(p.d_in * (p.d_sae / p.d_in)) != p.d_sae:
        raise Unsupported(f"{p.where}: {p.d_sae} latents are no expansion factor of {p.d_in} that reads back the same")
    if p.activation == "threshold" and p.threshold_F is not None:
        silent = int((p.threshold_F <= 0).sum())
        if silent:
            raise Unsupported(f"{p.where}: Llamascopium stores logarithms of thresholds; {silent} are not positive")
    return p


PLUGIN = Llamascopium()
