"""EleutherAI sparsify: a folder with ``sae.safetensors`` and ``cfg.json`` (FORMATS 5.3); checked against 1.3.3.

``encoder.weight`` and ``W_dec`` both lie [F, D]. An SAE always subtracts its decoder bias, a transcoder never does;
there is no input norm. Optimiser files beside the two are ignored.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sae import foldings
from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.portable import Activation, ImportOptions, Portable, said, shaped, stated, take, width
from sae.safe_files import read_json, read_safetensors, safetensor_shapes

WEIGHTS, CFG = "sae.safetensors", "cfg.json"
_KNOWN = {
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "skip_connection",
    "transcode", "d_in", "signed",
}  # fmt: skip


class Sparsify:
    """Reader and writer."""

    title = "sparsify (sae.safetensors with encoder.weight + cfg.json)"
    files = ("sae.safetensors", "cfg.json", "../config.json", "../../config.json")

    def recognises(self, path: Path) -> bool:
        if not path.is_dir() or not (path / WEIGHTS).is_file() or (path / "reference.safetensors").is_file():
            return False
        try:
            return "W_enc_DF" not in safetensor_shapes(path / WEIGHTS)
        except ArtefactError:
            return '"saescope"' not in (path / CFG).read_text(errors="replace") if (path / CFG).is_file() else True

    def read(self, path: Path, options: ImportOptions) -> Portable:
        where, file = path / CFG, path / WEIGHTS
        cfg = read_json(where)
        unknown = sorted(set(cfg) - _KNOWN)
        if unknown:
            raise ConfigError(f"{where} has the fields {', '.join(unknown)}, whose meaning is unknown to this reader")
        d_in, k = width(where, cfg, "d_in"), stated(where, cfg, "k", int)
        transcoder = stated(where, cfg, "transcode", bool) if "transcode" in cfg else False
        skip = stated(where, cfg, "skip_connection", bool) if "skip_connection" in cfg else False
        tensors = read_safetensors(file)
        take(file, tensors, ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if skip else [])])
        d_sae = said(where, cfg, "num_latents", int) or d_in * stated(where, cfg, "expansion_factor", int)
        activation = _activation(where, cfg)
        return Portable(
            format="sparsify", where=str(path), architecture="groupmax" if activation == "groupmax" else "topk",
            activation=activation, W_enc_FD=shaped(file, "encoder.weight", tensors["encoder.weight"], (d_sae, d_in)),
            W_dec_FD=shaped(file, "W_dec", tensors["W_dec"], (d_sae, d_in)),
            b_enc_F=shaped(file, "encoder.bias", tensors["encoder.bias"], (d_sae,)),
            b_dec_D=shaped(file, "b_dec", tensors["b_dec"], (d_in,)), apply_b_dec_to_input=not transcoder,
            input_norm=InputNorm(kind="none"), gate_scale="none", k=k, transcoder=transcoder,
            W_skip_DD=shaped(file, "W_skip", tensors["W_skip"], (d_in, d_in)) if skip else None,
            **_origin(path, transcoder), files=(where, file), extra={"sparsify": cfg},
        )  # fmt: skip

    def write(self, p: Portable, folder: Path) -> None:
        """``Unsupported``: activations but topk and groupmax, per-token norms, another output width."""
        p = foldings.fold_gate_scale(foldings.fold_dataset_norm(p, keep_codes=False))
        if p.activation not in ("topk", "groupmax"):
            raise Unsupported(f"{p.where}: sparsify runs topk and groupmax, not {p.activation}; --to saelens can")
        if p.input_norm.kind != "none":
            raise Unsupported(f"{p.where}: sparsify has no input norm, not {p.input_norm.kind}; --to saelens can")
        if int(p.W_dec_FD.shape[1]) != p.d_in:
            raise Unsupported(f"{p.where}: sparsify reads and writes one width, not {p.d_in} and {p.W_dec_FD.shape[1]}")
        p = foldings.remove_pre_bias(p) if p.transcoder else foldings.add_pre_bias(p)
        assert p.b_enc_F is not None
        tensors = {"encoder.weight": p.W_enc_FD, "encoder.bias": p.b_enc_F, "W_dec": p.W_dec_FD, "b_dec": p.b_dec_D}
        if p.W_skip_DD is not None:
            tensors["W_skip"] = p.W_skip_DD
        cfg: dict[str, Any] = {
            "activation": p.activation, "expansion_factor": max(1, p.d_sae // p.d_in), "normalize_decoder": False,
            "num_latents": p.d_sae, "k": p.k, "multi_topk": False, "skip_connection": p.W_skip_DD is not None,
            "transcode": p.transcoder, "d_in": p.d_in,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / CFG).write_text(json.dumps(cfg) + "\n", encoding="utf-8")


def _origin(path: Path, transcoder: bool) -> dict[str, Any]:
    """Module path from the folder's name, model and context from the run's own config.json where it lies above.

    An SAE reads the module's output; a transcoder reads its input and predicts its output.
    """
    name = path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name
    run = next((p for p in (path.parent / "config.json", path.parent.parent / "config.json") if p.is_file()), None)
    values = read_json(run) if run is not None else {}
    lm, context = values.get("model"), values.get("ctx_len")
    module = name if re.fullmatch(r"(layers|h)\.\d+(\..+)?", name) else None
    return {
        "hook": name, "hookpoint": f"{module}:in" if transcoder and module else module,
        "hookpoint_out": module if transcoder else None,
        "lm": lm if isinstance(lm, str) else None, "context_tokens": context if isinstance(context, int) else None,
    }  # fmt: skip


def _activation(where: Path, cfg: dict[str, Any]) -> Activation:
    name = stated(where, {"activation": "topk"} | cfg, "activation", str)  # files before the option are all TopK
    if name not in ("topk", "groupmax"):
        raise Unsupported(f"{where}: activation {name!r} cannot be run; known: topk, groupmax")
    if said(where, cfg, "signed", bool):
        if name == "groupmax":
            raise Unsupported(f"{where}: signed groupmax cannot be run")
        return "topk_signed"
    return "groupmax" if name == "groupmax" else "topk"


PLUGIN = Sparsify()
