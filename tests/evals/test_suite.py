"""The contract suite: every file of evals/suite (and every --plugin) keeps the promises of HOUSE 4 and 5."""

import csv
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import Function, context, info, memory_store, topk_subject
from planted import planted, truth_of

from evals.base import NEEDS, PRESETS, PROVIDES, SAESubject
from evals.results import Row, write_rows
from sae import plugins
from sae.base import random_like
from sae.config import FilterConfig, TokensConfig
from sae.manifest import canonical_json

SUITE = "evals.suite"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "evaluation" in metafunc.fixturenames:
        names = plugins.names(SUITE) + list(metafunc.config.getoption("--plugin", default=[]))
        metafunc.parametrize("evaluation", names, indirect=True)


@pytest.fixture
def evaluation(request: pytest.FixtureRequest) -> Any:
    return plugins.find(SUITE, request.param)


class World:
    """The tiny LM, activations of random bytes, three subjects; the heavier needs are made when first asked for."""

    def __init__(self, lm: Any, texts: Any, root: Any) -> None:
        self.lm, self.texts, self.root = lm, texts, root
        self.hookpoint = lm.default_hookpoint()
        self.store = memory_store(lm, self.hookpoint, rows=12)
        train = memory_store(lm, self.hookpoint, rows=48, seed=1, split="train")
        self.trained = topk_subject(lm, self.hookpoint, train, steps=200)
        floor = random_like(self.trained.sae, 0, train.read(train.kept_N))
        self.random = SAESubject(floor, info(lm, self.hookpoint, floor.sae_id, d_in=floor.d_in, d_sae=64, k=8))
        self.identity = Function(info(lm, self.hookpoint, "identity", d_in=self.store.d_in), lambda x: x)
        self._made: dict[str, Any] = {}

    def _once(self, name: str, build: Any) -> Any:
        if name not in self._made:
            self._made[name] = build()
        return self._made[name]

    def probes(self) -> Any:
        """One task of 240 prompts, told apart by a word."""
        from evals.probe_activations import ProbeConfig, build_probes

        path, r = self.root / "task.csv", np.random.default_rng(0)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "target"])
            for i in range(480):
                letters = "".join(chr(97 + c) for c in r.integers(26, size=10))
                writer.writerow([f"{letters} {i} {'yes' if i % 2 else 'nope'}", i % 2])
        return build_probes(self.root, self.lm, self.hookpoint,
                            ProbeConfig(own=(f"yes={path}",), cap_rows=120, max_tokens=16, seeds=(0,)))

    def twin(self) -> Any:
        """The trained SAE from another seed."""
        train = memory_store(self.lm, self.hookpoint, rows=48, seed=1, split="train")
        return topk_subject(self.lm, self.hookpoint, train, seed=1, steps=200)

    def latents(self) -> Any:
        """Latent cache of the trained SAE on held-out text."""
        from autointerp.latent_cache import build_latents
        from sae.activations import capture_activations
        from sae.tokens import build_tokens

        cfg = TokensConfig(
            text=str(self.texts), context_tokens=64, train_tokens=4_096, explain_tokens=8_192, calibrate_tokens=4_096,
            score_tokens=8_192, test_tokens=4_096)
        sets = build_tokens(self.root, cfg, self.lm.name, self.lm.tokenizer)
        stores: dict[str, Any] = {}
        for split in ("explain", "calibrate", "score"):
            median = next(iter(stores.values())).norm_median if stores else None
            stores[split] = capture_activations(
                self.root, self.lm, sets[split], self.hookpoint, store_dtype="float32", filter_cfg=FilterConfig(),
                norm_median=median)
        return build_latents(self.root, self.trained.sae, stores)

    def run(self, evaluation: Any, subject: Any, shared: dict[str, Any] | None = None) -> Any:
        more: dict[str, Any] = {}
        if "probes" in evaluation.needs:
            more["probes"] = self._once("probes", self.probes)
        if "interp" in evaluation.needs:
            more["latents"] = self._once("latents", self.latents)
        if "truth" in evaluation.needs:
            more["truth"] = self._once("truth", lambda: truth_of(planted(n=600, d=self.store.d_in, g=24)))
        if "peers" in evaluation.needs:
            more["peers"] = [self._once("twin", self.twin)]
        return evaluation.run(context(self.lm, self.hookpoint, self.store, subject, self.root, shared, **more))


@pytest.fixture(scope="module")
def world(tiny_lm, tiny_texts, tmp_path_factory) -> World:
    return World(tiny_lm, tiny_texts, tmp_path_factory.mktemp("world"))


def text_of(rows: list[Row]) -> str:
    return "\n".join(canonical_json(asdict(row)) for row in sorted(rows, key=Row.sort_key))


def aggregate(result: Any) -> dict[str, float]:
    return {row.metric: row.value for row in result.rows if row.slice == "" and row.value is not None}


