"""Do two SAEs, in whatever form, mean the same? Inputs for the check, the comparison, and the verdict.

D = d_in, F = d_sae, N tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.base import SAE
from sae.errors import CheckpointMismatch
from sae.manifest import rng
from sae.portable import Portable, naive_forward

SAMPLE_TOKENS = 128
TOLERANCE = 1e-4
"""Relative error of codes and reconstructions (float32 against the oracle)."""
SAME_SETS = 0.99
"""Share of tokens whose set of active latents must be equal; the rest are near-ties of float32."""


class Outcome(NamedTuple):
    """What an SAE does with a sample."""

    contributions_NF: Tensor
    """float64: code times length of the decoder row times output scale. No folding of FORMATS 1 changes these."""
    x_hat_ND: Tensor
    """float64, raw units."""


class Agreement(NamedTuple):
    """Of two outcomes on one sample."""

    codes: float
    """Relative error of the contributions over tokens with the same set of active latents; NaN if there is none."""
    reconstructions: float
    """Relative error of x_hat over the same tokens."""
    same_sets: float
    """Share of tokens with the same set of active latents."""
    l0_before: float
    l0_after: float
    """Mean active latents per token."""
    fvu_before: float
    fvu_after: float
    """Against the inputs themselves; NaN for a transcoder, which predicts something else."""
    tokens: int

    @property
    def passed(self) -> bool:
        """Within the tolerances of a load."""
        return self.same_sets >= SAME_SETS and max(self.codes, self.reconstructions) <= TOLERANCE

    def facts(self) -> dict[str, float | None]:
        """For a manifest, which holds no NaN."""
        return {name: None if value != value else value for name, value in self._asdict().items()}


@torch.no_grad()
def outcome(subject: SAE | Portable, x_ND: Tensor) -> Outcome:
    """Our class by its own code in its own type, a portable SAE by the naive forward pass; ``x_ND`` raw."""
    if isinstance(subject, Portable):
        found = naive_forward(subject, x_ND)
        rows_F = torch.linalg.vector_norm(subject.W_dec_FD.double(), dim=1)
        return Outcome(
            torch.from_numpy(found.z_NF * found.scale).double() * rows_F, torch.from_numpy(found.x_hat_ND).double()
        )
    rows_F = torch.linalg.vector_norm(subject.W_dec_FD.double().cpu(), dim=1)
    scale_N1 = subject.output_scale(x_ND).double().cpu()[:, None]
    return Outcome(subject.encode(x_ND).double().cpu() * rows_F * scale_N1, subject(x_ND).double().cpu())


def compare(before: SAE | Portable, after: SAE | Portable, x_ND: Tensor) -> Agreement:
    """``after`` against ``before`` on raw activations, block by block: few N x F matrices are held at a time."""
    sums: dict[str, float] = dict.fromkeys(("same", "l0_a", "l0_b", "code", "code_error", "x", "x_error"), 0.0)
    residuals = {"a": 0.0, "b": 0.0}
    transcodes = before.transcoder if isinstance(before, Portable) else before.transcodes
    for x_nD in x_ND.split(block_tokens(before.d_sae)):
        a, b = outcome(before, x_nD), outcome(after, x_nD)
        active_a, active_b = a.contributions_NF != 0, b.contributions_NF != 0
        same_N = (active_a == active_b).all(1)
        sums["same"] += float(same_N.sum())
        sums["l0_a"] += float(active_a.sum())
        sums["l0_b"] += float(active_b.sum())
        for name, got, want in (
            ("code", b.contributions_NF, a.contributions_NF), ("x", b.x_hat_ND, a.x_hat_ND)
        ):  # fmt: skip
            sums[name] += float(want[same_N].square().sum())
            sums[f"{name}_error"] += float((got[same_N] - want[same_N]).square().sum())
        if not transcodes:
            residuals["a"] += float((x_nD.double() - a.x_hat_ND).square().sum())
            residuals["b"] += float((x_nD.double() - b.x_hat_ND).square().sum())
    n, variance = max(len(x_ND), 1), total_variance(x_ND)
    shares = {k: r / variance if variance > 0 and not transcodes else float("nan") for k, r in residuals.items()}
    nothing = float("nan")
    relative = {k: (sums[f"{k}_error"] / (sums[k] or 1.0)) ** 0.5 if sums["same"] else nothing for k in ("code", "x")}
    return Agreement(
        codes=relative["code"], reconstructions=relative["x"], same_sets=sums["same"] / n, l0_before=sums["l0_a"] / n,
        l0_after=sums["l0_b"] / n, fvu_before=shares["a"], fvu_after=shares["b"], tokens=len(x_ND),
    )  # fmt: skip


def block_tokens(d_sae: int) -> int:
    """Tokens whose codes are held at a time in float64: 128 MiB a matrix."""
    return max(1, 2**24 // d_sae)


def total_variance(x_ND: Tensor) -> float:
    """Sum of squared distances from the mean, the denominator of FVU."""
    x = x_ND.double()
    return float((x - x.mean(0)).square().sum()) if len(x) else 0.0


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


def self_check(sae: SAE, p: Portable) -> Agreement:
    """``CheckpointMismatch`` unless ``sae`` gives what the recipe of ``p`` gives on :func:`sample_inputs`."""
    found = compare(p, sae, sample_inputs(p))
    if not found.passed:
        raise CheckpointMismatch(
            f"{p.where}: our {sae.cfg.architecture} differs from the recipe of {p.format}: codes by {found.codes:.2g}, "
            f"reconstructions by {found.reconstructions:.2g} (at most {TOLERANCE:g}), equal sets on "
            f"{found.same_sets:.0%} of {found.tokens} tokens (at least {SAME_SETS:.0%}); this is a fault of saescope"
        )
    return found
