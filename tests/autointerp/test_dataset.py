"""The explanation dataset from real stages, latents to scores; the scorer and one explainer are stand-ins."""

import json
import shutil
from importlib import resources

import pandas as pd
import pytest
from held_out import random_sae, stores
from tiny import byte_tokenizer

from autointerp import pipeline
from autointerp.config import ExemplarConfig
from autointerp.dataset import TABLES, export, find_chains
from autointerp.dataset_card import blocked, licence_of
from autointerp.exemplars import build_exemplars
from autointerp.explainers.token_list import TokenList
from autointerp.interfaces import ExplainContext, ScoreContext, ScoreResult
from autointerp.latent_cache import build_latents_many
from autointerp.records import Explanation, Failure, LatentScore, ScoreItem
from sae.errors import ArtefactError, ConfigError, DataError

CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=4, explain_silent=3, explain_random=4,
    calibrate_positive=3, calibrate_silent=3, score_positive=6, score_silent=6, score_hard=2, min_windows=(6, 3, 8),
)


class Refuser:
    """An explainer that fails on every other latent and answers with a pattern on the rest."""

    name, version, needs = "refuser", 1, frozenset()

    def explain_many(self, views, ctx):
        out = []
        for i, view in enumerate(views):
            failure = Failure(code="refusal", stage="explain", detail="no | thanks") if i % 2 else None
            pattern = None if i % 2 else {"version": 1, "patterns": [{"ids": [1, None], "value": 0.5}]}
            identity = f"{view.sae_id}/{view.latent}/refuser/0"
            out.append([Explanation(explanation_id=identity, sae_id=view.sae_id, latent=view.latent,
                                    explainer="refuser", text=None, pattern=pattern, failure=failure)])
        return out


class Coin:
    """Right for true explanations, wrong for shuffled ones; the first item of every job fails."""

    name, version, needs = "coin", 1, frozenset()

    def score_many(self, jobs, ctx):
        results = []
        for job in jobs:
            items = tuple(
                ScoreItem(
                    explanation_id=job.explanation.explanation_id, exemplar_id=e.exemplar_id, scorer="coin",
                    positive=e.positive, value=None if i == 0 else float(e.positive != (job.floor_kind != "")),
                    verdict=None if i == 0 else e.positive,
                    failure=Failure(code="timeout", stage="score") if i == 0 else None,
                )
                for i, e in enumerate(job.exemplars)
            )
            failed = job.explanation.failure
            score = LatentScore(
                sae_id=job.sae_id, latent=job.latent, explanation_id=job.explanation.explanation_id,
                explainer=job.explanation.explainer, scorer="coin", scorer_version=1, judge="coin", metric="auc",
                value=None if failed else (0.25 if job.floor_kind else 0.75), floor_kind=job.floor_kind,
                base_rate=job.pi, null_reason=failed.code if failed else None,
            )
            results.append(ScoreResult(scores=(score,), items=items))
        return results


