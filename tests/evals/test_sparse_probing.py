"""k-sparse probing on planted codes: carriers are found, XOR is not linear, five of five are needed, floors hold."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from evals.base import EvalContext
from evals.baselines import Channels
from evals.probe_activations import ProbeActivations, TaskSplit
from evals.results import SubjectInfo, write_rows
from evals.sparse_probes import (
    CS,
    DenseFeatures,
    best_columns,
    codes_of,
    fit_logistic,
    probe_k,
    random_topk,
)
from evals.suite import sparse_probing
from evals.suite.sparse_probing import KS, PLUGIN
from sae.manifest import canonical_json, rng, writing
from sae.ops import SparseLatents

N, F = 480, 40
SIDE = np.arange(N) % 8 < 4  # groups of four rows, alternately on train and test
SPLITS = [TaskSplit("t", 0, np.flatnonzero(SIDE), np.flatnonzero(~SIDE))]
INFO = SubjectInfo(
    sae_id="s", kind="sae", lm="toy", lm_revision="0", hookpoint="layers.1", architecture="topk", d_in=F, d_sae=F, k=4,
    train_tokens=0, sae_sha256="0",
)  # fmt: skip


class Codes(Channels):
    """Each prompt's activation *is* its code, of which only positive entries are active."""

    provides = frozenset({"features", "sparse"})

    def encode_sparse(self, x_ND):
        return SparseLatents(x_ND.clamp_min(0), torch.arange(x_ND.shape[1]).expand(x_ND.shape))


def background(seed: int = 0, rate: float = 0.2) -> np.ndarray:
    """[N, F] sparse non-negative codes that know nothing of any label."""
    r = rng("sparse codes", seed)
    return ((r.random((N, F)) < rate) * np.abs(r.normal(1, 0.25, size=(N, F)))).astype(np.float32)