def test_declaration(evaluation, request) -> None:
    asked = request.node.callspec.params["evaluation"]
    assert ":" in asked or evaluation.name == asked
    assert evaluation.title and isinstance(evaluation.version, int) and evaluation.version >= 1
    assert evaluation.needs <= NEEDS and evaluation.uses <= PROVIDES and evaluation.uses
    names = [m.name for m in evaluation.metrics]
    assert names and len(set(names)) == len(names)
    assert any(m.headline for m in evaluation.metrics)
    for metric in evaluation.metrics:
        assert metric.title and metric.unit and metric.description and metric.reference, metric.name
        assert metric.better in ("higher", "lower", "neither") and metric.low < metric.high, metric.name


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_are_plain_json(evaluation, preset: str) -> None:
    config = evaluation.config(preset)
    assert json.loads(canonical_json(config)) and config == evaluation.config(preset)
    assert not config.keys() & {"eval", "preset", "seed"}  # the run's own part of the key


def test_rows_match_declarations_and_repeat(evaluation, world, tmp_path) -> None:
    first, second = (world.run(evaluation, world.trained) for _ in range(2))
    assert first.rows and write_rows(tmp_path, first.rows, evaluation.metrics) == len(first.rows)
    assert text_of(first.rows) == text_of(second.rows)
    assert json.loads(canonical_json(dict(first.counts))) == json.loads(canonical_json(dict(second.counts)))
    if first.details is not None:
        assert first.details.to_csv() == second.details.to_csv()
        first.details.to_parquet(tmp_path / "details.parquet", index=False)
    for row in first.rows:
        assert (row.value is None) == (row.status != "ok") and (row.failure is None) == (row.value is not None)
        assert row.sae_id == world.trained.info.sae_id and row.eval == evaluation.name and row.preset == "tiny"
        if row.ci_low is not None:
            assert row.ci_low <= row.ci_high and row.stderr > 0 and row.n >= 2, row.metric


def test_details_give_the_aggregate_back(evaluation, world) -> None:
    """`compare` works from the sums per unit, so they must be the sums behind the row."""
    result = world.run(evaluation, world.trained)
    if result.details is None:
        assert all(row.value is None for row in result.rows)
        return
    values = aggregate(result)
    for column in result.details.columns:
        metric, dot, part = column.rpartition(".")
        if dot and part == "num" and metric in values:
            total = result.details[column].sum() / result.details[f"{metric}.den"].sum()
            assert total == pytest.approx(values[metric], rel=1e-9, abs=1e-12), metric


def test_the_identity_is_best_and_the_random_sae_poor(evaluation, world) -> None:
    if evaluation.uses != {"reconstruct"}:
        pytest.skip("measures codes or features: the identity has none; the order is tested beside the evaluation")
    shared: dict[str, Any] = {}
    identity, trained, random = (
        aggregate(world.run(evaluation, s, shared)) for s in (world.identity, world.trained, world.random))
    # without a bound there is no best value: the loss of a random LM may fall by chance when it is disturbed
    bounds = {m.name: m.low if m.better == "lower" else m.high for m in evaluation.metrics if m.better != "neither"}
    bounded = {name for name, bound in bounds.items() if np.isfinite(bound)}
    ranked = [m for m in evaluation.metrics if m.headline and m.name in bounded & identity.keys()]
    assert ranked
    for metric in ranked:
        sign = 1 if metric.better == "higher" else -1
        assert sign * identity[metric.name] > sign * trained[metric.name] > sign * random[metric.name], metric.name


def test_another_seed_is_another_sample_of_the_same_truth(evaluation, world) -> None:
    """Seeds move samples and resamples, not what is measured: intervals of two seeds overlap."""
    if not evaluation.needs <= {"lm", "test"}:
        pytest.skip("samples of the interpretation stages are drawn before the evaluation")
    made = []
    for seed in (0, 1):
        ctx = context(world.lm, world.hookpoint, world.store, world.trained, world.root)
        ctx.seed = seed
        made.append({r.metric: r for r in evaluation.run(ctx).rows})
    for name, row in made[0].items():
        other = made[1][name]
        if row.ci_low is not None and other.ci_low is not None:
            slack = 2 * max(row.stderr, other.stderr)
            assert row.ci_low - slack <= other.ci_high and other.ci_low - slack <= row.ci_high, name


def test_listed_and_free_of_torch_until_it_runs(evaluation, request) -> None:
    """`--list` and the pages read declarations: importing an evaluation may not load torch."""
    import subprocess
    import sys

    asked = request.node.callspec.params["evaluation"]
    if ":" in asked:
        pytest.skip("an outside plug-in may import what it likes")
    code = f"import sys, {SUITE}.{asked}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_a_float16_model_is_refused_where_losses_are_measured(evaluation, world) -> None:
    if "lm" not in evaluation.needs or not evaluation.needs <= {"lm", "test"}:
        pytest.skip("runs no passes of its own above the hookpoint")
    from sae.errors import Unsupported

    class Half:
        dtype = torch.bfloat16

    ctx = context(world.lm, world.hookpoint, world.store, world.trained, world.root)
    ctx.load_lm = Half  # type: ignore[assignment]
    with pytest.raises(Unsupported, match="float32"):
        evaluation.run(ctx)
