"""ReLU with an L1 penalty: z = relu(h); Bricken et al. 2023. Formulas in :mod:`sae.relu_code`."""

from torch import Tensor

from sae import data_start
from sae.relu_code import ReLUCode


class ReLU(ReLUCode):
    """The code of :mod:`sae.relu_code`, fitted to its own input."""

    def initialise(self, n_ND: Tensor, seed: int) -> None:
        """As the base class; with ``data_start`` latents start at tokens instead of at random."""
        super().initialise(n_ND, seed)
        if (self.cfg.train or {}).get("data_start", False):
            data_start.start_at_tokens_(self, n_ND, seed)


PLUGIN = ReLU
