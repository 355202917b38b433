"""N2G: the few tokens that suffice to switch the latent on, found by asking the model (AUTOINTERP 3). No LLM."""

from typing import ClassVar

from autointerp.pattern_explainer import PatternExplainer


class N2G(PatternExplainer):
    """Matched so that the best of all patterns that fit wins; suffixes up to a limit."""

    name: ClassVar[str] = "n2g"
    version: ClassVar[int] = 1


PLUGIN = N2G
