"""JumpReLU transcoder, the kind of Gemma Scope; Lieberum et al., arXiv 2408.05147.

Trained on a :class:`sae.paired.PairedStore`; formulas in :mod:`sae.transcoding`.
"""

from sae.transcoding import JumpReLUPairs


class JumpReLUTranscoder(JumpReLUPairs):
    """``cfg.k`` is the L0 that training aims at; null for an import."""


PLUGIN = JumpReLUTranscoder
