"""Documents from wherever text lies: the default mix, files and folders, Hugging Face data sets (DATA 7)."""

import csv
import gzip
import importlib.util
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae.errors import ConfigError, DataError, MissingExtra, did_you_mean
from sae.manifest import key_of, sha256_file, sha256_text

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
PACKINGS = ("", ".gz", ".zst")
LONG_TXT_CHARACTERS = 20_000
"""A .txt of more is a book: it is divided at blank lines, into pieces of at most this."""
PIECES, SHORT_PIECE_CHARACTERS = 400, 2_000
"""A book is divided into about so many pieces, but not for pieces to be shorter: the smallest split gets 2 %."""
MANY_FILES = 300
"""With so many files every split gets some: then a file lies in one split, with all its pieces."""
_LAST_RESORTS = ("\n", r"(?<=[.!?…])\s|(?<=[。！？])", r"\s")
"""Where a paragraph that is too long is divided: lines, sentences, words."""
_HF = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?:(?P<split>[\w.-]+)"
    r"(?::(?P<column>\w+))?(?:@(?P<revision>[\w.-]+))?"
)
logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """One text."""

    text: str
    source: str
    """File or data set it came from."""
    doc_id: str
    """Place within the source."""
    group: str = ""
    """Documents of one group lie in one split, that of this text; "": of the document's own text."""


def iter_documents(source: str, column: str = "text") -> Iterator[Document]:
    """Documents of ``default``, a file, a folder or ``hf:REPO[/CONFIG]:SPLIT[:COLUMN][@REV]``, in a fixed order.

    Raises :class:`ConfigError` (no such path, unknown kind) and :class:`DataError` (empty, not UTF-8, no such column).
    """
    if source == "default":
        from sae.default_mix import default_rows

        for row in default_rows():
            yield Document(row.text, row.file, str(row.row))
    elif source.startswith("hf:"):
        yield from _from_hub(source, column)
    else:
        yield from _from_files(text_files(source), column)


def text_files(source: str) -> list[Path]:
    """The readable files behind a path, sorted; :class:`ConfigError` if there are none."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) is not None)
        if not files:
            raise ConfigError(f"the folder {path} holds no {', '.join(SUFFIXES)} file (plain, .gz or .zst)")
        return files
    if not path.is_file():
        raise ConfigError(
            f"--texts {source!r}: there is no such file or folder; give a path, `default`, or "
            "hf:REPO[/CONFIG]:SPLIT[:COLUMN][@REV]"
        )
    if _kind(path) is None:
        raise ConfigError(f"{path}: cannot tell the kind of text; expected {', '.join(SUFFIXES)} (plain, .gz or .zst)")
    return [path]


def source_key(source: str) -> str:
    """What a tokens key says of the text: hashes of the files, of the default mix, or the data set's own name."""
    if source == "default":
        from sae.default_mix import mix_key

        return mix_key()
    if source.startswith("hf:"):
        _parse_hub(source)
        return sha256_text(source)
    files, root = text_files(source), Path(source).expanduser()
    # Paths below the folder, as two subfolders may hold files of one name.
    named = {(p.relative_to(root).as_posix() if p != root else p.name): sha256_file(p) for p in files}
    return key_of("texts", 2 if any(_kind(p) == ".txt" for p in files) else 1, named)  # 2: books in smaller pieces


