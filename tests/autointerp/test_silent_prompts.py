"""Prompts for steering: silent by a dense encoding, of one document each, drawn for a latent and nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from held_out import random_sae, stores
from judges import TOKENIZER, script

from autointerp.client import CachedClient
from autointerp.clients.scripted import ScriptedClient
from autointerp.config import ExemplarConfig, InterpConfig
from autointerp.exemplars import ExemplarTable, build_exemplars
from autointerp.interfaces import ScoreContext
from autointerp.judge_sizes import JudgeSizes
from autointerp.latent_cache import LatentCache, build_latents
from autointerp.pipeline import make_jobs, plugins_of
from autointerp.records import Explanation
from autointerp.scorers.intervention import PLUGIN as Intervention
from autointerp.silent_prompts import silent_prompts
from sae.errors import ArtefactError, ConfigError

TOKENS = 20
CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=4,
    calibrate_positive=4, calibrate_silent=4, score_positive=8, score_silent=8, score_hard=2, min_windows=(6, 3, 8),
)  # fmt: skip


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory):
    return stores(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def cache(held_out, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    sizes = {"window_tokens": CFG.window_tokens, "min_window_tokens": CFG.min_window_tokens}
    root = Path(held_out["score"].folder).parents[1]
    return build_latents(root, random_sae(), held_out, **sizes)


@pytest.fixture(scope="module")
def table(cache: LatentCache) -> ExemplarTable:
    return build_exemplars(Path(cache.folder).parents[1], cache, cache.eligible(CFG)[:4], CFG)


def test_no_latent_is_active_anywhere_in_its_prompts(held_out, cache: LatentCache) -> None:
    """Against the SAE's own codes of the stored activations, token by token."""
    store = held_out["score"]
    dense = random_sae().encode(store.read(slice(0, store.n_tokens))).numpy()
    kept = np.zeros(store.n_tokens, dtype=bool)
    kept[np.asarray(store.kept_N)] = True
    tokens = np.asarray(store.tokens.tokens_BL)
    found = 0
    for latent in range(0, cache.d_sae, 3):
        for prompt in silent_prompts(cache.folder, latent, 30, TOKENS):
            flat = prompt.row * tokens.shape[1] + prompt.start + np.arange(TOKENS)
            assert kept[flat].all() and (dense[flat, latent] <= 0).all()
            assert prompt.token_ids == tuple(tokens.reshape(-1)[flat].tolist())
            assert len(set(cache.doc_of("score")[flat].tolist())) == 1 and not prompt.positive
            found += 1
    assert found > 200


def test_as_many_as_there_are_distinct_and_of_many_documents(cache: LatentCache) -> None:
    latent = int(cache.stats["density"].argmin())
    few, many = (silent_prompts(cache.folder, latent, n, TOKENS) for n in (5, 10_000))
    assert len(few) == 5 and len(many) < 10_000
    assert len({e.exemplar_id for e in many}) == len({(e.row, e.start) for e in many}) == len(many)
    some = silent_prompts(cache.folder, latent, 30, TOKENS)
    assert len({e.doc_id for e in some}) == 30 < len({e.doc_id for e in many})
    assert silent_prompts(cache.folder, latent, 30, 10_000) == []


def test_they_depend_on_latent_and_seed_alone_and_are_uniform(cache: LatentCache) -> None:
    one = silent_prompts(cache.folder, 3, 8, TOKENS)
    silent_prompts(cache.folder, 5, 8, TOKENS)
    assert silent_prompts(cache.folder, 3, 8, TOKENS) == one != silent_prompts(cache.folder, 3, 8, TOKENS, seed=1)
    everything = [e.exemplar_id for e in silent_prompts(cache.folder, 3, 10_000, TOKENS)]
    places = [
        everything.index(e.exemplar_id) / len(everything)
        for seed in range(60)
        for e in silent_prompts(cache.folder, 3, 8, TOKENS, seed=seed)
    ]
    assert np.mean(places) == pytest.approx(0.5, abs=0.06)


def test_a_cache_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError):
        silent_prompts(tmp_path / "latents" / "gone", 0, 5, TOKENS)


def explained(table: ExemplarTable) -> list[Explanation]:
    return [
        Explanation(
            explanation_id=f"{table.sae_id}/{i}/t/0", sae_id=table.sae_id, latent=i, explainer="t", text=f"text {i}"
        )
        for i in table.latents
    ]


def test_the_scorer_reads_long_prompts_of_the_runs_cache(tiny_lm, table: ExemplarTable) -> None:
    """30 texts of 20 tokens each, the same ones under the true and under the shuffled explanation."""
    jobs = [j for j in make_jobs(explained(table), table, 0) if j.latent == table.latents[0]]
    assert len(jobs) == 2 and {j.cache for j in jobs} == {table.folder.parents[1] / "latents" / table.latents_key}
    backend = ScriptedClient(script(lambda said, text: 0.3), tokenizer=TOKENIZER)
    sae = random_sae(d_in=32)
    ctx = ScoreContext(
        client=CachedClient(backend), lm=tiny_lm, sae=sae, hookpoint="layers.2", tokenizer=TOKENIZER,
        latents=tuple(table.latents),
    )  # fmt: skip
    results = Intervention(prompt_tokens=TOKENS, target_nats=0.1).score_many(jobs, ctx)
    wanted = [e.exemplar_id for e in silent_prompts(jobs[0].cache, jobs[0].latent, 30, TOKENS)]
    assert len(wanted) == 30
    for result in results:
        assert [i.exemplar_id for i in result.items] == wanted
        assert {s.metric: s.n_pos for s in result.scores}["surprisal_gain"] == 30
    longer = Intervention(prompt_tokens=10_000).score_many(jobs[:1], ctx)
    assert {s.null_reason for s in longer[0].scores} == {"too_few_rows"}
    with pytest.raises(ConfigError, match="prompt_tokens=None"):
        Intervention(prompt_tokens=TOKENS).score_many([replace(jobs[0], cache=None)], ctx)


def test_the_designs_sizes_are_the_default_and_papers_quick_has_fewer() -> None:
    from evals.run_config import paper, quick, tiny

    def made(cfg: InterpConfig, name: str):
        return plugins_of(replace(cfg, explainers=("pmi",), scorers=(name,)))

    for cfg, sizes in ((InterpConfig(), (30, 64)), (paper().interp, (30, 64)), (quick().interp, (20, None))):
        _, [scorer] = made(cfg, "intervention")
        assert (scorer.prompts, scorer.prompt_tokens) == sizes
    _, [simulation] = made(paper().interp, "simulation")
    assert (simulation.windows_per_sign, simulation.calibrate_per_sign) == (20, 20)
    _, [surprisal] = made(paper().interp, "surprisal")
    assert (surprisal.positive, surprisal.silent) == (50, 50)
    assert paper().exemplars.calibrate_positive == paper().exemplars.calibrate_silent == 20
    assert paper().interp.sizes.check_descriptions == 24
    for cfg in (quick().interp, tiny().interp):  # as before there were sizes
        [pmi], [surprisal] = made(cfg, "surprisal")
        assert (surprisal.positive, surprisal.silent, surprisal.calibrate, pmi.silent) == (8, 8, 8, 2)
        assert made(cfg, "simulation")[1][0].windows_per_sign == 10


@pytest.mark.parametrize(
    "wrong", [{"steering_prompts": 3}, {"likelihood_windows": 1}, {"check_descriptions": 25}, {"simulated_windows": 0}]
)
def test_bad_sizes_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        JudgeSizes(**wrong)
