"""Activations at the last tokens of many short token lists: what lists share at their front is read once.

On a float32 model with a lean pass (:mod:`sae.fast_forward`) all lists of a batch are one tree; on others a list that
begins another one is read off that one's pass. In bfloat16 the attention of a tree would round otherwise than that of
rows, by so much that one N2G pattern in a hundred is another (decision 037); rows give the bits they always gave.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import ConfigError
from sae.token_tree import Tokens, batches, leaves, sort_lists, trees

if TYPE_CHECKING:
    from sae.language_model import LanguageModel


class LastTokens(NamedTuple):
    """One batch of answers."""

    lists: NDArray[np.int64]
    """Which of the lists,"""
    x_BD: Tensor
    """the activations at their last tokens, in the compute type of the model,"""
    n_tokens: int
    """and how many tokens were read for them, padding included."""


def last_tokens(
    lm: "LanguageModel", lists: Sequence[Tokens], hookpoint: str, batch_tokens: int
) -> Iterator[LastTokens]:
    """Activations at ``hookpoint`` of the last token of each list, every list once, in an order of the pass's own;
    ``batch_tokens``: tokens per pass. The lists differ from each other; :class:`ConfigError` for an empty one."""
    if any(not tokens for tokens in lists):
        raise ConfigError("a probe without tokens has no last position")
    depth = lm.block_of(hookpoint)
    fast = lm.lean_pass(depth) if depth and lm.dtype == torch.float32 else None
    if fast is None or depth is None:
        yield from _by_rows(lm, lists, hookpoint, batch_tokens)
        return
    for tree in trees(lists, batch_tokens):
        x_nD = fast.of_tree(tree, depth)
        yield LastTokens(tree.lists_l, x_nD[torch.from_numpy(tree.ends_l)], len(tree.ids_n))


def _by_rows(
    lm: "LanguageModel", lists: Sequence[Tokens], hookpoint: str, batch_tokens: int
) -> Iterator[LastTokens]:
    found = sort_lists(lists)
    places, leaf_of_l = leaves(found)
    by_leaf = np.split(np.arange(len(leaf_of_l)), np.searchsorted(leaf_of_l, np.arange(1, len(places))))
    whole = {lists[int(found.order_l[place])]: leaf for leaf, place in enumerate(places.tolist())}
    for batch in batches(sorted(whole, key=lambda t: (len(t), t)), batch_tokens):
        longest = len(batch[-1])
        # Padding stands on the right, where a causal model cannot see it from the last real token.
        ids_BL = torch.tensor([t + (t[-1],) * (longest - len(t)) for t in batch], device=lm.device)
        x_BLD = lm.capture(ids_BL, [hookpoint])[hookpoint]
        read = [by_leaf[whole[t]] for t in batch]
        rows = torch.from_numpy(np.repeat(np.arange(len(batch)), [len(r) for r in read])).to(x_BLD.device)
        answered = np.concatenate(read)
        last = torch.from_numpy(found.length_l[answered] - 1).to(x_BLD.device)
        yield LastTokens(found.order_l[answered], x_BLD[rows, last], len(batch) * longest)
