"""Replacing every kept position by one vector: rows that become equal share a pass, and the losses are the same."""

import numpy as np
import pytest
import torch
from memory_store import memory_store

from evals.passes import Passes, distinct_rows


@pytest.fixture(scope="module")
def hookpoint(tiny_lm) -> str:
    return tiny_lm.default_hookpoint()


@pytest.fixture(scope="module")
def passes(tiny_lm, hookpoint) -> Passes:
    store = memory_store(tiny_lm, hookpoint)
    return Passes(tiny_lm.upper(hookpoint), store, np.arange(len(store.tokens.tokens_BL)), (0, 1, 2))


def test_distinct_rows() -> None:
    x = torch.arange(24.0).reshape(4, 3, 2)
    keep = torch.tensor([[False, True, True]] * 3 + [[False, True, False]])
    x[2, 0] = x[0, 0]  # rows 0 and 2 differ in kept positions alone
    first, kind = distinct_rows(keep, x)
    assert first == [0, 1, 3] and kind.tolist() == [0, 1, 0, 2]
    x[2, 0, 1] += 1e-6 * 32
    assert distinct_rows(keep, x)[0] == [0, 1, 2, 3]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_losses_of_a_constant_equal_the_pass_of_every_row(passes, scale, monkeypatch) -> None:
    rows = seen = 0
    hidden = passes.upper.hidden

    def counted(resid, *rest):
        nonlocal seen
        seen += len(resid)
        return hidden(resid, *rest)

    for batch in passes.batches("rows"):
        x = batch.block.x_BLD
        value = scale * x[batch.keep_BL].mean(dim=0)
        every = passes.losses(batch, passes.states(batch, torch.where(batch.keep_BL[..., None], value, x)))
        monkeypatch.setattr(passes.upper, "hidden", counted)
        shared = passes.constant_losses(batch, value)
        monkeypatch.undo()
        assert shared.shape == every.shape and np.abs(shared - every).max() < 1e-5
        assert np.ptp(shared) > 0.1  # what is to be predicted differs from row to row
        rows += len(x)
    assert 0 < seen < rows


def test_without_upper_layers_of_their_own_every_row_is_passed(passes, monkeypatch) -> None:
    (batch, *_) = passes.batches("rows")
    expected = passes.constant_losses(batch, torch.zeros(()))
    monkeypatch.setattr(passes.upper, "is_exact", False)
    assert np.abs(passes.constant_losses(batch, torch.zeros(())) - expected).max() < 1e-5
