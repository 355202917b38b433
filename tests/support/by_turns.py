"""Ours and a peer timed by turns: medians with p20 and p80, and how much of the processor each process was given.

Torch-free and standard library alone, since the peer's environment imports it too.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEAST_SHARE = 0.85
"""Below it wall times say more about the neighbours than about the work."""


@dataclass(frozen=True)
class Spent:
    """What a piece of work took, in seconds."""

    processor_s: float
    wall_s: float
    waited_s: float
    """Ready to run, but no processor was free (threads together; 0 where the kernel does not say)."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def waited_s() -> float:
    """Seconds for which the living threads of this process waited for a processor; see proc(5), ``schedstat``."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has just ended, a kernel without it
            continue
    return total / 1e9


def timed(work: Callable[[], Any]) -> tuple[Any, Spent]:
    """(what ``work`` returns, what it took)."""
    begun = time.process_time(), time.monotonic(), waited_s()
    result = work()
    spent = time.process_time() - begun[0], time.monotonic() - begun[1], max(0.0, waited_s() - begun[2])
    return result, Spent(*spent)


def share_of(spent: list[Spent]) -> float:
    """Processor time over what was asked for; nothing asked for is all of it."""
    used, waited = (sum(getattr(s, name) for s in spent) for name in ("processor_s", "waited_s"))
    return used / (used + waited) if used + waited > 0 else 1.0


def summary(values: list[float]) -> tuple[float, float, float]:
    """(median, p20, p80), interpolated between the values."""
    ordered = sorted(values)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return statistics.median(ordered), at(0.2), at(0.8)


def compare(what: str, ours: list[Spent], theirs: list[Spent], peer: str, *, per: float, unit: str) -> list[str]:
    """Lines to print: seconds ``per`` unit, ours against theirs. Wall time only if both had their processor."""
    lines, shares = [], (share_of(ours), share_of(theirs))
    fit = min(shares) >= LEAST_SHARE
    for name, words in (("processor_s", "processor"), ("wall_s", "wall")):
        if name == "wall_s" and not fit:
            lines.append(f"{what}: no wall time, given {shares[0]:.2f} and {shares[1]:.2f} of the processor time asked "
                         f"for (wanted: {LEAST_SHARE})")  # fmt: skip
            continue
        a, b = (summary([getattr(s, name) / per for s in side]) for side in (ours, theirs))
        shown = " against ".join(f"{m:.4g} ({low:.4g} to {high:.4g})" for m, low, high in (a, b))
        lines.append(f"{what}: {shown} s {unit} of {peer}, {words} time: {b[0] / a[0]:.2f} x")
    return lines
