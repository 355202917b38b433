"""BatchTopK: z = the K N largest of relu(h) over a batch of N tokens; Bussmann et al., arXiv 2412.06410.

A token may have more or fewer than K active latents; K is their mean. Run with a calibrated threshold, since at
inference a token must not depend on its batch. The batch is that of the optimiser's step (``train.batch_tokens``).
"""

import torch
from torch import Tensor

from sae.base import StepLoss, TrainState, step_loss
from sae.threshold import CalibratedSAE


class BatchTopK(CalibratedSAE):
    """L0 is K in the mean."""

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error plus ``aux_alpha`` times the auxiliary loss of dead latents."""
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        return step_loss(self, n_ND, self.encode_batch(n_ND), state, no_penalty, with_aux=True)


PLUGIN = BatchTopK
