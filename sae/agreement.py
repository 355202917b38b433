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
    """``after`` against ``before`` on raw activations."""
    a, b, x = outcome(before, x_ND), outcome(after, x_ND), x_ND.double()
    active_a, active_b = a.contributions_NF != 0, b.contributions_NF != 0
    same_N = (active_a == active_b).all(1)
    transcodes = before.transcoder if isinstance(before, Portable) else before.transcodes
    return Agreement(
        codes=_relative(b.contributions_NF[same_N], a.contributions_NF[same_N]),
        reconstructions=_relative(b.x_hat_ND[same_N], a.x_hat_ND[same_N]), same_sets=float(same_N.double().mean()),
        l0_before=float(active_a.sum(1).double().mean()), l0_after=float(active_b.sum(1).double().mean()),
        fvu_before=float("nan") if transcodes else fvu(x, a.x_hat_ND),
        fvu_after=float("nan") if transcodes else fvu(x, b.x_hat_ND), tokens=len(x_ND),
    )  # fmt: skip


def _relative(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return float("nan")
    size = float(torch.linalg.vector_norm(want))
    return float(torch.linalg.vector_norm(got - want)) / (size or 1.0)


def fvu(x_ND: Tensor, x_hat_ND: Tensor) -> float:
    """Fraction of variance unexplained over the sample (METRICS A); NaN for a constant sample."""
    total = float((x_ND - x_ND.mean(0)).square().sum())
    return float((x_ND - x_hat_ND).square().sum()) / total if total > 0 else float("nan")


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
