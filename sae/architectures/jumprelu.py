"""JumpReLU: a learned threshold per latent; Rajamanoharan et al., arXiv 2407.14435. See :mod:`sae.jump_code`."""

from sae.jump_code import JumpReLUCode


class JumpReLU(JumpReLUCode):
    """The code of :mod:`sae.jump_code`, fitted to its own input."""


PLUGIN = JumpReLU
