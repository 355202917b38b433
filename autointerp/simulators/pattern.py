"""Simulate with N2G patterns: the value of the pattern that ends at a token, 0 where none does (AUTOINTERP 4).

W tokens per window. Only the window itself is left context here, so a pattern that reaches before the window does not
match; the evaluation ``n2g`` scores patterns with full context (METRICS D).
"""

from collections import defaultdict
from dataclasses import replace
from typing import ClassVar

import numpy as np

from autointerp.interfaces import ScoreContext, SimulationPair
from autointerp.n2g_patterns import PatternSet, TokenIndex, predict
from autointerp.records import ActivationScale, Exemplar, Failure, Simulation

PADDING = -1
"""Fills short windows up on the right; never a token id."""


class PatternSimulator:
    """Values in the LM's own units."""

    name: ClassVar[str] = "pattern"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def simulate_many(self, pairs: list[SimulationPair], ctx: ScoreContext) -> list[Simulation]:
        """One simulation per pair; ``unsupported`` for an explanation that has no pattern."""
        asked: dict[str, list[int]] = defaultdict(list)
        for i, (explanation, _) in enumerate(pairs):
            asked[explanation.explanation_id].append(i)
        out: dict[int, Simulation] = {}
        for explanation_id, members in asked.items():
            explanation = pairs[members[0]][0]
            values: list[tuple[float, ...]] | None = None
            failure = explanation.failure
            if explanation.pattern is not None:
                values = simulate(PatternSet.load(explanation.pattern), [pairs[i][1] for i in members])
            elif failure is None:
                failure = Failure(code="unsupported", stage="simulate", detail="the explanation has no pattern")
            for order, i in enumerate(members):
                out[i] = Simulation(
                    explanation_id=explanation_id, exemplar_id=pairs[i][1].exemplar_id, simulator=self.name,
                    scale=ActivationScale.ACTIVATION, values=None if values is None else values[order],
                    failure=None if values is not None else failure,
                )
        return [out[i] for i in range(len(pairs))]


def simulate(patterns: PatternSet, windows: list[Exemplar]) -> list[tuple[float, ...]]:
    """Predicted activation per token of each window."""
    width = max(len(w.token_ids) for w in windows)
    ids = np.full((len(windows), width), PADDING, dtype=np.int64)
    for i, window in enumerate(windows):
        ids[i, : len(window.token_ids)] = window.token_ids
    # Anchored patterns begin behind the row prefix, which only a window at the start of its row can show.
    at_row_start = np.array([w.start <= 1 for w in windows])
    values = np.zeros(ids.shape, dtype=np.float64)
    free = replace(patterns, patterns=tuple(p for p in patterns.patterns if not p.anchored))
    for chosen, usable in ((at_row_start, patterns), (~at_row_start, free)):
        if chosen.any():
            block = np.zeros(ids[chosen].size)
            found = predict(usable, TokenIndex(ids[chosen], first_position=0))
            block[found.flat_n] = found.value_n
            values[chosen] = block.reshape(-1, width)
    return [tuple(values[i, : len(w.token_ids)].tolist()) for i, w in enumerate(windows)]


PLUGIN = PatternSimulator