def store(tmp_path, z: np.ndarray, labels: dict[str, np.ndarray], seeds=(0,)) -> ProbeActivations:
    """Each task has rows of its own; ``z`` of [N, F] are the codes of all of them alike."""
    records = [
        (t, seed, "train" if SIDE[i] ^ (seed % 2) else "test", t * N + i)
        for t in range(len(labels)) for seed in seeds for i in range(N)
    ]  # fmt: skip
    names = list(labels)
    meta = {
        "tasks": names, "families": {n: n for n in names}, "failures": {}, "missing": {}, "task_set": "planted",
        "n_tokens": 0,
    }  # fmt: skip
    with writing(tmp_path / "probes" / "k", kind="probes", key="k", stage_version=1, config={}) as out:
        np.save(out.path / "acts.npy", z if len(z) > N else np.tile(z, (len(names), 1)))
        rows = {
            "task": np.repeat(names, N), "label": np.concatenate([*labels.values()]).astype(np.int8),
            "group": np.tile(np.arange(N) // 4, len(names)).astype(np.int32),
        }  # fmt: skip
        pd.DataFrame(rows).to_parquet(out.path / "rows.parquet")
        table = pd.DataFrame(records, columns=["order", "seed", "side", "row"])
        table.to_parquet(out.path / "splits.parquet")
        (out.path / "tasks.json").write_text(canonical_json(meta))
    return ProbeActivations.open(tmp_path / "probes" / "k")


def run(tmp_path, probes, subject=None, preset="tiny", shared=None):
    return PLUGIN.run(EvalContext(
        root=tmp_path, subject=subject or Codes(INFO), preset=preset, seed=0, hookpoint="layers.1", run_key="r",
        probes=probes, shared={} if shared is None else shared,
    ))  # fmt: skip


def values(result, slice=""):
    return {row.metric: row for row in result.rows if row.slice == slice}


def test_a_planted_latent_is_found_and_known_perfectly(tmp_path):
    label = rng("label").integers(0, 2, N)
    z = background()
    z[:, 7] = label * 2.0
    result = run(tmp_path, store(tmp_path, z, {"one": label}))
    rows = values(result)
    assert rows["auc_k1"].value == 1.0 and rows["acc_k1"].value == 1.0 and rows["f1_k1"].value == 1.0
    assert set(result.details.latents_k1) == {"7"}
    assert rows["auc_k1"].ci_low is None  # 1 in every resample: no interval is claimed
    assert rows["ce_k1"].value < 0.1 and rows["auc_k5"].value > 0.99
    assert rows["floor_random_auc_k1"].value < 0.8 and rows["floor_channels_auc_k1"].value == 1.0
    assert rows["sparsity_cost_k1"].value == pytest.approx(rows["dense_auc"].value - 1)


def test_shuffled_labels_give_chance(tmp_path):
    labels = {f"t{i}": rng("label", i).integers(0, 2, N) for i in range(8)}
    z = background()
    z[:, 7] = labels["t0"] * 2.0
    rows = values(run(tmp_path, store(tmp_path, z, labels)))
    assert abs(rows["floor_shuffled_auc"].value - 0.5) <= 0.03
    noise = np.mean([values(run(tmp_path, store(tmp_path / "n", background(1), labels)))["auc_k1"].value])
    assert abs(noise - 0.5) <= 0.03  # selection among latents leaks nothing to the test side


def test_the_interval_of_the_shuffled_floor_knows_that_a_shuffle_is_a_draw(tmp_path):
    """Latents that carry the label in part rank high under some shuffles, on either side; resampled prompts of one
    shuffle do not show it: the floor's intervals left out 0.5 for 42 % of the SAEs of a study."""
    labels = {f"t{i}": rng("labels", i).permutation(np.arange(N) % 2).astype(np.int8) for i in range(6)}
    z = np.concatenate([background(i) for i in range(6)])
    y = np.concatenate(list(labels.values()))
    for latent in range(20):  # each knows most of the label, wrong in places of its own
        wrong = rng("wrong", latent).random(len(y)) < 0.1
        z[:, latent] = np.where((y > 0) ^ wrong, 1.0, 0.0)
    probes = store(tmp_path, z, labels)
    found = []
    for seed in range(8):
        made = PLUGIN.run(EvalContext(
            root=tmp_path, subject=Codes(INFO), preset="tiny", seed=seed, hookpoint="layers.1", run_key="r",
            probes=probes, shared={}))  # fmt: skip
        found.append(values(made)[sparse_probing.SHUFFLED])
    spread = np.std([row.value for row in found], ddof=1)
    assert spread > 0.05 and 0.5 < np.mean([row.stderr for row in found]) / spread < 2
    assert all(row.n == 6 for row in found) and np.mean([row.ci_low <= 0.5 <= row.ci_high for row in found]) >= 0.7


def test_exclusive_or_is_no_linear_function_of_two_latents():
    a, b = rng("a").integers(0, 2, N), rng("b").integers(0, 2, N)
    z = np.stack([a, b], axis=1).astype(float)
    logit, _ = probe_k(z[SIDE], (a ^ b)[SIDE], np.arange(SIDE.sum()) % 3, z[~SIDE])
    label = (a ^ b)[~SIDE]
    auc = (logit[label == 1][:, None] > logit[label == 0]).mean() + (logit[label == 1][:, None] == logit[label == 0]
                                                                     ).mean() / 2  # fmt: skip
    assert auc <= 0.6


def test_a_sum_of_five_needs_five(tmp_path):
    z = background(rate=0.1)
    five = (rng("five").random((N, 5)) < 0.5).astype(np.float32)
    z[:, 10:15] = five
    label = (five.sum(axis=1) > 2).astype(int)
    result = run(tmp_path, store(tmp_path, z, {"sum": label}), preset="paper")
    rows = values(result)
    auc = [rows[f"auc_k{k}"].value for k in KS]
    assert auc[0] < auc[1] < auc[2] and auc[0] < 0.8 and auc[2] > 0.99
    assert auc[3] == pytest.approx(auc[2], abs=0.01) and auc[4] == pytest.approx(auc[2], abs=0.02)
    assert set(result.details.latents_k5.iloc[0].split()) == {"10", "11", "12", "13", "14"}
    assert result.counts["n_short"] == 1  # 64 of 40 latents were asked for


def test_no_latent_wins_by_being_loud_and_rare_ones_are_not_ranked():
    label = rng("label").integers(0, 2, N)
    z = background().astype(float)
    z[:, 3] = label * 1.0 + 0.01
    z[:, 4] = 1000 * (1 + 0.2 * label)  # a class difference of 200, a fifth of its size
    train = SPLITS[0].train
    z[:, 5] = 0
    z[train[label[train] == 1][:4], 5] = 1.0  # of one class alone, but on four rows
    score = DenseFeatures(lambda c: torch.from_numpy(z[:, c.numpy()]), N, F).scores(label, SPLITS)[0]
    assert best_columns(score, 1)[0] == 3 and score[5] == -np.inf
    scaled = z * np.exp(rng("scales").normal(size=F))
    again = DenseFeatures(lambda c: torch.from_numpy(scaled[:, c.numpy()]), N, F).scores(label, SPLITS)[0]
    assert (best_columns(again, F) == best_columns(score, F)).all()  # rescaling a latent changes no rank


def test_sparse_and_dense_features_agree():
    z, label = background(), rng("label").integers(0, 2, N)
    sparse = codes_of(Codes(INFO), torch.from_numpy(z))
    dense = DenseFeatures(lambda columns: torch.from_numpy(z)[:, columns], N, F)
    assert sparse.l0 == pytest.approx((z > 0).sum(axis=1).mean())
    np.testing.assert_allclose(sparse.scores(label, SPLITS), dense.scores(label, SPLITS), rtol=1e-6)
    np.testing.assert_allclose(sparse.take(np.array([3, 1])), dense.take(np.array([3, 1])))


def test_the_fit_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    r = rng("fit")
    x = r.normal(size=(200, 6))
    y = (x @ r.normal(size=6) + r.normal(size=200) > 0.3).astype(int)
    masks = np.stack([np.ones(200), np.arange(200) % 3 > 0])
    for c in CS:
        w, b = fit_logistic(x, y, masks, np.array([1 / c, 1 / c]))
        for p, mask in enumerate(masks > 0):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x[mask], y[mask])
            np.testing.assert_allclose(w[p], theirs.coef_[0], atol=1e-5)
            assert b[p] == pytest.approx(theirs.intercept_[0], abs=1e-5)


