"""Labelled texts for probes: read, re-binarise, clean, group, split (METRICS C.1 and C.2). Torch-free.

The tasks are a data file, ``probe_tasks.json``. Near-duplicates and variants of one question form a *group*; a group
lies wholly on one side, so that nothing a probe is tested on was seen in fitting it.
"""

import base64
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.errors import ConfigError, DataError, did_you_mean
from sae.manifest import hash64, rng, sha256_file

TASKS_FILE = Path(__file__).with_name("probe_tasks.json")
MIN_PER_CLASS = 60
"""Fewer rows of a class on a side and the task is left out, code `too_few_rows`."""
NEAR_COSINE = 0.7
"""TF-IDF cosine from which two texts count as variants of each other."""
BASE64_DOCUMENTS = 1000
WORD = re.compile(r"\w+")


class RawRow(NamedTuple):
    """One labelled text before cleaning."""

    prompt: str
    label: str
    """For multi-class tables the class; else "1" or "0"."""
    question: str = ""
    """Re-binarised tasks: what the options share."""
    stem: str = ""
    """Group text that a transform knows and the prompt does not show."""


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """A cleaned binary task of n rows."""

    name: str
    family: str
    prompts: tuple[str, ...]
    labels: np.ndarray
    """int8 [n], 1 = positive."""
    keys: tuple[str, ...]
    """Normalised prompts, all distinct."""
    groups: np.ndarray
    """int32 [n], 0 ... n_groups - 1."""
    n_dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason: unparsed, empty, conflict, duplicate, unpaired, surplus."""

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1 if len(self.groups) else 0


class Split(NamedTuple):
    """Row numbers of the two sides of a task, both classes equally large within a side."""

    train: np.ndarray
    test: np.ndarray


def normalise(text: str) -> str:
    """The key of a prompt: NFKC, lower case, white space collapsed, stripped."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def _words(text: str, first: int | None = None, last: int | None = None) -> str:
    found = WORD.findall(normalise(text))
    return " ".join(found[:first] if last is None else found[-last:])


def _before(pattern: str) -> Callable[[RawRow], str]:
    compiled = re.compile(pattern)

    def cut(row: RawRow) -> str:
        found = [m.start() for m in compiled.finditer(row.prompt)]
        return normalise(row.prompt[: found[-1]] if found else row.prompt)

    return cut


GROUP_KEYS: dict[str, Callable[[RawRow], str]] = {
    "before_answer": _before(r"\nA[:.]"),
    "before_bar": lambda row: normalise(row.prompt.partition(" | ")[0]),
    "before_blank_line": lambda row: normalise(row.prompt.partition("\n\n")[0]),
    "before_sep": lambda row: normalise(row.prompt.partition("[SEP]")[0]),
    "first_200": lambda row: normalise(row.prompt)[:200],
    "first_8_words": lambda row: _words(row.prompt, first=8),
    "first_line": lambda row: normalise(row.prompt.strip().partition("\n")[0]),
    "last_two_words": lambda row: _words(row.prompt, last=2),
    "stem": lambda row: normalise(row.stem),
    "without_last_two_lines": lambda row: normalise("\n".join(row.prompt.rstrip().split("\n")[:-2])),
}
"""Task keys: rows with equal keys are variants of one question."""


@lru_cache(maxsize=1)
def task_table() -> dict[str, dict[str, Any]]:
    """Entries of ``probe_tasks.json`` by name, in the order of the file."""
    entries = json.loads(TASKS_FILE.read_text(encoding="utf-8"))["tasks"]
    return {entry["name"]: entry for entry in entries}


def task_names(preset: str = "paper") -> list[str]:
    """The tasks of a preset that can be built here: all of them, or the 12 of `quick` (and `tiny`)."""
    return [n for n, e in task_table().items() if "missing" not in e and (preset == "paper" or e.get("quick"))]


def missing_tasks() -> dict[str, str]:
    """Tasks of the paper that cannot be built, with the reason."""
    return {name: entry["missing"] for name, entry in task_table().items() if "missing" in entry}


def tasks_sha256() -> str:
    """Hash of the data file, for keys."""
    return sha256_file(TASKS_FILE)


