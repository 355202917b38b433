"""Replies of language models on disk, so that no answer is paid for twice: one sqlite file, keyed by request.

Only completed replies are stored, as the model gave them; parsing is done again on each read, so a better parser
re-scores for nothing. Write-ahead log, a commit per reply (60 microseconds): a killed process loses nothing that it
had received.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae.errors import ArtefactError
from sae.manifest import canonical_json

BUSY_TIMEOUT_S = 60.0
LAYOUT_VERSION = 1
_KEYS_PER_QUERY = 500
_INSERT = "INSERT OR REPLACE INTO replies VALUES (?,?,?,?,?,?,?,?,?,?)"

_TABLES = """
CREATE TABLE IF NOT EXISTS replies(
  key TEXT PRIMARY KEY, request BLOB, request_bytes INTEGER, reply BLOB NOT NULL, reply_bytes INTEGER NOT NULL,
  prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER, latency_ms REAL, created_at TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clients(identity TEXT PRIMARY KEY) WITHOUT ROWID;
"""


def _pack(value: Any) -> tuple[bytes, int]:
    """(zstd bytes, size before compression) of canonical JSON."""
    import pyarrow as pa

    raw = canonical_json(value).encode("utf-8", "surrogatepass")
    return pa.compress(raw, codec="zstd", asbytes=True), len(raw)


def _unpack(blob: bytes, size: int) -> Any:
    import pyarrow as pa

    raw = pa.decompress(blob, decompressed_size=size, codec="zstd", asbytes=True)
    return json.loads(raw.decode("utf-8", "surrogatepass"))


def _stored(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The whole replies of a file among ``keys``."""
    found: dict[str, dict[str, Any]] = {}
    for i in range(0, len(keys), _KEYS_PER_QUERY):
        part = keys[i : i + _KEYS_PER_QUERY]
        marks = ",".join("?" * len(part))
        for key, blob, size in db.execute(f"SELECT key, reply, reply_bytes FROM replies WHERE key IN ({marks})", part):
            try:
                found[key] = _unpack(blob, size)
            except (OSError, ValueError):
                continue
    return found


class ReplyCache:
    """``ReplyCache(path)``. One object may be used from several threads; several processes may share the file."""

    def __init__(
        self, path: Path, *, keep_requests: bool = False, must_exist: bool = False, known: Path | None = None
    ) -> None:
        """``keep_requests`` stores the request beside its reply, for reading; ``must_exist`` for readers. ``known``: a
        file of replies that nobody writes, read where ``path`` lacks one; ``path`` may then lie on another machine's
        disk, where a write-ahead log does not work.

        Raises :class:`ArtefactError` where the file is not such a cache.
        """
        self.path, self.keep_requests = Path(path), keep_requests
        self._lock = threading.Lock()
        self._held: list[tuple[Any, ...]] | None = None
        """Rows of a block that is to be stored whole. Held here and not in a transaction, which would keep all other
        processes from writing while a model computes."""
        if must_exist and not self.path.is_file():
            raise ArtefactError(f"there is no reply cache {self.path}; run the stage once with a real client")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
            self._db.execute(f"PRAGMA journal_mode={'WAL' if known is None else 'DELETE'}")
            self._db.execute("PRAGMA synchronous=NORMAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, LAYOUT_VERSION):
                raise ArtefactError(
                    f"{self.path} has layout {version}, this saescope reads {LAYOUT_VERSION}; move it away"
                )
            self._db.executescript(_TABLES)
            self._db.execute(f"PRAGMA user_version={LAYOUT_VERSION}")
            self._db.commit()
            self._known = None
            if known is not None and known.is_file():
                place = f"{known.resolve().as_uri()}?mode=ro&immutable=1"
                self._known = sqlite3.connect(place, uri=True, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise ArtefactError(
                f"cannot use the reply cache {self.path} ({error}); move the file away and run again"
            ) from error

    def get_many(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The stored replies among ``keys``. A damaged reply counts as missing, and is fetched again."""
        with self._lock, self._errors():
            found = _stored(self._db, sorted(set(keys)))
            if self._known is not None:
                found |= _stored(self._known, sorted(set(keys) - found.keys()))
        return found

    def put(self, key: str, reply: Mapping[str, Any], *, request: Mapping[str, Any] | None = None) -> None:
        """Store one completed reply (a dict with ``usage``)."""
        blob, size = _pack(reply)
        asked, asked_size = _pack(request) if self.keep_requests and request is not None else (None, None)
        usage = reply.get("usage", {})
        row = (
            key, asked, asked_size, blob, size,
            usage.get("prompt_tokens"), usage.get("cached_tokens"), usage.get("output_tokens"), usage.get("latency_ms"),
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )  # fmt: skip
        with self._lock, self._errors():
            if self._held is not None:
                self._held.append(row)
                return
            self._db.execute(_INSERT, row)
            self._db.commit()

    @contextmanager
    def batch(self, *, atomic: bool) -> Iterator[None]:
        """Put several replies. ``atomic``: all of them or, after an error or a kill, none. Otherwise each stays."""
        if not atomic:
            yield
            return
        self._held = []
        try:
            yield
            with self._lock, self._errors(), self._db:  # one transaction: committed, or rolled back after an error
                self._db.executemany(_INSERT, self._held)
        finally:
            self._held = None

    def request(self, key: str) -> dict[str, Any] | None:
        """The request stored with a reply, if it was kept."""
        with self._lock, self._errors():
            row = self._db.execute("SELECT request, request_bytes FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None or row[0] is None else _unpack(*row)

    def remember(self, identity: Mapping[str, Any]) -> None:
        """Note which model answered, so that ``replay`` knows whose keys to compute."""
        with self._lock, self._errors():
            self._db.execute("INSERT OR IGNORE INTO clients VALUES (?)", (canonical_json(dict(identity)),))
            self._db.commit()

    def identities(self) -> list[dict[str, Any]]:
        """The models that answered into this file, sorted."""
        with self._lock, self._errors():
            return [json.loads(row[0]) for row in self._db.execute("SELECT identity FROM clients ORDER BY identity")]

    def __len__(self) -> int:
        with self._lock, self._errors():
            return int(self._db.execute("SELECT count(*) FROM replies").fetchone()[0])

    def absorb(self, other: Path) -> None:
        """Take in the replies of another file of the same layout, and delete it. What is here already stays."""
        with self._lock, self._errors():
            self._db.execute("ATTACH DATABASE ? AS other", (str(other),))
            for table in ("replies", "clients"):
                self._db.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM other.{table}")
            self._db.commit()
            self._db.execute("DETACH DATABASE other")
        other.unlink(missing_ok=True)

    def copy_to(self, path: Path) -> None:
        """All replies as they are now, in a file that is complete when it appears."""
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        temporary.unlink(missing_ok=True)
        with self._lock, self._errors():
            self._db.execute("VACUUM INTO ?", (str(temporary),))
        os.replace(temporary, path)

    def commit(self) -> None:
        """Make everything stored so far safe."""
        with self._lock, self._errors():
            self._db.commit()

    def close(self) -> None:
        """Commit and close; idempotent."""
        with self._lock:
            try:
                self._db.commit()
            except sqlite3.ProgrammingError:
                return
            self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """sqlite's errors (full disk, damaged file) as :class:`ArtefactError`."""
        try:
            yield
        except sqlite3.Error as error:
            raise ArtefactError(
                f"reply cache {self.path}: {error}; free disk space or move the file away, then run again"
            ) from error
