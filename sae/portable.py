"""One SAE in the terms of FORMATS 1, between any file on disk and the class that runs it.

A format plug-in (``sae/formats/<name>.py``) fills in every field, as no semantic field has a default: a wrong pre-bias,
norm, gate scale or threshold is the usual loading fault of the field, and it is silent. D = d_in, F = d_sae, N tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError

Activation = Literal["relu", "topk", "threshold", "gated", "groupmax", "topk_signed"]
DOUBLE_NUMBERS = 2**27
LARGEST_WIDTH = 2**26
LARGEST_NUMBER = 2**53
"""No width, count or norm of a configuration is larger; NaN and infinity are not smaller either."""
BIASES = ("b_enc_F", "b_dec_D", "b_pre_D", "threshold_F", "b_gate_F", "b_mag_F", "r_mag_F")
"""Fields that are never 16-bit: a rounded threshold moves the set of active latents."""


SCALE, THRESHOLD = "scale", "threshold"
"""Words of :attr:`Portable.lacks`."""
Activations = Callable[["Portable"], Tensor]
"""Raw activations x_ND, filtered as in training, at the hookpoint that a file names."""


@dataclass(kw_only=True, frozen=True)
class ImportOptions:
    """What a user may state where a file does not; a value that contradicts the file is an error."""

    activation: Literal["relu", "topk"] | None = None
    """How to run a file that does not say, or whose threshold was never calibrated."""
    k: int | None = None
    """Active latents per token, where the file does not say."""
    input_norm: Literal["none", "layer_norm"] | None = None
    """Input normalisation, where the file does not say."""
    scale_in: float | None = None
    """SAELens files whose norm expected_average_only_in was not folded: n = x * scale_in."""
    hookpoint: str | None = None
    """Native name of the module that the SAE reads; overrides what the file says."""
    calibrate_on: Activations | None = field(default=None, compare=False)
    """Gives activations on which a scale or a threshold that the file lacks is measured; without it such a file is
    refused."""
    allow_16bit_thresholds: bool = False
    """Take thresholds and biases that were rounded to 16 bits: their set of active latents is not the trained one."""


@dataclass(kw_only=True)
class Portable:
    """Weights and semantics. Tensors are float32 (float64 while foldings are applied)."""

    format: str
    """Name of the plug-in it came from."""
    where: str
    """File or folder, for messages."""
    architecture: str
    activation: Activation
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    b_enc_F: Tensor | None
    """None for gated alone."""
    b_dec_D: Tensor
    apply_b_dec_to_input: bool
    input_norm: InputNorm
    gate_scale: Literal["none", "decoder_norm"]
    k: int | None
    threshold_F: Tensor | None = None
    b_gate_F: Tensor | None = None
    b_mag_F: Tensor | None = None
    r_mag_F: Tensor | None = None
    b_pre_D: Tensor | None = None
    W_skip_DD: Tensor | None = None
    transcoder: bool = False
    """Whether it predicts another tensor than it reads."""
    group_sizes: tuple[int, ...] | None = None
    lm: str | None = None
    hook: str | None = None
    """Hook name in the words of the source."""
    hookpoint: str | None = None
    """Native name (FORMATS 4), None where the source does not say."""
    hookpoint_out: str | None = None
    """Native name of what a transcoder predicts."""
    context_tokens: int | None = None
    prepend_bos: bool | None = None
    train_tokens: int | None = None
    published_l0: float | None = None
    """Mean active latents per token that the source states for it."""
    recipe: tuple[str, ...] = ()
    """Foldings applied since the file was read."""
    lacks: tuple[str, ...] = ()
    """What is still to be measured on activations (:mod:`sae.import_calibration`)."""
    files: tuple[Path, ...] = ()
    """Files it was read from: their hashes name the import."""
    version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        return int(self.W_enc_FD.shape[1])

    @property
    def d_sae(self) -> int:
        return int(self.W_dec_FD.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        found = {name: getattr(self, name) for name in ("W_enc_FD", "W_dec_FD", *BIASES, "W_skip_DD")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Format(Protocol):
    """What ``sae/formats/<name>.py`` offers as ``PLUGIN``. Formats that can be written also have ``write``; formats
    whose SAE is a folder have ``files``, patterns of its content with the weights first, for the hub."""

    title: str
    """For messages and for ``inspect``."""

    def recognises(self, path: Path) -> bool:
        """Whether the files at ``path`` have this format's names and keys; reads headers alone and raises nothing."""
        ...

    def read(self, path: Path, options: ImportOptions) -> Portable:
        """``ArtefactError`` for faults of the file, ``ConfigError`` for what it contradicts, ``Unsupported``."""
        ...


