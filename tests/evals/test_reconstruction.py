"""Oracles of METRICS A: identity, mean, shrunk and shifted reconstructions, the eigenvalue tail, planted densities."""

import numpy as np
import pytest
import torch

from evals.base import Normalisation
from evals.suite import reconstruction as rec
from evals.units import SetMeans
from sae.manifest import rng
from sae.ops import SparseLatents

N, D, F = 1_200, 16, 12


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    r = rng("reconstruction-test")
    return torch.from_numpy(r.normal(size=(N, D)) * np.linspace(0.5, 3, D) + 4)


@pytest.fixture(scope="module")
def doc() -> np.ndarray:
    return np.repeat(np.arange(N // 30), 30)


def accumulate(x, x_hat, doc, keep=None, codes=None, norm=None, block=N, order=None) -> rec.Accumulator:
    keep = np.ones(len(x), dtype=bool) if keep is None else keep
    means = SetMeans(x[torch.from_numpy(keep)].double().mean(0), x.double().mean(0))
    acc = rec.Accumulator(means, F if codes is not None else None)
    order = np.arange(len(x)) if order is None else order
    for start in range(0, len(x), block):
        i = order[start : start + block]
        part = None if codes is None else SparseLatents(codes.values_NK[i], codes.indices_NK[i])
        n = None if norm is None else Normalisation(norm.shift_N[i], norm.scale_N[i])
        acc.add(x[i], x_hat[i], doc[i], keep[i], part, n)
    return acc


def measured(x, x_hat, doc, **kwargs) -> dict:
    norm = kwargs.pop("norm", Normalisation(torch.zeros(len(x)), torch.ones(len(x))))
    return rec.estimates(accumulate(x, x_hat, doc, norm=norm, **kwargs), 0, 200)


def test_identity(x, doc) -> None:
    found = measured(x, x, doc)
    assert found["fvu"].value == 0 and found["explained_variance"].value == 1 and found["nmse_zero"].value == 0
    assert found["cosine"].value == pytest.approx(1) and found["cosine_centred"].value == pytest.approx(1)
    assert found["shrinkage"].value == pytest.approx(0, abs=1e-12) and found["bias_norm"].value == 0
    assert found["norm_ratio"].value == pytest.approx(1)
    assert found["fvu"].ci_low is None  # a perfect score in every resample is no reason for a zero-width interval


def test_the_mean_predictor_scores_one(x, doc) -> None:
    found = measured(x, x.mean(0).expand_as(x), doc)
    assert found["fvu"].value == pytest.approx(1, abs=1e-12)
    assert found["cosine_centred"].value == pytest.approx(0, abs=1e-6)
    assert found["bias_norm"].value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.3, 0.9, 1.5])
def test_shrunk_to_the_mean(x, doc, s: float) -> None:
    mean = x.mean(0)
    found = measured(x, mean + s * (x - mean), doc)
    assert found["fvu"].value == pytest.approx((1 - s) ** 2, abs=1e-12)
    if s > 0:
        assert found["shrinkage"].value == pytest.approx(1 - s, abs=1e-9)
    else:
        assert found["shrinkage"].failure == "no_effect"


def test_a_constant_offset_is_not_hidden(x, doc) -> None:
    """Pinned: dictionary_learning centres the residual and so hides a constant bias."""
    c = torch.linspace(-1, 1, D, dtype=torch.float64)
    found = measured(x, x + c, doc)
    variance = float((x - x.mean(0)).square().sum(-1).mean())
    assert found["fvu"].value == pytest.approx(float(c @ c) / variance, abs=1e-9)
    assert found["bias_norm"].value == pytest.approx(float(c.norm()) / variance**0.5, abs=1e-9)


def test_square_before_mean_is_not_what_we_do(x, doc) -> None:
    """Pinned: SAEBench 0.6.0 squares after averaging over the batch; dictionary_learning averages batch ratios."""
    x_hat = x.clone()
    x_hat[:30] += 50
    one, many = measured(x, x_hat, doc)["fvu"].value, measured(x, x_hat, doc, block=30)["fvu"].value
    assert one == pytest.approx(many, rel=1e-12)
    assert one == pytest.approx(30 * D * 2500 / float((x - x.mean(0)).square().sum()), rel=1e-12)


