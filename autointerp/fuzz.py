"""Which tokens to mark in fuzzing: position-matched negatives (AUTOINTERP 5.1). Torch-free.

A judge of marks could cheat: if wrong marks sat elsewhere in the window than right ones, or were more or fewer, the
place alone would tell. So every negative carries the mask of a positive of its own: a one-to-one matching of positive
masks to hosts. A host is a silent window, or another positive window in which the mask misses every active token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autointerp.prompts import active_tokens
from autointerp.records import Exemplar

Mask = tuple[int, ...]
"""Indices of marked tokens, ascending."""
RIGHT, SILENT, WRONG = "right_marks", "silent", "wrong_marks"
NEGATIVES = (SILENT, WRONG)


class Marked(NamedTuple):
    """A window and the tokens marked in it."""

    exemplar: Exemplar
    mask: Mask
    kind: str
    """right_marks, silent or wrong_marks."""

    @property
    def positive(self) -> bool:
        return self.kind == RIGHT


def right_mask(exemplar: Exemplar) -> Mask:
    """Tokens at or above 0.3 of the window's peak."""
    return tuple(np.flatnonzero(active_tokens(exemplar.acts)).tolist())


def marked_windows(
    positives: Sequence[Exemplar], silent: Sequence[Exemplar], generator: np.random.Generator
) -> list[Marked]:
    """The positives with their own marks, and as many negatives as can be matched, half of each kind.

    Masks that fit no other positive window go to silent windows, so that wide masks are not missing among the
    negatives; a mask that fits nowhere has no negative. Each host is used once per kind. The order of the answer is
    fixed by the ids, its content by ``generator``.
    """
    own = [Marked(e, right_mask(e), RIGHT) for e in sorted(positives, key=lambda e: e.exemplar_id)]
    own = [m for m in own if m.mask]
    quiet = sorted(silent, key=lambda e: e.exemplar_id)
    order = [int(i) for i in generator.permutation(len(own))]
    hosts = [int(j) for j in generator.permutation(len(quiet))]
    negatives = _negatives(own, quiet, order, hosts)
    if len(negatives) < len(own):  # marks far to the right fit few windows: let them choose first
        other = _negatives(own, quiet, sorted(order, key=lambda i: -own[i].mask[-1]), hosts)
        negatives = max(negatives, other, key=len)
    return own + sorted(negatives, key=lambda m: (m.kind, m.exemplar.exemplar_id))


def _negatives(own: Sequence[Marked], quiet: Sequence[Exemplar], order: list[int], hosts: list[int]) -> list[Marked]:
    """Half of the masks on wrong tokens, the others in silent windows; masks choose in the order given."""
    fits = [[j for j in order if j != i and _misses(m.mask, own[j].exemplar)] for i, m in enumerate(own)]
    wrong = _matching(order, fits, len(own) // 2)
    left = [i for i in order if i not in wrong]
    placed = _matching(left, [[j for j in hosts if _inside(m.mask, quiet[j])] for m in own], len(left))
    return [Marked(own[j].exemplar, own[i].mask, WRONG) for i, j in wrong.items()] + [
        Marked(quiet[j], own[i].mask, SILENT) for i, j in placed.items()
    ]


def _inside(mask: Mask, host: Exemplar) -> bool:
    return mask[-1] < len(host.token_ids)


def _misses(mask: Mask, host: Exemplar) -> bool:
    return _inside(mask, host) and all(host.acts[i] <= 0 for i in mask)


def _matching(sources: Sequence[int], fits: Sequence[Sequence[int]], most: int) -> dict[int, int]:
    """source -> target, each target once: a largest matching (augmenting paths), stopped at ``most`` pairs."""
    source_of: dict[int, int] = {}

    def place(source: int, tried: set[int]) -> bool:
        for target in fits[source]:
            if target in tried:
                continue
            tried.add(target)
            if target not in source_of or place(source_of[target], tried):
                source_of[target] = source
                return True
        return False

    for source in sources:
        if len(source_of) >= most:
            break
        place(source, set())
    return {source: target for target, source in sorted(source_of.items())}
