"""JumpReLU transcoder beside a linear map of the input, the kind of Gemma Scope 2.

Trained on a :class:`sae.paired.PairedStore`; formulas in :mod:`sae.transcoding`.
"""

from sae.transcoding import JumpReLUPairs, SkipPairs


class JumpReLUSkipTranscoder(SkipPairs, JumpReLUPairs):
    """``y = z W_dec + b_dec + n W_skip.T``."""


PLUGIN = JumpReLUSkipTranscoder