def test_block_size_and_order_do_not_matter(x, doc) -> None:
    x_hat = x * 0.9 + 0.1
    norm = Normalisation(x.mean(-1), x.std(-1))
    first = measured(x, x_hat, doc, norm=norm)
    second = measured(x, x_hat, doc, norm=norm, block=77, order=rng("order").permutation(N))
    for name, estimate in first.items():
        assert second[name].value == pytest.approx(estimate.value, rel=1e-12, abs=1e-12), name
        assert second[name].n == estimate.n == N // 30


def test_normalised_space_against_brute_force(x, doc) -> None:
    x_hat = x * 0.8 + 0.3
    shift, scale = x.mean(-1), x.std(-1)
    found = measured(x, x_hat, doc, norm=Normalisation(shift, scale))
    n = (x - shift[:, None]) / scale[:, None]
    y = (x_hat - shift[:, None]) / scale[:, None]
    expected = (n - y).square().sum() / (n - n.mean(0)).square().sum()
    assert found["fvu_normalized"].value == pytest.approx(float(expected), rel=1e-9)
    plain = measured(x, x_hat, doc)
    assert plain["fvu_normalized"].value == pytest.approx(plain["fvu"].value, rel=1e-9)


def test_pca_is_the_eigenvalue_tail(x, doc) -> None:
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors[:, -5:]
    found = measured(x, x.mean(0) + centred @ basis @ basis.T, doc)
    assert found["fvu"].value == pytest.approx(float(values[:-5].sum() / values.sum()), rel=1e-9)


def test_dropped_tokens_enter_only_the_unfiltered_value(x, doc) -> None:
    sink = x.clone()
    sink[::40] *= 300
    keep = np.ones(N, dtype=bool)
    keep[::40] = False
    x_hat = sink.clone()
    x_hat[torch.from_numpy(keep)] += 1.0
    found = measured(sink, x_hat, doc, keep=keep)
    rest = sink[torch.from_numpy(keep)]
    variance = float((rest - rest.mean(0)).square().sum())
    assert found["fvu"].value == pytest.approx(keep.sum() * D / variance, rel=1e-9)
    assert found["fvu_unfiltered"].value < found["fvu"].value / 100  # the sinks would make it look good


def test_edges(x, doc) -> None:
    constant = torch.ones(N, D, dtype=torch.float64)
    found = measured(constant, constant * 0.5, doc)
    assert found["fvu"].failure == "constant_target" and found["cosine"].value == pytest.approx(1)
    single = measured(x[:1], x[:1] * 0.5, doc[:1])
    assert single["fvu"].failure == "constant_target" and single["cosine"].value == pytest.approx(1)
    assert single["cosine"].ci_low is None
    broken = x.clone()
    broken[100] = float("nan")
    acc = accumulate(x, broken, doc, norm=Normalisation(torch.zeros(N), torch.ones(N)))
    assert rec.estimates(acc, 0, 50)["fvu"].failure == "non_finite" and acc.first_bad_document == 3


