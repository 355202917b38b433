"""Newton probes against scikit-learn and closed forms; invariances; the dense ceiling."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evals import probes
from evals.probe_activations import TaskSplit
from evals.probe_search import dense_block, random_directions_block, search, sparse_block
from evals.probes import apply_probe, dense_probe, entropy, fit_probes, score_logits
from sae.ops import SparseLatents

LN2 = math.log(2)


def labelled(n=300, seed=0, rate=0.4, signal=1.0):
    draw = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=draw) < rate).float()
    return torch.randn(n, generator=draw) + signal * y, y


SHAPES = {
    "dense": lambda x: x,
    "sparse": lambda x: torch.where(torch.arange(len(x)) % 10 > 0, 0.0, x.abs()),
    "shifted": lambda x: x + 1e4,
    "large": lambda x: x * 300,
    "small": lambda x: x * 1e-4,
}


@pytest.mark.parametrize("signal", [0.0, 0.7, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_scikit_learn(shape, signal):
    x, y = labelled(signal=signal)
    x = SHAPES[shape](x)
    fits = fit_probes(x[None], y)
    s = x.double().numpy()
    s = ((s - s.mean()) / s.std())[:, None]
    model = LogisticRegression(C=1 / probes.RIDGE, tol=1e-10, max_iter=5000).fit(s, y.numpy())
    expected = score_logits(model.decision_function(s), y.numpy()).loss_N.mean()
    assert abs(float(fits.ce_F[0]) - expected) <= 1e-5
    assert fits.n_unconverged == 0
    assert np.isclose(apply_probe(fits, 0, x, y).loss_N.mean(), expected, atol=1e-5)


@pytest.mark.parametrize("n", [120, 256, 1_000])
def test_the_loss_is_that_of_scikit_learn_to_a_millionth(n):
    """64 latents, dense and sparse, weak and strong; the mean cross-entropy on train."""
    draw = torch.Generator().manual_seed(n)
    y = (torch.arange(n) % 2).float()
    strength = torch.linspace(0, 2.5, 64)[:, None]
    h = torch.randn(64, n, generator=draw) + strength * (2 * y - 1)
    h[::2] = torch.where(torch.rand(32, n, generator=draw) < 0.1, h[::2].abs(), 0.0)
    fits = fit_probes(h, y)
    for i in range(64):
        s = h[i].double().numpy()
        s = ((s - s.mean()) / s.std())[:, None]
        model = LogisticRegression(C=1 / probes.RIDGE, tol=1e-10, max_iter=5000).fit(s, y.numpy())
        expected = score_logits(model.decision_function(s), y.numpy()).loss_N.mean()
        assert abs(float(fits.ce_F[i]) - expected) <= 1e-6, i


def test_planted_logit_reaches_the_quadrature_value():
    draw = torch.Generator().manual_seed(0)
    s = torch.randn(20_000, generator=draw)
    y = (torch.rand(20_000, generator=draw) < torch.sigmoid(2 * s)).float()
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    p = 1 / (1 + np.exp(-2 * nodes))
    expected = float((weights * -(p * np.log(p) + (1 - p) * np.log1p(-p))).sum() / weights.sum())
    noise = torch.randn(4, 20_000, generator=draw)
    fits = fit_probes(torch.cat([noise, s[None]]), y)
    assert fits.best() == 4
    assert abs(float(fits.ce_F[4]) - expected) < 0.01


def test_separable_labels():
    y = (torch.arange(400) % 2).float()
    fits = fit_probes((2 * y - 1)[None], y)
    assert float(fits.ce_F[0]) < 1e-3 and math.isfinite(float(fits.w_F[0])) and fits.n_unconverged == 0


def test_constant_and_dead_features_say_the_base_rate():
    y = (torch.arange(200) % 2).float()
    fits = fit_probes(torch.stack([torch.zeros(200), torch.full((200,), 1e4), torch.randn(200)]), y)
    assert fits.ce_F[:2].tolist() == [entropy(0.5)] * 2 == [LN2] * 2
    assert fits.w_F[:2].tolist() == [0.0, 0.0]
    assert fits.n_constant == 2
    other = apply_probe(fits, 0, torch.full((4,), 7.0), torch.tensor([0.0, 1, 0, 1]))
    assert np.allclose(other.loss_N, LN2)


def test_nan_features_are_left_out_and_counted():
    x, y = labelled()
    broken = x.clone()
    broken[3] = math.nan
    fits = fit_probes(torch.stack([broken, x]), y)
    assert fits.n_nonfinite == 1 and fits.best() == 1
    assert fit_probes(broken[None], y).best() == -1


def test_permuted_labels_do_not_generalise():
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(20):
        h = torch.randn(500, 240, generator=draw)
        y = (torch.randperm(240, generator=draw) % 2).float()
        fits = fit_probes(h[:, :120], y[:120])
        losses.append(apply_probe(fits, fits.best(), h[fits.best(), 120:], y[120:]).loss_N.mean())
    assert np.mean(losses) >= LN2 - 0.02


def test_order_and_block_size_change_nothing(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(70, 150, generator=draw) * 10 ** torch.randint(-3, 3, (70, 1), generator=draw)
    y = (torch.arange(150) % 2).float()
    fits = fit_probes(h, y)
    rows, features = torch.randperm(150, generator=draw), torch.randperm(70, generator=draw)
    assert torch.allclose(fit_probes(h[:, rows], y[rows]).ce_F, fits.ce_F, atol=1e-6)
    assert torch.allclose(fit_probes(h[features], y).ce_F, fits.ce_F[features], atol=1e-6)
    monkeypatch.setattr(probes, "_BLOCK_NUMBERS", 1)
    assert torch.allclose(fit_probes(h, y).ce_F, fits.ce_F, atol=1e-6)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="both classes"):
        fit_probes(torch.randn(3, 10), torch.ones(10))


def splits_of(n):
    half = n // 2
    return [
        TaskSplit("a", 0, np.arange(half), np.arange(half, n)),
        TaskSplit("b", 0, np.arange(0, n, 2), np.arange(1, n, 2)),
    ]


def test_search_finds_the_planted_feature_whatever_the_blocks(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    n, f = 240, 100
    y = (torch.randperm(n, generator=draw) % 2).float()
    x = torch.randn(n, f, generator=draw)
    x[:, 57] += 3 * y
    x[:, 90] = x[:, 57]  # an equal twin: the lower index wins
    block = dense_block(lambda x, columns: x[:, columns], x)
    whole = search(block, f, n, y, splits_of(n), "t")
    assert [c.feature for c in whole.choices] == [57, 57]
    from evals import probe_search

    monkeypatch.setattr(probe_search, "_BLOCK_NUMBERS", 1)
    parts = search(block, f, n, y, splits_of(n), "t")
    for a, b in zip(whole.choices, parts.choices, strict=True):
        assert a.feature == b.feature and np.allclose(a.test.loss_N, b.test.loss_N, atol=1e-6)


def test_sparse_blocks_equal_the_dense_code():
    draw = torch.Generator().manual_seed(0)
    n, f, k = 30, 50, 4
    indices = torch.stack([torch.randperm(f, generator=draw)[:k] for _ in range(n)])
    values = torch.rand(n, k, generator=draw)
    values[3] = 0.0  # empty slots, whatever their index
    dense = torch.zeros(n, f).scatter_(1, indices, values)
    block = sparse_block(SparseLatents(values, indices), n)
    assert torch.equal(torch.cat([block(0, 20), block(20, 50)]).T, dense)


def test_random_directions_are_unit_projections_of_standardised_channels():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=draw) * torch.arange(1, 9) + 5
    block = random_directions_block(x, np.arange(500), 64, 0)
    h = torch.cat([block(0, 10), block(10, 64)])
    assert torch.allclose(h.mean(dim=1), torch.zeros(64), atol=1e-4)
    assert 0.5 < float(h.var(dim=1).mean()) < 1.5
    again = random_directions_block(x, np.arange(500), 64, 0)
    # Equal to the bit in equal blocks; a product that is cut otherwise may round otherwise.
    assert torch.equal(h, torch.cat([again(0, 10), again(10, 64)]))
    torch.testing.assert_close(h, again(0, 64), rtol=1e-5, atol=1e-5)
    assert not torch.equal(h, random_directions_block(x, np.arange(500), 64, 1)(0, 64))


def test_dense_probe_equals_the_unrotated_fit_and_generalises():
    draw = np.random.default_rng(0)
    n, d = 160, 300
    direction = draw.normal(size=d) / np.sqrt(d)
    y = np.arange(n) % 2
    x = draw.normal(size=(n, d)) + 4 * np.outer(2 * y - 1, direction)
    found = dense_probe(x[:80].astype(np.float32), y[:80], np.arange(80) // 2, x[80:].astype(np.float32), y[80:])
    mean, std = x[:80].mean(axis=0), x[:80].std(axis=0)
    model = LogisticRegression(C=found.c, tol=1e-8, max_iter=5000).fit((x[:80] - mean) / std, y[:80])
    expected = score_logits(model.decision_function((x[80:] - mean) / std), y[80:]).loss_N
    assert np.allclose(found.scores.loss_N, expected, atol=5e-3)
    assert found.scores.loss_N.mean() < 0.3
    assert found.c in probes.DENSE_CS


def test_rounding_of_a_loud_channel_is_no_feature():
    """A millionth of its mean is what float32 leaves of it; here it would tell the classes apart for certain."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(200, 5)).astype(np.float32), np.arange(200) % 2
    x[:, 2] = 1e6 + 0.0625 * y
    found = dense_probe(x[:100], y[:100], np.arange(100), x[100:], y[100:])
    assert found.scores.loss_N.mean() > LN2 - 0.02


def test_dense_probe_survives_a_constant_channel():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(100, 5)).astype(np.float32), np.arange(100) % 2
    x[:, 2] = 3.0
    x[:, 0] += 2 * y
    assert dense_probe(x[:50], y[:50], np.arange(50), x[50:], y[50:]).scores.loss_N.mean() < LN2
