"""How the subject model learned: its pretraining tokens and loss curve, by which a rise of loss is compute lost.

METRICS B: a rise of ``delta_ce`` nats takes the model back to the step at which its own loss was as much higher.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.errors import DataError
from sae.manifest import sha256_file


@dataclass(frozen=True)
class Pretraining:
    """What a user knows of the model's pretraining; either part may be missing."""

    tokens: float | None = None
    curve: "Curve | None" = None


@dataclass(frozen=True)
class Curve:
    """Loss by step, falling, as isotonic regression leaves it."""

    step_S: np.ndarray
    loss_S: np.ndarray
    key: str

    def share(self, delta_ce: Any) -> Any:
        """step*/step_last, where the curve's last loss plus delta is reached; 1 where delta <= 0; broadcasts.

        Linear interpolation of the loss in ln(step). Above the first point's loss: that point's share, a bound from
        above (see :meth:`clipped`).
        """
        delta = np.asarray(delta_ce, dtype=np.float64)
        wanted = self.loss_S[-1] + np.maximum(delta, 0.0)
        # np.interp wants rising abscissae; of equal losses the earliest step counts, since it was reached there
        loss, first = np.unique(self.loss_S, return_index=True)
        log_share = np.log(self.step_S)[first] - math.log(self.step_S[-1])
        log_share[0] = 0.0  # the last loss itself: no rise, all of the compute
        found = np.exp(np.interp(wanted, loss, log_share))
        return np.where(np.isnan(delta), np.nan, found)

    def clipped(self, delta_ce: float) -> bool:
        """Is the patched loss above every loss of the curve?"""
        return bool(self.loss_S[-1] + delta_ce > self.loss_S[0])

    @staticmethod
    def open(path: Path) -> "Curve":
        """A CSV with the columns `step` and `loss`. DataError where it is none, or has fewer than two steps above 0."""
        path = Path(path)
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = [(float(r["step"]), float(r["loss"])) for r in csv.DictReader(file)]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is no loss curve: a CSV with the columns step and loss is expected "
                            f"({type(error).__name__}: {error})") from error  # fmt: skip
        good = sorted({s: loss for s, loss in rows if s > 0 and math.isfinite(s) and math.isfinite(loss)}.items())
        if len(good) < 2:
            raise DataError(f"{path} holds {len(good)} usable steps; two at least, above 0 and finite, are needed")
        step, loss = np.array(good).T
        return Curve(step, falling(loss), sha256_file(path)[:16])


def falling(loss_S: np.ndarray) -> np.ndarray:
    """The nearest non-rising sequence in squared error: isotonic regression by pooling adjacent violators."""
    values: list[float] = []
    sizes: list[int] = []
    for loss in loss_S:
        values.append(float(loss))
        sizes.append(1)
        while len(values) > 1 and values[-2] < values[-1]:
            total = sizes[-2] + sizes[-1]
            pooled = (values[-2] * sizes[-2] + values[-1] * sizes[-1]) / total
            values[-2:], sizes[-2:] = [pooled], [total]
    return np.repeat(values, sizes)
