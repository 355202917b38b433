"""Oracles of METRICS E on toy language models whose effects are known, and the real runner on the tiny one."""

import math

import numpy as np
import pytest
import torch

from evals.suite import ablation_sparsity as ablation
from sae.manifest import rng

T = ablation.T_POSITIONS
L, P = 40, 12


class ToyUpper:
    """logits = U h; without mixing h is the residual, with ``copying`` the sum of all residuals so far."""

    is_exact = True

    def __init__(self, U_VD: torch.Tensor, copying: bool = False) -> None:
        self.U_VD, self.copying = U_VD, copying

    def prefix(self, resid_BPD: torch.Tensor) -> torch.Tensor:
        return resid_BPD.sum(dim=1, keepdim=True)

    def continue_from(self, past: torch.Tensor, resid_BTD: torch.Tensor, first_position: int) -> torch.Tensor:
        return (past + resid_BTD.cumsum(1) if self.copying else resid_BTD) @ self.U_VD.T


class FullPasses(ToyUpper):
    """The same, for a model whose layers cannot run apart."""

    is_exact = False

    def logits(self, resid_BLD: torch.Tensor, *, ids_BL: torch.Tensor) -> torch.Tensor:
        assert ids_BL.shape == resid_BLD.shape[:2]
        return (resid_BLD.cumsum(1) if self.copying else resid_BLD) @ self.U_VD.T


def ablator(upper: ToyUpper, width: int) -> ablation.Ablator:
    x = torch.from_numpy(rng("ablation-x").normal(size=(L, width)).astype(np.float32))
    return ablation.Ablator(upper, x, torch.zeros(L, dtype=torch.int64), P, T)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.from_numpy(rng("gaussian", shape).normal(size=shape).astype(np.float32))


def test_one_token_at_one_position() -> None:
    effects = ablator(ToyUpper(torch.eye(50)), 50).effects(torch.eye(50)[:3])
    assert effects.values["sparsity"] == pytest.approx([1 / (50 * T)] * 3, rel=1e-4)
    assert effects.values["sparsity_vocab"] == pytest.approx([1 / 50] * 3, rel=1e-4)
    assert effects.values["time_participation"] == pytest.approx([1 / T] * 3, rel=1e-4)
    assert effects.values["effect_share_tau0"] == pytest.approx([1.0] * 3, rel=1e-6)
    assert effects.values["effect_rms"] == pytest.approx([math.sqrt(1 / (50 * T))] * 3, rel=1e-4)
    assert effects.no_effect == 0


def test_a_constant_shift_of_all_logits_is_no_effect() -> None:
    U = gaussian(30, 4)
    U[:, 0] = 3.0
    effects = ablator(ToyUpper(U), 4).effects(torch.eye(4)[:2])
    assert math.isnan(effects.values["sparsity"][0]) and math.isfinite(effects.values["sparsity"][1])
    assert effects.no_effect == 1


def test_nothing_taken_out_is_no_effect() -> None:
    assert ablator(ToyUpper(gaussian(30, 4)), 4).effects(torch.zeros(2, 4)).no_effect == 2


def test_gaussian_effect_at_one_position() -> None:
    effects = ablator(ToyUpper(gaussian(50_000, 4)), 4).effects(torch.eye(4)[:1])
    assert effects.values["sparsity"][0] == pytest.approx(2 / math.pi / T, rel=0.01)
    assert effects.values["sparsity_vocab"][0] == pytest.approx(2 / math.pi, rel=0.01)


@pytest.mark.parametrize("runner", [ToyUpper, FullPasses])
def test_gaussian_effect_copied_to_all_later_positions(runner: type[ToyUpper]) -> None:
    effects = ablator(runner(gaussian(50_000, 4), copying=True), 4).effects(torch.eye(4)[:1])
    assert effects.values["sparsity"][0] == pytest.approx(2 / math.pi, rel=0.01)
    assert effects.values["time_participation"][0] == pytest.approx(1, rel=0.01)
    assert effects.values["effect_share_tau0"][0] == pytest.approx(1 / T, rel=0.01)


