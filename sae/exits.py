"""How every command ends, in one place: 0 done, 1 done with failed tasks, 2 wrong usage or configuration, 3 the LLM
budget is spent, 130 interrupted (HOUSE 9, docs/decisions/035-exit-codes.md). Torch-free."""

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sae.errors import SaescopeError, os_error_text

DONE, FAILED, USAGE, BUDGET, INTERRUPTED = 0, 1, 2, 3, 130
KEPT = "finished stages are kept, the same command goes on from there"
logger = logging.getLogger(__name__)


def run(door: Callable[[], int], kept: str = KEPT) -> int:
    """The status of a door: what it returns, or that of the error that ended it, said in one line on stderr.

    ``kept``: what an interrupted command leaves, in words; may be empty. Usage errors of argparse and tyro pass as the
    ``SystemExit(2)`` that they are, an unexpected exception with its traceback, to which Python gives status 1.
    """
    rest = f"; {kept}" if kept else ""
    try:
        with _terminated_is_interrupted():
            return door()
    except KeyboardInterrupt:
        print(f"interrupted{rest}", file=sys.stderr)
        return INTERRUPTED
    except SaescopeError as error:
        logger.debug("traceback", exc_info=error)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return DONE
        logger.debug("traceback", exc_info=error)
        print(f"error: {os_error_text(error)}{rest}", file=sys.stderr)
        return FAILED


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: locks are let go, what was paid is written. Training, which saves a step
    first, and the server of pages have handlers of their own while they run."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reader_is_gone() -> bool:
    """Whether it is our output that nobody reads (``| head``), and no other pipe; then the rest of it is dropped."""
    try:
        out = sys.stdout.fileno()
    except OSError:  # no file of the system's, as in tests
        return False
    look = select.poll()
    look.register(out, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True
