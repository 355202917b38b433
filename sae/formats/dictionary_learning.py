"""dictionary_learning: ``trainer_i/ae.pt`` beside ``config.json`` (FORMATS 5.2); checked against 0.1.0.

The class is stated by ``trainer.dict_class`` and must fit the keys of ``ae.pt``. There is no input norm: a run with
``norm_factor`` has folded it into its biases already.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae import foldings
from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.portable import THRESHOLD, Activation, ImportOptions, Portable, said, shaped, stated, take
from sae.safe_files import read_json, read_torch

WEIGHTS, CFG = "ae.pt", "config.json"


class _Class(NamedTuple):
    keys: tuple[str, ...]
    names: dict[str, str]
    """Our field -> their key; the encoder and decoder matrices by orientation below."""
    pre_bias: bool
    architecture: str
    activation: Activation
    linear: bool
    """Matrices ``encoder.weight`` [F, D], ``decoder.weight`` [D, F]; else ``W_enc`` [D, F], ``W_dec`` [F, D]."""


_LINEAR, _PLAIN = ("encoder.weight", "decoder.weight"), ("W_enc", "W_dec", "b_enc", "b_dec")
_K = ("k", "threshold")
_CLASSES = {
    "AutoEncoder": _Class(
        (*_LINEAR, "encoder.bias", "bias"), {"b_enc_F": "encoder.bias", "b_dec_D": "bias"}, True, "relu", "relu", True
    ),
    "AutoEncoderNew": _Class(
        (*_LINEAR, "encoder.bias", "decoder.bias"), {"b_enc_F": "encoder.bias", "b_dec_D": "decoder.bias"}, False,
        "relu", "relu", True,
    ),
    "AutoEncoderTopK": _Class(
        (*_LINEAR, "encoder.bias", "b_dec", *_K), {"b_enc_F": "encoder.bias", "b_dec_D": "b_dec"}, True, "topk",
        "topk", True,
    ),
    "BatchTopKSAE": _Class(
        (*_LINEAR, "encoder.bias", "b_dec", *_K), {"b_enc_F": "encoder.bias", "b_dec_D": "b_dec"}, True, "batchtopk",
        "threshold", True,
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        (*_PLAIN, *_K, "group_sizes"), {"b_enc_F": "b_enc", "b_dec_D": "b_dec"}, True, "matryoshka", "threshold", False
    ),
    "JumpReluAutoEncoder": _Class(
        (*_PLAIN, "threshold"), {"b_enc_F": "b_enc", "b_dec_D": "b_dec"}, False, "jumprelu", "threshold", False
    ),
    "GatedAutoEncoder": _Class(
        (*_LINEAR, "decoder_bias", "gate_bias", "mag_bias", "r_mag"),
        {"b_dec_D": "decoder_bias", "b_gate_F": "gate_bias", "b_mag_F": "mag_bias", "r_mag_F": "r_mag"}, True, "gated",
        "gated", True,
    ),
}  # fmt: skip


class DictionaryLearning:
    """Reader and writer."""

    title = "dictionary_learning (ae.pt + config.json)"
    files = ("ae.pt", "config.json")

    def recognises(self, path: Path) -> bool:
        return (path.is_dir() and (path / WEIGHTS).is_file()) or (path.is_file() and path.name == WEIGHTS)

    def read(self, path: Path, options: ImportOptions) -> Portable:
        folder = path if path.is_dir() else path.parent
        where, file = folder / CFG, folder / WEIGHTS
        trainer = stated(where, read_json(where), "trainer", dict)
        name = stated(where, trainer, "dict_class", str)
        if name not in _CLASSES:
            raise Unsupported(f"{where}: dict_class {name!r} cannot be run; known: {', '.join(_CLASSES)}")
        kind, values = _CLASSES[name], read_torch(file)
        _fits(file, where, name, values)
        take(file, values, kind.keys)
        encoder = values["encoder.weight" if kind.linear else "W_enc"]
        if not isinstance(encoder, Tensor) or encoder.dim() != 2:
            raise ArtefactError(f"{file}: the encoder is no matrix")
        d_sae, d_in = encoder.shape if kind.linear else encoder.shape[::-1]
        for field, found in (("dict_size", d_sae), ("activation_dim", d_in)):
            if said(where, trainer, field, int) not in (None, found):
                turned = " (does the encoder lie transposed?)" if trainer[field] in encoder.shape else ""
                raise ConfigError(
                    f"{where} says {field} {trainer[field]}, the tensors of {file.name} say {found}; expected them "
                    f"equal{turned}"
                )
        biases = {
            ours: shaped(file, theirs, values[theirs], (d_in,) if ours == "b_dec_D" else (d_sae,))
            for ours, theirs in kind.names.items()
        }
        decoder = values["decoder.weight" if kind.linear else "W_dec"]
        decoder_FD = shaped(file, "decoder.weight", decoder, (d_in, d_sae)).t() if kind.linear else decoder
        run = _how_it_runs(file, where, name, values, trainer, options, d_sae)
        lm, layer = said(where, trainer, "lm_name", str), said(where, trainer, "layer", (int, str))
        return Portable(
            format="dictionary_learning", where=str(folder), W_enc_FD=encoder if kind.linear else encoder.t(),
            W_dec_FD=decoder_FD, **({"b_enc_F": None} | biases | run), apply_b_dec_to_input=kind.pre_bias,  # type: ignore[arg-type]
            input_norm=InputNorm(kind="none"), gate_scale="none", lm=lm,
            hook=f"{trainer.get('submodule_name')} (layer {layer})", hookpoint=_hookpoint(trainer), files=(where, file),
            train_tokens=None, extra={"dictionary_learning": {k: v for k, v in trainer.items() if k != "submodule"}},
        )  # fmt: skip

    def write(self, p: Portable, folder: Path) -> None:
        """Pre-bias by E4; a threshold that varies by latent makes a JumpReluAutoEncoder, one number a BatchTopKSAE."""
        name, p = _class_for(p)
        kind = _CLASSES[name]
        values: dict[str, Any] = {theirs: getattr(p, ours) for ours, theirs in kind.names.items()}
        if kind.linear:
            values |= {"encoder.weight": p.W_enc_FD, "decoder.weight": p.W_dec_FD.t()}
        else:
            values |= {"W_enc": p.W_enc_FD.t(), "W_dec": p.W_dec_FD}
        if "k" in kind.keys:
            values["k"] = torch.tensor(p.k or 1, dtype=torch.int)
            values["threshold"] = torch.tensor(-1.0) if p.threshold_F is None else p.threshold_F[0].clone()
        elif "threshold" in kind.keys:
            values["threshold"] = p.threshold_F
        if "group_sizes" in kind.keys:
            values["group_sizes"] = torch.tensor(p.group_sizes)
        trainer = {"dict_class": name, "activation_dim": p.d_in, "dict_size": p.d_sae, "k": p.k, "lm_name": p.lm}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({n: t.contiguous() for n, t in values.items()}, folder / WEIGHTS)
        text = json.dumps({"trainer": trainer | {"submodule_name": p.hookpoint}, "buffer": {}}, indent=1)
        (folder / CFG).write_text(text + "\n", encoding="utf-8")


def _fits(file: Path, where: Path, name: str, values: dict[str, Any]) -> None:
    """``ConfigError`` where the tensors are those of another class than the one stated."""
    if set(values) == set(_CLASSES[name].keys):
        return
    others = [other for other, kind in _CLASSES.items() if set(values) == set(kind.keys)]
    if others:
        raise ConfigError(f"{where} says dict_class {name}, but {file.name} holds the tensors of {' or '.join(others)}")


def _how_it_runs(
    file: Path, where: Path, name: str, values: dict[str, Any], trainer: dict[str, Any], options: ImportOptions,
    d_sae: int,
) -> dict[str, Any]:  # fmt: skip
    """architecture, activation, k, group sizes and threshold of one file."""
    kind = _CLASSES[name]
    run: dict[str, Any] = {"architecture": kind.architecture, "activation": kind.activation, "k": None}
    if "k" in kind.keys:
        run["k"] = int(shaped(file, "k", values["k"], ()))
        if said(where, trainer, "k", int) not in (None, run["k"]):
            raise ConfigError(f"{where} says k {trainer['k']}, {file.name} says {run['k']}")
    if "group_sizes" in kind.keys:
        sizes = [int(n) for n in shaped(file, "group_sizes", values["group_sizes"], tuple(values["group_sizes"].shape))]
        if min(sizes, default=0) < 1 or sum(sizes) != d_sae:
            raise ConfigError(f"{file}: group_sizes {sizes} do not add up to {d_sae} latents")
        run["group_sizes"] = tuple(sizes)
    if kind.activation != "threshold":
        return run
    if name == "JumpReluAutoEncoder":
        return run | {"threshold_F": shaped(file, "threshold", values["threshold"], (d_sae,))}
    threshold = shaped(file, "threshold", values["threshold"], ())
    if float(threshold) >= 0:
        return run | {"threshold_F": threshold.expand(d_sae)}
    if options.activation != "topk":
        if options.calibrate_on is not None:
            return run | {"lacks": (THRESHOLD,)}
        raise ConfigError(
            f"{file}: the threshold is {float(threshold):g}: it was never calibrated (training sets it after step "
            "1,000), and the SAE would be dense; pass --activation topk to run the K largest per token, or "
            "--calibrate --check-on MODEL to measure a threshold"
        )
    return run | {"architecture": "topk", "activation": "topk", "group_sizes": None}


def _hookpoint(trainer: dict[str, Any]) -> str | None:
    """The library's own scripts read the residual stream after a layer and name it ``resid_post_layer_<l>``."""
    name = trainer.get("submodule_name")
    lm = str(trainer.get("lm_name") or "")
    if not isinstance(name, str):
        return None
    if name.startswith("resid_post_layer_") and name.removeprefix("resid_post_layer_").isdigit():
        return ("h." if "gpt2" in lm.lower() else "layers.") + name.removeprefix("resid_post_layer_")
    return name if name.split(".")[0] in ("layers", "h") else None


