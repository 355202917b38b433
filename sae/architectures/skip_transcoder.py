"""Skip transcoder: a transcoder beside a linear map of the input; Paulo et al., arXiv 2501.18823.

What is linear takes no latents. Trained on a :class:`sae.paired.PairedStore`; formulas in :mod:`sae.transcoding`.
"""

from sae.transcoding import SkipPairs, TopKPairs


class SkipTranscoder(SkipPairs, TopKPairs):
    """``y = z W_dec + b_dec + n W_skip.T``."""


PLUGIN = SkipTranscoder