def source_exists(source: str) -> None:
    """:class:`ConfigError` for a path that is not there or of no known kind, or a data set's name of another form,
    :class:`MissingExtra` where data sets cannot be read. Reads nothing."""
    if source.startswith("hf:"):
        revision = _parse_hub(source)["revision"]
        if importlib.util.find_spec("datasets") is None:
            raise MissingExtra("datasets", "hub")
        if revision is None:
            logger.warning("%s names no revision: its text may change under one name; write %s@COMMIT", source, source)
    elif source != "default":
        text_files(source)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    for packing in PACKINGS[1:]:
        name = name.removesuffix(packing)
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def _open(path: Path) -> Any:
    """A binary stream of the unpacked content."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        import pyarrow as pa

        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return open(path, "rb")


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; "
            "convert it first, e.g. with iconv -f LATIN1 -t UTF-8"
        ) from None


def _from_files(files: Sequence[Path], column: str) -> Iterator[Document]:
    """Documents of all; the pieces of a book are kept together or, where that would leave splits empty, it is told."""
    told = len(files) >= MANY_FILES
    for path in files:
        first = ""
        for document in _from_file(path, column):
            first = first or document.text
            if _kind(path) != ".txt" or document.text == first:
                yield document
            elif len(files) >= MANY_FILES:
                yield document._replace(group=first)
            else:
                if not told:
                    told = True
                    logger.warning(
                        "%s has over %s characters and is divided at blank lines, as are others like it; of fewer than "
                        "%d files the pieces are dealt out one by one, so splits share books, and intervals count the "
                        "pieces of one as independent", path.name, f"{LONG_TXT_CHARACTERS:,}", MANY_FILES,
                    )  # fmt: skip
                yield document


def _from_file(path: Path, column: str) -> Iterator[Document]:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with text")
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    found = 0
    try:
        for i, text in enumerate(readers[_kind(path) or ""](path, column)):
            if text.strip():
                found += 1
                yield Document(text.strip(), path.name, str(i))
    except (OSError, EOFError, csv.Error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path} cannot be read ({error}); is it damaged or of another kind?") from error
    if not found:
        raise DataError(f"{path} holds no text but white space")


def _read_txt(path: Path, column: str) -> Iterator[str]:
    with _open(path) as file:
        text = _decode(file.read(), path, 0)
    if len(text) <= LONG_TXT_CHARACTERS:
        yield text
    else:
        most = min(LONG_TXT_CHARACTERS, max(SHORT_PIECE_CHARACTERS, len(text) // PIECES))
        yield from _pieces(text, most, (r"\n\s*\n", *_LAST_RESORTS))


def _pieces(text: str, most: int, borders: tuple[str, ...]) -> Iterator[str]:
    """``text`` in pieces of at most ``most`` characters, each as long as it can be; nothing but white space is left
    out. ``borders``: where it may be divided, the best first; within a word only where one is longer than a piece."""
    if not borders:
        yield from (text[i : i + most] for i in range(0, len(text), most))
        return
    start = end = begin = 0  # of the piece that grows, and of what follows it
    for border in (*re.finditer(borders[0], text), None):
        stop, after = (len(text), len(text)) if border is None else border.span()
        if stop - start > most and end > start:
            yield text[start:end]
            start = begin
        if stop - start > most:
            yield from _pieces(text[start:stop], most, borders[1:])
            start = after
        end, begin = stop, after
    if end > start:
        yield text[start:end]


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    offset = 0
    with io.BufferedReader(_open(path)) if path.name.endswith(".zst") else _open(path) as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error.msg}); expected one object per line"
                ) from None
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}, line {number}: expected an object with {column!r}, got {type(value).__name__}"
                )
            yield _cell(value, column, path)


def _cell(value: dict[str, Any], column: str, path: Path) -> str:
    if column not in value:
        raise DataError(
            f"{path} has no column {column!r}{did_you_mean(column, map(str, value))}; name it with --tokens.text-column"
        )
    cell = value[column]
    return cell if isinstance(cell, str) else "" if cell is None else str(cell)


def _read_csv(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        text = _decode(file.read(), path, 0)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield _cell(row, column, path)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file ({error})") from None
    names = table.schema_arrow.names
    if column not in names:
        raise DataError(
            f"{path} has no column {column!r}{did_you_mean(column, names)}; name it with --tokens.text-column"
        )
    for batch in table.iter_batches(batch_size=1024, columns=[column]):
        yield from ("" if v is None else str(v) for v in batch.column(0).to_pylist())


def _parse_hub(source: str) -> dict[str, str | None]:
    found = _HF.fullmatch(source)
    if found is None:
        raise ConfigError(
            f"--texts {source!r}: expected hf:REPO[/CONFIG]:SPLIT[:COLUMN][@REV], "
            "e.g. hf:Skylion007/openwebtext:train:text"
        )
    return found.groupdict()


def _from_hub(source: str, column: str) -> Iterator[Document]:
    parts = _parse_hub(source)
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "hub") from None
    wanted = parts["column"] or column
    try:
        stream = load_dataset(
            parts["repo"], parts["config"], split=parts["split"], revision=parts["revision"], streaming=True
        )
    except Exception as error:  # the hub's own errors are many; offline ones among them
        raise DataError(
            f"cannot open the data set {source!r}: {type(error).__name__}: {error}; check the name and "
            "the network, or give a local file"
        ) from error
    for i, row in enumerate(stream):
        yield Document(_cell(row, wanted, Path(source)).strip(), source, str(i))
