"""circuit-tracer per-layer transcoders: ``layer_i.safetensors`` beside ``config.yaml`` (FORMATS 5.8).

One file is one transcoder. ``W_enc`` and ``W_dec`` both lie [F, D]; there is no pre-bias and no norm. ``topk`` there
keeps negative values. Its JumpReLU has no ReLU, so that a negative threshold would let negative values through.
Source: safety-research/circuit-tracer b00048e.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sae import foldings
from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.hook_names import from_transformer_lens, to_transformer_lens
from sae.portable import Activation, ImportOptions, Portable, shaped, stated, take
from sae.safe_files import read_safetensors, read_yaml

CFG = "config.yaml"
_THRESHOLD = "activation_function.threshold"


class CircuitTracer:
    """Reader and writer."""

    title = "circuit-tracer (layer_i.safetensors beside config.yaml)"

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return (path / CFG).is_file() and any(path.glob("layer_*.safetensors"))
        return path.suffix == ".safetensors" and path.is_file() and (path.parent / CFG).is_file()

    def read(self, path: Path, options: ImportOptions) -> Portable:
        if path.is_dir():
            layers = sorted(path.glob("layer_*.safetensors"))
            if len(layers) != 1:
                raise ConfigError(f"{path} holds {len(layers)} transcoders; name one of them, e.g. {layers[0]}")
            path = layers[0]
        where = path.parent / CFG
        cfg = read_yaml(where)
        if stated(where, cfg, "model_kind", str) != "transcoder_set":
            raise Unsupported(f"{where}: model_kind {cfg['model_kind']!r} cannot be run; known: transcoder_set")
        tensors = read_safetensors(path)
        take(path, tensors, ["W_enc", "W_dec", "b_enc", "b_dec"], [_THRESHOLD, "W_skip", "k"])
        encoder = tensors["W_enc"]
        if encoder.dim() != 2:
            raise ArtefactError(f"{path}: W_enc is no matrix; expected [F, D]")
        d_sae, d_in = encoder.shape
        activation, k = _activation(where, path, cfg, tensors)
        layer = re.search(r"layer_(\d+)", path.stem)
        hooks = [
            f"blocks.{layer.group(1) if layer else '?'}.{stated(where, cfg, name, str)}"
            for name in ("feature_input_hook", "feature_output_hook")
        ]
        lm = stated(where, cfg, "model_name", str)
        skip = tensors.get("W_skip")
        return Portable(
            format="circuit_tracer", where=str(path), activation=activation, W_enc_FD=encoder, k=k,
            architecture={"relu": "relu", "threshold": "jumprelu"}.get(activation, "topk"),
            W_dec_FD=shaped(path, "W_dec", tensors["W_dec"], (d_sae, d_in)),
            b_enc_F=shaped(path, "b_enc", tensors["b_enc"], (d_sae,)),
            b_dec_D=shaped(path, "b_dec", tensors["b_dec"], (d_in,)), threshold_F=_threshold(path, tensors, d_sae),
            W_skip_DD=None if skip is None else shaped(path, "W_skip", skip, (d_in, d_in)), transcoder=True,
            apply_b_dec_to_input=False, input_norm=InputNorm(kind="none"), gate_scale="none", lm=lm, hook=hooks[0],
            hookpoint=from_transformer_lens(hooks[0], lm), hookpoint_out=from_transformer_lens(hooks[1], lm),
            files=(where, path), extra={"circuit_tracer": json.loads(json.dumps(cfg, default=str))},
        )  # fmt: skip

    def write(self, p: Portable, folder: Path) -> None:
        """One layer and its config.yaml. ``Unsupported``: SAEs, activations but relu and threshold, per-token norms,
        another output width, hooks that do not name one layer."""
        p = _expressible(p)
        assert p.b_enc_F is not None
        layer, read, written = _hooks(p)
        tensors = {"W_enc": p.W_enc_FD, "W_dec": p.W_dec_FD, "b_enc": p.b_enc_F, "b_dec": p.b_dec_D}
        if p.activation == "threshold" and p.threshold_F is not None:
            tensors[_THRESHOLD] = p.threshold_F.clamp_min(0)
        if p.W_skip_DD is not None:
            tensors["W_skip"] = p.W_skip_DD
        cfg = {
            "model_kind": "transcoder_set", "model_name": p.lm, "feature_input_hook": read,
            "feature_output_hook": written, "scan_name": "saescope", "transcoders": [f"layer_{layer}.safetensors"],
        } | ({"activation": "relu"} if p.activation == "relu" else {})  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.float().contiguous() for n, t in tensors.items()}, folder / f"layer_{layer}.safetensors")
        # JSON is YAML, and needs no quoting rules of its own.
        (folder / CFG).write_text(json.dumps(cfg, indent=1) + "\n", encoding="utf-8")


def _expressible(p: Portable) -> Portable:
    if not p.transcoder:
        raise Unsupported(f"{p.where} is an SAE; circuit-tracer reads transcoders; --to saelens or native can")
    if p.activation not in ("relu", "threshold"):
        raise Unsupported(
            f"{p.where}: circuit-tracer's topk keeps negative values, so {p.activation} cannot be written; --to native"
        )
    p = foldings.remove_pre_bias(foldings.fold_gate_scale(foldings.fold_dataset_norm(p, keep_codes=True)))
    if p.input_norm.kind != "none" or int(p.W_dec_FD.shape[1]) != p.d_in:
        raise Unsupported(f"{p.where}: circuit-tracer has no {p.input_norm.kind}, and one width; --to native keeps it")
    return p


def _hooks(p: Portable) -> tuple[str, str, str]:
    """Layer, input hook and output hook, the last two without their ``blocks.<layer>.``."""
    given = [p.hook if p.hook and p.hook.startswith("blocks.") else None, None]
    names = [
        name or (to_transformer_lens(point, p.lm) if point else None)
        for name, point in zip(given, (p.hookpoint, p.hookpoint_out), strict=True)
    ]
    parts = [re.fullmatch(r"blocks\.(\d+)\.(.+)", name or "") for name in names]
    if parts[0] is None or parts[1] is None or parts[0].group(1) != parts[1].group(1) or p.lm is None:
        raise Unsupported(
            f"{p.where}: circuit-tracer wants the model and two hooks of one layer, here {p.lm}, {names[0] or p.hook}, "
            f"{names[1] or p.hookpoint_out}; --to native keeps it"
        )
    return parts[0].group(1), parts[0].group(2), parts[1].group(2)


def _threshold(path: Path, tensors: dict[str, Tensor], d_sae: int) -> Tensor | None:
    if _THRESHOLD not in tensors:
        return None
    threshold_F = shaped(path, _THRESHOLD, tensors[_THRESHOLD], (d_sae,))
    below = int((threshold_F < 0).sum())
    if below:
        raise Unsupported(f"{path}: {below} thresholds are negative and let negative values pass")
    return threshold_F


def _activation(
    where: Path, path: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Activation, int | None]:
    """The stated activation; where none is stated, a threshold means JumpReLU and its absence ReLU (their loader)."""
    name = cfg.get("activation")
    if name is None:
        return ("threshold" if _THRESHOLD in tensors else "relu"), None
    if name == "relu":
        if _THRESHOLD in tensors:
            raise ConfigError(f"{where} says activation relu, {path.name} holds thresholds")
        return "relu", None
    if name == "topk":
        k = int(shaped(path, "k", tensors["k"], ())) if "k" in tensors else stated(where, cfg, "k", int)
        return "topk_signed", k
    raise Unsupported(f"{where}: activation {name!r} cannot be run; known: relu, topk")


PLUGIN = CircuitTracer()