def test_planted_densities_are_exact_counts(x, doc) -> None:
    values, indices = torch.zeros(N, 3), torch.zeros(N, 3, dtype=torch.int64)
    values[:, 0], indices[:, 0] = 1.0, 1  # latent 1 is always on
    values[: N // 4, 1], indices[: N // 4, 1] = 2.0, 2  # density 1/4
    values[0, 2], indices[0, 2] = 0.5, 3  # one token
    acc = accumulate(x, x, doc, codes=SparseLatents(values, indices), block=100)
    assert acc.active_F.tolist() == [0, N, N // 4, 1] + [0] * 8
    found = rec.code_estimates(acc, 0, 200)
    assert found["l0"].value == pytest.approx((N + N // 4 + 1) / N)
    assert found["dead_frac"].value == pytest.approx(9 / 12) and found["dead_frac"].n == N
    assert found["dead_frac_10m"].failure == "too_few_rows"
    assert found["dense_frac_01"].value == pytest.approx(2 / 12)
    assert found["dense_frac_10"].value == pytest.approx(2 / 12)
    assert (found["l0_p05"].value, found["l0_p95"].value) == (1, 2)
    histogram = rec.density_histogram(acc.active_F, N)
    assert histogram["dead"] == 9 and sum(histogram.values()) == F
    assert histogram["-0.25"] == 1 and histogram["-0.75"] == 1 and histogram["-3.25"] == 1


def test_the_percentiles_of_l0_are_the_5th_and_the_95th(x, doc) -> None:
    """4 % of the tokens have none, 2 % one, 8 % seven, 6 % eight active latents, all others four."""
    hundredth = N // 100
    active_N = np.repeat([0, 1, 4, 7, 8], [4 * hundredth, 2 * hundredth, 80 * hundredth, 8 * hundredth, 6 * hundredth])
    values = (torch.arange(8)[None] < torch.from_numpy(active_N)[:, None]).float()
    acc = accumulate(x, x, doc, codes=SparseLatents(values, torch.arange(8).expand(N, 8)), block=100)
    found = rec.code_estimates(acc, 0, 200)
    expected = (np.quantile(active_N, q, method="inverted_cdf") for q in (0.05, 0.95))
    assert (found["l0_p05"].value, found["l0_p95"].value) == tuple(expected) == (1, 8)


def test_quantile_of_counts() -> None:
    q = rec.quantile_of_counts(np.arange(1.0, 101.0), 0.95)
    assert q(np.ones(100)) == 95
    assert q(np.ones((3, 100))).tolist() == [95, 95, 95]


def test_tokens_without_latents_count_as_zero(x, doc) -> None:
    acc = accumulate(x, x, doc, codes=SparseLatents(torch.zeros(N, 1), torch.zeros(N, 1, dtype=torch.int64)))
    found = rec.code_estimates(acc, 0, 50)
    assert found["l0"].value == 0 and found["dead_frac"].value == 1
    assert acc.l0_counts[0].total("n") == N


@pytest.mark.parametrize("scale", [0.8, 1.0])
def test_the_best_values_undo_shrinkage_on_the_same_latents(tmp_path, scale: float) -> None:
    """x is made of three of twelve orthonormal rows; an encoder that says 0.8 of their values errs by 0.2 of each."""
    from types import SimpleNamespace

    from golden_worlds import topk
    from memory_store import MemoryStore, MemoryTokens, context

    r = rng("refined")
    rows = np.linalg.qr(r.normal(size=(D, D)))[0][:F]
    z = np.zeros((N, F))
    for i in range(N):
        z[i, r.choice(F, size=3, replace=False)] = r.uniform(1, 2, size=3)
    x = torch.from_numpy((z @ rows).astype(np.float32))
    subject = topk(rows.astype(np.float32), 0.0, 3, "planted")
    subject.sae.W_enc_FD.mul_(scale)
    tokens = MemoryTokens(np.zeros((N // 30, 30), dtype=np.uint16), np.repeat(np.arange(N // 30), 30).reshape(-1, 30))
    keep = np.arange(N) % 30 > 0
    store = MemoryStore(tokens, x, keep)
    lm = SimpleNamespace(name="lm", revision="r")
    found = {}
    for preset in ("tiny", "paper"):
        ctx = context(lm, "layers.1", store, subject, tmp_path)
        ctx.preset = preset
        found[preset] = {row.metric: row for row in rec.PLUGIN.run(ctx).rows}
    assert not {"fvu_refined", "fvu_of_values"} & found["tiny"].keys()
    kept = x[torch.from_numpy(keep)].double()
    share = float((1 - scale) ** 2 * kept.square().sum() / (kept - kept.mean(0)).square().sum())
    got = found["paper"]
    assert got["fvu"].value == pytest.approx(share, abs=1e-6) and got["fvu_refined"].value == pytest.approx(0, abs=1e-9)
    assert got["fvu_of_values"].value == pytest.approx(share, abs=1e-6)
    if scale < 1:
        assert got["fvu_of_values"].n == N // 30 and got["fvu_of_values"].ci_low < share < got["fvu_of_values"].ci_high
