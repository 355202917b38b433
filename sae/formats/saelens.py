"""SAELens: a folder with ``sae_weights.safetensors`` and ``cfg.json``, v6 and older (FORMATS 5.1).

Checked against sae_lens 6.54.12. ``W_enc`` lies [D, F], ``W_dec`` [F, D]. Old configurations are flat and leave out
what was not yet an option; what the library fills in then is stated here (``_from_old``), and nothing else is.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae import foldings
from sae.config import InputNorm
from sae.errors import ConfigError, Unsupported
from sae.hook_names import from_transformer_lens, to_transformer_lens
from sae.portable import SCALE, ImportOptions, Portable, said, shaped, stated, take, width
from sae.safe_files import read_json, read_safetensors

WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_SEMANTIC = {
    "architecture", "d_in", "d_sae", "d_out", "k", "apply_b_dec_to_input", "normalize_activations",
    "rescale_acts_by_decoder_norm", "reshape_activations", "dtype", "device", "metadata", "matryoshka_widths",
}  # fmt: skip
_TRAINING = {
    "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations",
    "aux_loss_coefficient", "topk_threshold_lr", "use_matryoshka_aux_loss", "jumprelu_init_threshold",
    "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "l0_coefficient", "l0_warm_up_steps", "target_l0",
    "pre_act_loss_coefficient", "jumprelu_tanh_scale", "jumprelu_ste_to_input", "sae_lens_version",
    "finetuning_scaling_factor", "sae_lens_training_version",
}  # fmt: skip
_ACTIVATION = {
    "standard": "relu", "gated": "gated", "topk": "topk", "jumprelu": "threshold", "batchtopk": "threshold",
    "matryoshka_batchtopk": "threshold", "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu_transcoder": "threshold", "jumprelu_skip_transcoder": "threshold",
}  # fmt: skip
_OWN = {
    "relu": ["b_enc"], "topk": ["b_enc"], "threshold": ["b_enc", "threshold"], "gated": ["b_gate", "b_mag", "r_mag"],
}  # fmt: skip
_UNFOLDED = "expected_average_only_in"
_OURS = {"batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka", "gated": "gated", "topk": "topk"}
_FIELDS = {"b_enc": "b_enc_F", "threshold": "threshold_F", "b_gate": "b_gate_F", "b_mag": "b_mag_F", "r_mag": "r_mag_F"}


class SAELens:
    """Reader and writer."""

    title = "SAELens (sae_weights.safetensors + cfg.json)"
    files = ("sae_weights.safetensors", "cfg.json")

    def recognises(self, path: Path) -> bool:
        if not path.is_dir() or not (path / WEIGHTS).is_file():
            return False
        return (path / CFG).is_file() or not (path / "config.json").is_file()

    def read(self, path: Path, options: ImportOptions) -> Portable:
        where = path / CFG
        cfg = _modern(read_json(where), where)
        architecture = stated(where, cfg, "architecture", str)
        if architecture not in _ACTIVATION:
            raise Unsupported(f"{where}: architecture {architecture!r} cannot be run; known: {', '.join(_ACTIVATION)}")
        unknown = sorted(set(cfg) - _SEMANTIC - _TRAINING)
        if unknown:
            raise ConfigError(f"{where} has the fields {', '.join(unknown)}, whose meaning is unknown to this reader")
        return _portable(path, where, cfg, architecture, options)

    def write(self, p: Portable, folder: Path) -> None:
        """Version 6. ``Unsupported``: groupmax, topk_signed, norms it does not have, TopK or normalised transcoders."""
        p = _expressible(p)
        kind = {"relu": "standard", "topk": "topk", "threshold": "jumprelu", "gated": "gated"}[p.activation]
        if p.transcoder:
            skip = "skip_transcoder" if p.W_skip_DD is not None else "transcoder"
            kind = f"jumprelu_{skip}" if p.activation == "threshold" else skip
        tensors = {"W_enc": p.W_enc_FD.t(), "W_dec": p.W_dec_FD, "b_dec": p.b_dec_D}
        tensors |= {name: t for name, field in _FIELDS.items() if (t := getattr(p, field)) is not None}
        if p.activation == "topk":
            tensors.pop("threshold", None)
        hook = p.hook or (to_transformer_lens(p.hookpoint, p.lm) if p.hookpoint else None)
        cfg: dict[str, Any] = {
            "architecture": kind, "d_in": p.d_in, "d_sae": p.d_sae, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": p.apply_b_dec_to_input, "reshape_activations": "none",
            "normalize_activations": {"none": "none", "layer_norm": "layer_norm"}.get(
                p.input_norm.kind, "constant_norm_rescale"
            ),
            "metadata": {
                "sae_lens_version": "6.0.0", "sae_lens_training_version": None, "model_name": p.lm, "hook_name": hook,
                "context_size": p.context_tokens, "prepend_bos": p.prepend_bos, "training_architecture": p.architecture,
            },
        }  # fmt: skip
        if p.transcoder:
            out = to_transformer_lens(p.hookpoint_out, p.lm) if p.hookpoint_out else None
            cfg |= {"d_out": int(p.W_dec_FD.shape[1]), "metadata": cfg["metadata"] | {"hook_name_out": out}}
        if p.W_skip_DD is not None:
            tensors["W_skip"] = p.W_skip_DD
        if p.activation == "topk":
            cfg |= {"k": p.k, "rescale_acts_by_decoder_norm": False}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().float().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
        (folder / CFG).write_text(json.dumps(cfg, indent=1) + "\n", encoding="utf-8")


def _expressible(p: Portable) -> Portable:
    if p.activation not in (("relu", "threshold") if p.transcoder else ("relu", "topk", "threshold", "gated")):
        what = f"a transcoder with {p.activation}" if p.transcoder else f"activation {p.activation}"
        raise Unsupported(f"{p.where}: {what} cannot be written for SAELens; --to native keeps it")
    p = foldings.fold_gate_scale(foldings.fold_dataset_norm(p, keep_codes=True))
    if p.b_pre_D is not None:
        p = foldings.remove_pre_bias(p)
    norm = p.input_norm
    if p.transcoder and norm.kind != "none":
        raise Unsupported(f"{p.where}: SAELens does not undo the {norm.kind} of a transcoder; --to native keeps it")
    if norm.kind == "unit_norm" and norm.center and norm.target == "one":
        return foldings.unit_norm_to_layer_norm(p)
    rescale = norm.kind == "unit_norm" and norm.target == "sqrt_d" and not norm.center and norm.eps == 0
    if norm.kind != "none" and norm != InputNorm(kind="layer_norm", eps=1e-5, ddof=1) and not rescale:
        raise Unsupported(f"{p.where}: SAELens has no input norm {norm}; --to native keeps it")
    return p


def _modern(cfg: dict[str, Any], where: Path) -> dict[str, Any]:
    metadata = cfg.get("metadata")
    nested = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    version = cfg.get("sae_lens_version") or nested
    found = re.match(r"(\d+)\.", str(version or "0."))
    if found is None:
        raise ConfigError(f"{where}: sae_lens_version is {version!r}, expected digits and dots")
    return cfg if int(found.group(1)) >= 6 else _from_old(cfg, where)


def _from_old(old: dict[str, Any], where: Path) -> dict[str, Any]:
    """A configuration before v6 in the words of v6, with what the library of that time did where it says nothing."""
    flat = {_RENAMED.get(name, name): value for name, value in old.items()}
    kwargs = said(where, flat, "activation_fn_kwargs", dict) or {}
    activation = said(where, flat, "activation_fn", str) or "relu"
    architecture = said(where, flat, "architecture", str) or "standard"
    if activation == "topk":
        architecture = "topk"
    elif activation != "relu":
        raise Unsupported(f"{where}: activation_fn {activation!r} cannot be run; known: relu, topk")
    hook = said(where, flat, "hook_name", str) or ""
    norm = flat.get("normalize_activations") or "none"  # a bool, a name, or absent
    norm = _UNFOLDED if norm is True else norm
    new = {
        "architecture": architecture, "d_in": flat.get("d_in"), "d_sae": flat.get("d_sae"),
        "apply_b_dec_to_input": flat.get("apply_b_dec_to_input", True), "normalize_activations": norm,
        "reshape_activations": flat.get("reshape_activations", "hook_z" if "hook_z" in hook else "none"),
        "dtype": flat.get("dtype"), "finetuning_scaling_factor": flat.get("finetuning_scaling_factor", False),
        "metadata": {
            "sae_lens_version": flat.get("sae_lens_version"), "model_name": flat.get("model_name"), "hook_name": hook,
            "context_size": flat.get("context_size"), "prepend_bos": flat.get("prepend_bos", True),
        },
    }  # fmt: skip
    if architecture == "topk":
        new |= {"k": kwargs.get("k", flat.get("k")), "rescale_acts_by_decoder_norm": False}
    return new


def _norm(where: Path, cfg: dict[str, Any], options: ImportOptions) -> InputNorm:
    kind = stated(where, cfg, "normalize_activations", str)
    if kind in ("none", "layer_norm"):
        return InputNorm(kind=kind, eps=1e-5, ddof=1)  # type: ignore[arg-type]
    if kind == "constant_norm_rescale":
        return InputNorm(kind="unit_norm", eps=0.0, center=False, target="sqrt_d")
    if kind == _UNFOLDED:
        if options.scale_in is None and options.calibrate_on is None:
            raise ConfigError(
                f"{where}: the norm expected_average_only_in was not folded into the weights, and the file does not "
                "hold its scale; export the SAE with save_inference_model, pass --scale-in, or measure it with "
                "--calibrate --check-on MODEL"
            )
        scale = options.scale_in or 1.0  # 1.0 stands until it is measured (lacks)
        return InputNorm(kind="dataset_rms", scale_in=scale, scale_out=scale)
    raise Unsupported(f"{where}: normalize_activations {kind!r} cannot be run")


def _portable(path: Path, where: Path, cfg: dict[str, Any], architecture: str, options: ImportOptions) -> Portable:
    file = path / WEIGHTS
    tensors = read_safetensors(file)
    d_in, d_sae = width(where, cfg, "d_in"), width(where, cfg, "d_sae")
    transcoder = "transcoder" in architecture
    d_out = width(where, cfg, "d_out") if transcoder else d_in
    activation = _ACTIVATION[architecture]
    _threshold(file, tensors, architecture, d_sae)
    _drop_ones(file, tensors)
    skip = ["W_skip"] if "skip" in architecture else []
    take(file, tensors, ["W_enc", "W_dec", "b_dec", *_OWN[activation], *skip])
    metadata = said(where, cfg, "metadata", dict) or {}
    rescale = stated(where, cfg, "rescale_acts_by_decoder_norm", bool) if "topk" in architecture else False
    lm, hook, hook_out, version = (
        said(where, metadata, name, str) or None
        for name in ("model_name", "hook_name", "hook_name_out", "sae_lens_version")
    )
    found = {name: field for name, field in _FIELDS.items() if name in tensors}
    per_latent = {field: shaped(file, name, tensors[name], (d_sae,)) for name, field in found.items()}
    widths = said(where, cfg, "matryoshka_widths", list) if architecture == "matryoshka_batchtopk" else None
    return Portable(
        format="saelens", where=str(path), architecture=_OURS.get(architecture, _plain(activation)),
        activation=activation, W_enc_FD=shaped(file, "W_enc", tensors["W_enc"], (d_in, d_sae)).t(),  # type: ignore[arg-type]
        W_dec_FD=shaped(file, "W_dec", tensors["W_dec"], (d_sae, d_out)),
        b_dec_D=shaped(file, "b_dec", tensors["b_dec"], (d_out,)), **({"b_enc_F": None} | per_latent),  # type: ignore[arg-type]
        apply_b_dec_to_input=not transcoder and stated(where, cfg, "apply_b_dec_to_input", bool),
        input_norm=_norm(where, cfg, options), gate_scale="decoder_norm" if rescale else "none",
        k=stated(where, cfg, "k", int) if "topk" in architecture else None, transcoder=transcoder,
        W_skip_DD=shaped(file, "W_skip", tensors["W_skip"], (d_out, d_in)) if skip else None,
        group_sizes=_group_sizes(where, widths, d_sae), lm=lm, hook=hook, hookpoint=from_transformer_lens(hook, lm),
        hookpoint_out=from_transformer_lens(hook_out, lm) if transcoder else None,
        context_tokens=said(where, metadata, "context_size", int),
        prepend_bos=said(where, metadata, "prepend_bos", bool), published_l0=said(where, metadata, "l0", (int, float)),
        files=(where, file), version=version, extra={"saelens": metadata},
        lacks=(SCALE,) if options.scale_in is None and cfg["normalize_activations"] == _UNFOLDED else (),
    )  # fmt: skip


def _plain(activation: str) -> str:
    return "jumprelu" if activation == "threshold" else activation


def _group_sizes(where: Path, widths: Any, d_sae: int) -> tuple[int, ...] | None:
    if not widths:
        return None
    ends = [*(w for w in widths if isinstance(w, int) and w < d_sae), d_sae]
    if len(ends) - 1 not in (len(widths), len(widths) - 1) or ends != sorted(set(ends)) or ends[0] < 1:
        raise ConfigError(f"{where}: matryoshka_widths {widths} do not rise to {d_sae} latents")
    return tuple(b - a for a, b in zip([0, *ends], ends, strict=False))


def _threshold(file: Path, tensors: dict[str, Tensor], architecture: str, d_sae: int) -> None:
    """Training checkpoints keep one scalar (BatchTopK) or logarithms (JumpReLU before SAELens #718)."""
    if architecture in ("batchtopk", "matryoshka_batchtopk") and "topk_threshold" in tensors:
        value = float(shaped(file, "topk_threshold", tensors.pop("topk_threshold"), ()))
        if not math.isfinite(value):
            raise ConfigError(f"{file}: topk_threshold is {value}")
        tensors["threshold"] = torch.full((d_sae,), value)
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()


def _drop_ones(file: Path, tensors: dict[str, Tensor]) -> None:
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool(torch.allclose(factor.float(), torch.ones(()))):
        raise Unsupported(f"{file}: scaling_factor is not 1 everywhere (a finetuned SAE); it cannot be run")


PLUGIN = SAELens()