def run(root, *, score=True, n=4, seeds=(0, 1)):
    held_out = stores(root)
    saes = [random_sae(seed=s) for s in seeds]
    caches = build_latents_many(root, saes, held_out, window_tokens=12, min_window_tokens=4)
    tokenizer = byte_tokenizer()
    for cache in caches:
        table = build_exemplars(root, cache, cache.eligible(CFG)[:n], CFG)
        folder = pipeline.explain(root, table, [TokenList(), Refuser()], ExplainContext(tokenizer=tokenizer))
        if score:
            pipeline.score(root, folder, table, [Coin()], ScoreContext(tokenizer=tokenizer))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return run(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def tables(root, tmp_path_factory):
    out = export(root, tmp_path_factory.mktemp("out") / "dataset")
    return {name: pd.read_parquet(out / name) for name in TABLES} | {"out": out}


def test_tables_join_on_their_keys(tables):
    saes = {"tiny.topk.s0-64", "tiny.topk.s1-64"}
    for name in TABLES:
        assert set(tables[name]["sae_id"]) == saes and len(tables[name]) > 0
    texts, scores, items, windows = (tables[n] for n in ("explanations", "scores", "score_items", "exemplars"))
    assert texts["explanation_id"].is_unique and windows["exemplar_id"].is_unique
    assert set(scores["explanation_id"]) <= set(texts["explanation_id"])
    assert set(items["exemplar_id"]) == set(windows.loc[windows["split"] == "score", "exemplar_id"])
    assert len(tables["latents"]) == 2 * 64
    merged = scores.merge(tables["latents"][["sae_id", "latent", "pi"]], on=["sae_id", "latent"])
    assert merged["base_rate"].astype(float).tolist() == pytest.approx(merged["pi"].tolist())


def test_failures_stay_failures(tables):
    texts, scores, items = tables["explanations"], tables["scores"], tables["score_items"]
    refused = texts[texts["failure_code"] == "refusal"]
    assert len(refused) == 4 and refused["text"].isna().all() and refused["pattern_json"].isna().all()
    patterns = texts[(texts["explainer"] == "refuser") & texts["failure_code"].isna()]
    assert json.loads(patterns["pattern_json"].iloc[0])["patterns"][0]["ids"] == [1, None]
    assert texts[texts["explainer"] == "token_list"]["text"].notna().all()
    null = scores[scores["value"].isna()]
    assert set(null["null_reason"]) == {"refusal"} and set(null["explanation_id"]) == set(refused["explanation_id"])
    failed = items[items["failure_code"] == "timeout"]
    assert failed["value"].isna().all() and failed["verdict"].isna().all() and len(failed) > 0
    assert items[items["failure_code"].isna()]["value"].notna().all()


def test_each_true_score_stands_beside_its_floor(tables):
    scores = tables["scores"]
    true = scores[(scores["floor_kind"] == "") & (scores["explainer"] == "token_list")]
    assert len(true) == 8 and (true["value"] == 0.75).all() and (true["floor"] == 0.25).all()
    assert scores[scores["floor_kind"] == "shuffled"]["floor"].isna().all()
    # This judge says the same under a wrong description, so its check finds it weak.
    assert (scores["judge_auc"] == 1.0).all() and (scores["judge_wrong_auc"] == 1.0).all()
    assert scores["judge_weak"].all()


def test_windows_keep_their_content(tables):
    windows = tables["exemplars"]
    assert (windows["length"] == windows["token_ids"].map(len)).all()
    positive = windows[windows["peak"] >= 0]
    expected = [a[p] for a, p in zip(positive["acts"], positive["peak"], strict=True)]
    assert positive["peak_act"].tolist() == pytest.approx(expected)
    silent = windows[windows["peak"] < 0]
    assert silent["peak_act"].isna().all() and silent["stratum_share"].notna().all()


def test_card(tables, root):
    text = (tables["out"] / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n") and "config_name: scores\n  data_files: scores/*.parquet" in text
    said = ("tiny.topk.s0-64", "| coin | coin |", "token_list", "not verified", "file0", "not_stated", "| weak |")
    for expected in said:
        assert expected in text
    chain = find_chains(root)["tiny.topk.s0-64"]
    assert all(path.name in text for path in chain.values()) and str(root) not in text
    manifest = json.loads((tables["out"] / "manifest.json").read_text())
    assert manifest["counts"]["saes"] == 2 and str(root) not in json.dumps(manifest["inputs"])


def test_equal_artefacts_equal_bytes_and_one_writing(root, tmp_path):
    a, b = export(root, tmp_path / "a"), export(root, tmp_path / "b")
    for name in (*(f"{t}/{t}.parquet" for t in TABLES), "README.md"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    written = (a / "manifest.json").stat().st_mtime_ns
    assert export(root, a) == a and (a / "manifest.json").stat().st_mtime_ns == written
    export(root, a, force=True)
    assert (a / "manifest.json").stat().st_mtime_ns != written


def test_without_scores_the_texts_are_exported_all_the_same(tmp_path):
    out = export(run(tmp_path / "root", score=False, seeds=(0,)), tmp_path / "out")
    assert len(pd.read_parquet(out / "explanations")) == 8
    empty = pd.read_parquet(out / "scores")
    assert len(empty) == 0 and {"value", "floor", "judge_weak"} <= set(empty.columns)
    assert len(pd.read_parquet(out / "score_items")) == 0


def test_newer_scores_replace_the_older(root, tmp_path):
    first = find_chains(root)["tiny.topk.s0-64"]["scores"]
    manifest = json.loads((first / "manifest.json").read_text())
    newer = first.with_name("f" * 16)
    shutil.copytree(first, newer)
    manifest["provenance"]["created_at"] = "2999-01-01T00:00:00Z"
    (newer / "manifest.json").write_text(json.dumps(manifest))
    try:
        assert find_chains(root)["tiny.topk.s0-64"]["scores"] == newer
        scores = pd.read_parquet(export(root, tmp_path / "again") / "scores")
        assert set(scores.loc[scores["sae_id"] == "tiny.topk.s0-64", "scores_key"]) == {"f" * 16}
    finally:
        shutil.rmtree(newer)


def test_refusals(root, tmp_path):
    with pytest.raises(ArtefactError, match="no finished explanations"):
        export(tmp_path / "empty", tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no dataset of saescope"):
        export(root, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(DataError, match="file0.*--accept-licences"):
        export(root, tmp_path / "y", check_licences=True)


def test_licences():
    assert licence_of("96_spam_is").status == "permissive" and licence_of("90_glue_qnli").status == "share_alike"
    assert licence_of("161_agnews_0").status == "non_commercial" and licence_of("158_code_C").status == "not_stated"
    assert licence_of("my_notes.txt").status == "not_stated"
    assert [found.source for found in blocked(["96_spam_is", "111_yelp_data", "111_yelp_data"])] == ["111_yelp_data"]
    mix = json.loads((resources.files("sae") / "default_mix.json").read_text(encoding="utf-8"))
    assert all(f["file"].split("_")[0].isdigit() for f in mix["files"])  # every default file has a number to look up
