"""What a foreign file lacks, measured on activations: the scale of an unfolded norm, the threshold of a BatchTopK SAE.

N tokens, D = d_in, F = d_sae. A file that lacks one is refused unless activations are at hand; nothing is guessed.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import adapt
from sae.calibrate import calibrate
from sae.errors import ConfigError, DataError
from sae.portable import SCALE, THRESHOLD, Portable

MIN_TOKENS = 256


@dataclass(frozen=True)
class _Sample:
    """Activations in memory, as :func:`sae.calibrate.calibrate` reads them."""

    x_ND: Tensor

    @property
    def kept_N(self) -> np.ndarray:
        return np.arange(len(self.x_ND))

    def read(self, flat: Any) -> Tensor:
        return self.x_ND[flat]


def fill(p: Portable, x_ND: Tensor) -> Portable:
    """``p`` with what it lacks, measured on ``x_ND``; the recipe says so, and with which numbers.

    ``DataError`` for activations that are too few, of another width or not finite, or where a threshold does not give
    its L0 on tokens that did not fix it.
    """
    if x_ND.dim() != 2 or x_ND.shape[1] != p.d_in or len(x_ND) < MIN_TOKENS:
        raise DataError(f"{p.where}: calibrating wants [N >= {MIN_TOKENS}, {p.d_in}], got {tuple(x_ND.shape)}")
    if not bool(torch.isfinite(x_ND).all()):
        raise DataError(f"{p.where}: the activations for calibrating are not finite")
    if SCALE in p.lacks:
        scale = p.d_in**0.5 / float(torch.linalg.vector_norm(x_ND.double(), dim=1).mean())
        note = f"input scale {scale:.6g} measured on {len(x_ND):,} tokens (mean norm to sqrt(d_in))"
        norm = replace(p.input_norm, kind="dataset_rms", scale_in=scale, scale_out=scale)
        p = replace(p, input_norm=norm, recipe=(*p.recipe, note), lacks=tuple(w for w in p.lacks if w != SCALE))
    return _threshold(p, x_ND) if THRESHOLD in p.lacks else p


def _threshold(p: Portable, x_ND: Tensor) -> Portable:
    if p.k is None:
        raise ConfigError(f"{p.where}: a threshold is calibrated for k active latents, and the file does not say k")
    whole = replace(p, threshold_F=p.W_enc_FD.new_zeros(p.d_sae), lacks=())
    found = calibrate(adapt.to_sae(whole), _Sample(x_ND.float()), p.k)
    note = (
        f"threshold {found.threshold:.6g} for L0 {p.k} calibrated on {found.tokens:,} tokens "
        f"(L0 {found.l0:.1f} on {found.check_tokens:,} others)"
    )
    threshold_F = p.W_enc_FD.new_full((p.d_sae,), found.threshold)
    return replace(whole, threshold_F=threshold_F, recipe=(*p.recipe, note))
