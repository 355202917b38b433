"""ReLU transcoder with an L1 penalty, as in Dunefsky et al., arXiv 2406.11944.

Trained on a :class:`sae.paired.PairedStore`; formulas in :mod:`sae.transcoding`.
"""

from sae.transcoding import ReLUPairs


class ReLUTranscoder(ReLUPairs):
    """What circuit-tracer's ReLU transcoders run as."""


PLUGIN = ReLUTranscoder
