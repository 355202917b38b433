"""Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors`` + ``config.json``) (FORMATS 5.5, 5.6).

JumpReLU without pre-bias and without input norm. The first generation has no configuration: widths come from the
tensors, layer, site and published L0 from the folders, never the other way round. The first generation is
what is written.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sae import foldings
from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.hook_names import place
from sae.portable import ImportOptions, Portable, said, shaped, take
from sae.safe_files import npz_names, read_json, read_npz, read_safetensors, safetensor_shapes

NPZ, WEIGHTS, CFG = "params.npz", "params.safetensors", "config.json"
_TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_SITES = {
    "res": "resid_post", "resid_post": "resid_post", "mlp": "mlp_out", "mlp_out": "mlp_out", "att": "hook_z",
    "attn_out": "hook_z",
}  # fmt: skip
_TRANSCODER = ("layers.{}.pre_feedforward_layernorm", "layers.{}.post_feedforward_layernorm")
"""What transcoders of both generations read and predict, where no configuration says."""


class GemmaScope:
    """Reader of both generations, writer of the first."""

    title = "Gemma Scope (params.npz, or params.safetensors + config.json)"
    files = ("params.*", "config.json")

    def recognises(self, path: Path) -> bool:
        file = _file(path)
        try:
            if file is None:
                return False
            found = npz_names(file) if file.suffix == ".npz" else list(safetensor_shapes(file))
        except (ArtefactError, Unsupported):
            return file is not None and file.name in (NPZ, WEIGHTS)
        names = {name.lower() for name in found}
        if file.name in (NPZ, WEIGHTS):  # by its own name a file that lacks a tensor is told which
            return len(names & set(_TENSORS)) >= 3
        return names >= {"w_enc", "w_dec", "threshold"}

    def read(self, path: Path, options: ImportOptions) -> Portable:
        file = _file(path)
        if file is None:
            raise ArtefactError(f"{path} holds no {NPZ} or {WEIGHTS}")
        raw = read_npz(file) if file.suffix == ".npz" else read_safetensors(file)
        tensors = {name.lower(): tensor for name, tensor in raw.items()}
        if len(tensors) != len(raw):
            raise ArtefactError(f"{file} holds the same name in two spellings: {sorted(raw)}")
        take(file, tensors, _TENSORS, ["affine_skip_connection"])
        encoder, decoder = tensors["w_enc"], tensors["w_dec"]
        if decoder.dim() == 3:
            raise Unsupported(f"{file} is a layer of a cross-layer transcoder {tuple(decoder.shape)}; it cannot be run")
        if encoder.dim() != 2:
            raise ArtefactError(f"{file}: w_enc is no matrix; expected [D, F]")
        d_in, d_sae = encoder.shape
        cfg = _config(file)
        where = _place(file, cfg)
        scaled: dict[str, Any] = {"recipe": ()}
        if "embedding" in file.parent.parts[-4:]:  # trained on embeddings without the factor that the model puts on
            encoder, decoder = encoder / d_in**0.5, decoder * d_in**0.5
            scaled = {"recipe": ("embedding SAE: W_enc / sqrt(D), W_dec * sqrt(D)",)}
            where["hookpoint"] = "layers.0:in"
        transcoder = bool(where.pop("transcoder")) or "affine_skip_connection" in tensors
        d_out = int(decoder.shape[-1]) if transcoder else d_in
        skip = tensors.get("affine_skip_connection")
        if skip is not None:
            skip = shaped(file, "affine_skip_connection", skip, (d_in, d_out)).t()
        return Portable(
            format="gemmascope", where=str(path), architecture="jumprelu", activation="threshold", W_enc_FD=encoder.t(),
            W_dec_FD=shaped(file, "w_dec", decoder, (d_sae, d_out)), b_enc_F=_vector(file, tensors, "b_enc", d_sae),
            b_dec_D=_vector(file, tensors, "b_dec", d_out), threshold_F=_vector(file, tensors, "threshold", d_sae),
            apply_b_dec_to_input=False, input_norm=InputNorm(kind="none"), gate_scale="none", k=None,
            transcoder=transcoder, W_skip_DD=skip, **where, **scaled,
            files=(file, *([file.parent / CFG] if cfg else [])), extra={"gemmascope": cfg},
        )  # fmt: skip

    def write(self, p: Portable, folder: Path) -> None:
        """``params.npz``. ``Unsupported``: activations but relu and threshold, norms, transcoders."""
        p = _jumprelu(p)
        assert p.b_enc_F is not None
        threshold_F = p.b_enc_F.new_zeros(p.d_sae) if p.threshold_F is None else p.threshold_F
        tensors: dict[str, Any] = {
            "W_enc": p.W_enc_FD.t(), "W_dec": p.W_dec_FD, "b_enc": p.b_enc_F, "b_dec": p.b_dec_D,
            "threshold": threshold_F,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: t.float().contiguous().numpy() for name, t in tensors.items()}
        np.savez(folder / NPZ, **arrays)


def _jumprelu(p: Portable) -> Portable:
    """ReLU is a threshold of 0; everything else that the format cannot say is folded or refused."""
    p = foldings.remove_pre_bias(foldings.fold_gate_scale(foldings.fold_dataset_norm(p, keep_codes=True)))
    if p.activation not in ("relu", "threshold") or p.input_norm.kind != "none" or p.transcoder:
        what = "a transcoder" if p.transcoder else f"{p.activation} with input norm {p.input_norm.kind}"
        raise Unsupported(f"{p.where}: Gemma Scope files mean JumpReLU without norm, not {what}; try --to saelens")
    return p


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in (".npz", ".safetensors") and path.name != "sae_weights.safetensors" else None
    found = [path / name for name in (NPZ, WEIGHTS) if (path / name).is_file()]
    return found[0] if found else None


def _vector(file: Path, tensors: dict[str, Tensor], name: str, length: int) -> Tensor:
    return shaped(file, name, tensors[name], (length,))


def _config(file: Path) -> dict[str, Any]:
    path = file.parent / CFG
    if file.suffix == ".npz" or not path.is_file():
        return {}
    cfg = read_json(path)
    architecture = cfg.get("architecture")
    if architecture != "jump_relu":
        raise ConfigError(f"{path}: architecture is {architecture!r}, expected 'jump_relu'")
    return cfg


def _place(file: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """lm, hook, hookpoint and whether it is a transcoder: from the configuration, else from the folders."""
    # In the hub's cache the repository stands above snapshots/<commit>, as models--google--gemma-scope-...
    parts = file.parent.parts
    text = "/".join([*(part for part in parts[:-4] if part.startswith("models--")), *parts[-4:]])
    layer, l0 = re.search(r"layer_(\d+)", text), re.search(r"average_l0_(\d+)", text)
    label = l0 or re.search(r"width_[^/_]+_l0_(\w+)", text)
    size = re.search(r"gemma-scope-(2-)?(\w+)-(pt|it)(?:-(\w+))?", text)
    lm = None
    at = file.parent / CFG
    if said(at, cfg, "model_name", str):
        lm = re.sub(r"-v3", "-3", cfg["model_name"])
        lm = lm.removesuffix("-pt") if lm.endswith("270m-pt") else lm  # the one that is published without it
    elif size is not None:
        lm = _model(int(3 if size.group(1) else 2), size.group(2), size.group(3))
    name = (size.group(4) if size is not None else None) or file.parent.parent.name
    read, written = (said(at, cfg, f"hf_hook_point_{side}", str) for side in ("in", "out"))
    hook = read or f"{name} layer {layer.group(1) if layer else '?'}"
    if label:
        hook = f"{hook} l0 {label.group(1)}"
    transcoder = "transcoder" in text or read != written
    site = _SITES.get(name)
    native, out = (_module(hook_point) if hook_point else None for hook_point in (read, written))
    if native is None and site and layer and read is None:
        native = place(site, int(layer.group(1)), lm or "gemma")
    out = out if transcoder else None
    if transcoder and layer and read is None:
        native, out = (hook_point.format(layer.group(1)) for hook_point in _TRANSCODER)
    published = float(l0.group(1)) if l0 else None
    return {
        "lm": lm, "hook": hook, "hookpoint": native, "hookpoint_out": out, "transcoder": transcoder,
        "published_l0": published,
    }  # fmt: skip


def _model(generation: int, size: str, kind: str) -> str:
    """gemma-2-2b, gemma-2-2b-it, gemma-3-1b-pt, gemma-3-1b-it, gemma-3-270m: what the hub calls them."""
    plain = kind == "pt" and (generation == 2 or size == "270m")
    return f"google/gemma-{generation}-{size}" + ("" if plain else f"-{kind}")


def _module(hook: str) -> str | None:
    """``model.layers.9.output`` -> ``layers.9``; ``...o_proj.input`` -> ``...o_proj:in``."""
    found = re.fullmatch(r"(?:model\.)?(?:language_model\.)?(layers\.\d+(?:\.\w+)*)\.(input|output)", hook)
    return None if found is None else found.group(1) + (":in" if found.group(2) == "input" else "")


PLUGIN = GemmaScope()
