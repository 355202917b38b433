"""Matryoshka BatchTopK: the first latents alone must reconstruct too; Bussmann et al., arXiv 2503.17547.

``loss = sum over g of w_g mean |n - y_g|^2 / v0``, y_g the reconstruction from the latents of the first g groups, which
end at F/16, F/8, F/4, F/2 and F; w_g = 1 / number of groups. Early latents learn what is general, and are not split up
by later ones. The code and its threshold are those of BatchTopK.
"""

from typing import Any

import torch
from torch import Tensor

from sae import losses, ops, ops_above
from sae.base import Fit, StepLoss, TrainState, step_loss
from sae.config import SAEConfig, TrainConfig
from sae.errors import ConfigError
from sae.threshold import CalibratedSAE

HALVINGS = 4


def group_sizes(d_sae: int) -> tuple[int, ...]:
    """Latents of each group, for prefixes of a sixteenth to the whole (fewer groups where F is less than 16)."""
    ends = sorted({d_sae >> s for s in range(HALVINGS + 1)} - {0})
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


class Matryoshka(CalibratedSAE):
    """BatchTopK whose latents are ordered in nested groups."""

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        if cfg.group_sizes is None:
            raise ConfigError("a matryoshka SAE needs group_sizes")
        self.group_sizes: tuple[int, ...] = cfg.group_sizes

    @classmethod
    def cfg_fields(cls, cfg: TrainConfig) -> dict[str, Any]:
        return super().cfg_fields(cfg) | {"group_sizes": group_sizes(cfg.d_sae)}

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Mean over the groups of the normalised squared error of their prefix, plus the auxiliary loss on the last."""
        entries = self.encode_batch(n_ND)
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        return step_loss(self, n_ND, entries, state, no_penalty, with_aux=True, fit=self.fit(n_ND, entries, state.v0))

    def fit(self, n_ND: Tensor, entries: ops.Entries, v0: float) -> Fit:
        """Each group is decoded once; prefixes are running sums."""
        y_ND: Tensor = self.b_dec_D
        mse, first = n_ND.new_zeros(()), 0
        for size in self.group_sizes:
            group = ops_above.kept(entries, ops_above.mask_of_latents(entries, first, first + size))
            y_ND = y_ND + ops.decode_entries(group, self.W_dec_FD)
            residual_ND = n_ND - y_ND
            mse = mse + losses.normalised_mse(residual_ND, v0) / len(self.group_sizes)
            first += size
        return Fit(mse, y_ND, residual_ND)


PLUGIN = Matryoshka
