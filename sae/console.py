"""What people see while it runs: logging, progress bars, tables. Only doors print; libraries log and track.

Progress goes to stderr, tables and paths to stdout. Off a terminal a bar becomes one line every 30 seconds.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 30.0
logger = logging.getLogger(__name__)


def setup(verbose: bool = False, *, rank: int = 0) -> None:
    """Install the handlers; called by doors alone."""
    from rich.logging import RichHandler

    level = logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING
    handler = RichHandler(console=_stderr(), show_path=False, log_time_format="%H:%M:%S", rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for name in ("sae", "autointerp", "evals", "sae_kernels", "__main__"):
        logging.getLogger(name).setLevel(level)


_CONSOLES: dict[str, Any] = {}


def _stderr() -> Any:
    from rich.console import Console

    return _CONSOLES.setdefault("err", Console(stderr=True))


def _stdout() -> Any:
    from rich.console import Console

    # Off a terminal rich guesses 80 columns and would cut the leaderboard.
    width = None if sys.stdout.isatty() else 160
    made: Any = Console(width=width)
    made.on_broken_pipe = _still_broken
    return _CONSOLES.setdefault("out", made)


def _still_broken() -> None:
    """rich would end the process, with status 1; that is for the door to decide (:mod:`sae.exits`)."""
    raise


class Progress:
    """Handle of one running bar."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self.note = ""
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def advance(self, n: float = 1, note: str | None = None) -> None:
        """Count ``n`` more units; ``note`` is shown behind the bar (loss, FVU, ...)."""
        self.done += n
        self.note = self.note if note is None else note
        rate = self.done / max(time.monotonic() - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=f"{rate:,.0f} {self.unit}/s {self.note}")
        elif time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            share = f"{self.done / self.total:4.0%}" if self.total else f"{self.done:,.0f}"
            print(f"{self.description}: {share} {rate:,.0f} {self.unit}/s {self.note}", file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: float | None = None, unit: str = "it") -> Iterator[Progress]:
    """A bar for one step; nothing is drawn off a terminal but a line every 30 s."""
    handle = Progress(description, total, unit)
    console = _stderr()
    if not console.is_terminal:
        yield handle
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<28}"), BarColumn(bar_width=28), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console, transient=True) as bar:
        handle._bar, handle._task = bar, bar.add_task(description, total=total, note="")
        yield handle


def track(items: Iterable[T], description: str, total: float | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate with a progress bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(description, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
    """Print a table to stdout; ``right`` lists the columns that are right-aligned."""
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    _stdout().print(drawn)


def say(text: str = "") -> None:
    """One line on stdout, without markup."""
    _stdout().print(text, markup=False, highlight=False, soft_wrap=True)
