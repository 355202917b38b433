"""Records in parquet and jsonl, exactly: a None stays a None, a Failure becomes a JSON cell. Torch-free."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from autointerp.records import Record
from sae.manifest import canonical_json

R = TypeVar("R", bound=Record)


def write_jsonl(path: Path, records: Sequence[Record]) -> None:
    """One canonical JSON object per line, in the order given."""
    path.write_text("".join(canonical_json(r.to_dict()) + "\n" for r in records), encoding="utf-8")


def read_jsonl(path: Path, kind: type[R]) -> list[R]:
    """What :func:`write_jsonl` wrote."""
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() also cuts at U+2028 and U+0085 inside a text
    return [kind.from_dict(json.loads(line)) for line in lines if line]


def write_parquet(path: Path, records: Sequence[Record], kind: type[Record]) -> None:
    """One row per record; nested objects as JSON text. An empty table keeps its columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{name: canonical_json(v) if isinstance(v, dict) else v for name, v in r.to_dict().items()} for r in records]
    if rows:
        table = pa.Table.from_pylist(rows)
        # A column that is None throughout has no type of its own; text reads back everywhere.
        for i, column in enumerate(table.schema):
            if pa.types.is_null(column.type):
                table = table.set_column(i, column.name, table[column.name].cast(pa.string()))
    else:
        table = pa.table({f.name: pa.array([], pa.string()) for f in fields(kind)})  # type: ignore[arg-type]
    pq.write_table(table, path, compression="zstd")


def read_parquet(path: Path, kind: type[R]) -> list[R]:
    """What :func:`write_parquet` wrote."""
    import pyarrow.parquet as pq

    nested = {f.name for f in fields(kind) if f.name in ("failure", "pattern", "detail")}  # type: ignore[arg-type]

    def plain(name: str, value: Any) -> Any:
        return json.loads(value) if name in nested and isinstance(value, str) and value.startswith("{") else value

    return [kind.from_dict({n: plain(n, v) for n, v in row.items()}) for row in pq.read_table(path).to_pylist()]
