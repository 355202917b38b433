"""Trees of token lists against sets of prefixes; activations at last tokens against one pass per list."""

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.last_tokens import last_tokens
from sae.token_tree import count_nodes, leaves, sort_lists, trees


def lists_of(n: int = 200, ids: int = 5, longest: int = 9, seed: int = 0) -> list[tuple[int, ...]]:
    """Distinct lists over few ids, so that many begin alike and some begin others."""
    r = np.random.default_rng(seed)
    drawn = [tuple(r.integers(3, 3 + ids, size=r.integers(1, longest + 1)).tolist()) for _ in range(n)]
    return list(dict.fromkeys(drawn))


def prefixes(lists) -> set[tuple[int, ...]]:
    return {t[:n] for t in lists for n in range(1, len(t) + 1)}


@pytest.mark.parametrize("batch_nodes", [1, 7, 64, 10_000])
def test_every_node_is_a_prefix_and_every_list_has_its_end(batch_nodes):
    lists, met = lists_of(), []
    for tree in trees(lists, batch_nodes):
        assert (np.diff(tree.depth_n) >= 0).all() and sum(map(len, tree.levels)) == len(tree.ids_n)
        texts, at = [], 0
        for depth, level in enumerate(tree.levels):
            assert level.shape[1] == depth + 1
            for way in level.tolist():
                assert way[-1] == at and tree.depth_n[at] == depth
                texts.append(tuple(tree.ids_n[way].tolist()))
                at += 1
        mine = [lists[i] for i in tree.lists_l.tolist()]
        assert [texts[i] for i in tree.ends_l.tolist()] == mine
        assert len(set(texts)) == len(texts) and set(texts) == prefixes(mine)
        met += mine
    assert sorted(met) == sorted(lists)


def test_one_batch_reads_each_prefix_once():
    lists = lists_of()
    assert count_nodes(lists) == len(prefixes(lists)) == sum(len(t.ids_n) for t in trees(lists, 10_000))
    assert count_nodes(lists) < 0.7 * sum(map(len, lists))
    # cutting costs the way to the first list of each batch, no more
    cut = list(trees(lists, 64))
    assert sum(len(t.ids_n) for t in cut) <= count_nodes(lists) + len(cut) * 9
    assert count_nodes([]) == 0 and list(trees([], 8)) == []
    assert count_nodes([(4, 5), (4, 5), (4,)]) == 2


def test_leaves_begin_no_other_list():
    lists = lists_of(60, ids=3, longest=5)
    found = sort_lists(lists)
    places, leaf_of = leaves(found)
    ordered = [lists[i] for i in found.order_l.tolist()]
    assert ordered == sorted(lists)
    expected = [t for t in ordered if not any(o != t and o[: len(t)] == t for o in ordered)]
    assert [ordered[p] for p in places.tolist()] == expected and len(expected) < len(lists)
    for text, leaf in zip(ordered, leaf_of.tolist(), strict=True):
        assert expected[leaf][: len(text)] == text


@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.1.mlp", "layers.0:in"])
def test_activations_are_those_of_each_list_alone(tiny_lm, hookpoint):
    """By a tree at the output of a block, by rows elsewhere; in many small batches and in one."""
    lists = lists_of(50, ids=4)
    alone = [tiny_lm.capture_by_hooks(torch.tensor([t]), [hookpoint])[hookpoint][0, -1] for t in lists]
    read = {}
    for batch_tokens in (16, 512):
        met, read[batch_tokens] = {}, 0
        for which, x_BD, n_tokens in last_tokens(tiny_lm, lists, hookpoint, batch_tokens):
            read[batch_tokens] += n_tokens
            met |= dict(zip(which.tolist(), x_BD, strict=True))
        assert sorted(met) == list(range(len(lists)))
        for i, expected in enumerate(alone):
            torch.testing.assert_close(met[i], expected, rtol=1e-4, atol=1e-4)
    if hookpoint == "layers.1":
        assert read[512] == count_nodes(lists) < read[16]
    else:
        whole = sum(len(t) for t in lists if not any(o != t and o[: len(t)] == t for o in lists))
        assert whole < sum(map(len, lists)) and whole <= read[512] < 1.3 * whole


def test_what_a_node_gets_hangs_on_the_way_to_it_alone(tiny_lm):
    """A token that is not on the way to a list's last token changes nothing for it."""
    some = [(3, 4, 5), (3, 4, 6, 7), (9, 9)]
    more = [*some, (3, 4, 5, 8), (3, 5), (9, 8, 7, 6, 5, 4)]
    by = [{}, {}]
    for found, lists in zip(by, (some, more), strict=True):
        for which, x_BD, _ in last_tokens(tiny_lm, lists, "layers.1", 64):
            found |= {lists[i]: x for i, x in zip(which.tolist(), x_BD, strict=True)}
    for text in some:
        torch.testing.assert_close(by[0][text], by[1][text], rtol=1e-5, atol=1e-5)


def test_an_empty_list_is_refused(tiny_lm):
    with pytest.raises(ConfigError, match="without tokens"):
        list(last_tokens(tiny_lm, [(3,), ()], "layers.1", 64))