def read_table(path: Path, prompt: str = "prompt", label: str = "target") -> list[tuple[str, str]]:
    """(prompt, label) pairs of a CSV (plain, .gz or .zst), both as written, in file order; DataError if unreadable."""
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise DataError(f"the task file {path} does not exist")
    try:
        table = pd.read_csv(_stream(path), dtype=str, keep_default_na=False, usecols=[prompt, label])
    except (ValueError, OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        wanted = f"a table with the columns {prompt!r} and {label!r}"
        raise DataError(f"{path} cannot be read as {wanted}: {error}") from error
    return list(zip(table[prompt], table[label], strict=True))


def _stream(path: Path) -> Any:
    """pyarrow decompresses .zst, for which pandas would want another package."""
    if path.suffix != ".zst":
        return path
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


def build_task(name: str) -> ProbeTask:
    """Read and clean one task of the table. ConfigError if unknown or missing, MissingAsset without texts."""
    rows, unparsed = raw_rows(name)
    entry = task_table()[name]
    return clean(
        name, entry["family"], rows, positive=entry["positive"] or ["1"], group_key=entry.get("group"),
        balance=entry.get("transform", "") in ("one_against_rest", "languages"), n_unparsed=unparsed,
    )  # fmt: skip


def raw_rows(name: str) -> tuple[list[RawRow], int]:
    """Labelled texts of one task of the table before cleaning, and how many rows of its file did not parse. Errors as
    :func:`build_task`."""
    from sae.assets import probe_csv

    table = task_table()
    if name not in table:
        raise ConfigError(f"there is no probe task {name!r}{did_you_mean(name, table)}")
    entry = table[name]
    if "missing" in entry:
        raise ConfigError(f"the probe task {name!r} cannot be built: {entry['missing']}")
    transform = entry.get("transform", "")
    if transform == "base64":
        texts = [prompt for source in entry["sources"] for prompt, _ in read_table(probe_csv(source))]
        return base64_rows(texts), 0
    if transform == "languages":
        from evals.language_tasks import messages

        return [RawRow(text, language, stem=source) for language, found in messages().items()
                for source, text in sorted(found.items())], 0  # fmt: skip
    return _raw_rows(read_table(probe_csv(entry["source"])), entry)


def csv_task(
    name: str, path: Path, *, positive: Sequence[str], prompt: str = "prompt", label: str = "target"
) -> ProbeTask:
    """A task of the user's own: a CSV with a prompt and a label column, under the same cleaning."""
    rows = [RawRow(text, value) for text, value in read_table(path, prompt, label)]
    return clean(name, f"own:{name}", rows, positive=positive)


def _raw_rows(pairs: Sequence[tuple[str, str]], entry: Mapping[str, Any]) -> tuple[list[RawRow], int]:
    """Rows of a table after its transform, and how many did not parse."""
    options = {"quail": _quail, "openbookqa": _openbookqa, "social_iqa": _social_iqa}.get(entry.get("transform", ""))
    if options is None:
        return [RawRow(prompt, label) for prompt, label in pairs], 0
    parsed = [options(prompt, label) for prompt, label in pairs]
    return [row for rows in parsed for row in rows], sum(not rows for rows in parsed)


def _quail(prompt: str, label: str) -> list[RawRow]:
    """Passage and question, a line break, one option; the label counts options from 0."""
    head, mark, tail = prompt.rpartition("\nA. ")
    found = re.fullmatch(r"(.*?) B\. (.*?) C\. (.*?) D\. (.*)", tail, re.DOTALL)
    if not mark or not found:
        return []
    return [RawRow(f"{head}\n{o}", str(int(str(i) == label)), question=head) for i, o in enumerate(found.groups())]


def _openbookqa(prompt: str, label: str) -> list[RawRow]:
    """Stem and one of the options (A) to (D)."""
    found = re.fullmatch(r"(.*?) ?\(A\) (.*?) ?\(B\) (.*?) ?\(C\) (.*?) ?\(D\) (.*)", prompt, re.DOTALL)
    if not found:
        return []
    stem, *options = found.groups()
    return [
        RawRow(f"{stem} {o}", str(int(letter == label)), question=stem, stem=stem)
        for letter, o in zip("ABCD", options, strict=True)
    ]


def _social_iqa(prompt: str, label: str) -> list[RawRow]:
    """Context, question, option, separated by spaces; the label counts options from 1."""
    found = re.fullmatch(
        r".*?Context: (.*?)\| ?Question: (.*?)\| ?Option A: (.*?)\| ?Option B: (.*?)\| ?Option C: (.*?)\. "
        r"The correct answer is ?", prompt, re.DOTALL,
    )  # fmt: skip
    if not found:
        return []
    context, question, *options = found.groups()
    return [
        RawRow(f"{context} {question} {o}", str(int(str(i) == label)), question=f"{context} {question}", stem=context)
        for i, o in enumerate(options, start=1)
    ]


def base64_rows(texts: Iterable[str]) -> list[RawRow]:
    """Per document of the split `test`: base64 of its first 24-48 bytes (positive), as long a random string (negative).

    The documents of smallest hash are taken; padding is equal in both, so that it tells nothing.
    """
    from sae.tokens import split_of

    alphabet = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"))
    stripped = {text.strip() for text in texts}
    held_out = (t for t in stripped if len(t.encode()) >= 48 and split_of(t) == "test")
    chosen = sorted(held_out, key=lambda t: (hash64(t), t))
    rows = []
    for text in chosen[:BASE64_DOCUMENTS]:
        draw = rng("base64", text)
        real = base64.b64encode(text.encode()[: int(draw.integers(24, 49))]).decode()
        body = real.rstrip("=")
        fake = "".join(draw.choice(alphabet, size=len(body))) + "=" * (len(real) - len(body))
        rows += [RawRow(real, "1", stem=text), RawRow(fake, "0", stem=text)]
    return rows


def clean(
    name: str, family: str, rows: Sequence[RawRow], *, positive: Sequence[str],
    group_key: str | None = None, balance: bool = False, n_unparsed: int = 0,
) -> ProbeTask:  # fmt: skip
    """Steps 1 to 5 of METRICS C.2. ``balance`` keeps as many negatives as positives (one class against the rest)."""
    dropped = Counter(unparsed=n_unparsed)
    rows = [row._replace(prompt=row.prompt.rstrip()) for row in rows]
    keys = [normalise(row.prompt) for row in rows]
    labels_of: dict[str, set[str]] = {}
    for key, row in zip(keys, rows, strict=True):
        labels_of.setdefault(key, set()).add(row.label)
    kept: list[tuple[str, RawRow, int]] = []
    seen: set[str] = set()
    for key, row in zip(keys, rows, strict=True):
        reason = "empty" if not key else "conflict" if len(labels_of[key]) > 1 else "duplicate" if key in seen else ""
        if reason:
            dropped[reason] += 1
            continue
        seen.add(key)
        kept.append((key, row, int(row.label in positive)))
    before = len(kept)
    if any(row.question for _, row, _ in kept):
        kept = _one_pair_per_question(kept)
        dropped["unpaired"] = before - len(kept)
    elif balance:
        kept = _as_many_negatives(kept)
        dropped["surplus"] = before - len(kept)
    final_keys = tuple(key for key, _, _ in kept)
    task_keys = [GROUP_KEYS[group_key](row) for _, row, _ in kept] if group_key else None
    return ProbeTask(
        name=name, family=family, prompts=tuple(row.prompt for _, row, _ in kept),
        labels=np.array([label for _, _, label in kept], dtype=np.int8), keys=final_keys,
        groups=group_rows(final_keys, task_keys), n_dropped={k: v for k, v in sorted(dropped.items()) if v},
    )  # fmt: skip


def _one_pair_per_question(kept: list[tuple[str, RawRow, int]]) -> list[tuple[str, RawRow, int]]:
    """Per question the first right option and the wrong one of smallest hash; a question without both goes."""
    right: dict[str, int] = {}
    wrong: dict[str, int] = {}
    for i, (key, row, label) in enumerate(kept):
        question = normalise(row.question)
        if label:
            right.setdefault(question, i)
        elif question not in wrong or hash64(key) < hash64(kept[wrong[question]][0]):
            wrong[question] = i
    both = {i for q in right.keys() & wrong.keys() for i in (right[q], wrong[q])}
    return [entry for i, entry in enumerate(kept) if i in both]


def _as_many_negatives(kept: list[tuple[str, RawRow, int]]) -> list[tuple[str, RawRow, int]]:
    n_positive = sum(label for _, _, label in kept)
    negatives = sorted((hash64(key), i) for i, (key, _, label) in enumerate(kept) if not label)
    chosen = {i for _, i in negatives[:n_positive]}
    return [entry for i, entry in enumerate(kept) if entry[2] or i in chosen]


def near_pairs(keys: Sequence[str], threshold: float = NEAR_COSINE) -> np.ndarray:
    """int64 [m, 2]: all pairs i < j whose word TF-IDF cosine reaches ``threshold``.

    Exact. By Cauchy-Schwarz a pair can reach it only if the *rare* words of i alone bring something, once its commonest
    words of joint norm below the threshold are set aside; so the product runs over few, rare words (prefix filtering,
    Bayardo et al. 2007), and only candidates are compared in full.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(keys) < 2 or not any(WORD.search(key) for key in keys):
        return np.zeros((0, 2), dtype=np.int64)
    x = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(keys).tocsr()
    rare, set_aside = _without_common(x, threshold - 0.2)
    transposed = x.T.tocsr()
    found = []
    for start in range(0, x.shape[0], 512):
        partial = (rare[start : start + 512] @ transposed).tocoo()
        i, j = partial.row.astype(np.int64) + start, partial.col.astype(np.int64)
        near = (partial.data >= threshold - set_aside[i] - 1e-6) & (i != j)
        i, j = i[near], j[near]
        for part in range(0, len(i), 65536):  # bounds the memory of the full comparison
            a, b = i[part : part + 65536], j[part : part + 65536]
            cosine = np.asarray(x[a].multiply(x[b]).sum(axis=1)).ravel()
            ok = cosine >= threshold
            found.append(np.stack([np.minimum(a, b)[ok], np.maximum(a, b)[ok]], axis=1))
    pairs = np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)
    return np.unique(pairs, axis=0)


def _without_common(x: Any, norm: float) -> tuple[Any, np.ndarray]:
    """``x`` without each row's most frequent words of joint norm <= ``norm``, and that norm per row."""
    frequency = np.bincount(x.indices, minlength=x.shape[1])
    row = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    order = np.lexsort((x.indices, -frequency[x.indices], row))
    squares = x.data[order] ** 2
    running = np.cumsum(squares)
    starts = np.concatenate([[0.0], running])[x.indptr[:-1]]
    common = running - starts[row[order]] <= norm**2
    aside = np.sqrt(np.bincount(row[order], weights=squares * common, minlength=x.shape[0]))
    rare = x.copy()
    rare.data[order[common]] = 0.0
    rare.eliminate_zeros()
    return rare, aside


def group_rows(keys: Sequence[str], task_keys: Sequence[str] | None = None) -> np.ndarray:
    """int32 [n]: connected components of near-duplicates and equal task keys, numbered by first row."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(keys)
    if n == 0:
        return np.zeros(0, dtype=np.int32)
    edges = [near_pairs(keys)]
    if task_keys is not None:
        first: dict[str, int] = {}
        edges.append(np.array([(first.setdefault(k, i), i) for i, k in enumerate(task_keys)], dtype=np.int64))
    i, j = np.concatenate(edges).T
    _, labels = connected_components(coo_array((np.ones(len(i), dtype=np.int8), (i, j)), shape=(n, n)), directed=False)
    _, first_row, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first_row))
    return np.asarray(rank[inverse], dtype=np.int32)


def split_task(task: ProbeTask, *, seed: int, cap_rows: int) -> Split | None:
    """Sides by group, at most ``cap_rows`` a side, both classes equally large; None = `too_few_rows`."""
    smallest: dict[int, str] = {}
    for group, key in zip(task.groups.tolist(), task.keys, strict=True):
        smallest[group] = min(smallest.get(group, key), key)
    side_of = {group: hash64(f"{seed}|{key}") % 2 for group, key in smallest.items()}
    sides = np.array([side_of[group] for group in task.groups.tolist()])
    order = np.array(sorted(range(len(task.keys)), key=lambda i: (hash64(f"{seed}|{task.keys[i]}"), i)), dtype=np.int64)
    chosen = []
    for side in (0, 1):
        by_class = [order[(sides[order] == side) & (task.labels[order] == label)] for label in (0, 1)]
        m = min(len(by_class[0]), len(by_class[1]), cap_rows // 2)
        if m < MIN_PER_CLASS:
            return None
        chosen.append(np.sort(np.concatenate([rows[:m] for rows in by_class])))
    return Split(*chosen)
