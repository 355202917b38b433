"""ReLU with an L1 penalty: z = relu(h); Bricken et al. 2023. Formulas in :mod:`sae.relu_code`."""

from sae.relu_code import ReLUCode


class ReLU(ReLUCode):
    """The code of :mod:`sae.relu_code`, fitted to its own input."""


PLUGIN = ReLU
