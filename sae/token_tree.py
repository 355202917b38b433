"""Token lists that begin alike, as trees: what a causal model reads once for all of them. Torch-free.

A node is one token behind the tokens of its ancestors, so lists that share their first tokens share nodes. W longest
list, n nodes of a batch, l lists.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Tokens = tuple[int, ...]
PADDING_SHARE = 0.15
"""A batch of rows may hold this share of padding; a longer list opens a new batch."""


class TokenTree(NamedTuple):
    """One batch of lists. Nodes are numbered by depth: those of the first level come first."""

    ids_n: Ints
    depth_n: Ints
    """0 for the first token of a list."""
    levels: tuple[Ints, ...]
    """Per depth d: [nodes of it, d + 1], the nodes on the way to each, itself the last."""
    lists_l: Ints
    """Which of the lists asked for are in this batch,"""
    ends_l: Ints
    """and the node of each one's last token."""


class Sorted(NamedTuple):
    """Lists in lexical order, where each shares the most with the one before."""

    order_l: Ints
    ids_lW: Ints
    """Padded with -1."""
    length_l: Ints
    shared_l: Ints
    """Tokens at the front that the list before has too."""

    @property
    def n_nodes(self) -> int:
        """Distinct prefixes: tokens that a model reads if all lists are one tree."""
        return int((self.length_l - self.shared_l).sum())


def sort_lists(lists: Sequence[Tokens]) -> Sorted:
    """The lists, none of them empty, in lexical order."""
    length_l = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    width = int(length_l.max(initial=0))
    ids_lW = np.full((len(lists), width), -1, dtype=np.int64)
    columns = np.arange(width)
    ids_lW[columns < length_l[:, None]] = np.fromiter(chain.from_iterable(lists), np.int64, count=int(length_l.sum()))
    order_l = np.lexsort(ids_lW.T[::-1]).astype(np.int64) if width else np.zeros(0, dtype=np.int64)
    ids_lW, length_l = ids_lW[order_l], length_l[order_l]
    same = (ids_lW[1:] == ids_lW[:-1]) & (ids_lW[1:] >= 0)
    shared_l = np.zeros(len(lists), dtype=np.int64)
    shared_l[1:] = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    return Sorted(order_l, ids_lW, length_l, shared_l)


def count_nodes(lists: Sequence[Tokens]) -> int:
    """Distinct prefixes of the lists."""
    return sort_lists(lists).n_nodes


def trees(lists: Sequence[Tokens], batch_nodes: int) -> Iterator[TokenTree]:
    """The lists in batches of about ``batch_nodes`` nodes, neighbours in lexical order together."""
    found = sort_lists(lists)
    batch_l = (np.cumsum(found.length_l - found.shared_l) - 1) // batch_nodes
    bounds = np.flatnonzero(np.diff(batch_l, prepend=-1, append=np.iinfo(np.int64).max))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield _tree(Sorted(*(part[start:stop] for part in found)))


def _tree(part: Sorted) -> TokenTree:
    shared_l = part.shared_l.copy()
    shared_l[:1] = 0  # what it shares with the list before is in another batch
    columns = np.arange(int(part.length_l.max()))
    new = (columns >= shared_l[:, None]) & (columns < part.length_l[:, None])
    row_n, depth_n = np.nonzero(new)
    # On the way to a node stands, at each depth, the last node at or before its list: lists that share are neighbours.
    number = np.full(new.shape, -1, dtype=np.int64)
    by_depth = np.argsort(depth_n, kind="stable")
    row_n, depth_n = row_n[by_depth], depth_n[by_depth]
    number[row_n, depth_n] = np.arange(len(row_n))
    way_lW = np.maximum.accumulate(number, axis=0)  # numbers rise down a column
    edges = np.searchsorted(depth_n, np.arange(len(columns) + 1)).tolist()
    levels = tuple(way_lW[row_n[a:b], : d + 1] for d, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)))
    ends_l = way_lW[np.arange(len(part.length_l)), part.length_l - 1]
    return TokenTree(part.ids_lW[row_n, depth_n], depth_n, levels, part.order_l, ends_l)


def leaves(found: Sorted) -> tuple[Ints, Ints]:
    """Sorted lists that begin no other one: their places, and for every list the leaf (an index into them) that begins
    with it."""
    begins_next = np.zeros(len(found.length_l), dtype=bool)
    begins_next[:-1] = found.shared_l[1:] == found.length_l[:-1]
    places = np.flatnonzero(~begins_next)
    # The first leaf at or behind a list begins with it.
    return places.astype(np.int64), np.searchsorted(places, np.arange(len(begins_next))).astype(np.int64)


def batches(lists: Sequence[Tokens], batch_tokens: int) -> list[list[Tokens]]:
    """Length-sorted lists cut so that a padded batch stays within ``batch_tokens`` and wastes little."""
    out: list[list[Tokens]] = []
    content = 0
    for tokens in lists:
        content += len(tokens)
        padded = (len(out[-1]) + 1) * len(tokens) if out else 0
        if not out or padded > batch_tokens or padded - content > PADDING_SHARE * padded + len(tokens):
            out.append([])
            content = len(tokens)
        out[-1].append(tokens)
    return out
