"""Baselines: PCA is the best linear code, random directions are unit lottery tickets, names are readable and stable."""

import re

import numpy as np
import pytest
import torch
from memory_store import MemoryStore, MemoryTokens, context, info, memory_store

from evals.base import Subject
from evals.baselines import PCA, Channels, Moments, RandomDirections, baseline_subjects, fit_moments
from evals.results import SubjectInfo
from evals.suite import reconstruction
from sae.errors import ConfigError, DataError, Unsupported
from sae.manifest import rng

D = 12
REFERENCE = SubjectInfo(
    sae_id="lm.layers.1.topk-f64-k4.s0-0", kind="sae", lm="lm", lm_revision="r", hookpoint="layers.1",
    architecture="topk", d_in=D, d_sae=64, k=4, train_tokens=10, sae_sha256="0",
)  # fmt: skip


def store_of(x: torch.Tensor, keep: np.ndarray | None = None) -> MemoryStore:
    keep = np.ones(len(x), dtype=bool) if keep is None else keep
    ids = np.zeros((1, len(x)), dtype=np.uint16)
    return MemoryStore(MemoryTokens(ids, np.zeros((1, len(x)), dtype=np.int64)), x, keep, key="store")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    r = rng("baselines")
    mixing = r.normal(size=(D, D)) * np.linspace(0.2, 3, D)
    return torch.from_numpy((r.normal(size=(3_000, D)) @ mixing + 100).astype(np.float32))


@pytest.fixture(scope="module")
def moments(x) -> Moments:
    return fit_moments(store_of(x))


def test_moments_of_kept_tokens(x, moments) -> None:
    assert np.allclose(moments.mean_D, x.double().mean(0), rtol=1e-12)
    assert np.allclose(moments.covariance_DD, np.cov(x.double().numpy().T, bias=True), rtol=1e-9, atol=1e-9)
    spoiled, keep = x.clone(), np.ones(len(x), dtype=bool)
    spoiled[::7] = 1e6
    keep[::7] = False
    expected = x[torch.from_numpy(keep)].double().mean(0)
    assert np.allclose(fit_moments(store_of(spoiled, keep)).mean_D, expected, rtol=1e-9)
    assert fit_moments(store_of(x), 500).n_tokens == 500
    with pytest.raises(DataError, match="token filter|passes the filter"):
        fit_moments(store_of(x, np.zeros(len(x), dtype=bool)))


@pytest.mark.parametrize("k", [1, 4, D, D + 5])
def test_pca_leaves_the_eigenvalue_tail(x, moments, k: int) -> None:
    pca = PCA(moments, k, REFERENCE)
    error = (x.double() - pca.reconstruct(x).double()).square().sum() / len(x)
    tail = torch.linalg.eigvalsh(moments.covariance_DD)[: max(0, D - k)].sum()
    assert float(error) == pytest.approx(float(tail), rel=1e-4, abs=1e-8)
    assert pca.info.k == min(k, D)


def test_pca_beats_any_other_projection_of_its_rank(x, moments) -> None:
    best = (x - PCA(moments, 4, REFERENCE).reconstruct(x)).square().sum()
    for i in range(5):
        basis, _ = torch.linalg.qr(torch.from_numpy(rng("basis", i).normal(size=(D, 4)).astype(np.float32)))
        centred = x - x.mean(0)
        assert best < (centred - centred @ basis @ basis.T).square().sum()


def test_random_directions(x, moments) -> None:
    one, again, other = (RandomDirections(moments, 200, seed, REFERENCE) for seed in (0, 0, 1))
    h = one.features(x)
    assert torch.equal(h, again.features(x)) and not torch.equal(h, other.features(x))
    assert one.info == again.info and one.info.sae_id != other.info.sae_id
    columns = torch.tensor([3, 150, 7])
    assert torch.allclose(one.features(x, columns), h[:, columns], atol=1e-4)
    # unit directions on standardised channels: the mean variance over directions is 1
    assert float(h.var(dim=0).mean()) == pytest.approx(1, rel=0.15)
    assert h.mean(dim=0).abs().max() < 1e-2


def test_a_constant_channel_is_harmless(x) -> None:
    still = x.clone()
    still[:, 3] = 5.0
    h = RandomDirections(fit_moments(store_of(still)), 50, 0, REFERENCE).features(still)
    assert h.isfinite().all()


def test_channels(x) -> None:
    channels = Channels(REFERENCE)
    assert torch.equal(channels.features(x), x) and channels.info.d_sae == D
    assert torch.equal(channels.features(x, torch.tensor([2, 0])), x[:, [2, 0]])


def test_subjects_of_a_run(x) -> None:
    subjects = baseline_subjects(store_of(x), REFERENCE, 0, l0s=[3.6, 4.2, 900.0])
    assert [s.info.architecture for s in subjects] == ["pca", "pca", "random_directions", "channels"]
    assert [s.info.k for s in subjects] == [4, D, None, None]
    for subject in subjects:
        assert isinstance(subject, Subject) and subject.info.kind == "baseline"
        assert re.fullmatch(r"baseline\.[a-z0-9._-]+-[0-9a-f]{8}", subject.info.sae_id), subject.info.sae_id
        assert subject.info.lm == "lm" and subject.info.hookpoint == "layers.1"
    assert len({s.info.sae_id for s in subjects}) == 4
    assert [s.info for s in subjects] == [
        s.info for s in baseline_subjects(store_of(x), REFERENCE, 0, l0s=[3.6, 4.2, 900.0])]
    assert baseline_subjects(store_of(x), REFERENCE, 0)[0].info.k == REFERENCE.k
    odd = SubjectInfo(**{**REFERENCE.__dict__, "hookpoint": "H.3/mlp:in", "k": None})
    assert [s.info.architecture for s in baseline_subjects(store_of(x), odd, 0)] == ["random_directions", "channels"]
    assert "/" not in baseline_subjects(store_of(x), odd, 0)[1].info.sae_id


def test_what_a_baseline_cannot_answer_is_said(x, moments) -> None:
    with pytest.raises(Unsupported, match="baseline.pca.*reconstruct"):
        PCA(moments, 2, REFERENCE).features(x)
    with pytest.raises(Unsupported, match="sparse codes"):
        Channels(REFERENCE).encode_sparse(x)
    with pytest.raises(ConfigError, match="at least one"):
        PCA(moments, 0, REFERENCE)


def test_pca_rows_of_the_tiny_model(tiny_lm, tmp_path) -> None:
    hookpoint = tiny_lm.default_hookpoint()
    train = memory_store(tiny_lm, hookpoint, rows=24, seed=1, split="train")
    test = memory_store(tiny_lm, hookpoint)
    reference = info(tiny_lm, hookpoint, "s", d_in=train.d_in, d_sae=64, k=8)
    few, full = baseline_subjects(train, reference, 0, l0s=[8, train.d_in])[:2]
    for subject, low, high in ((few, 0.05, 0.95), (full, 0.0, 1e-9)):
        result = reconstruction.PLUGIN.run(context(tiny_lm, hookpoint, test, subject, tmp_path))
        rows = {row.metric: row for row in result.rows}
        assert low <= rows["fvu"].value <= high
        assert rows["l0"].value == subject.info.k and "dead_frac" not in rows
        assert rows["fvu"].kind == "baseline"
