"""Probe loss on planted activations: the carrier is found, floors and ceiling stand right, rows repeat."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evals.base import EvalContext
from evals.baselines import Channels
from evals.probe_activations import OwnTask, ProbeActivations, ProbeConfig, build_probes
from evals.probes import RIDGE
from evals.results import SubjectInfo, write_rows
from evals.suite import probe_loss
from evals.suite.probe_loss import PLUGIN, weighted_auc
from sae.errors import ConfigError, DataError
from sae.manifest import canonical_json, writing
from sae.ops import SparseLatents

LN2 = math.log(2)
N, D = 240, 24
INFO = SubjectInfo(
    sae_id="s", kind="sae", lm="toy", lm_revision="0", hookpoint="layers.1", architecture="topk", d_in=D, d_sae=D, k=4,
    train_tokens=0, sae_sha256="0",
)  # fmt: skip


class Codes(Channels):
    """Channels that are also a sparse code: all of them, values moved so that none is 0."""

    provides = frozenset({"features", "sparse"})

    def encode_sparse(self, x_ND):
        return SparseLatents(x_ND + 10, torch.arange(x_ND.shape[1]).expand(x_ND.shape))


def channels(kind=Channels):
    return kind(INFO)


def planted_probes(tmp_path, *, signal=3.0, seeds=(0,), failures=None, n_train=N // 8):
    """Three tasks in two families; channel 5 + t carries the label of task t."""
    draw = np.random.default_rng(0)
    names = ["one", "two", "three"]
    x = draw.normal(size=(3 * N, D)).astype(np.float32)
    labels = np.tile(np.arange(N) % 2, 3)
    for t in range(3):
        x[t * N : (t + 1) * N, 5 + t] += signal * labels[:N]
    groups = np.tile(np.arange(N) // 4, 3)
    records = []
    for t in range(3):
        for seed in seeds:
            sides = np.random.default_rng(seed).permutation(N // 4) < n_train
            side = np.where(sides[groups[:N]], "train", "test")
            records += [(t, seed, side[i], t * N + i) for i in range(N)]
    meta = {
        "tasks": names, "families": {"one": "a", "two": "a", "three": "b"}, "failures": failures or {}, "missing": {},
        "task_set": "planted", "n_tokens": 0,
    }  # fmt: skip
    folder = tmp_path / "probes" / "k"
    with writing(folder, kind="probes", key=f"k{signal}", stage_version=1, config={}) as writer:
        np.save(writer.path / "acts.npy", x)
        rows = {"task": np.repeat(names, N), "label": labels.astype(np.int8), "group": groups.astype(np.int32)}
        pd.DataFrame(rows).to_parquet(writer.path / "rows.parquet")
        table = pd.DataFrame(records, columns=["order", "seed", "side", "row"])
        table.to_parquet(writer.path / "splits.parquet")
        (writer.path / "tasks.json").write_text(canonical_json(meta))
    return ProbeActivations.open(folder)


def context(tmp_path, subject, probes, shared=None):
    return EvalContext(
        root=tmp_path, subject=subject, preset="tiny", seed=0, hookpoint="layers.1", run_key="r", probes=probes,
        shared={} if shared is None else shared,
    )  # fmt: skip


def by_metric(result, slice=""):
    return {row.metric: row for row in result.rows if row.slice == slice}


def test_the_carrying_channel_is_found(tmp_path):
    probes = planted_probes(tmp_path)
    result = PLUGIN.run(context(tmp_path, channels(Codes), probes))
    rows = by_metric(result)
    assert set(result.details.groupby("task").feature.first()[["one", "two", "three"]]) == {5, 6, 7}
    for metric in ("probe_loss", "probe_loss_insample", "probe_loss_post"):
        row = rows[metric]
        assert row.value < 0.3 and row.ci_low < row.value < row.ci_high
    assert rows["probe_auc"].value > 0.95 and rows["probe_acc"].value > 0.9
    assert rows["floor_chance"].value == LN2
    assert rows["floor_random_directions"].value > rows["probe_loss"].value + 0.2
    assert rows["gain_vs_random"].ci_low > 0
    gain = rows["floor_random_directions"].value - rows["probe_loss"].value
    assert rows["gain_vs_random"].value == pytest.approx(gain)
    # the planted channel is all there is to know, so nothing is lost against the dense probe
    assert rows["gap_closed_pooled"].value > 0.9
    assert rows["dense_loss"].value < rows["floor_random_directions"].value
    assert rows["probe_loss_ci_task"].n == 2 and rows["probe_loss_family_mean"].n == 2
    tasks = [by_metric(result, f"task={t}")["probe_loss"] for t in ("one", "two", "three")]
    assert np.mean([row.value for row in tasks]) == pytest.approx(rows["probe_loss"].value)
    family = (np.mean([tasks[0].value, tasks[1].value]) + tasks[2].value) / 2
    assert rows["probe_loss_family_mean"].value == pytest.approx(family)
    assert result.counts["n_unconverged"] == 0 and result.counts["task_set"] == "planted"


def test_accuracy_is_that_of_the_chosen_probe_at_even_odds(tmp_path):
    """By scikit-learn: the likelier class, of a probe whose intercept is not 0."""
    probes = planted_probes(tmp_path, signal=1.0)
    result = PLUGIN.run(context(tmp_path, channels(), probes))
    x, right = np.load(tmp_path / "probes" / "k" / "acts.npy"), []
    for number, task in enumerate(("one", "two", "three")):
        split, label_N = next(s for s in probes.splits if s.task == task), probes.rows.label.to_numpy()
        train, test = x[split.train][:, [5 + number]], x[split.test][:, [5 + number]]
        mean, std = train.mean(), train.std()
        model = LogisticRegression(C=1 / RIDGE, tol=1e-10).fit((train - mean) / std, label_N[split.train])
        right.append(model.score((test - mean) / std, label_N[split.test]))
    assert by_metric(result)["probe_acc"].value == pytest.approx(np.mean(right)) and 0.6 < np.mean(right) < 0.9


def test_details_give_the_mean_over_tasks(tmp_path):
    result = PLUGIN.run(context(tmp_path, channels(), planted_probes(tmp_path, seeds=(0, 1))))
    table, rows = result.details, by_metric(result)
    for metric in ("probe_loss", "dense_loss", "floor_random_directions"):
        assert table[f"{metric}.num"].sum() / table[f"{metric}.den"].sum() == pytest.approx(rows[metric].value)
    assert table.unit.is_unique
    assert "probe_loss_post" not in rows  # channels are no sparse code: no row, not a zero


def test_without_signal_everything_is_at_chance(tmp_path):
    rows = by_metric(PLUGIN.run(context(tmp_path, channels(), planted_probes(tmp_path, signal=0.0))))
    assert rows["probe_loss"].value > LN2 - 0.03
    assert rows["probe_loss_insample"].value < LN2  # the in-sample minimum flatters even then
    assert 0.35 < rows["probe_auc"].value < 0.65


def test_same_bytes_twice_and_shared_parts_once(tmp_path):
    probes, texts, shared = planted_probes(tmp_path), [], {}
    for name in ("a", "b"):
        result = PLUGIN.run(context(tmp_path, channels(), probes, shared))
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, result.rows, PLUGIN.metrics)
        texts.append((tmp_path / name / "rows.jsonl").read_bytes())
    assert texts[0] == texts[1]
    assert len(shared) == 2  # the dense ceiling and the random floor


def test_one_task_without_a_gap_does_not_rule_the_share_that_is_closed():
    """A mean of ratios gave -.25 to random directions against themselves: a task with a gap of .015 nats weighed -3.3
    of 12. A ratio of sums cannot, and is 0 for what gains nothing and 1 for what reaches the dense probe."""
    draw = np.random.default_rng(1)

    def task(random, dense, gain):
        noise = draw.normal(0, 0.002, 200)
        return {"gain_vs_random": np.full(200, gain) + noise, "floor_random_directions": np.full(200, random),
                "dense_loss": np.full(200, dense)}

    wide = [task(0.65, 0.35, 0.0) for _ in range(11)]
    found = probe_loss.pooled_gap([*wide, task(0.673, 0.658, -0.05)], 100, 0)
    assert abs(found.value) < 0.03 and found.ci_low <= found.value <= found.ci_high
    assert probe_loss.pooled_gap([task(0.6, 0.3, 0.3)] * 2, 10, 0).value == pytest.approx(1.0, abs=0.05)
    assert probe_loss.pooled_gap([task(0.6, 0.595, 0.1)], 10, 0).failure == "no_effect"
    assert probe_loss.pooled_gap([], 0, 3).failure == "too_few_rows"


def test_n_counts_the_groups_of_the_side_that_was_resampled(tmp_path):
    probes = planted_probes(tmp_path, n_train=20)
    rows = by_metric(PLUGIN.run(context(tmp_path, channels(), probes)))
    group = probes.rows.group.to_numpy()
    for metric, side in (("probe_loss", "test"), ("probe_loss_insample", "train")):
        assert rows[metric].n == sum(len(np.unique(group[getattr(s, side)])) for s in probes.splits)
    assert rows["probe_loss"].n != rows["probe_loss_insample"].n  # else this test tells nothing


def test_tasks_without_enough_rows_are_reported_not_imputed(tmp_path):
    probes = planted_probes(tmp_path, failures={"four": "too_few_rows"})
    result = PLUGIN.run(context(tmp_path, channels(), probes))
    row = by_metric(result, "task=four")["probe_loss"]
    assert row.value is None and row.failure == "too_few_rows" and row.status == "undefined"
    assert by_metric(result)["probe_loss"].n_failed == 1


def test_a_nan_feature_is_counted_and_never_chosen(tmp_path):
    class Broken(Channels):
        def features(self, x_ND, columns=None):
            h = super().features(x_ND, columns).clone()
            h[:, columns == 5] = math.nan
            return h

    result = PLUGIN.run(context(tmp_path, channels(Broken), planted_probes(tmp_path)))
    assert result.counts["n_nonfinite"] == 3
    assert 5 not in set(result.details.feature)


def test_weighted_auc_equals_counting_pairs():
    draw = np.random.default_rng(0)
    logit, label = np.round(draw.normal(size=40), 1), draw.integers(0, 2, 40)
    weight = draw.integers(0, 4, size=(5, 40)).astype(float)
    found = weighted_auc(logit, label, np.arange(40), weight)
    for r in range(5):
        i, j = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
        order = (logit[i][:, None] > logit[j]) + 0.5 * (logit[i][:, None] == logit[j])
        pairs = weight[r, i][:, None] * weight[r, j]
        assert found[r] == pytest.approx((order * pairs).sum() / pairs.sum())
    assert math.isnan(weighted_auc(logit, np.ones(40), np.arange(40), weight)[0])


def test_presets_and_configuration():
    assert len(PLUGIN.config("quick")["tasks"]) == 12 and len(PLUGIN.config("paper")["tasks"]) >= 50
    assert PLUGIN.config("paper")["cap_rows"] == 2000 and len(PLUGIN.config("paper")["seeds"]) == 3
    with pytest.raises(ConfigError, match="sciqq"):
        ProbeConfig(tasks=("sciqq",))
    with pytest.raises(ConfigError, match="utilitarianism"):
        ProbeConfig(tasks=("utilitarianism",))
    with pytest.raises(ConfigError, match="120"):
        ProbeConfig(cap_rows=60)
    assert OwnTask.parse("a=b.csv:text:kind:yes")[2:] == ("text", "kind", "yes")
    with pytest.raises(ConfigError, match="NAME=FILE"):
        OwnTask.parse("a.csv")


def own_csv(path, n=400, flip=False):
    words = ["red", "blue", "tall", "small", "loud", "calm", "warm", "cold"]
    draw = np.random.default_rng(0)
    lines = ["prompt,target"]
    for i in range(n):
        body = " ".join(f"{w}{j}" for w, j in zip(draw.permutation(words), draw.integers(0, 999, 8), strict=True))
        lines.append(f"{body} {'?' if i % 2 else '.'},{i % 2}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_activations_of_an_own_task(tmp_path, tiny_lm):
    """The last token decides the label; the activation there separates it; 480 rows show it for one channel."""
    own = own_csv(tmp_path / "own.csv", n=1600)
    cfg = ProbeConfig(own=(f"marks={own}",), cap_rows=480, max_tokens=16, seeds=(0,))
    hookpoint = tiny_lm.default_hookpoint()
    probes = build_probes(tmp_path, tiny_lm, hookpoint, cfg)
    assert probes.x_ND.shape == (960, tiny_lm.check_hookpoint(hookpoint)) and probes.x_ND.dtype == np.float32
    assert probes.rows.n_tokens.max() == 16 and probes.rows.truncated.all()
    before = (probes.folder / "acts.npy").stat().st_mtime_ns
    assert build_probes(tmp_path, tiny_lm, hookpoint, cfg).key == probes.key
    assert (probes.folder / "acts.npy").stat().st_mtime_ns == before
    (split,) = probes.splits
    groups = probes.rows.group.to_numpy()
    assert not set(groups[split.train]) & set(groups[split.test])
    subject = channels()
    subject.info = SubjectInfo(**{**INFO.__dict__, "d_in": probes.x_ND.shape[1], "d_sae": probes.x_ND.shape[1]})
    rows = by_metric(PLUGIN.run(context(tmp_path, subject, probes)))
    assert rows["probe_loss"].ci_high < LN2 and rows["dense_loss"].value < 0.1


def test_batches_and_padding_do_not_change_an_activation(tiny_lm, monkeypatch):
    from evals import probe_activations

    draw = np.random.default_rng(0)
    ids = [[0, *draw.integers(3, 250, size=n).tolist()] for n in (1, 9, 3, 30, 9, 2)]
    hookpoint = tiny_lm.default_hookpoint()
    together = probe_activations.last_token_activations(tiny_lm, hookpoint, ids)
    monkeypatch.setattr(probe_activations, "BATCH_TOKENS", 1)
    assert np.allclose(together, probe_activations.last_token_activations(tiny_lm, hookpoint, ids), atol=1e-4)
    direct = tiny_lm.capture(torch.tensor([ids[3]]), [hookpoint])[hookpoint][0, -1]
    assert np.allclose(together[3], direct.numpy(), atol=1e-4)


def test_own_tasks_that_cannot_be_used(tmp_path, tiny_lm):
    with pytest.raises(DataError, match="nowhere.csv"):
        build_probes(tmp_path, tiny_lm, "layers.1", ProbeConfig(own=(f"t={tmp_path / 'nowhere.csv'}",)))
    small = own_csv(tmp_path / "small.csv", n=80)
    with pytest.raises(DataError, match="60 rows"):
        build_probes(tmp_path, tiny_lm, "layers.1", ProbeConfig(own=(f"t={small}",)))
    with pytest.raises(ConfigError, match="no probe task"):
        build_probes(tmp_path, tiny_lm, "layers.1", ProbeConfig())
    assert not list((tmp_path / "probes").glob("*")) if (tmp_path / "probes").exists() else True


def test_every_metric_is_declared_once():
    names = [m.name for m in probe_loss.METRICS]
    assert len(set(names)) == len(names) and sum(m.headline for m in probe_loss.METRICS) == 1
