"""The reply cache where parts are asked on several machines: sqlite's write-ahead log is for the processes of one.

The command's own machine keeps ``replies.sqlite``. Another machine writes ``replies.<machine>.sqlite`` beside it, with
a rollback journal, and reads what was known when the parts were handed out from ``replies.known.sqlite``, which nobody
writes. The files of the others are taken into ``replies.sqlite`` when the parts are done, or, after a kill, before the
next ones are handed out: no answer is paid for twice, but for those that two machines ask at the same time.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autointerp.reply_cache import ReplyCache
from sae.ray_jobs import host, is_elsewhere

REPLIES = "replies.sqlite"
KNOWN = "replies.known.sqlite"


def reply_files(root: Path) -> tuple[Path, Path | None]:
    """(file that this process writes replies to, file of replies known before; None = all are in the first)."""
    if not is_elsewhere():
        return root / REPLIES, None
    return root / f"replies.{re.sub(r'[^A-Za-z0-9_-]', '_', host())}.sqlite", root / KNOWN


@contextmanager
def gathered(root: Path) -> Iterator[None]:
    """Other machines may answer inside: they find what is known, and what they add is taken in at the end."""
    with _opened(root) as cache:
        cache.copy_to(root / KNOWN)
    try:
        yield
    finally:
        with _opened(root):
            (root / KNOWN).unlink(missing_ok=True)


@contextmanager
def _opened(root: Path) -> Iterator[ReplyCache]:
    """The cache, with the files of other machines taken in."""
    cache = ReplyCache(root / REPLIES)
    try:
        for other in sorted(root.glob("replies.*.sqlite")):
            if other.name != KNOWN:
                cache.absorb(other)
        yield cache
    finally:
        cache.close()
