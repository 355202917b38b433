"""ReLU transcoder beside a linear map of the input; Paulo et al., arXiv 2501.18823.

Trained on a :class:`sae.paired.PairedStore`; formulas in :mod:`sae.transcoding`.
"""

from sae.transcoding import ReLUPairs, SkipPairs


class ReLUSkipTranscoder(SkipPairs, ReLUPairs):
    """``y = z W_dec + b_dec + n W_skip.T``."""


PLUGIN = ReLUSkipTranscoder
