"""Figures of a running device without waiting for the step that was just launched."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

LAG = 2
"""Steps between a figure's making and its reading: the step before the last is done when the last is being launched."""


class Lagged:
    """A queue of small device tensors on their way to the host.

    What is read is always the figure of exactly ``lag`` pushes ago, done or not (then it is waited for), so that what
    depends on it is the same in every run.
    """

    def __init__(self, lag: int = LAG) -> None:
        self.lag = lag
        self._queue: deque[tuple[int, Tensor, Any]] = deque()

    def push(self, step: int, figures: Tensor) -> None:
        """Start the copy of a 1-D tensor to the host."""
        if figures.device.type != "cuda":
            self._queue.append((step, figures.detach().clone(), None))
            return
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        host.copy_(figures.detach(), non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(figures.device))
        self._queue.append((step, host, done))

    def take(self, *, everything: bool = False) -> list[tuple[int, list[float]]]:
        """(step, figures) of all pushes that are at least ``lag`` old, oldest first; with ``everything`` of all."""
        found = []
        while len(self._queue) > (0 if everything else self.lag - 1):
            step, host, done = self._queue.popleft()
            if done is not None:
                done.synchronize()
            found.append((step, host.tolist()))
        return found

    def pending(self) -> list[tuple[int, list[float]]]:
        """(step, figures) of all pushes not read yet, oldest first; they stay in the queue. Waits for the device."""
        for _, _, done in self._queue:
            if done is not None:
                done.synchronize()
        return [(step, host.tolist()) for step, host, _ in self._queue]

    def refill(self, figures: list[tuple[int, list[float]]]) -> None:
        """Put back what :meth:`pending` gave, in place of what is queued."""
        self._queue = deque((step, torch.tensor(values, dtype=torch.float64), None) for step, values in figures)
