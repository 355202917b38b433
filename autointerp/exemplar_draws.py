"""Draw the windows of one latent on one split (AUTOINTERP 2): positives by rank and at random, silent ones by stratum.

Randomness depends on (seed, sae_id, latent, purpose) alone, so latents may be added, removed or reordered.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autointerp import negatives
from autointerp.config import ExemplarConfig
from autointerp.documents import assert_disjoint
from autointerp.n2g import Pair
from autointerp.records import EXPLAIN, SCORE, Exemplar
from autointerp.windows import Runs, Windows, entry_bounds, find_runs, peak_placed, run_bounds
from sae.errors import LeakError
from sae.manifest import rng

if TYPE_CHECKING:
    from autointerp.latent_cache import LatentCache

Ints = NDArray[np.int64]
WINDOWS_PER_GROUP = 5
"""A quantile group holds at least this many windows, or there are fewer groups."""


@dataclass(frozen=True)
class SplitText:
    """What all latents share of one split."""

    split: str
    tokens_N: NDArray[Any]
    doc_of_N: NDArray[np.int32]
    runs: Runs
    windows: Windows
    allowed: NDArray[np.bool_]
    """Per window: False where its tokens recur from an earlier split."""
    doc_ids: list[str]
    """Hash of each document's tokens: equal documents have equal ids."""
    sources: list[str]

    @cached_property
    def by_content(self) -> dict[bytes, list[int]]:
        """Windows by their tokens."""
        out: dict[bytes, list[int]] = {}
        for w, content in enumerate(window_contents(self.tokens_N, self.windows)):
            out.setdefault(content, []).append(w)
        return out


def window_contents(tokens_N: NDArray[Any], windows: Windows) -> list[bytes]:
    """Token bytes of each window."""
    whole = tokens_N[windows.token_positions].astype(np.uint32)
    return [whole[a:b].tobytes() for a, b in zip(windows.ptr[:-1].tolist(), windows.ptr[1:].tolist(), strict=True)]


def document_ids(
    tokens_N: NDArray[Any], doc_of_N: NDArray[np.int32], keep_N: NDArray[np.bool_], n_docs: int
) -> list[str]:
    """A hash of each document's kept tokens, "" for a document without any."""
    kept = np.flatnonzero(keep_N)
    docs, content = doc_of_N[kept], np.asarray(tokens_N)[kept].astype(np.uint32)
    bounds = np.searchsorted(docs, np.arange(n_docs + 1))
    return [
        hashlib.blake2b(content[a:b].tobytes(), digest_size=8).hexdigest() if b > a else ""
        for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]


def read_texts(cache: "LatentCache") -> tuple[dict[str, SplitText], Counter[str]]:
    """The splits of a cache, disjoint by document (:class:`LeakError` if not) and by window.

    A window whose tokens recur from an earlier split is taken out of the later population; the counter says how many.
    """
    assert_disjoint({split: cache.tokens(split) for split in cache.splits})
    texts: dict[str, SplitText] = {}
    seen_windows: set[bytes] = set()
    dropped: Counter[str] = Counter()
    for split in cache.splits:
        tokens, windows = cache.tokens(split), cache.windows(split)
        keep, doc_of = cache.keep(split), cache.doc_of(split)
        tokens_N = np.asarray(tokens.tokens_BL).reshape(-1)
        doc_ids = document_ids(tokens_N, doc_of, keep, tokens.n_docs)
        contents = window_contents(tokens_N, windows)
        allowed = np.array([c not in seen_windows for c in contents], dtype=bool)
        dropped[split] = int((~allowed).sum())
        seen_windows.update(contents)
        runs = find_runs(keep, doc_of, tokens.L)
        texts[split] = SplitText(split, tokens_N, doc_of, runs, windows, allowed, doc_ids, list(tokens.sources))
    return texts, dropped


