"""Cells of the board and their differences to a floor, paired where both were resampled alike. Torch-free."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from evals.board import Column

Z95 = 1.959964
"""Half width of a 95 % normal interval in standard errors."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number with its interval, or the reason why there is none."""

    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    stderr: float | None = None
    n: int = 0
    n_failed: int = 0
    reason: str = ""
    source: tuple[str, str, str, str, str] | None = None
    """(sae_id, eval, run_key, metric, split) of an aggregate: finds its draws."""
    pairing: str = ""
    """Cells of equal pairing were measured on the same inputs."""

    @property
    def gap(self) -> str:
        """What a table shows instead of a value: the failure code of an undefined number, a dash for none at all."""
        state, _, code = self.reason.partition(": ")
        return code.replace("_", " ") if state == "undefined" and code.isidentifier() else "–"


NOT_RUN = Cell(reason="not run")
Draws = Callable[[str, str, str, str, str], "np.ndarray | None"]
"""(sae_id, eval, run_key, metric, split) -> resampled values [R]; None where none were kept."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Value of an SAE minus that of its random SAE."""

    value: float
    ci_low: float | None
    ci_high: float | None
    verdict: Literal["better", "worse", "undecided", ""]
    """"" where the column has no better side."""


def paired_interval(value: Cell, floor: Cell, draws: Draws | None) -> tuple[float, float] | None:
    """95 % of the differences draw by draw, where both cells were resampled with the same weights (METRICS 3.2)."""
    if draws is None or value.source is None or floor.source is None or value.n != floor.n:
        return None
    a, b = (draws(*cell.source) for cell in (value, floor))  # type: ignore[misc]
    if not value.pairing or value.pairing != floor.pairing or a is None or b is None or len(a) != len(b):
        return None
    delta = a.astype(float) - b.astype(float)
    delta = delta[np.isfinite(delta)]
    if len(delta) < 0.95 * len(a):
        return None
    low, high = np.quantile(delta, (0.025, 0.975))
    return float(low), float(high)


def gain_of(column: "Column", value: Cell, floor: Cell, draws: Draws | None = None) -> Gain | None:
    """Difference to a floor, paired where the two share their units and draws were kept. Else the interval adds the two
    standard errors as if independent: right for latents of different SAEs, cautious otherwise."""
    if value.value is None or floor.value is None or not column.spec.against_random:
        return None
    difference = value.value - floor.value
    low = high = None
    if (paired := paired_interval(value, floor, draws)) is not None:
        low, high = paired
    elif value.stderr is not None and floor.stderr is not None:
        half = Z95 * math.hypot(value.stderr, floor.stderr)
        low, high = difference - half, difference + half
    verdict: Literal["better", "worse", "undecided", ""] = ""
    if column.ranked and low is not None and high is not None:
        up = column.spec.better == "higher"
        verdict = "undecided" if low <= 0 <= high else "better" if (low > 0) == up else "worse"
    return Gain(value=difference, ci_low=low, ci_high=high, verdict=verdict)