def _class_for(p: Portable) -> tuple[str, Portable]:
    p = foldings.fold_gate_scale(foldings.fold_dataset_norm(p, keep_codes=False))
    if p.input_norm.kind != "none" or p.transcoder:
        what = "a transcoder" if p.transcoder else f"input norm {p.input_norm.kind}"
        raise Unsupported(f"{p.where}: dictionary_learning cannot express {what}; --to saelens or native can")
    if p.activation == "threshold":
        assert p.threshold_F is not None
        one = bool((p.threshold_F == p.threshold_F[0]).all()) and float(p.threshold_F[0]) >= 0
        if not one or p.architecture == "jumprelu":
            return "JumpReluAutoEncoder", foldings.remove_pre_bias(p)
        grouped = p.architecture == "matryoshka" and p.group_sizes is not None
        return ("MatryoshkaBatchTopKSAE" if grouped else "BatchTopKSAE"), foldings.add_pre_bias(p)
    known: dict[str, tuple[str, Callable[[Portable], Portable]]] = {
        "topk": ("AutoEncoderTopK", foldings.add_pre_bias), "gated": ("GatedAutoEncoder", foldings.add_pre_bias),
        "relu": ("AutoEncoder", foldings.add_pre_bias),
    }  # fmt: skip
    if p.activation not in known:
        raise Unsupported(f"{p.where}: dictionary_learning has no activation {p.activation}; --to native keeps it")
    if p.activation == "relu" and not p.apply_b_dec_to_input and p.b_pre_D is None:
        return "AutoEncoderNew", p
    name, fold = known[p.activation]
    return name, fold(p)


PLUGIN = DictionaryLearning()
