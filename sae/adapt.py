"""Between :class:`sae.portable.Portable` and the class that runs it, and the check that both mean the same.

D = d_in, F = d_sae, N tokens.
"""

import re
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae import foldings
from sae.base import SAE
from sae.config import SAEConfig, SubjectMeta
from sae.errors import CheckpointMismatch, Unsupported
from sae.manifest import key_of, rng, sha256_file
from sae.plugins import find, names
from sae.portable import Portable, naive_forward

NATIVE = "native"
IMPORT_VERSION = 1
SAMPLE_TOKENS = 128
TOLERANCE = 1e-4
"""Relative error of codes and reconstructions (float32 against the oracle)."""
SAME_SETS = 0.99
"""Share of tokens whose set of active latents must be that of the oracle; the rest are near-ties of float32."""
UNIT_ROWS = 1e-5
UNKNOWN = "unknown"
"""Model revision and type of an import: no foreign file states them."""


def to_sae(p: Portable) -> SAE:
    """Our class with these weights. ``Unsupported`` where no class of ours has this meaning."""
    original = p
    p = foldings.remove_pre_bias(foldings.fold_gate_scale(p)) if p.b_pre_D is not None else foldings.fold_gate_scale(p)
    if p.transcoder or p.W_skip_DD is not None:
        raise Unsupported(f"{p.where} is a transcoder; saescope runs SAEs that reconstruct what they read")
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


def _config(p: Portable, original: Portable) -> SAEConfig:
    files = {f.name: sha256_file(f) for f in original.files}
    rows_F = torch.linalg.vector_norm(p.W_dec_FD.double(), dim=1)
    meaning = [p.format, p.activation, p.k, p.hookpoint, p.input_norm, list(p.recipe)]
    key = key_of("import", IMPORT_VERSION, meaning, files)
    slug = [_slug(part) for part in (p.format, (p.lm or "lm").rsplit("/", 1)[-1], p.hookpoint or p.hook or "hook")]
    size = f"{p.architecture}-f{p.d_sae}" + (f"-k{p.k}" if p.k is not None and p.activation == "topk" else "")
    meta = None
    if p.lm is not None and p.hookpoint is not None:
        meta = SubjectMeta(
            lm=p.lm, lm_revision=UNKNOWN, hookpoint=p.hookpoint, lm_dtype=UNKNOWN,
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
        context_tokens=meta.context_length_tokens or None if meta else None,
        prepend_bos=meta.prepend_bos if meta else None, train_tokens=cfg.train_tokens, extra=dict(cfg.extra), **values,
    )  # fmt: skip


class Agreement(NamedTuple):
    """Of an SAE with the oracle of a portable one, on one sample."""

    codes: float
    """Relative error of the contributions over tokens with the same set of active latents."""
    reconstructions: float
    """Relative error of x_hat over the same tokens."""
    same_sets: float
    """Share of tokens with the same set of active latents."""
    l0: float
    """Mean active latents per token of the SAE."""
    fvu: float
    """Of the SAE on the sample."""
    fvu_before: float
    """Of the oracle on the sample."""
    tokens: int

    @property
    def passed(self) -> bool:
        """Within the tolerances of a load."""
        return self.same_sets >= SAME_SETS and max(self.codes, self.reconstructions) <= TOLERANCE


def sample_inputs(p: Portable, n_tokens: int = SAMPLE_TOKENS) -> Tensor:
    """x_ND for checks without a language model: the decoder bias, a few encoder directions and Gaussian noise, in raw
    units, long enough that latents fire. Depends on shapes and weights alone."""
    generator = torch.Generator().manual_seed(int(rng("import-sample", p.d_in, p.d_sae).integers(2**62)))
    length_F = torch.linalg.vector_norm(p.W_enc_FD, dim=1).clamp_min(1e-12)
    needed_F = torch.zeros_like(length_F)
    for name in ("threshold_F", "b_enc_F", "b_gate_F"):
        if (tensor := getattr(p, name)) is not None:
            needed_F = needed_F + tensor.abs() / length_F
    size = float(needed_F.median()) + 1.0
    picked_NS = torch.randint(p.d_sae, (n_tokens, 4), generator=generator)
    amounts_NS = 4 * size * torch.rand(n_tokens, 4, generator=generator)
    rows_NSD = p.W_enc_FD[picked_NS] / length_F[picked_NS][:, :, None]
    x_ND = (amounts_NS[:, :, None] * rows_NSD).sum(1) + 0.25 * size * torch.randn(n_tokens, p.d_in, generator=generator)
    x_ND = x_ND if p.transcoder else x_ND + p.b_dec_D
    return x_ND / p.input_norm.scale_in if p.input_norm.kind == "dataset_rms" else x_ND


@torch.no_grad()
def agreement(sae: SAE, p: Portable, x_ND: Tensor) -> Agreement:
    """``sae`` against the naive forward pass of ``p`` on raw activations; NaN errors where no token can be compared.

    Codes are compared as contributions, value times decoder row length times output scale: no folding changes those.
    """
    truth = naive_forward(p, x_ND)
    latents_NF = sae.encode(x_ND).double().cpu()
    x_hat_ND = sae(x_ND).double().cpu()
    rows_F = torch.linalg.vector_norm(sae.W_dec_FD.double().cpu(), dim=1)
    got_NF = latents_NF * rows_F * sae.output_scale(x_ND).double().cpu()[:, None]
    want_NF = torch.from_numpy(truth.z_NF * truth.scale) * torch.linalg.vector_norm(p.W_dec_FD.double(), dim=1)
    want_ND = torch.from_numpy(truth.x_hat_ND)
    same_N = ((latents_NF != 0) == torch.from_numpy(truth.z_NF != 0)).all(1)
    return Agreement(
        codes=_relative(got_NF[same_N], want_NF[same_N]), reconstructions=_relative(x_hat_ND[same_N], want_ND[same_N]),
        same_sets=float(same_N.double().mean()), l0=float((latents_NF != 0).sum(1).double().mean()),
        fvu=_fvu(x_ND.double(), x_hat_ND), fvu_before=_fvu(x_ND.double(), want_ND), tokens=len(x_ND),
    )  # fmt: skip


def _relative(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return float("nan")
    size = float(torch.linalg.vector_norm(want))
    return float(torch.linalg.vector_norm(got - want)) / (size or 1.0)


def _fvu(x_ND: Tensor, x_hat_ND: Tensor) -> float:
    total = float((x_ND - x_ND.mean(0)).square().sum())
    return float((x_ND - x_hat_ND).square().sum()) / total if total > 0 else float("nan")


def self_check(sae: SAE, p: Portable) -> Agreement:
    """``CheckpointMismatch`` unless ``sae`` gives what the recipe of ``p`` gives on :func:`sample_inputs`."""
    found = agreement(sae, p, sample_inputs(p))
    if not found.passed:
        raise CheckpointMismatch(
            f"{p.where}: our {sae.cfg.architecture} differs from the recipe of {p.format}: codes by {found.codes:.2g}, "
            f"reconstructions by {found.reconstructions:.2g} (at most {TOLERANCE:g}), equal sets on "
            f"{found.same_sets:.0%} of {found.tokens} tokens (at least {SAME_SETS:.0%}); this is a fault of saescope"
        )
    return found