def take(where: Path, tensors: Mapping[str, Any], needed: Iterable[str], optional: Iterable[str] = ()) -> None:
    """``ArtefactError`` for a missing or an unknown key, with what was expected."""
    needed, optional = list(needed), list(optional)
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ArtefactError(f"{where} lacks {', '.join(missing)}; expected {needed}, found {sorted(tensors)}")
    unknown = sorted(set(tensors) - set(needed) - set(optional))
    if unknown:
        raise ArtefactError(f"{where} holds {', '.join(unknown)}, which this format does not have; expected {needed}")


def shaped(where: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> Tensor:
    """The tensor, if it has this shape; a transposed one is named as such."""
    if not isinstance(tensor, Tensor):
        raise ArtefactError(f"{where}: {name} is a {type(tensor).__name__}, expected a tensor {shape}")
    if tuple(tensor.shape) != shape:
        turned = tuple(tensor.shape) == shape[::-1]
        hint = "; it lies transposed" if turned else ""
        raise ConfigError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}{hint}")
    return tensor


def stated(where: Path, values: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A required field of a configuration, of the right type (a bool is no number)."""
    if name not in values:
        raise ConfigError(f"{where} does not say {name!r}, and it is not guessed")
    value = values[name]
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right or (isinstance(value, (int, float)) and not abs(value) < LARGEST_NUMBER):
        names = ", ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
        raise ConfigError(f"{where}: {name} is {value!r}, expected {names}")
    return value


def width(where: Path, values: Mapping[str, Any], name: str) -> int:
    """A stated number of channels or latents: positive, and small enough to allocate a vector of it."""
    value: int = stated(where, values, name, int)
    if not 1 <= value <= LARGEST_WIDTH:
        raise ConfigError(f"{where}: {name} is {value}, expected 1 to {LARGEST_WIDTH:,}")
    return value


def said(where: Path, values: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field that may be absent or null (None); of another type it is a :class:`ConfigError` as in :func:`stated`."""
    return None if values.get(name) is None else stated(where, values, name, kind)


def check(p: Portable, options: ImportOptions) -> Portable:
    """Shapes, types, NaN and semantics that contradict each other; returns ``p`` with tensors in float32.

    ``ArtefactError`` for tensors that cannot be used, ``ConfigError`` for semantics that need what is not there.
    """
    F, D, d_out = p.d_sae, p.d_in, int(p.W_dec_FD.shape[1])
    shapes = {
        "W_enc_FD": (F, D), "W_dec_FD": (F, d_out), "b_dec_D": (d_out,), "b_pre_D": (D,), "W_skip_DD": (d_out, D)
    }  # fmt: skip
    for name, tensor in p.tensors().items():
        expected = shapes.get(name, (F,))
        if tuple(tensor.shape) != expected:
            raise ConfigError(f"{p.where}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
        if not tensor.is_floating_point():
            raise ArtefactError(f"{p.where}: {name} has type {tensor.dtype}, expected floating point")
        narrow = name == "threshold_F" and tensor.dtype in (torch.bfloat16, torch.float16)
        if narrow and not options.allow_16bit_thresholds:
            raise ArtefactError(
                f"{p.where}: threshold is stored as {tensor.dtype}, expected float32; rounding it has changed which "
                "latents are active (--allow-16bit-thresholds takes it as it is)"
            )
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ArtefactError(f"{p.where}: {name} holds {bad} numbers that are NaN or infinite; it is unusable")
        setattr(p, name, tensor.detach().to(torch.float32).contiguous())
    _check_semantics(p)
    return p


def _check_semantics(p: Portable) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{p.where}: {message}")

    counted = p.activation in ("topk", "groupmax", "topk_signed")
    need(not counted or (p.k is not None and 1 <= p.k <= p.d_sae), f"{p.activation} needs k in 1..{p.d_sae}, not {p.k}")
    need(p.activation != "groupmax" or p.d_sae % (p.k or 1) == 0, f"k = {p.k} groups do not divide {p.d_sae} latents")
    has_threshold = p.threshold_F is not None or THRESHOLD in p.lacks
    need(p.activation != "threshold" or has_threshold, "activation threshold needs a threshold per latent")
    gated = all(t is not None for t in (p.b_gate_F, p.b_mag_F, p.r_mag_F))
    need(p.activation != "gated" or gated, "gated needs b_gate, b_mag and r_mag")
    need((p.b_enc_F is None) == (p.activation == "gated"), "b_enc belongs to every activation but gated")
    need(not (p.apply_b_dec_to_input and p.transcoder), "a transcoder never subtracts its decoder bias from its input")
    need(not (p.apply_b_dec_to_input and p.b_pre_D is not None), "b_pre and apply_b_dec_to_input exclude each other")
    need(bool(p.W_dec_FD.any()) and bool(p.W_enc_FD.any()), "all weights are zero; nothing can be reconstructed")


class Naive(NamedTuple):
    """Result of :func:`naive_forward`."""

    z_NF: np.ndarray[Any, Any]
    x_hat_ND: np.ndarray[Any, Any]
    scale: Any
    """Factor from normalised to raw units: a number, or [N, 1]."""


def naive_forward(p: Portable, x_ND: Tensor) -> Naive:
    """The forward pass of FORMATS 1, word for word, in numpy: the oracle of every import and export.

    In float64, above 2^27 weights in float32. No code is shared with :class:`sae.base.SAE`: a fault of either shows.
    """
    kind = torch.float64 if p.W_enc_FD.numel() <= DOUBLE_NUMBERS else torch.float32
    w = {name: tensor.to(kind).numpy() for name, tensor in p.tensors().items()}
    x = x_ND.to(kind).numpy()
    n, mean, scale = _naive_norm(p.input_norm, x)
    u = n - w["b_dec_D"] if p.apply_b_dec_to_input else n - w.get("b_pre_D", 0.0)
    s = np.linalg.norm(w["W_dec_FD"], axis=1) if p.gate_scale == "decoder_norm" else np.ones(p.d_sae)
    h = u @ w["W_enc_FD"].T
    g = (h + w.get("b_enc_F", 0.0)) * s
    if p.activation == "relu":
        z = np.maximum(g, 0)
    elif p.activation == "threshold":
        z = np.where((g > w["threshold_F"]) & (g > 0), g, 0)
    elif p.activation == "gated":
        z = np.where(h + w["b_gate_F"] > 0, np.maximum(np.exp(w["r_mag_F"]) * h + w["b_mag_F"], 0), 0)
    elif p.activation == "groupmax":
        groups = g.reshape(len(g), p.k or 1, -1)
        largest = np.arange(groups.shape[2]) == groups.argmax(2)[..., None]
        z = np.where(largest, np.maximum(groups, 0), 0).reshape(g.shape)
    else:
        order = np.argsort(-g, axis=1, kind="stable")[:, : p.k]
        z = np.zeros_like(g)
        np.put_along_axis(z, order, np.take_along_axis(g, order, 1), 1)
        z = z if p.activation == "topk_signed" else np.maximum(z, 0)
    z = z / np.where(s > 0, s, 1)
    y = z @ w["W_dec_FD"] + w["b_dec_D"]
    if "W_skip_DD" in w:
        y = y + n @ w["W_skip_DD"].T
    return Naive(z, y * scale + mean, scale)


def _naive_norm(norm: InputNorm, x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Any, Any]:
    if norm.kind == "none":
        return x, 0.0, 1.0
    if norm.kind == "dataset_rms":
        return x * norm.scale_in, 0.0, 1 / norm.scale_out
    if norm.kind == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, ddof=norm.ddof, keepdims=True)
        return (x - mean) / (std + norm.eps), mean, std
    mean = x.mean(1, keepdims=True) if norm.center else np.zeros((len(x), 1))
    length = np.linalg.norm(x - mean, axis=1, keepdims=True)
    factor = x.shape[1] ** 0.5 if norm.target == "sqrt_d" else 1.0
    return (x - mean) / (length + norm.eps) * factor, mean, length / factor
