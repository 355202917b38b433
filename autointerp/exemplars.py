"""Exemplars: which windows an explainer sees and on which its texts are scored (AUTOINTERP 2, HOUSE arrow 5).

W tokens per window. The splits explain, calibrate and score are disjoint by document and by window content; this is
asserted when a table is written and again when it is opened, because scoring what was shown is the commonest error of
the field.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.config import ExemplarConfig
from autointerp.embedding_near import EmbeddingNear, open_pool
from autointerp.exemplar_draws import LatentDraw, SplitText, draw_pairs, read_texts
from autointerp.interfaces import EmbedderLike
from autointerp.latent_cache import LatentCache, sample_latents
from autointerp.records import (
    CALIBRATE,
    EXPLAIN,
    INTERP_SPLITS,
    NEGATIVE_KINDS,
    POSITIVE_KINDS,
    SCORE,
    Exemplar,
    Failure,
    LatentView,
)
from sae.config import from_dict, to_dict
from sae.console import track
from sae.errors import ArtefactError, ConfigError, LeakError
from sae.manifest import artefact_dir, is_complete, key_of, read_manifest, writing

__all__ = ["ExemplarTable", "assert_no_leak", "build_exemplars", "draw_pairs", "sample_latents"]

KIND, STAGE_VERSION = "exemplars", 1
FIELDS = (
    "exemplar_id", "latent", "kind", "split", "group", "doc_id", "source", "row", "start", "token_ids", "acts", "peak",
    "stratum", "stratum_share", "neighbour",
)
KINDS = (*POSITIVE_KINDS, *NEGATIVE_KINDS)
STAT_COLUMNS = ("n_active", "density", "density_explain", "pi", "max_act", "top_tokens")
SILENCE = 0.0
"""The one zero that all windows share."""
FAILURE_FIELDS = ("latent", "code", "stage", "detail")


def build_exemplars(
    root: Path, cache: LatentCache, latents: Iterable[int], cfg: ExemplarConfig, *, force: bool = False,
    embedder: EmbedderLike | None = None, tokenizer: Any = None,
) -> "ExemplarTable":
    """Draw and verify the windows of ``latents``; writes ``exemplars/<key>/``, skips a complete one.

    A latent with too few positive windows becomes a failure record and has no rows. Raises :class:`LeakError` if a
    document is in two splits, :class:`ConfigError` if the cache was cut into other windows or lacks a split, or if
    ``cfg.score_embedding_near`` is asked for without ``embedder`` and the subject's ``tokenizer`` (used for it alone).
    """
    wanted = sorted({int(i) for i in latents})
    _check(cache, wanted, cfg)
    config = to_dict(cfg) | {"latents": wanted}
    inputs = {"latents": cache.key}
    nearby = None
    if cfg.score_embedding_near == 0:
        del config["score_embedding_near"]  # tables older than this kind keep their keys
    else:
        nearby = _nearby(root, cache, embedder, tokenizer)
        inputs["window_embeddings"] = nearby.key
    key = key_of(KIND, STAGE_VERSION, config, inputs)
    folder = artefact_dir(root, KIND, key)
    if is_complete(folder) and not force:
        return ExemplarTable.open(folder)
    texts, dropped = read_texts(cache)
    eligible = set(cache.eligible(cfg).tolist())
    near = cache.co_occurring([i for i in wanted if i in eligible])
    failures: list[dict[str, Any]] = []
    rows: list[Exemplar] = []
    for latent in track(wanted, "Exemplars", unit="latents"):
        if latent not in eligible:
            failures.append({"latent": latent, **_ineligible(cache, latent, cfg)})
            continue
        neighbours = {"co_occurring": near[latent], "decoder_near": cache.nearest(latent)}
        drawn, missing = _draw(cache, texts, latent, cfg, neighbours, nearby)
        rows += drawn
        failures += [{"latent": latent, **failure} for failure in missing]
    rows.sort(key=_order)
    assert_no_leak(rows)
    with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as writer:
        _frame(rows).to_parquet(writer.path / "exemplars.parquet", index=False, compression="zstd")
        pd.DataFrame(failures, columns=list(FAILURE_FIELDS)).to_parquet(writer.path / "failures.parquet", index=False)
        stats = cache.stats.loc[wanted, [c for c in STAT_COLUMNS if c in cache.stats]].reset_index()
        stats["sae_id"] = cache.sae_id
        stats.to_parquet(writer.path / "latents.parquet", index=False)
        writer.counts |= {
            "sae_id": cache.sae_id, "n_requested": len(wanted), "n_explained": len({e.latent for e in rows}),
            "n_exemplars": len(rows), "failures": dict(sorted(Counter(f["code"] for f in failures).items())),
            "duplicate_windows": dict(dropped),
        }
    rows.clear()  # they are read again, and once in memory is enough
    return ExemplarTable.open(folder)


def _check(cache: LatentCache, latents: Sequence[int], cfg: ExemplarConfig) -> None:
    if (cfg.window_tokens, cfg.min_window_tokens) != (cache.window_tokens, cache.min_window_tokens):
        raise ConfigError(
            f"exemplars ask for windows of {cfg.min_window_tokens}..{cfg.window_tokens} tokens, the latent cache "
            f"{cache.key} was cut into {cache.min_window_tokens}..{cache.window_tokens}; build it with the same numbers"
        )
    if missing := [s for s in INTERP_SPLITS if s not in cache.splits]:
        raise ConfigError(f"the latent cache {cache.key} lacks the split {', '.join(missing)}; build it with all three")
    if wrong := [i for i in latents if not 0 <= i < cache.d_sae]:
        raise ConfigError(f"{cache.sae_id} has latents 0..{cache.d_sae - 1}, not {wrong[:5]}")


def _nearby(root: Path, cache: LatentCache, embedder: EmbedderLike | None, tokenizer: Any) -> EmbeddingNear:
    if embedder is None or tokenizer is None:
        raise ConfigError(
            "score_embedding_near needs a sentence embedding model and the subject's tokenizer; give "
            "--interp.embedder default (or a folder), or --exemplars.score-embedding-near 0 (at the door explain: "
            "--embedder default, or --exemplars score_embedding_near=0)"
        )
    return open_pool(root, cache, embedder, tokenizer)


def _ineligible(cache: LatentCache, latent: int, cfg: ExemplarConfig) -> dict[str, str]:
    stats = cache.stats.loc[latent]
    dead = int(stats["n_active"]) == 0
    found = ", ".join(
        f"{split} {int(stats[f'n_windows_{split}'])} of {least}"
        for split, least in zip(INTERP_SPLITS, cfg.min_windows, strict=True)
    )
    if broken := int(stats.get("n_non_finite", 0)):
        return _missing("non_finite", f"{broken} activations are NaN or infinite")
    return _missing("dead" if dead else "too_few_positive", f"positive windows: {found}")


def _missing(code: str, detail: str) -> dict[str, str]:
    failure = Failure(code=code, stage="exemplars", detail=detail)
    return {"code": failure.code, "stage": failure.stage, "detail": failure.detail}


def _draw(
    cache: LatentCache,
    texts: dict[str, SplitText],
    latent: int,
    cfg: ExemplarConfig,
    near: dict[str, list[int]],
    nearby: EmbeddingNear | None,
) -> tuple[list[Exemplar], list[dict[str, str]]]:
    """All exemplars of one latent and the hard kinds that yielded nothing."""
    shown: set[bytes] = set()
    rows: list[Exemplar] = []
    missing: list[dict[str, str]] = []
    for split in INTERP_SPLITS:
        text = texts[split]
        draw = LatentDraw(cache, text, latent, cfg)
        forbidden = {w for content in shown for w in text.by_content.get(content, ())}
        least, left = cfg.min_windows[INTERP_SPLITS.index(split)], draw.n_positive(forbidden)
        if left < least:  # windows that recur from an earlier split do not count
            detail = f"{left} of {least} positive windows on split {split} once repeated ones are left out"
            return [], [_missing("too_few_positive", detail)]
        silent = draw.silent(near, forbidden)
        if split == EXPLAIN:
            hard = {"same_token": cfg.explain_silent}
            top = draw.top(cfg.explain_top)
            found = [*top, *draw.quantile_placed(1, skip=top), *draw.random_positive(cfg.explain_random)]
            found += draw.draw_silent(silent, cfg.explain_silent, hard)
        elif split == CALIBRATE:
            hard = {}
            found = draw.quantile_grid(cfg.calibrate_positive, forbidden)
            found += draw.draw_silent(silent, cfg.calibrate_silent, hard)
        else:
            n = cfg.score_hard
            hard = {"same_token": n, "co_occurring": n, "decoder_near": n // 2}
            found = draw.quantile_grid(cfg.score_positive, forbidden)
            found += draw.draw_silent(silent, cfg.score_silent, hard)
            if nearby is not None:
                hard["embedding_near"] = cfg.score_embedding_near
                order = nearby.order([e for e in rows if e.split == EXPLAIN and e.positive])
                found += draw.draw_nearest(silent, "embedding_near", order, cfg.score_embedding_near, found)
        kinds = {e.kind for e in found}
        for kind in (k for k, n in hard.items() if n > 0 and k not in kinds):
            missing.append(_missing("no_hard_negative", f"{kind} on split {split}"))
        shown |= {_content(e) for e in found}
        rows += found
    return rows, missing


def _order(e: Exemplar) -> tuple[int, ...]:
    return (e.latent, INTERP_SPLITS.index(e.split), KINDS.index(e.kind), e.group, e.row, e.start, e.peak)


def _content(exemplar: Exemplar) -> bytes:
    return np.array(exemplar.token_ids, dtype=np.uint32).tobytes()


def _frame(rows: Sequence[Exemplar]) -> pd.DataFrame:
    table = pd.DataFrame({name: [getattr(e, name) for e in rows] for name in FIELDS})
    table["token_ids"] = [np.array(e.token_ids, dtype=np.int32) for e in rows]
    table["acts"] = [np.array(e.acts, dtype=np.float32) for e in rows]
    table["neighbour"] = pd.array([e.neighbour for e in rows], dtype="Int64")
    table["stratum_share"] = pd.array([e.stratum_share for e in rows], dtype="Float64")
    return table


def assert_no_leak(rows: Iterable[Exemplar]) -> None:
    """:class:`LeakError` if a document is in two splits, or a latent's window content recurs in a later split."""
    split_of_doc: dict[str, str] = {}
    split_of_window: dict[tuple[int, tuple[int, ...]], str] = {}
    for e in rows:
        if (other := split_of_doc.setdefault(e.doc_id, e.split)) != e.split:
            where = f"{other} and {e.split}"
            raise LeakError(f"document {e.doc_id} ({e.source}) has windows in {where}; build the exemplars again")
        if (other := split_of_window.setdefault((e.latent, e.token_ids), e.split)) != e.split:
            raise LeakError(f"latent {e.latent}: {e.exemplar_id} recurs from {other}; build the exemplars again")


