"""The default text mix (DATA 4): 27 tables of sae-probes, cleaned, de-duplicated and free of the probe tasks' prompts.

Rules, in order: strip and drop short texts; drop a text whose first 200 key characters were seen in any earlier row;
drop a text that shares a run of ten words with a probe prompt; cap large files. The result, a list of (file, row), is
kept in the cache directory under the hash of the rules and of the wheel, so that the work is done once per machine.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae import assets
from sae.console import track
from sae.errors import DataError
from sae.manifest import hash64, is_complete, key_of, writing

MIX_FILE = Path(__file__).with_name("default_mix.json")
MIX_VERSION = 1
WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class MixRow(NamedTuple):
    """One kept document."""

    file: str
    """Name of the table."""
    row: int
    text: str


def text_key(text: str) -> str:
    """NFKC, lower case, white space collapsed: equal keys are equal texts (METRICS C.2)."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def runs_of_words(words: list[list[str]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64, text index) of every run of ``length`` words; a shorter text is one run of its own."""
    import pandas as pd

    sizes = np.array([len(w) for w in words], dtype=np.int64)
    flat = np.array([w for text in words for w in text], dtype=object)
    if not len(flat):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    codes = pd.util.hash_array(flat, categorize=True)
    text_of = np.repeat(np.arange(len(words)), sizes)
    ends = np.cumsum(sizes)
    left = ends[text_of] - np.arange(len(flat))  # words from here to the end of the text
    is_first = np.arange(len(flat)) == (ends - sizes)[text_of]
    valid = (left >= length) | (is_first & (sizes[text_of] < length))
    hashes = np.zeros(len(flat), dtype=np.uint64)
    padded = np.concatenate([codes, np.zeros(length, dtype=np.uint64)])
    with np.errstate(over="ignore"):
        for j in range(length):
            inside = left > j
            hashes = hashes * _MULTIPLIER + np.where(inside, padded[j : j + len(flat)], np.uint64(j + 1))
    return hashes[valid], text_of[valid]


def _read(name: str) -> tuple[str, list[str], list[str]]:
    """(table name, prompts, targets)."""
    import pandas as pd
    import pyarrow as pa

    path = assets.probe_csv(name)
    with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
        frame = pd.read_csv(stream, dtype=str, keep_default_na=False, usecols=["prompt", "target"])
    return path.name.removesuffix(".csv.zst"), frame["prompt"].tolist(), frame["target"].tolist()


def _candidates(rules: dict[str, Any]) -> dict[str, list[MixRow]]:
    """Rules 1 and 2: texts of every file that are long enough and new."""
    seen: set[str] = set()
    kept: dict[str, list[MixRow]] = {}
    for entry in track(rules["files"], "default texts: read", unit="file"):
        name, prompts, targets = _read(entry["file"])
        rows = kept.setdefault(name, [])
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            text = prompt.strip()
            if len(text) < rules["min_characters"] or ("target" in entry and target != entry["target"]):
                continue
            key = text_key(text[: 4 * rules["near_duplicate_characters"]])[: rules["near_duplicate_characters"]]
            if key not in seen:
                seen.add(key)
                rows.append(MixRow(name, i, text))
    return kept


def _probe_runs(rules: dict[str, Any]) -> np.ndarray:
    """Sorted distinct hashes of all runs of words in the probe prompts."""
    found = []
    seen: set[str] = set()
    for number in track(rules["probe_files"], "default texts: probe prompts", unit="file"):
        _, prompts, _ = _read(str(number))
        keys = {text_key(p) for p in set(prompts)} - seen  # a quarter of the rows repeat a prompt
        seen |= keys
        words = [WORD.findall(key) for key in keys]
        found.append(np.unique(runs_of_words(words, rules["decontaminate_words"])[0]))
    return np.unique(np.concatenate(found))


def build_mix(rules: dict[str, Any]) -> list[MixRow]:
    """All rules applied, from scratch; about half a minute on two cores."""
    candidates = _candidates(rules)
    probes = _probe_runs(rules)
    caps = {entry["file"]: entry.get("max_bytes") for entry in rules["files"]}
    mix: list[MixRow] = []
    for name, rows in track(list(candidates.items()), "default texts: decontaminate", unit="file"):
        words = [WORD.findall(text_key(r.text)) for r in rows]
        hashes, text_of = runs_of_words(words, rules["decontaminate_words"])
        at = np.minimum(np.searchsorted(probes, hashes), len(probes) - 1)
        dirty = set(text_of[probes[at] == hashes].tolist())
        clean = [r for i, r in enumerate(rows) if i not in dirty]
        limit = caps.get(name) or caps.get(name.partition("_")[0])
        mix.extend(_capped(clean, limit) if limit else clean)
    return mix


def _capped(rows: list[MixRow], max_bytes: int) -> list[MixRow]:
    """As many texts, in order of H("0|" + text), as fit into ``max_bytes`` characters."""
    total, kept = 0, []
    for row in sorted(rows, key=lambda r: (hash64("0|" + r.text), r.row)):
        if total >= max_bytes:
            break
        total += len(row.text)
        kept.append(row)
    return sorted(kept, key=lambda r: r.row)


def rules_of_mix() -> dict[str, Any]:
    """The data file."""
    return json.loads(MIX_FILE.read_text(encoding="utf-8"))


def mix_key() -> str:
    """Hash of the rules and of the wheel they are applied to."""
    asset = assets.find("sae_probes")
    return key_of("default_mix", MIX_VERSION, rules_of_mix(), {"wheel": asset.wheel_sha256})


def default_rows() -> Iterator[MixRow]:
    """The mix, in file order; built on first use, then read back from the cache."""
    key = mix_key()
    folder = assets.cache_dir() / "derived" / f"default_mix-{key}"
    if not is_complete(folder):
        rows = build_mix(rules_of_mix())
        names = sorted({r.file for r in rows})
        with writing(folder, kind="default_mix", key=key, stage_version=MIX_VERSION, config=rules_of_mix()) as out:
            (out.path / "files.json").write_text(json.dumps(names))
            index = {name: i for i, name in enumerate(names)}
            np.save(out.path / "rows.npy", np.array([(index[r.file], r.row) for r in rows], dtype=np.int32))
            out.counts["documents"] = len(rows)
        yield from rows
        return
    names = json.loads((folder / "files.json").read_text())
    kept = np.load(folder / "rows.npy")
    order = list(dict.fromkeys(kept[:, 0].tolist()))
    for f in track(order, "default texts", unit="file"):
        name, prompts, _ = _read(names[f])
        for row in kept[kept[:, 0] == f, 1].tolist():
            if row >= len(prompts):
                raise DataError(f"{folder} does not fit the table {name}; delete that folder and run again")
            yield MixRow(name, row, prompts[row].strip())
