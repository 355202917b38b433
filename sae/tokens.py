"""Text to packed rows of tokens, one set per split. Equal texts always fall into one split (DATA 3 and 4).

B rows, L tokens per row; flat index n = row * L + position.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.config import TokensConfig, to_dict
from sae.console import progress
from sae.errors import DataError
from sae.manifest import artefact_dir, hash64, is_complete, key_of, read_manifest, sha256_text, writing
from sae.texts import Document, iter_documents, source_key

if TYPE_CHECKING:
    from sae.kept_out import KeptOut

SPLITS = ("train", "explain", "calibrate", "score", "test")
TOKENS_VERSION = 1
TOKENIZE_BATCH = 256
CHOSEN_PREFIX = "saescope_prefix_id"
"""Attribute of a tokenizer for whose run a prefix was chosen."""
ENOUGH = 0.75
"""A split with a smaller share of the tokens asked for is warned of."""
_ABOUT_TXT = (
    "; a .txt file is one document, one of over 20,000 characters is divided into pieces of 2,000 or more: "
    'write each document as a line {"text": "..."} of a .jsonl file'
)
logger = logging.getLogger(__name__)


def split_of(text: str, seed: int = 0) -> str:
    """Split of a document, a function of its text: 1/20 test, 2/20 explain/calibrate/score (4:2:4), the rest train."""
    bucket = hash64(text) % 20
    if bucket == 0:
        return "test"
    if bucket > 2:
        return "train"
    share = hash64(f"{seed}|{text}") % 100
    return "explain" if share < 40 else "calibrate" if share < 60 else "score"


def prefix_id(tokenizer: Any, override: int | None = None) -> int:
    """Token at position 0 of every row and between documents.

    ``override``, else what :func:`use_prefix` chose, else the BOS id if the tokenizer puts one in front by itself, else
    `<|endoftext|>` (id 0 for SmolLM2, whose `bos` and `eos` are chat marks), else EOS, else BOS. DataError if none
    exists.
    """
    if override is None:
        override = getattr(tokenizer, CHOSEN_PREFIX, None)
    if override is not None:
        if not 0 <= override < len(tokenizer):
            raise DataError(f"prefix id {override} is outside the vocabulary of {len(tokenizer):,} tokens")
        return override
    added = tokenizer("a", add_special_tokens=True)["input_ids"]
    if added and added[0] == tokenizer.bos_token_id:
        return int(added[0])
    for candidate in (_id_of(tokenizer, "<|endoftext|>"), tokenizer.eos_token_id, tokenizer.bos_token_id):
        if candidate is not None:
            return int(candidate)
    raise DataError("the tokenizer has no BOS, EOS or <|endoftext|> token; give --tokens.prefix-id")


def use_prefix(tokenizer: Any, chosen: int | None) -> None:
    """Whoever loads a model for a run says here which prefix its rows have (``--tokens.prefix-id``): prompts of probes,
    of spelling, of patterns and of steering begin as the rows do (METRICS 1). None: the tokenizer's own."""
    if chosen is not None:
        setattr(tokenizer, CHOSEN_PREFIX, prefix_id(tokenizer, chosen))


def use_prefix_of(tokenizer: Any, root: Path, tokens_key: str) -> None:
    """:func:`use_prefix` with that of a set of tokens of this results folder, if it is there."""
    folder = artefact_dir(root, "tokens", tokens_key)
    if tokens_key and is_complete(folder):
        use_prefix(tokenizer, TokenSet.open(folder).prefix_id)