def test_scale_of_the_latent_does_not_matter_while_effects_are_linear() -> None:
    runner = ablator(ToyUpper(gaussian(400, 6), copying=True), 6)
    one, ten = (runner.effects(scale * torch.eye(6)[:2]).values for scale in (1, 10))
    assert one["sparsity"] == pytest.approx(ten["sparsity"], rel=1e-4)
    assert one["effect_rms"] == pytest.approx(ten["effect_rms"] / 10, rel=1e-4)


def test_a_weak_sparse_effect_is_still_an_effect() -> None:
    runner = ablator(ToyUpper(torch.eye(2_000)), 2_000)
    assert runner.effects(0.01 * torch.eye(2_000)[:1]).values["sparsity"][0] == pytest.approx(1 / (2_000 * T), rel=1e-2)


@pytest.mark.parametrize(("row", "median"), [([5.0, 1.0, 3.0], 3.0), ([5.0, 1.0, 3.0, 9.0], 3.0), ([7.0, 2.0], 2.0)])
def test_lower_median(row: list[float], median: float) -> None:
    l1, l2 = ablation.effect_statistics(np.array([row], dtype=np.float32))
    assert l1[0] == sum(abs(v - median) for v in row)
    assert l2[0] == sum((v - median) ** 2 for v in row)


def test_places_are_inside_one_document_and_pass_the_filter() -> None:
    r = rng("places")
    keep = r.random((200, 64)) > 0.3
    doc = np.cumsum(r.random((200, 64)) < 0.03, axis=1) + 100 * np.arange(200)[:, None]
    places = ablation.choose_places(keep, doc, 50, seed=0)
    assert len(places) == 50 and len({q.row for q in places}) == 50 and places == sorted(places)
    for row, p, d in places:
        assert keep[row, p] and len(set(doc[row, p - 8 : p + T])) == 1 and doc[row, p] == d
    assert places == ablation.choose_places(keep, doc, 50, seed=0)
    assert places != ablation.choose_places(keep, doc, 50, seed=1)


def test_places_are_uniform_over_the_row_and_rows_without_room_are_left_out() -> None:
    keep, doc = np.ones((3_000, 30), dtype=bool), np.zeros((3_000, 30), dtype=int)
    found = [q.p for q in ablation.choose_places(keep, doc, 3_000, seed=0)]
    assert (min(found), max(found)) == (8, 30 - T)
    assert np.bincount(found)[8:].min() > 3_000 / 7 * 0.8
    assert ablation.choose_places(keep[:, :20], doc[:, :20], 5, seed=0) == []
    keep[:, 8:] = False
    assert ablation.choose_places(keep, doc, 5, seed=0) == []


def test_floor_directions() -> None:
    x = gaussian(32)
    channels = ablation.channel_contributions(x, 5, 0, 3)
    held = channels.sum(0)
    assert ((channels != 0).sum(1) == 1).all() and torch.equal(held[held != 0], x[held != 0])
    lengths = torch.tensor([2.0, 7.0])
    random = ablation.random_contributions(lengths, 64, 32, 0, 3)
    assert {round(float(v), 4) for v in random.norm(dim=1)} == {2.0, 7.0}
    cosines = torch.nn.functional.normalize(random, dim=1) @ torch.nn.functional.normalize(random, dim=1).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.8


def test_gain_is_a_paired_log_ratio() -> None:
    def effects(*sparsity: float) -> ablation.Effects:
        return ablation.Effects({name: np.array(sparsity) for name in ablation.PER_DIRECTION})

    values = ablation.position_values(effects(0.1, 0.2), effects(0.4, math.nan), effects(0.3))
    assert values["sparsity"] == pytest.approx(0.15)
    assert values["floor_random_sparsity"] == pytest.approx(0.4)
    assert values["gain_vs_random"] == pytest.approx(math.log(0.4) - (math.log(0.1) + math.log(0.2)) / 2)
    assert values["gain_vs_channels"] == pytest.approx(math.log(0.3) - (math.log(0.1) + math.log(0.2)) / 2)
    assert math.isnan(ablation.position_values(effects(math.nan), effects(0.4), effects(0.3))["gain_vs_random"])


