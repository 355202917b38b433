"""Between :class:`sae.portable.Portable` and the class that runs it. D = d_in, F = d_sae."""

import re
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sae import foldings
from sae.base import SAE
from sae.config import SAEConfig, SubjectMeta
from sae.errors import Unsupported
from sae.manifest import key_of, sha256_file
from sae.plugins import find, names
from sae.portable import Portable

NATIVE = "native"
IMPORT_VERSION = 1
UNIT_ROWS = 1e-5
UNKNOWN = "unknown"
"""Model revision and type of an import: no foreign file states them."""


def to_sae(p: Portable) -> SAE:
    """Our class with these weights. ``Unsupported`` where no class of ours has this meaning."""
    original = p
    if p.activation == "topk_signed":
        raise Unsupported(
            f"{p.where} keeps negative values among its K largest, which saescope has no code for; --activation topk "
            "runs it without them (they are rare where K is far below the number of latents)"
        )
    p = foldings.fold_gate_scale(p)
    if p.transcoder:
        p = _transcoder(p)
    elif p.b_pre_D is not None:
        p = foldings.remove_pre_bias(p)
    if p.architecture not in names("sae.architectures"):
        raise Unsupported(f"{p.where} runs {p.activation} ({p.architecture}); saescope has no such architecture")
    cfg = _config(p, original)
    kind: type[SAE] = find("sae.architectures", p.architecture)
    sae = kind(cfg)
    given = p.tensors() | {"W_enc_DF": p.W_enc_FD.t()}
    with torch.no_grad():
        for name, shape in kind.tensor_shapes(cfg).items():
            if name not in given or tuple(given[name].shape) != shape:
                raise Unsupported(f"{p.where}: {p.architecture} needs {name} {shape}, which the file does not give")
            getattr(sae, name).copy_(given[name])
    unused = set(p.tensors()) - set(kind.tensor_shapes(cfg)) - {"W_enc_FD"}
    if unused:
        raise Unsupported(f"{p.where}: {p.architecture} cannot run {', '.join(sorted(unused))}")
    return sae.requires_grad_(False)


_TRANSCODERS = {"topk": "", "relu": "relu_", "threshold": "jumprelu_"}
"""First part of the name of our transcoder with an activation."""


def _transcoder(p: Portable) -> Portable:
    """Ours subtract an input bias of their own, zero where the source has none."""
    if p.activation not in _TRANSCODERS or p.input_norm.kind not in ("none", "dataset_rms"):
        raise Unsupported(
            f"{p.where} is a transcoder with {p.activation} and input norm {p.input_norm.kind}; saescope runs those "
            f"with {', '.join(_TRANSCODERS)} and norm none or dataset_rms"
        )
    bias_D = p.W_enc_FD.new_zeros(p.d_in) if p.b_pre_D is None else p.b_pre_D
    kind = "skip_transcoder" if p.W_skip_DD is not None else "transcoder"
    return replace(p, b_pre_D=bias_D, architecture=_TRANSCODERS[p.activation] + kind)


def _config(p: Portable, original: Portable) -> SAEConfig:
    files = {f.name: sha256_file(f) for f in original.files}
    rows_F = torch.linalg.vector_norm(p.W_dec_FD.double(), dim=1)
    meaning = [p.format, p.activation, p.k, p.hookpoint, p.input_norm, list(p.recipe)]
    key = key_of("import", IMPORT_VERSION, meaning, files)
    slug = [_slug(part) for part in (p.format, (p.lm or "lm").rsplit("/", 1)[-1], p.hookpoint or p.hook or "hook")]
    size = f"{p.architecture}-f{p.d_sae}" + (f"-k{p.k}" if p.activation in ("topk", "groupmax") else "")
    meta = None
    if p.lm is not None and p.hookpoint is not None:
        meta = SubjectMeta(
            lm=p.lm, lm_revision=UNKNOWN, hookpoint=p.hookpoint, hookpoint_out=p.hookpoint_out, lm_dtype=UNKNOWN,
            context_length_tokens=p.context_tokens or 0, packing=UNKNOWN, lm_slug=slug[1],
            prepend_bos=True if p.prepend_bos is None else p.prepend_bos,
        )  # fmt: skip
    threshold = {"kind": "imported", "tokens": None, "l0": None} if p.activation == "threshold" else None
    return SAEConfig(
        architecture=p.architecture, activation=p.activation, d_in=p.d_in, d_out=int(p.W_dec_FD.shape[1]),  # type: ignore[arg-type]
        d_sae=p.d_sae, k=p.k, apply_b_dec_to_input=p.apply_b_dec_to_input, input_norm=p.input_norm,
        decoder_unit_norm=bool((rows_F - 1).abs().max() <= UNIT_ROWS), group_sizes=p.group_sizes,
        threshold_source=threshold, sae_id=".".join((*slug, f"{size}.{key[:8]}")), meta=meta,
        train_tokens=p.train_tokens, train_steps=None, seed=None, extra={**p.extra, "lm": p.lm, "hook": p.hook},
        source={"format": p.format, "version": p.version, "files": files, "recipe": list(p.recipe)},
    )  # fmt: skip


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "x"


def from_sae(sae: SAE) -> Portable:
    """The weights and semantics of our class, for an exporter."""
    cfg, meta = sae.cfg, sae.cfg.meta
    tensors: dict[str, Tensor] = {
        name: getattr(sae, name).detach().float().cpu().contiguous() for name in sae.tensor_shapes(cfg)
    }
    encoder = tensors.pop("W_enc_DF").t().contiguous()
    known = {f.name for f in fields(Portable)}
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise Unsupported(f"{cfg.sae_id}: {', '.join(unknown)} of {cfg.architecture} has no place in other formats")
    values: dict[str, Any] = {"b_enc_F": None, **tensors}
    return Portable(
        format=NATIVE, where=cfg.sae_id, architecture=cfg.architecture, activation=cfg.activation, W_enc_FD=encoder,
        apply_b_dec_to_input=cfg.apply_b_dec_to_input, input_norm=cfg.input_norm, gate_scale="none", k=cfg.k,
        group_sizes=cfg.group_sizes, lm=meta.lm if meta else None, hookpoint=meta.hookpoint if meta else None,
        hookpoint_out=meta.hookpoint_out if meta else None, transcoder=sae.transcodes,
        context_tokens=meta.context_length_tokens or None if meta else None,
        prepend_bos=meta.prepend_bos if meta else None, train_tokens=cfg.train_tokens, extra=dict(cfg.extra), **values,
    )  # fmt: skip