def _id_of(tokenizer: Any, token: str) -> int | None:
    """Its id, None for a token that the vocabulary lacks. ``get_vocab`` of a fast tokenizer copies the whole of it, 30
    ms for 49,152 tokens, and every plain prompt of the local client asks."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = tokenizer.get_vocab().get(token) if backend is None else backend.token_to_id(token)
    return None if found is None else int(found)


def drop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Special ids, which the token filter drops: BOS, EOS, pad and all that the tokenizer declares special."""
    special = {int(i) for i in tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {int(i) for i, token in added.items() if getattr(token, "special", False)}
    return tuple(sorted(special))


@dataclass(frozen=True)
class TokenSet:
    """Packed rows of one split, on disk."""

    folder: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(folder: Path) -> "TokenSet":
        """:class:`sae.errors.ArtefactError` if the folder is not complete."""
        return TokenSet(Path(folder), read_manifest(folder))

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def split(self) -> str:
        return str(self.manifest["config"]["split"])

    @property
    def L(self) -> int:
        return int(self.manifest["config"]["context_tokens"])

    @property
    def prefix_id(self) -> int:
        return int(self.manifest["config"]["prefix_id"])

    @cached_property
    def tokens_BL(self) -> np.ndarray:
        """uint16 or uint32 [B, L], memory-mapped."""
        return np.load(self.folder / "tokens_BL.npy", mmap_mode="r")

    @cached_property
    def doc_starts(self) -> np.ndarray:
        """int64, flat index of the first token of each document, ascending."""
        return np.load(self.folder / "doc_starts.npy")

    @cached_property
    def sources(self) -> list[str]:
        """Source of each document."""
        names, index = self.manifest["counts"]["sources"], np.load(self.folder / "source_of_doc.npy")
        return [names[i] for i in index]

    @property
    def n_docs(self) -> int:
        return len(self.doc_starts)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens_BL.size)

    def doc_ids_BL(self) -> np.ndarray:
        """int32 [B, L]: index of the document each token belongs to; the prefix of a row belongs to what follows it."""
        flat = np.arange(self.n_tokens, dtype=np.int64)
        docs = np.searchsorted(self.doc_starts, flat, side="right") - 1
        docs = docs.reshape(self.tokens_BL.shape)
        docs[:, 0] = docs[:, 1]
        return np.maximum(docs, 0).astype(np.int32)


