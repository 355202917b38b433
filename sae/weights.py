"""An SAE of weights that a script holds, and its folder on disk: no other library's file is needed in between.

D = d_in, F = d_sae. ``sae.from_weights`` and ``sae.save`` are these.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import adapt, agreement, checkpoint
from sae.base import SAE
from sae.config import InputNorm, to_dict
from sae.errors import ArtefactError, ConfigError, did_you_mean
from sae.hook_names import from_transformer_lens
from sae.manifest import key_of, sha256_text, writing
from sae.portable import Activation, ImportOptions, Portable, check

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "topk": "topk",
    "batchtopk": "threshold",
    "jumprelu": "threshold",
    "matryoshka": "threshold",
    "gated": "gated",
}
"""How the architectures that can be given are run. BatchTopK and Matryoshka run on the threshold that training left."""
NO_NORM = InputNorm(kind="none")
SAVE_VERSION = 1


def from_weights(
    W_enc: Any, W_dec: Any, *, architecture: str, subtract_b_dec: bool, lm: str, hookpoint: str,
    b_enc: Any = None, b_dec: Any = None, k: int | None = None, threshold: Any = None, b_gate: Any = None,
    b_mag: Any = None, r_mag: Any = None, group_sizes: Sequence[int] | None = None,
    input_norm: InputNorm = NO_NORM, context_tokens: int | None = None,
    train_tokens: int | None = None, name: str = "own",
) -> SAE:  # fmt: skip
    """The SAE with these weights, ready to be run, saved (:func:`save`) and evaluated (``run_all --sae FOLDER``).

    Tensors or arrays, of any floating type: ``W_enc`` [D, F], ``W_dec`` [F, D], ``b_enc`` [F] and ``b_dec`` [D] (0 if
    not given). ``architecture``: relu; topk (``k``); batchtopk, jumprelu, matryoshka (``threshold`` [F] or one number:
    a latent is active where its pre-activation exceeds it; matryoshka also ``group_sizes``); gated (``b_gate``,
    ``b_mag``, ``r_mag`` [F] instead of ``b_enc``). It computes z = f((n(x) - b_dec) W_enc + b_enc), without "- b_dec"
    where ``subtract_b_dec`` is false, and x_hat = z W_dec + b_dec in the units of x; n is ``input_norm``.

    What a wrong guess would make silently worse has no default. ``lm``: name or folder of the language model.
    ``hookpoint``: as in ``--hookpoint``; for well-known models TransformerLens' names are understood too.
    ``context_tokens``: length of the rows it was trained on, evaluations use no longer ones. ``name``: how its name on
    boards begins.

    ConfigError: shapes that do not fit, a field that the architecture lacks or does not have; ArtefactError: numbers
    that are not finite; CheckpointMismatch: our class and the formula above disagree, a fault of saescope.
    """
    if architecture not in ACTIVATIONS:
        raise ConfigError(f"from_weights: no architecture {architecture!r}{did_you_mean(architecture, ACTIVATIONS)}")
    activation = ACTIVATIONS[architecture]
    given = {"b_enc": b_enc, "k": k, "threshold": threshold, "b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}
    _fits(architecture, activation, {name for name, value in given.items() if value is not None})
    encoder, decoder = _matrices(W_enc, W_dec, b_gate if activation == "gated" else b_enc)
    D, F = encoder.shape
    latents = {"threshold_F": threshold, "b_gate_F": b_gate, "b_mag_F": b_mag, "r_mag_F": r_mag}
    latents = {key: value for key, value in latents.items() if value is not None}
    vectors: dict[str, Any] = {key: _vector(key[:-2], value, F) for key, value in latents.items()}
    found = Portable(
        format=name, where="from_weights", architecture=architecture, activation=activation, W_enc_FD=encoder.T,
        W_dec_FD=decoder, b_enc_F=None if activation == "gated" else _vector("b_enc", b_enc, F),
        b_dec_D=_vector("b_dec", b_dec, D), apply_b_dec_to_input=subtract_b_dec, input_norm=input_norm,
        gate_scale="none", k=k, group_sizes=None if group_sizes is None else tuple(int(n) for n in group_sizes), lm=lm,
        hookpoint=from_transformer_lens(hookpoint, lm) or hookpoint, context_tokens=context_tokens,
        train_tokens=train_tokens, **vectors,
    )  # fmt: skip
    found = check(found, ImportOptions(allow_16bit_thresholds=True))
    found = replace(found, recipe=(f"weights given by a script, sha256 {_sha256(found)}",))
    made = adapt.to_sae(found)
    agreement.self_check(made, found)
    return made


def save(sae: SAE, folder: str | Path, x_sample_ND: Tensor | None = None, *, force: bool = False) -> Path:
    """Write the SAE as a folder that ``sae.load`` and ``run_all --sae`` read; returns the folder.

    ``x_sample_ND``: raw activations, some hundreds of them, for the reference sample by which each load checks itself;
    without them synthetic ones are used. The folder appears whole or not at all.

    ArtefactError: the folder exists (``force`` replaces an SAE's folder); DataError: weights that are not finite.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (force and _holds_sae(folder)))):
        raise ArtefactError(f"{folder} exists; choose another folder, or pass force=True where it holds an SAE")
    found, cfg = adapt.from_sae(sae), to_dict(sae.cfg)
    sample = agreement.sample_inputs(found) if x_sample_ND is None else x_sample_ND
    inputs = {"weights": _sha256(found)}
    key = key_of("saes", SAVE_VERSION, cfg, inputs)
    with writing(folder, kind="saes", key=key, stage_version=SAVE_VERSION, config=cfg, inputs=inputs) as out:
        checkpoint.save(sae, out.path, sample)
        out.counts.update({"sae_id": sae.sae_id, "reference": "synthetic inputs" if x_sample_ND is None else "given"})
    return folder


def _holds_sae(folder: Path) -> bool:
    return (folder / checkpoint.CFG).is_file()


def _fits(architecture: str, activation: Activation, given: set[str]) -> None:
    """``ConfigError`` for a field that the architecture needs and is not given, or has no place for."""
    needed = {"topk": {"k"}, "threshold": {"threshold"}, "gated": {"b_gate", "b_mag", "r_mag"}}.get(activation, set())
    if missing := sorted(needed - given):
        raise ConfigError(f"from_weights: {architecture} needs {', '.join(missing)}")
    allowed = needed | {"k"} | (set() if activation == "gated" else {"b_enc"})
    if surplus := sorted(given - allowed):
        raise ConfigError(f"from_weights: {architecture} has no {', '.join(surplus)}")


def _matrices(W_enc: Any, W_dec: Any, bias: Any) -> tuple[Tensor, Tensor]:
    """W_enc [D, F] and W_dec [F, D]; ``bias``: of the latents, tells them from both of them turned."""
    encoder, decoder = _tensor("W_enc", W_enc), _tensor("W_dec", W_dec)
    shapes = f"from_weights: W_enc {tuple(encoder.shape)} and W_dec {tuple(decoder.shape)}"
    hint = "the weight of a torch.nn.Linear lies the other way round: give .weight.T"
    if encoder.ndim != 2 or tuple(encoder.shape) != tuple(decoder.shape)[::-1]:
        raise ConfigError(f"{shapes} are not [D, F] and [F, D]; {hint}")
    D, F = encoder.shape
    if D != F and getattr(bias, "shape", None) == (D,):
        raise ConfigError(f"{shapes} say {F} latents, but they have {D} biases; {hint}")
    return encoder, decoder


def _tensor(name: str, value: Any) -> Tensor:
    found = torch.as_tensor(value).detach().cpu()
    if not found.is_floating_point():
        raise ConfigError(f"from_weights: {name} has type {found.dtype}, expected floating point")
    return found


def _vector(name: str, value: Any, length: int) -> Tensor:
    """A vector of this length; zeros for None, a number for all."""
    if value is None or isinstance(value, (int, float)):
        return torch.full((length,), float(value or 0.0))
    found = _tensor(name, value)
    found = found.expand(length) if found.ndim == 0 else found
    if tuple(found.shape) != (length,):
        raise ConfigError(f"from_weights: {name} has shape {tuple(found.shape)}, expected {(length,)}")
    return found


def _sha256(p: Portable) -> str:
    """Of all tensors, by name."""
    parts = [name + hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in p.tensors().items()]
    return sha256_text("|".join(parts))[:16]
