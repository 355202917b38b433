"""N2G as OpenAI released it (openai/sparse_autoencoder, explanations.py at 4965b94): AUTOINTERP 3, the left column.

No backtracking, so that a short pattern shadows longer ones; suffixes of any length; nothing in front of the probes; a
document that no suffix reproduces is kept whole. For comparison with published figures; ``n2g`` explains better.
"""

from typing import ClassVar

from autointerp.n2g import Matcher
from autointerp.pattern_explainer import PatternExplainer


class ReleasedN2G(PatternExplainer):
    """The same input as ``n2g``, so that the two may be compared latent by latent."""

    name: ClassVar[str] = "n2g_released"
    version: ClassVar[int] = 1
    matcher: ClassVar[Matcher] = "released"
    max_suffix: ClassVar[int | None] = None


PLUGIN = ReleasedN2G