class _Packer:
    """Concatenates documents into rows: prefix, then the next L - 1 ids of `doc sep doc sep ...`."""

    def __init__(self, context: int, prefix: int, budget: int) -> None:
        self.context, self.prefix, self.n_rows = context, prefix, max(1, budget // context)
        self.rows: list[list[int]] = []
        self.row: list[int] = [prefix]
        self.starts: list[int] = []
        self.sources: list[str] = []
        self.documents = 0

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.n_rows

    def add(self, ids: Sequence[int], source: str) -> None:
        """Append one document, as far as the budget reaches."""
        if self.full or not ids:
            return
        self.documents += 1
        if len(self.row) > 1:  # a separator that would follow the prefix at once is skipped
            self._push(self.prefix)
        if self.full:
            return
        self.starts.append(len(self.rows) * self.context + len(self.row))
        self.sources.append(source)
        for i in ids:
            self._push(int(i))
            if self.full:
                return

    def _push(self, token: int) -> None:
        self.row.append(token)
        if len(self.row) == self.context:
            self.rows.append(self.row)
            self.row = [self.prefix]

    def finish(self) -> tuple[list[list[int]], list[int], list[str]]:
        """(rows, document starts, sources); the last, short row is dropped, and documents that lie in it alone."""
        limit = len(self.rows) * self.context
        n = sum(start < limit for start in self.starts)
        return self.rows, self.starts[:n], self.sources[:n]


def _ordered(source: str, column: str, seed: int) -> Iterator[Document]:
    """The default mix in hashed order, so that any budget is a fair mix of sources; other texts as they come."""
    if source != "default":
        yield from iter_documents(source, column)
        return
    yield from sorted(iter_documents(source), key=lambda d: (hash64(f"{seed}|order|{d.text}"), d.text))


def _needed(packers: dict[str, _Packer], documents: Iterable[Document], seed: int) -> Iterator[tuple[str, Document]]:
    """Documents of splits that still have room; a text that came before is skipped."""
    seen: set[int] = set()
    for document in documents:
        if all(p.full for p in packers.values()):
            return
        split = split_of(document.group or document.text, seed)
        if packers[split].full:
            continue
        key = hash64(document.text)
        if key not in seen:
            seen.add(key)
            yield split, document


def _pack(cfg: TokensConfig, tokenizer: Any, prefix: int, keep_out: "KeptOut | None") -> dict[str, _Packer]:
    packers = {s: _Packer(cfg.context_tokens, prefix, cfg.split_tokens(s)) for s in SPLITS}
    total = sum(p.n_rows * cfg.context_tokens for p in packers.values())
    with progress("tokens", total=total, unit="tok") as bar:
        waiting: list[tuple[str, Document]] = []

        def flush() -> None:
            ids = tokenizer([d.text for _, d in waiting], add_special_tokens=False)["input_ids"] if waiting else []
            for (split, document), one in zip(waiting, ids, strict=True):
                before = len(packers[split].rows)
                packers[split].add(one, document.source)
                bar.advance((len(packers[split].rows) - before) * cfg.context_tokens)
            waiting.clear()

        documents = _ordered(cfg.text, cfg.text_column, cfg.seed)
        for pair in _needed(packers, documents if keep_out is None else keep_out.clean(documents), cfg.seed):
            waiting.append(pair)
            if len(waiting) == TOKENIZE_BATCH:
                flush()
        flush()
    return packers


def _tokens_config(cfg: TokensConfig, split: str, lm_name: str, tokenizer: Any, prefix: int) -> dict[str, Any]:
    values = to_dict(cfg)
    keep = {name: values[name] for name in ("text_column", "context_tokens", "seed")}
    vocabulary = getattr(tokenizer, "backend_tokenizer", None)
    identity = vocabulary.to_str() if vocabulary is not None else str(sorted(tokenizer.get_vocab().items()))
    return keep | {
        "text": source_key(cfg.text),
        "split": split,
        "tokens": cfg.split_tokens(split),
        "prefix_id": prefix,
        "tokenizer": sha256_text(identity)[:16],
        "packing": "concat_eos",
    }


def build_tokens(
    root: Path, cfg: TokensConfig, lm_name: str, tokenizer: Any, *, force: bool = False,
    keep_out: "KeptOut | None" = None,
) -> dict[str, TokenSet]:  # fmt: skip
    """One artefact `tokens/<key>/` per split; complete ones are reused. ``keep_out``: documents that share text with
    its prompts are in no split, and counted in the manifests.

    Raises :class:`DataError` if a split gets less than one row, with the numbers.
    """
    prefix = prefix_id(tokenizer, cfg.prefix_id)
    cleaned = {} if keep_out is None else {"kept_out": keep_out.key}
    configs = {s: _tokens_config(cfg, s, lm_name, tokenizer, prefix) | cleaned for s in SPLITS}
    keys = {s: key_of("tokens", TOKENS_VERSION, c) for s, c in configs.items()}
    folders = {s: artefact_dir(root, "tokens", k) for s, k in keys.items()}
    if force or not all(is_complete(f) for f in folders.values()):
        packers = _pack(cfg, tokenizer, prefix, keep_out)
        more = {} if keep_out is None else {"kept_out": keep_out.n_dropped}
        found = {s: p.finish() for s, p in packers.items()}
        _require_rows(cfg, packers, found)
        _warn_of_short_splits(cfg, found)
        for split, (rows, starts, sources) in found.items():
            _write(folders[split], keys[split], configs[split], rows, starts, sources, len(tokenizer), more)
    return {s: TokenSet.open(f) for s, f in folders.items()}


def _require_rows(cfg: TokensConfig, packers: dict[str, _Packer], found: dict[str, Any]) -> None:
    short = [s for s in SPLITS if not found[s][0]]
    if short:
        counts = ", ".join(f"{s}: {p.documents}" for s, p in packers.items())
        raise DataError(
            f"the text {cfg.text!r} leaves the split(s) {', '.join(short)} without one row of "
            f"{cfg.context_tokens} tokens (documents by split: {counts}); give more documents "
            "(2 % of them go to the smallest split) or a smaller --tokens.context-tokens"
            + (_ABOUT_TXT if ".txt" in cfg.text.lower() else "")
        )


def _warn_of_short_splits(cfg: TokensConfig, found: dict[str, Any]) -> None:
    """The run goes on with what there is: fewer units, wider intervals."""
    got = {s: len(rows) * cfg.context_tokens for s, (rows, _, _) in found.items()}
    short = [s for s in SPLITS if got[s] < ENOUGH * cfg.split_tokens(s)]
    if short:
        told = ", ".join(f"{s} {got[s]:,} of {cfg.split_tokens(s):,}" for s in short)
        logger.warning("%s ended before its splits were full (tokens: %s); more text fills them", cfg.text, told)


def _write(
    folder: Path,
    key: str,
    config: dict[str, Any],
    rows: list[list[int]],
    starts: list[int],
    sources: list[str],
    vocab: int,
    more: dict[str, int],
) -> None:
    names = sorted(set(sources))
    index = {name: i for i, name in enumerate(names)}
    with writing(folder, kind="tokens", key=key, stage_version=TOKENS_VERSION, config=config) as out:
        dtype = np.uint16 if vocab <= 65_536 else np.uint32
        np.save(out.path / "tokens_BL.npy", np.array(rows, dtype=dtype))
        np.save(out.path / "doc_starts.npy", np.array(starts, dtype=np.int64))
        np.save(out.path / "source_of_doc.npy", np.array([index[s] for s in sources], dtype=np.int32))
        out.counts.update(rows=len(rows), documents=len(starts), sources=names, **more)