class ExemplarTable:
    """Reader of ``exemplars/<key>/``."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        if manifest["kind"] != KIND or manifest["stage_version"] != STAGE_VERSION:
            found = f"{manifest['kind']} v{manifest['stage_version']}"
            raise ArtefactError(f"{folder} holds {found}, expected {KIND} v{STAGE_VERSION}; build the exemplars again")
        self.folder = Path(folder)
        self.key: str = manifest["key"]
        self.latents_key = str(manifest["inputs"]["latents"])
        """Of the latent cache from which it was drawn."""
        self.requested: list[int] = manifest["config"]["latents"]
        """Latents asked for, those without exemplars included."""
        self.config = from_dict(ExemplarConfig, {k: v for k, v in manifest["config"].items() if k != "latents"})
        self.counts: dict[str, Any] = manifest["counts"]
        self.sae_id: str = self.counts["sae_id"]
        self.table = pd.read_parquet(self.folder / "exemplars.parquet")
        self.stats = pd.read_parquet(self.folder / "latents.parquet").set_index("latent")
        self.failures = pd.read_parquet(self.folder / "failures.parquet")
        assert_no_leak(e for found in self._by_latent.values() for e in found)

    @classmethod
    def open(cls, folder: Path) -> "ExemplarTable":
        """:class:`ArtefactError` if incomplete; :class:`LeakError` if the splits are not disjoint."""
        return cls(folder)

    @cached_property
    def _by_latent(self) -> dict[int, list[Exemplar]]:
        out: dict[int, list[Exemplar]] = {}
        ids: dict[int, int] = {}
        for row in self.table.to_dict("records"):
            out.setdefault(int(row["latent"]), []).append(_exemplar(row, ids))
        return out

    @property
    def latents(self) -> list[int]:
        """Latents that have exemplars, ascending."""
        return sorted(self._by_latent)

    def exemplars(self, latent: int, split: str) -> list[Exemplar]:
        """All windows of one latent on one split; ConfigError for a latent without exemplars."""
        if latent not in self._by_latent:
            raise ConfigError(f"exemplars {self.key} hold no latent {latent}; see its failures table")
        return [e for e in self._by_latent[latent] if e.split == split]

    def view(
        self, latent: int, *, tokenizer: Any = None, promoted: Sequence[str] = (), suppressed: Sequence[str] = ()
    ) -> LatentView:
        """What an explainer may see. ``top_tokens`` are decoded where the subject's tokenizer is given, else empty."""
        stats = self.stats.loc[latent]
        top = () if tokenizer is None else tuple(tokenizer.decode([int(t)]) for t in stats["top_tokens"])
        return LatentView(
            sae_id=self.sae_id, latent=latent, exemplars=tuple(self.exemplars(latent, EXPLAIN)),
            density=float(stats["density_explain"]), max_act=float(stats["max_act"]), top_tokens=top,
            promoted=tuple(promoted), suppressed=tuple(suppressed),
        )

    def scored(self, latent: int, split: str = SCORE) -> list[Exemplar]:
        """Windows on which an explanation is calibrated or scored; :class:`LeakError` for the split explain."""
        if split not in (CALIBRATE, SCORE):
            raise LeakError(f"windows of split {split!r} may not be scored; expected {CALIBRATE} or {SCORE}")
        return self.exemplars(latent, split)

    def pi(self, latent: int) -> float:
        """Share of the score split's grid windows on which the latent is active."""
        return float(self.stats.loc[latent, "pi"])

    def failures_of(self, latent: int) -> list[Failure]:
        """Why a latent has no exemplars, or lacks a kind."""
        mine = self.failures[self.failures["latent"] == latent]
        return [Failure(code=f["code"], stage=f["stage"], detail=f["detail"]) for f in mine.to_dict("records")]


def _exemplar(row: dict[str, Any], ids: dict[int, int]) -> Exemplar:
    """``ids`` holds each token id once: hundreds of windows per latent would hold every number anew."""
    values = {name: row[name] for name in FIELDS}
    for name in ("latent", "group", "row", "start", "peak"):
        values[name] = int(values[name])
    values["token_ids"] = tuple(ids.setdefault(i, i) for i in row["token_ids"].tolist())
    values["acts"] = tuple(a or SILENCE for a in row["acts"].tolist())
    values["neighbour"] = None if pd.isna(row["neighbour"]) else int(row["neighbour"])
    values["stratum_share"] = None if pd.isna(row["stratum_share"]) else float(row["stratum_share"])
    return Exemplar(**values)
