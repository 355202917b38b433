"""``python -m sae inspect PATH``: what an SAE is, how it is run, and whether it is healthy, in one screen.

D = d_in, F = d_sae.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sae import adapt, agreement, console, foldings, loading
from sae.config import InputNorm
from sae.errors import ConfigError, Unsupported
from sae.manifest import sha256_file
from sae.portable import ImportOptions, Portable, naive_forward

PROBE_GAIN = 0.10
"""A single change that lowers FVU by more than this share makes the recipe suspect (FORMATS 7)."""
L0_SHARE = 0.15
"""So does an L0 that differs from the published one by more than this share."""


def semantics(p: Portable) -> list[tuple[str, str]]:
    """How it is run, one fact a row."""
    norm = p.input_norm
    details = {
        "layer_norm": f" (eps {norm.eps:g}, ddof {norm.ddof})", "none": "",
        "unit_norm": f" (eps {norm.eps:g}, centred {norm.center}, to {norm.target})",
        "dataset_rms": f" (x * {norm.scale_in:.6g}, x_hat / {norm.scale_out:.6g})",
    }[norm.kind]  # fmt: skip
    k = f", k = {p.k}" if p.k is not None else ""
    bias = "b_dec" if p.apply_b_dec_to_input else "a bias of its own" if p.b_pre_D is not None else "nothing"
    rows = [
        ("format", "saescope" if p.format == loading.NATIVE else loading.plugin(p.format).title),
        ("version", p.version or ""), ("from the hub", str(p.extra.get("hub") or "")),
        ("trained as, run as", f"{p.architecture}, {p.activation}{k}"), ("d_in, d_sae", f"{p.d_in}, {p.d_sae}"),
        ("input norm", norm.kind + details), ("subtracted from the input", bias), ("gate scale", p.gate_scale),
        ("transcoder", "yes" + (", with skip" if p.W_skip_DD is not None else "") if p.transcoder else "no"),
        ("model", p.lm or "not said"), ("hook", p.hook or ""),
        ("published L0", "" if p.published_l0 is None else f"{p.published_l0:g}"),
        ("hookpoint", p.hookpoint or "not said; give --hookpoint"),
        ("context, BOS", f"{p.context_tokens or 'not said'}, {'not said' if p.prepend_bos is None else p.prepend_bos}"),
        ("applied on reading", "; ".join(p.recipe)),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def health(p: Portable) -> list[tuple[str, str]]:
    """Norms, dead directions and thresholds; a row that begins with ``!`` is a reason to look closer."""
    encoder_F, decoder_F = (torch.linalg.vector_norm(t.double(), dim=1) for t in (p.W_enc_FD, p.W_dec_FD))
    rows = [
        (name, _spread(n)) for name, n in (("length of encoder rows", encoder_F), ("length of decoder rows", decoder_F))
    ]
    silent = int((decoder_F == 0).sum())
    if silent:
        rows.append(("! decoder rows of length 0", f"{silent:,} of {p.d_sae:,}"))
    if not p.transcoder:  # whose rows lie in two spaces
        cosine_F = (p.W_enc_FD.double() * p.W_dec_FD.double()).sum(1) / (encoder_F * decoder_F).clamp_min(1e-30)
        mark = "! " if float(cosine_F.median()) < 0 else ""
        rows.append((f"{mark}cosine of encoder and decoder rows", _spread(cosine_F)))
    for name in ("b_enc_F", "b_dec_D", "threshold_F"):
        if (tensor := getattr(p, name)) is not None:
            rows.append((name, _spread(tensor.double())))
    if p.threshold_F is not None and bool((p.threshold_F < 0).any()):
        rows.append(("! thresholds below 0", f"{int((p.threshold_F < 0).sum()):,}: they act as 0"))
    return rows


def _spread(values: Tensor) -> str:
    low, middle, high = (float(torch.quantile(values[:: max(1, len(values) // 10**6)], q)) for q in (0.0, 0.5, 1.0))
    return f"{low:.4g} … {middle:.4g} … {high:.4g}"


def variants(p: Portable) -> dict[str, Portable]:
    """Every single change of the recipe that a loader gets wrong silently: pre-bias, norm, gate scale."""
    found = {}
    if p.transcoder and p.d_in == p.W_dec_FD.shape[1]:
        found["with b_dec subtracted from the input"] = replace(p, apply_b_dec_to_input=True, b_pre_D=None)
    elif not p.transcoder:
        note = "without pre-bias" if p.apply_b_dec_to_input else "with b_dec subtracted from the input"
        found[note] = replace(p, apply_b_dec_to_input=not p.apply_b_dec_to_input, b_pre_D=None)
    for norm in (
        InputNorm(kind="none"),
        foldings.LAYER_NORM,
        InputNorm(kind="unit_norm", center=False, target="sqrt_d"),
    ):
        if norm.kind != p.input_norm.kind and not p.transcoder:
            found[f"input norm {norm.kind}"] = replace(p, input_norm=norm)
    other = "none" if p.gate_scale == "decoder_norm" else "decoder_norm"
    found[f"gate scale {other}"] = replace(p, gate_scale=other)  # type: ignore[arg-type]
    return found


def probe(p: Portable, x_ND: Tensor, target_NO: Tensor | None = None) -> list[tuple[str, float, float]]:
    """(recipe, FVU, L0) as imported, then under each of :func:`variants`, on raw activations (FORMATS 7).

    ``target_NO``: what a transcoder predicts, on the same tokens; an SAE predicts ``x_ND``. ``Unsupported`` for a
    transcoder without it.
    """
    if target_NO is None:
        if p.transcoder:
            raise Unsupported(f"{p.where} is a transcoder: its recipe is judged by its target, which is not given")
        target_NO = x_ND
    if target_NO.shape != (len(x_ND), p.W_dec_FD.shape[1]):
        raise ConfigError(f"{p.where} gives {p.W_dec_FD.shape[1]} channels, the target has {tuple(target_NO.shape)}")
    rows = []
    for name, variant in {"as imported": p, **variants(p)}.items():
        missed, active = 0.0, 0
        step = agreement.block_tokens(p.d_sae)
        for x_nD, target_nO in zip(x_ND.split(step), target_NO.split(step), strict=True):
            found = naive_forward(variant, x_nD)
            missed += float((target_nO.double() - torch.from_numpy(found.x_hat_ND).double()).square().sum())
            active += int((found.z_NF != 0).sum())
        rows.append((name, missed / agreement.total_variance(target_NO), active / len(x_ND)))
    return rows


def show(path: str | Path, options: ImportOptions) -> Portable:
    """Print origin, semantics, files, health and the self-check; the exceptions of ``sae.load`` pass through."""
    p = loading.read(path, options)
    console.table(str(path), ("", ""), semantics(p))
    console.table("health (lowest … median … highest)", ("", ""), health(p))
    if p.files:
        rows = [(f.name, f"{f.stat().st_size:,}", sha256_file(f)[:16]) for f in p.files]
        console.table("files", ("file", "bytes", "sha256"), rows, right=(1,))
    try:
        found = agreement.self_check(adapt.to_sae(p), p)
        console.say(
            f"self-check on {found.tokens} synthetic inputs: codes {found.codes:.1e}, reconstructions "
            f"{found.reconstructions:.1e}, equal sets {found.same_sets:.1%}"
        )
    except Unsupported as error:
        console.say(f"saescope can read but not run it: {error}")
    return p


def suspicion(rows: Sequence[tuple[str, float, float]], published_l0: float | None = None) -> str | None:
    """What is wrong with the first row of :func:`probe`, or None: a change fits clearly better, the SAE reconstructs
    worse than the mean, or its L0 is off the published one by more than :data:`L0_SHARE`."""
    (_, own, l0), *others = rows
    best, fvu, _ = min(others, key=lambda row: row[1])
    if published_l0 is not None and abs(l0 - published_l0) > L0_SHARE * published_l0:
        return f"L0 {l0:.1f} as imported, {published_l0:g} published; file, model, hookpoint or token filter differ"
    if not (own > 1 or fvu < (1 - PROBE_GAIN) * own):
        return None
    return f"FVU {own:.3f} as imported, {fvu:.3f} {best}; file, model or hookpoint is not what it is taken for"


def verdict(rows: Sequence[tuple[str, float, float]], published_l0: float | None = None) -> int:
    """Exit status of :func:`probe`: 1 for a :func:`suspicion`, which is printed."""
    found = suspicion(rows, published_l0)
    if found is not None:
        console.say(f"suspect: {found}")
    return 0 if found is None else 1