def test_a_separated_problem_and_a_constant_column_are_fitted():
    label = np.arange(60) % 2
    x = np.stack([label * 1.0, np.ones(60)], axis=1)
    logit, c = probe_k(x, label, np.arange(60) // 2 % 3, x)
    assert c == max(CS) and ((logit > 0) == (label > 0)).all() and np.isfinite(logit).all()


def test_the_strength_of_the_penalty_is_chosen_on_held_out_groups():
    """Noise alone: the strongest penalty has the least held-out loss."""
    r = rng("noise")
    x, label = r.normal(size=(120, 30)), r.integers(0, 2, 120)
    assert probe_k(x, label, np.arange(120) % 3, x)[1] == min(CS)


def test_details_give_the_rows_back_over_seeds_and_tasks(tmp_path):
    labels = {f"t{i}": rng("label", i).integers(0, 2, N) for i in range(2)}
    z = background()
    z[:, 7] += labels["t0"] * rng("part").integers(0, 2, N)
    result = run(tmp_path, store(tmp_path, z, labels, seeds=(0, 1)))
    rows = values(result)
    for metric in ("ce_k1", "acc_k5"):
        total = result.details[f"{metric}.num"].sum() / result.details[f"{metric}.den"].sum()
        assert total == pytest.approx(rows[metric].value, rel=1e-9)
    assert rows["auc_k1"].value == pytest.approx(
        np.mean([values(result, f"task={t}")["auc_k1"].value for t in labels]))  # fmt: skip
    assert rows["auc_k1_ci_task"].n == 2 and rows["auc_k1"].ci_low < rows["auc_k1"].value < rows["auc_k1"].ci_high
    assert set(result.draws) >= {"auc_k1|heldout", "acc_k1|heldout"}
    assert write_rows(tmp_path, result.rows, PLUGIN.metrics) == len(result.rows)


def test_auc_and_f1_are_those_of_scikit_learn(tmp_path):
    from sklearn.metrics import f1_score, roc_auc_score

    label = rng("label").integers(0, 2, N)
    z = background()
    z[:, 7] += label * rng("part").integers(0, 2, N)
    probes = store(tmp_path, z, {"one": label})
    rows = values(run(tmp_path, probes))
    split = probes.splits[0]
    from evals.probes import grouped_folds

    x = z[:, [int(values_of) for values_of in run(tmp_path, probes).details.latents_k5.iloc[0].split()]].clip(0)
    fold_N = grouped_folds(np.arange(N)[split.train] // 4, label[split.train])
    logit, _ = probe_k(x[split.train].astype(float), label[split.train], fold_N, x[split.test].astype(float))
    assert rows["auc_k5"].value == pytest.approx(roc_auc_score(label[split.test], logit), abs=1e-9)
    assert rows["f1_k5"].value == pytest.approx(f1_score(label[split.test], logit > 0), abs=1e-9)


def test_dead_codes_are_undefined(tmp_path):
    label = rng("label").integers(0, 2, N)
    result = run(tmp_path, store(tmp_path, -np.abs(background()) - 0.1, {"one": label}))
    rows = values(result)
    assert rows["auc_k1"].value is None and rows["auc_k1"].failure == "no_active_latent"
    assert rows["auc_k1"].n_failed == 1
    assert values(result, "task=one")["auc_k5"].failure == "no_active_latent"


def test_a_mean_over_fewer_tasks_is_of_another_task_set(tmp_path):
    """A subject that is silent on one task has a mean over the others; `compare` refuses it by this name."""

    class SilentOnSecond(Codes):
        def encode_sparse(self, x_ND):
            return super().encode_sparse(torch.where(torch.arange(len(x_ND))[:, None] < N, x_ND, -1.0))

    label = rng("label").integers(0, 2, N)
    probes = store(tmp_path, background(), {"one": label, "two": 1 - label})
    whole, part = run(tmp_path, probes), run(tmp_path, probes, SilentOnSecond(INFO))
    assert whole.counts["task_set"] == "planted" and whole.counts["n_tasks"] == 2
    assert part.counts["task_set"] == "planted without two" and part.counts["n_tasks"] == 1
    assert values(part)["auc_k1"].n_failed == 1 and values(part)["auc_k1"].value is not None
    assert values(part, "task=two")["auc_k1"].failure == "no_active_latent"


def test_floors_are_made_once_for_all_subjects(tmp_path, monkeypatch):
    label = rng("label").integers(0, 2, N)
    probes, shared, made = store(tmp_path, background(), {"one": label}), {}, []
    real = sparse_probing._fit

    def counted(features, probes, ks, title, *more):
        made.append(title)
        return real(features, probes, ks, title, *more)

    monkeypatch.setattr(sparse_probing, "_fit", counted)
    first = run(tmp_path, probes, shared=shared)
    assert len(made) == 4
    again = run(tmp_path, probes, shared=shared)
    assert made[4:] == ["k-sparse probes", "k-sparse probes: shuffled"]
    assert first.rows == again.rows


def test_random_codes_have_the_l0_asked_for_and_repeat():
    x = torch.from_numpy(rng("x").normal(size=(N, 16)).astype(np.float32))
    codes = random_topk(x, np.arange(N), 64, 5, 0)
    assert codes.l0 == pytest.approx(5, abs=0.01) and codes.matrix.shape == (N, 64)
    assert (codes.matrix != random_topk(x, np.arange(N), 64, 5, 0).matrix).nnz == 0
    assert (codes.matrix != random_topk(x, np.arange(N), 64, 5, 1).matrix).nnz > 0