def test_prefix_reuse_equals_the_hooked_full_forward(tiny_lm) -> None:
    hookpoint = tiny_lm.default_hookpoint()
    ids = torch.from_numpy(rng("ids").integers(3, 259, size=(1, L)))
    x = tiny_lm.capture(ids, [hookpoint])[hookpoint][0].float()
    runner = ablation.Ablator(tiny_lm.upper(hookpoint), x, ids[0], P, T)
    at_p = torch.stack([x[P], x[P] + gaussian(x.shape[1])])
    logits = runner.logits(at_p)
    for row, value in enumerate(at_p):
        patched = x.clone()
        patched[P] = value
        full = tiny_lm.replace(ids[:, : P + T], hookpoint, patched[None, : P + T])[0, P:]
        assert torch.allclose(logits[row], full, atol=1e-5 * float(full.abs().max()))


@pytest.fixture(scope="module")
def measured(tiny_lm):
    from memory_store import memory_store, topk_subject

    hookpoint = tiny_lm.default_hookpoint()
    store = memory_store(tiny_lm, hookpoint)
    return tiny_lm, hookpoint, store, topk_subject(tiny_lm, hookpoint, store, steps=50)


def run(measured, tmp_path, subject=None, shared=None):
    from memory_store import context

    lm, hookpoint, store, own = measured
    result = ablation.PLUGIN.run(context(lm, hookpoint, store, subject or own, tmp_path, shared))
    return {row.metric: row for row in result.rows}, result


def test_rows_of_the_tiny_model(measured, tmp_path) -> None:
    rows, result = run(measured, tmp_path)
    assert set(rows) == {m.name for m in ablation.METRICS}
    assert all(row.value is not None for row in rows.values())
    assert 0 < rows["sparsity"].value < 1 and 0 < rows["floor_channels_sparsity"].value < 1
    assert result.counts["positions"] == 6 and result.counts["active_latents"] == 48
    details = result.details
    assert details["gain_vs_random.num"].sum() / details["gain_vs_random.den"].sum() == pytest.approx(
        rows["gain_vs_random"].value)


def test_random_latents_have_no_gain(measured, tmp_path) -> None:
    """A planted null: latents replaced by random directions differ from the floor by noise alone."""
    from evals.base import Contributions

    class Null:
        info, provides = measured[3].info, measured[3].provides

        def contributions(self, x_D):
            drawn = rng("null", round(float(x_D[0]), 6)).normal(size=(8, len(x_D)))
            vectors = torch.from_numpy(drawn.astype(np.float32))
            return Contributions(torch.arange(8), torch.ones(8), vectors)

    rows, _ = run(measured, tmp_path, Null())
    assert abs(rows["gain_vs_random"].value) < 4 * rows["gain_vs_random"].stderr + 0.1


def test_active_latents_only_and_the_contribution_is_what_decoding_loses(measured) -> None:
    _, _, store, subject = measured
    x = store.read([5])
    found = subject.contributions(x[0])
    codes, x_hat = subject.codes_and_reconstruction(x)
    active = codes.values_NK[0] > 0
    assert sorted(codes.indices_NK[0][active].tolist()) == found.indices_A.tolist()
    assert (found.values_A > 0).all()
    slot = int((codes.indices_NK[0] == found.indices_A[2]).nonzero()[0])
    without = type(codes)(codes.values_NK.clone(), codes.indices_NK)
    without.values_NK[0, slot] = 0
    assert torch.allclose(x_hat[0] - subject.sae.decode(without, x)[0], found.vectors_AD[2], atol=1e-4)


def test_no_active_latent_is_counted_not_scored(measured, tmp_path) -> None:
    from evals.base import Contributions

    class Silent:
        info, provides = measured[3].info, measured[3].provides

        def contributions(self, x_D):
            return Contributions(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, len(x_D)))

    rows, result = run(measured, tmp_path, Silent())
    assert rows["sparsity"].value is None and rows["sparsity"].failure == "no_active_latent"
    assert result.counts["no_active_latent"] == 6


def test_the_channel_floor_is_measured_once_per_run(measured, tmp_path, monkeypatch) -> None:
    calls, real = [], ablation.channel_contributions
    monkeypatch.setattr(ablation, "channel_contributions", lambda *a: calls.append(1) or real(*a))
    shared: dict = {}
    first, second = run(measured, tmp_path, shared=shared)[0], run(measured, tmp_path, shared=shared)[0]
    assert len(calls) == 6 and first == second