class WindowPeaks(NamedTuple):
    """Positive grid windows of one latent, ascending."""

    window: Ints
    value: NDArray[np.float32]
    """Largest activation inside."""
    flat: Ints
    """Its flat index (the first, where several are equal)."""

    def where(self, mask: NDArray[np.bool_]) -> "WindowPeaks":
        return WindowPeaks(self.window[mask], self.value[mask], self.flat[mask])


def window_peaks(flat_n: NDArray[np.integer], value_n: NDArray[np.float32], windows: Windows) -> WindowPeaks:
    """Peak of every grid window that holds an activation."""
    flat = flat_n.astype(np.int64)
    window = windows.of_flat[flat].astype(np.int64)
    inside = window >= 0
    flat, window, value = flat[inside], window[inside], value_n[inside]
    order = np.lexsort((flat, -value, window))
    first = np.ones(order.size, dtype=bool)
    first[1:] = window[order][1:] != window[order][:-1]
    best = order[first]
    return WindowPeaks(window[best], value[best], flat[best])


def quantile_groups(peak_values: NDArray[np.float32], n_groups: int) -> Ints:
    """Group of each window, 0 = weakest: min(n_groups, n // 5) groups of equal count (at least one)."""
    n = peak_values.size
    groups = max(1, min(n_groups, n // WINDOWS_PER_GROUP))
    rank = np.empty(n, dtype=np.int64)
    rank[np.lexsort((np.arange(n), peak_values))] = np.arange(n)
    return rank * groups // max(n, 1)


def quotas(n: int, groups: int, generator: np.random.Generator) -> Ints:
    """``n`` spread evenly over the groups; the remainder goes to groups drawn at random."""
    out = np.full(groups, n // groups, dtype=np.int64)
    out[generator.permutation(groups)[: n % groups]] += 1
    return out


class LatentDraw:
    """All draws of one latent on one split."""

    def __init__(self, cache: "LatentCache", text: SplitText, latent: int, cfg: ExemplarConfig) -> None:
        self.cache, self.text, self.latent, self.cfg = cache, text, latent, cfg
        self.flat, self.value = cache.entries(latent, text.split)
        self.peaks = window_peaks(self.flat, self.value, text.windows)
        self.prefix = cache.key[:8]

    def generator(self, purpose: str) -> np.random.Generator:
        return rng(self.cfg.seed, self.cache.sae_id, self.latent, f"{self.text.split}/{purpose}")

    def record(self, kind: str, start: int, length: int, peak: int = -1, **more: Any) -> Exemplar:
        """The window from flat index ``start``; ``peak`` is a flat index, -1 for a silent window."""
        text = self.text
        row, column = divmod(int(start), text.windows.row_tokens)
        low, high = entry_bounds(self.flat, start, length)
        acts = np.zeros(int(length), dtype=np.float32)
        acts[self.flat[low:high].astype(np.int64) - start] = self.value[low:high]
        doc = int(text.doc_of_N[start])
        local = int(peak - start) if peak >= 0 else -1
        return Exemplar(
            exemplar_id=f"{self.prefix}-{self.latent}-{text.split}-{kind}-{row}-{column}-{local}",
            latent=self.latent, kind=kind, split=text.split, doc_id=text.doc_ids[doc], source=text.sources[doc],
            row=row, start=column, token_ids=tuple(text.tokens_N[start : start + length].tolist()),
            acts=tuple(acts.tolist()), peak=local, **more,
        )

    def _placed(self, kind: str, peaks: Ints, groups: Ints | None = None) -> list[Exemplar]:
        start, length = peak_placed(self.text.runs, peaks, self.cfg.left_tokens, self.cfg.window_tokens)
        group = np.full(peaks.size, -1) if groups is None else groups
        rows = zip(start.tolist(), length.tolist(), peaks.tolist(), group.tolist(), strict=True)
        return [self.record(kind, s, n, p, group=g) for s, n, p, g in rows]

    def top(self, n: int) -> list[Exemplar]:
        """Largest peaks of distinct documents, peak-placed."""
        flat = self.flat.astype(np.int64)
        first, end = run_bounds(self.text.runs, flat)
        long_enough = np.flatnonzero(end - first >= self.cfg.min_window_tokens)
        order = long_enough[np.lexsort((flat[long_enough], -self.value[long_enough]))]
        _, leading = np.unique(self.text.doc_of_N[flat[order]], return_index=True)
        return self._placed("top", flat[order[np.sort(leading)[:n]]])

    def quantile_placed(self, per_group: int, skip: list[Exemplar]) -> list[Exemplar]:
        """Per group ``per_group`` peak-placed windows; a document comes once, those of ``skip`` only if need be."""
        peaks, groups = self._allowed_peaks()
        generator = self.generator("quantile")
        doc = self.text.doc_of_N[peaks.flat]
        shown = {(e.row, e.start + e.peak) for e in skip}
        skipped = {e.doc_id for e in skip}
        used: set[int] = set()
        chosen: list[int] = []
        for group in range(int(groups.max(initial=-1)) + 1):
            order = generator.permutation(np.flatnonzero(groups == group)).tolist()
            order.sort(key=lambda i: self.text.doc_ids[doc[i]] in skipped)  # stable: fresh documents come first
            taken = 0
            for i in order:
                place = divmod(int(peaks.flat[i]), self.text.windows.row_tokens)
                if taken < per_group and doc[i] not in used and place not in shown:
                    used.add(doc[i])
                    chosen.append(i)
                    taken += 1
        picked = np.array(sorted(chosen), dtype=np.int64)
        return self._placed("quantile", peaks.flat[picked], groups[picked])

    def n_positive(self, forbidden: set[int]) -> int:
        """Positive windows that may be drawn."""
        return int(self._allowed_peaks(forbidden)[0].window.size)

    def _allowed_peaks(self, forbidden: set[int] | None = None) -> tuple[WindowPeaks, Ints]:
        fine = self.text.allowed[self.peaks.window]
        if forbidden:
            fine &= ~np.isin(self.peaks.window, list(forbidden))
        peaks = self.peaks.where(fine)
        return peaks, quantile_groups(peaks.value, self.cfg.n_groups)

    def quantile_grid(self, n: int, forbidden: set[int]) -> list[Exemplar]:
        """``n`` positive grid windows spread over the quantile groups, without replacement."""
        peaks, groups = self._allowed_peaks(forbidden)
        generator = self.generator("quantile")
        wanted = quotas(n, int(groups.max(initial=0)) + 1, generator)
        out = []
        for group, quota in enumerate(wanted.tolist()):
            members = np.flatnonzero(groups == group)
            for i in np.sort(generator.permutation(members)[:quota]).tolist():
                w = int(peaks.window[i])
                start, length = int(self.text.windows.start[w]), int(self.text.windows.length[w])
                out.append(self.record("quantile", start, length, int(peaks.flat[i]), group=group))
        return out

    def random_positions(self, n: int) -> Ints:
        """``n`` uniformly drawn activations as flat indices; each document once before any comes twice."""
        order = self.generator("random_positive").permutation(self.flat.size)
        order = negatives.documents_first(order, self.text.doc_of_N[self.flat])
        return self.flat[np.sort(order[:n])].astype(np.int64)

    def random_positive(self, n: int) -> list[Exemplar]:
        """Windows around :meth:`random_positions`; ``peak`` is the drawn token, not the window's maximum."""
        return self._placed("random_positive", self.random_positions(n))

    def silent(self, near: dict[str, list[int]], forbidden: set[int]) -> negatives.Silent:
        """All silent windows of the split with their strata. ``near``: neighbours by hard kind, nearest first."""
        split = self.text.split
        allowed = self.text.allowed.copy()
        allowed[list(forbidden)] = False
        top = self.cache.stats["top_tokens"].iloc[self.latent][: negatives.SAME_TOKEN_TOP]
        same = self.text.windows.holding_tokens(self.text.tokens_N, [int(t) for t in top])
        neighbours = {k: [(i, self.cache.positive_windows(i, split)) for i in ids] for k, ids in near.items()}
        return negatives.find_silent(len(self.text.windows), self.peaks.window, allowed, same, neighbours)

    def draw_silent(self, silent: negatives.Silent, n: int, hard: dict[str, int]) -> list[Exemplar]:
        """``n`` uniform silent windows, then ``hard[kind]`` more from each hard stratum; all distinct, all verified."""
        windows = self.text.windows
        doc = windows.doc[silent.windows] if self.text.split == EXPLAIN else None
        drawn = [("silent", i) for i in negatives.draw(silent.windows, n, self.generator("silent"), doc_of=doc)]
        taken = {i for _, i in drawn}
        for kind, wanted in hard.items():
            inside = np.flatnonzero(silent.stratum == negatives.STRATA.index(kind))
            free = np.array([i for i in inside.tolist() if i not in taken], dtype=np.int64)
            docs = windows.doc[silent.windows[free]] if self.text.split == EXPLAIN else None
            drawn += [(kind, free[i]) for i in negatives.draw(free, wanted, self.generator(kind), doc_of=docs)]
        return self._silent_records(silent, drawn)

    def draw_nearest(
        self, silent: negatives.Silent, kind: str, order: Ints, n: int, drawn: list[Exemplar]
    ) -> list[Exemplar]:
        """The first ``n`` windows of ``order`` that are silent and not among ``drawn``; verified like the others."""
        starts = [e.row * self.text.windows.row_tokens + e.start for e in drawn]
        free = np.isin(order, silent.windows) & ~np.isin(self.text.windows.start[order], starts)
        chosen = np.searchsorted(silent.windows, order[free][:n])
        return self._silent_records(silent, [(kind, int(i)) for i in chosen])

    def _silent_records(self, silent: negatives.Silent, drawn: list[tuple[str, int]]) -> list[Exemplar]:
        """Records of (kind, position in ``silent.windows``)."""
        windows, out = self.text.windows, []
        negatives.verify_silent(windows, silent.windows[[i for _, i in drawn]], self.flat)
        for kind, i in drawn:
            w, stratum = int(silent.windows[i]), int(silent.stratum[i])
            neighbour = int(silent.neighbour[i])
            out.append(
                self.record(
                    kind, int(windows.start[w]), int(windows.length[w]), stratum=negatives.STRATA[stratum],
                    stratum_share=silent.share(stratum), neighbour=neighbour if neighbour >= 0 else None,
                )
            )
        return out


def draw_pairs(
    cache: "LatentCache", latent: int, n: int, *, split: str = EXPLAIN, seed: int = 0, left_tokens: int = 24
) -> list[Pair]:
    """N2G's input for any latent (METRICS D 2): ``n`` uniformly drawn activations with up to ``left_tokens`` before.

    The same positions as the kind random_positive of an exemplar table with this seed and n. ``split="score"`` gives
    the 16 random positives of ``n2g_recall_16``.
    """
    if split not in (EXPLAIN, SCORE):
        raise LeakError(f"pairs come from explain (to build) or score (to test), not {split!r}")
    keep, doc_of, tokens = cache.keep(split), cache.doc_of(split), cache.tokens(split)
    flat, value = cache.entries(latent, split)
    order = rng(seed, cache.sae_id, latent, f"{split}/random_positive").permutation(flat.size)
    chosen = np.sort(negatives.documents_first(order, doc_of[flat])[:n])
    peaks = flat[chosen].astype(np.int64)
    first, _ = run_bounds(find_runs(keep, doc_of, tokens.L), peaks)
    tokens_N = np.asarray(tokens.tokens_BL).reshape(-1)
    starts = np.maximum(first, peaks - left_tokens)
    return [
        Pair(tuple(tokens_N[s : p + 1].tolist()), float(v))
        for s, p, v in zip(starts.tolist(), peaks.tolist(), value[chosen].tolist(), strict=True)
    ]
