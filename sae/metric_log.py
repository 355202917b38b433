"""``train.jsonl``: one JSON object per line, readable while the run goes on."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sae.errors import ArtefactError
from sae.mirror import Mirror


class MetricLog:
    """Appends rows to a file that starts empty; use it as a context manager. ``mirror`` gets the same rows."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path = Path(path)
        self._mirror = mirror
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """One line, flushed. A number that is not finite becomes null: NaN is not JSON and never leaves as a number."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.write(clean)

    def restore(self, text: str) -> None:
        """Replace everything written so far: the log as it was at the step that training goes on from."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()

    def text(self) -> str:
        """Everything written so far."""
        self._file.flush()
        return self.path.read_text(encoding="utf-8")

    def close(self) -> None:
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``train.jsonl``. A last line cut by a kill is left out; other damage is an :class:`ArtefactError`."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ArtefactError(f"{path}, line {number} is not JSON ({error}); train the SAE again") from error
    return rows
