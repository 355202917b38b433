"""Transcoder: a TopK code of an MLP's input that reconstructs its output; Dunefsky et al., arXiv 2406.11944.

Trained on a :class:`sae.paired.PairedStore`; formulas in :mod:`sae.transcoding`.
"""

from sae.transcoding import TopKPairs


class Transcoder(TopKPairs):
    """Input and target hookpoint differ, and so may their widths."""


PLUGIN = Transcoder
