"""Stability over seeds on copies: permuted, rescaled, flipped, partly replaced SAEs have known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from memory_store import context, memory_store, topk_subject

from evals import seeds
from evals.base import SAESubject
from evals.measure import Measurement
from evals.run_log import RunLog
from evals.seeds import jaccard, match, peers_of
from evals.suite.seed_stability import PLUGIN
from sae.config import TrainConfig
from sae.errors import Unsupported


@pytest.fixture(scope="module")
def world(tiny_lm):
    hookpoint = tiny_lm.default_hookpoint()
    store = memory_store(tiny_lm, hookpoint, rows=16)
    return tiny_lm, hookpoint, store, topk_subject(tiny_lm, hookpoint, store, steps=50)


def changed(subject, name="copy", *, order=None, factor=1.0, replaced=0):
    """A copy of an SAE whose latents are permuted, their decoder rows scaled, the first ``replaced`` drawn anew."""
    import copy

    sae = copy.deepcopy(subject.sae)
    order = torch.arange(sae.d_sae) if order is None else order
    with torch.no_grad():
        for tensor in (sae.W_dec_FD, sae.W_enc_FD, sae.b_enc_F):
            tensor.copy_(tensor[order].clone())
        sae.W_dec_FD *= factor
        if replaced:
            generator = torch.Generator().manual_seed(0)
            for tensor in (sae.W_dec_FD, sae.W_enc_FD):
                tensor[:replaced] = torch.randn(replaced, tensor.shape[1], generator=generator)
    sae.cfg = replace(sae.cfg, sae_id=name)
    return SAESubject(sae, replace(subject.info, sae_id=name))


def run(world, *peers, subject=None):
    lm, hookpoint, store, own = world
    return PLUGIN.run(context(lm, hookpoint, store, subject or own, None, peers=tuple(peers)))


def values(result, slice=""):
    return {row.metric: row.value for row in result.rows if row.slice == slice}


def test_a_permuted_copy_is_the_same_dictionary(world):
    order = torch.randperm(world[3].sae.d_sae, generator=torch.Generator().manual_seed(3))
    found = values(run(world, changed(world[3], order=order)))
    for metric in ("shared_frac", "matched_cos", "mmcs", "mutual_nn_frac", "firing_jaccard"):
        assert found[metric] == pytest.approx(1.0, abs=1e-6), metric
    assert found["floor_shared_frac"] < 0.1 and found["floor_matched_cos"] < 0.7


def test_lengths_do_not_count_and_signs_do(world):
    own = world[3]
    assert values(run(world, changed(own, factor=7.0)))["shared_frac"] == 1.0
    flipped = run(world, changed(own, factor=-1.0))
    assert values(flipped)["shared_frac"] < 0.1  # what is left are chance partners
    d = torch.eye(8)
    assert match(d, d, -d, d).cos_F.max() <= 0 and not match(d, d, -d, d).mutual_F.any()


@pytest.mark.parametrize("kept", [1 / 3, 0.75])
def test_the_shared_share_is_that_of_the_rows_kept(kept):
    n, width = 300, 256
    generator = torch.Generator().manual_seed(0)
    dec, enc = torch.randn(n, width, generator=generator), torch.randn(n, width, generator=generator)
    other_dec, other_enc = dec.clone(), enc.clone()
    gone = round(n * (1 - kept))
    other_dec[:gone] = torch.randn(gone, width, generator=generator)
    order = torch.randperm(n, generator=generator)
    found = match(dec, enc, other_dec[order], other_enc[order])
    shared = (found.cos_F >= seeds.SHARED) & (found.cos_enc_F >= seeds.SHARED)
    assert shared.mean() == pytest.approx(kept, abs=0.002)
    assert found.mutual_F.mean() == pytest.approx(kept, abs=0.002)
    assert (found.partner_F[gone:] == np.argsort(order.numpy())[gone:]).all()


def test_an_equal_decoder_with_another_encoder_is_not_shared():
    generator = torch.Generator().manual_seed(0)
    dec, enc, other = (torch.randn(50, 64, generator=generator) for _ in range(3))
    found = match(dec, enc, dec, other)
    assert found.cos_F.min() > 0.999 and (found.cos_enc_F >= seeds.SHARED).mean() == 0


def test_the_surplus_of_a_larger_side_is_unmatched():
    d = torch.eye(10)
    found = match(d, d, d[:6], d[:6])
    assert (found.partner_F == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]).all() and found.cos_F.sum() == 6
    assert (match(d[:6], d[:6], d, d).partner_F == np.arange(6)).all()


def test_a_match_reversed_is_the_match_of_the_reverse():
    generator = torch.Generator().manual_seed(0)
    dec, enc = torch.randn(40, 16, generator=generator), torch.randn(40, 16, generator=generator)
    dec_b = dec[:30] + 0.5 * torch.randn(30, 16, generator=generator)
    enc_b = enc[:30] + 0.5 * torch.randn(30, 16, generator=generator)
    there, back = match(dec, enc, dec_b, enc_b), match(dec_b, enc_b, dec, enc)
    turned = there.reversed()
    assert there.mutual_F.any() and not there.mutual_F.all()
    for name in ("partner_F", "cos_F", "cos_enc_F", "best_F", "best_back_G", "mutual_F"):
        np.testing.assert_allclose(getattr(turned, name), getattr(back, name), err_msg=name)


def test_firing_overlap_is_that_of_sets():
    from scipy.sparse import csc_matrix

    a = csc_matrix(np.array([[1, 0], [1, 1], [0, 1], [0, 0]], dtype=np.int32))
    b = csc_matrix(np.array([[0, 1], [1, 1], [1, 1], [1, 0]], dtype=np.int32))
    assert jaccard(a, b, np.array([1, 0])) == pytest.approx([2 / 3, 2 / 3])
    assert np.isnan(jaccard(a, b, np.array([1, -1]))[1])


def test_several_seeds_are_averaged_and_each_has_a_row(world):
    own = world[3]
    others = [changed(own, "same"), changed(own, "half", replaced=own.sae.d_sae // 2)]
    result = run(world, *others)
    each = [values(result, f"peer={p.info.sae_id}") for p in others]
    mean = np.mean([v["shared_frac"] for v in each])
    assert each[0]["shared_frac"] == 1.0 and each[1]["shared_frac"] < 0.8
    assert values(result)["shared_frac"] == pytest.approx(mean)
    table = result.details
    assert table["shared_frac.num"].sum() / table["shared_frac.den"].sum() == pytest.approx(mean)
    deciles = [values(result, f"decile={i}")["shared_frac"] for i in range(1, 11)]
    assert np.mean(deciles) == pytest.approx(mean, abs=0.05)
    assert result.counts["n_alive"] == len(table) == next(r for r in result.rows if r.slice == "").n
    row = next(r for r in result.rows if r.slice == "" and r.metric == "shared_frac")
    assert row.ci_low < row.value < row.ci_high


def test_dead_saes_are_undefined_and_a_lone_one_refused(world):
    dead = changed(world[3], "dead")
    with torch.no_grad():
        dead.sae.b_enc_F -= 1e6
        dead.sae.W_enc_FD *= 0
    for pair in ((dead, world[3]), (world[3], dead)):
        result = run(world, pair[1], subject=pair[0])
        assert {r.failure for r in result.rows} == {"no_active_latent"} and values(result)["mmcs"] is None
    with pytest.raises(Unsupported, match="no other seed"):
        run(world)


def test_many_latents_are_matched_by_neighbours_alone(world, monkeypatch):
    monkeypatch.setattr(seeds, "MAX_HUNGARIAN", 8)
    result = run(world, changed(world[3]))
    found = {r.metric: r for r in result.rows if r.slice == ""}
    assert found["mutual_nn_frac"].value == 1.0 and found["mmcs"].value == pytest.approx(1.0)
    assert found["shared_frac"].failure == "gate_failed" and found["firing_jaccard"].value is None


def test_the_two_sides_of_a_pair_agree(world):
    other = changed(world[3], "half", replaced=world[3].sae.d_sae // 2)
    there, back = values(run(world, other)), values(run(world, world[3], subject=other))
    assert there["mmcs"] == pytest.approx(back["mmcs"], abs=1e-9)


def trained(subject, name, **settings):
    copy = changed(subject, name)
    copy.sae.cfg = replace(copy.sae.cfg, train=TrainConfig(**{"d_sae": 64, "k": 8} | settings))
    return copy


def test_peers_differ_in_the_seed_alone(world):
    own = world[3]
    subjects = [trained(own, "s0"), trained(own, "s1", seed=1), trained(own, "s2", seed=2), trained(own, "lr", lr=1e-2)]
    assert [p.info.sae_id for p in peers_of(subjects[0], subjects)] == ["s1", "s2"]
    assert peers_of(subjects[3], subjects) == [] and peers_of(own, [*subjects, own]) == []


def test_a_run_without_seeds_leaves_it_out(world, tmp_path):
    lm, hookpoint, store, own = world
    subjects = [trained(own, "s0"), trained(own, "s1", seed=1), trained(own, "lr", lr=1e-2)]
    log = RunLog(root=tmp_path, preset="tiny", key="k", config={})
    measurement = Measurement(
        root=tmp_path, preset="tiny", seed=0, hookpoint=hookpoint, log=log, parts={"stores": lambda: {"test": store}},
        latents=lambda i: None, scores=lambda i: None, load_lm=lambda: lm,
        peers=lambda subject: peers_of(subject, subjects),
    )  # fmt: skip
    measurement.run_all([PLUGIN], subjects)
    assert sorted(f.parent.parent.name for f in measurement.folders) == ["s0", "s1"] and not log.failures
