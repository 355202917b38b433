"""Silent windows that read like the latent's own: which are chosen, and that they move no other number."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from held_out import VOCABULARY, L, random_sae, stores
from judges import COIN, TOKENIZER, Coin

from autointerp import pipeline
from autointerp.classify import detection_scores, make_items
from autointerp.client import CachedClient, Capabilities
from autointerp.clients.scripted import ScriptedClient
from autointerp.config import ExemplarConfig
from autointerp.embedding_near import EmbeddingNear, open_pool
from autointerp.estimate import _typical_reply, estimate
from autointerp.exemplar_draws import read_texts
from autointerp.exemplars import STAGE_VERSION, ExemplarTable, build_exemplars
from autointerp.explainers.token_list import PLUGIN as TokenList
from autointerp.interfaces import ScoreContext, ScoreJob
from autointerp.latent_cache import build_latents
from autointerp.records import Explanation, Failure
from autointerp.scorers.detection import PLUGIN as Detection
from autointerp.scorers.embedding import PLUGIN as Embedding
from autointerp.scorers.fuzzing import PLUGIN as Fuzzing
from autointerp.scorers.intruder import PLUGIN as Intruder
from autointerp.scorers.late_interaction import PLUGIN as LateInteraction
from autointerp.scorers.simulation import PLUGIN as Simulation
from evals.page_data import LatentData
from evals.page_tokens import TokenReader
from evals.page_windows import window_groups
from evals.run_config import RunConfig
from sae.config import to_dict
from sae.errors import ConfigError
from sae.manifest import key_of, read_manifest

KIND = "embedding_near"
OFF = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=4,
    calibrate_positive=4, calibrate_silent=4, score_positive=8, score_silent=8, score_hard=4, min_windows=(6, 3, 8),
)  # fmt: skip
ON = replace(OFF, score_embedding_near=3)
LISTED, PROBED = Capabilities(structured="json_schema"), Capabilities(next_token=True)


class Numbers:
    """A tokenizer whose texts are the ids."""

    def decode(self, ids) -> str:
        return "".join(f" {int(i)}" for i in ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % VOCABULARY for c in text]


class Planted:
    """A text's direction is how often it holds each token: near windows are those of like tokens."""

    name, model_hash = "planted", "p" * 64

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def embed(self, texts) -> np.ndarray:
        self.asked.update(texts)
        counts = np.zeros((len(texts), VOCABULARY), dtype=np.float32)
        for row, text in zip(counts, texts, strict=True):
            np.add.at(row, [int(t) for t in text.split()], 1)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory):
    return stores(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(held_out, tmp_path_factory: pytest.TempPathFactory):
    return build_latents(tmp_path_factory.mktemp("root"), random_sae(), held_out, window_tokens=12, min_window_tokens=4)


def build(root: Path, cache, cfg: ExemplarConfig, embedder=None, n: int = 6) -> ExemplarTable:
    near = {"embedder": embedder or Planted(), "tokenizer": Numbers()} if cfg.score_embedding_near else {}
    return build_exemplars(root, cache, cache.eligible(cfg)[:n], cfg, **near)


@pytest.fixture(scope="module")
def tables(cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExemplarTable, ExemplarTable]:
    root = tmp_path_factory.mktemp("tables")
    return build(root, cache, OFF), build(root, cache, ON)


def near_of(table: ExemplarTable, latent: int):
    return [e for e in table.exemplars(latent, "score") if e.kind == KIND]


def others(table: ExemplarTable):
    return [e for i in table.latents for s in ("explain", "calibrate", "score") for e in table.exemplars(i, s)
            if e.kind != KIND]  # fmt: skip


def test_the_nearest_silent_windows_are_chosen_and_an_active_one_never(tables, cache, held_out) -> None:
    """Against all windows of the split, sorted by hand; silence from a dense encode."""
    table, one = tables[1], held_out["score"]
    z_NF = random_sae().encode(one.read(slice(None))).numpy() * one.keep_N[:, None]
    text, embed, active_was_nearer = read_texts(cache)[0]["score"], Planted().embed, 0
    words = [Numbers().decode(text.tokens_N[text.windows.positions(w)]) for w in range(len(text.windows))]
    for latent in table.latents:
        shown = {Numbers().decode(e.token_ids) for e in table.exemplars(latent, "explain") if e.positive}
        mean = embed(sorted(shown)).astype(np.float64).mean(0)
        cosine = np.round(embed(words) @ (mean / np.linalg.norm(mean)), 5).tolist()
        order = sorted(range(len(words)), key=lambda w: (-cosine[w], w))
        drawn = {e.row * L + e.start for e in table.exemplars(latent, "score") if e.kind != KIND}
        silent = [not z_NF[text.windows.positions(w), latent].any() for w in range(len(words))]
        earlier = {e.token_ids for s in ("explain", "calibrate") for e in table.exemplars(latent, s)}
        free = [
            w for w in order
            if silent[w] and text.allowed[w] and int(text.windows.start[w]) not in drawn
            and tuple(text.tokens_N[text.windows.positions(w)].tolist()) not in earlier
        ]  # fmt: skip
        found = near_of(table, latent)
        assert {e.row * L + e.start for e in found} == {int(text.windows.start[w]) for w in free[:3]}
        assert len(found) == 3 and not any(any(e.acts) or e.positive for e in found)
        active_was_nearer += not silent[order[0]]
    assert active_was_nearer  # the nearest of all was active, and was passed over


def test_documents_of_other_splits_are_never_shown_and_all_else_is_as_without(tables) -> None:
    off, on = tables
    assert others(on) == others(off) and not any(near_of(off, i) for i in off.latents)
    elsewhere = {e.doc_id for e in others(on) if e.split != "score"}
    assert not elsewhere & {e.doc_id for i in on.latents for e in near_of(on, i)}
    config = {k: v for k, v in to_dict(OFF).items() if k != "score_embedding_near"} | {"latents": off.latents}
    before = key_of("exemplars", STAGE_VERSION, config, {"latents": read_manifest(off.folder)["inputs"]["latents"]})
    assert off.key == before != on.key  # keys from before still hold


def test_the_pool_is_embedded_once_for_all_saes_and_the_same_bytes_come_again(
    tables, held_out, cache, tmp_path: Path
) -> None:
    planted, n_windows = Planted(), len(cache.windows("score"))
    again = build(tmp_path, cache, ON, planted)
    assert (again.folder / "exemplars.parquet").read_bytes() == (tables[1].folder / "exemplars.parquet").read_bytes()
    assert planted.asked.total() > n_windows
    other = build_latents(tmp_path, random_sae(seed=5), held_out, window_tokens=12, min_window_tokens=4)
    planted.asked.clear()
    assert build(tmp_path, other, ON, planted).latents
    assert 0 < planted.asked.total() < n_windows / 2  # the other SAE's positives alone
    assert len(list((tmp_path / "window_embeddings").iterdir())) == 1
    small = open_pool(tmp_path, cache, planted, Numbers(), size=50)
    assert small.windows_n.size == 50 == np.unique(small.windows_n).size and small.vectors_nE.shape == (50, VOCABULARY)
    assert open_pool(tmp_path, cache, Coin(), Numbers(), size=50).key != small.key


def test_no_silent_window_in_the_pool_is_a_typed_absence(cache, tmp_path: Path, monkeypatch) -> None:
    latent = int(cache.eligible(ON)[0])
    active = cache.positive_windows(latent, "score")
    monkeypatch.setattr(EmbeddingNear, "order", lambda self, positives: active)
    table = build(tmp_path, cache, ON, n=1)
    assert near_of(table, latent) == [] and table.exemplars(latent, "score")
    found = [(f.code, f.detail) for f in table.failures_of(latent)]
    assert found[-1] == ("no_hard_negative", f"{KIND} on split score")


def test_without_an_embedder_it_is_refused_before_any_work(cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--interp.embedder default"):
        build_exemplars(tmp_path, cache, cache.eligible(ON)[:1], ON)
    assert not any(tmp_path.iterdir())
    run = RunConfig()
    with pytest.raises(ConfigError, match="--interp.embedder default"):
        replace(run, exemplars=ON, interp=replace(run.interp, embedder="none"))
    with pytest.raises(ConfigError, match="score_embedding_near"):
        ExemplarConfig(score_embedding_near=-1)


def jobs_of(table: ExemplarTable) -> list[ScoreJob]:
    said = [
        Explanation(explanation_id=f"x{i}", sae_id=table.sae_id, latent=i, explainer="toy", text=f"words of {i}",
                    selected=True)
        for i in table.latents
    ]  # fmt: skip
    return pipeline.make_jobs(said, table, 0)


@pytest.mark.parametrize(
    ("scorer", "capabilities"),
    [
        (Detection(per_request=5), LISTED), (Detection(), PROBED), (Embedding(), PROBED), (LateInteraction(), PROBED),
        (Fuzzing(), LISTED), (Intruder(), PROBED), (Simulation(simulator="word_embedding"), PROBED),
    ],
)  # fmt: skip
def test_every_other_score_is_the_same_with_and_without(tables, scorer, capabilities) -> None:
    answered: list[tuple[list, dict, set]] = []
    for table in tables:
        backend = ScriptedClient(_says, tokenizer=Numbers(), capabilities=capabilities)
        ctx = ScoreContext(client=CachedClient(backend), embedder=Coin(), tokenizer=Numbers())
        results = scorer.score_many(jobs_of(table), ctx)
        rows = [s.to_dict() for r in results for s in r.scores]
        items = {(i.explanation_id, i.exemplar_id, i.mask): i for r in results for i in r.items}
        answered.append((rows, items, {str(r) for r in backend.sent}))
    (rows_off, items_off, sent_off), (rows_on, items_on, sent_on) = answered
    assert rows_off and [r for r in rows_on if r["group"] != f"kind={KIND}"] == rows_off
    assert {k: items_on[k] for k in items_off} == items_off and sent_off <= sent_on
    mine = {r["metric"] for r in rows_on if r["group"] == f"kind={KIND}"}
    extra = [i for k, i in items_on.items() if k not in items_off]
    if scorer.name in ("detection", "embedding", "late_interaction"):
        assert mine == ({"fpr"} if capabilities is LISTED else {"fpr", "auc"})
        assert len(extra) == 3 * len(jobs_of(tables[1])) and not any(i.positive for i in extra)
    else:
        assert not mine and not extra


def _says(request):
    """The first half of a list fits: the answer hangs on which lines stand together."""
    return json.dumps(_typical_reply(request)) if request.verb == "generate" else COIN(request)


def test_failures_among_them_are_theirs_alone(tables) -> None:
    off, on = ({job.latent: job for job in jobs_of(t) if not job.floor_kind} for t in tables)
    latent = tables[1].latents[0]
    lost = Failure(code="refusal", stage="score")
    rows = []
    for job in (off[latent], on[latent]):
        values = [lost if e.kind == KIND else 0.9 if e.positive else 0.2 for e in job.exemplars]
        items = make_items(job, job.exemplars, values, 0.5, "toy")
        found = detection_scores(job, items, scorer="toy", version=1, judge="toy")
        rows.append({(r.metric, r.group): r for r in found})
    without, with_them = rows
    assert {k: with_them[k] for k in without} == without and with_them["auc", ""].value == 1.0
    for metric in ("fpr", "auc"):
        row = with_them[metric, f"kind={KIND}"]
        assert row.value is None and row.null_reason == "too_many_failures" and row.n_failed == 3


def test_they_are_in_the_estimate() -> None:
    requests = [
        {s.stage: s.requests for s in estimate([TokenList()], [Detection()], cfg, latents=10, tokenizer=TOKENIZER,
                                               capabilities=PROBED, embedder=False)}["score.detection"]
        for cfg in (OFF, ON)
    ]  # fmt: skip
    assert requests[1] - requests[0] == 10 * 2 * 3  # latents, true and shuffled, windows


def test_they_are_on_the_page_among_the_hard_negatives(tables) -> None:
    latent = tables[1].latents[0]
    shown = [e for s in ("explain", "score") for e in tables[1].exemplars(latent, s)]
    data = LatentData(sae_id="sae", latent=latent, exemplars=shown)
    titles = {g["title"]: [w["k"] for w in g["windows"]] for g in window_groups(data, TokenReader(), None)}
    at = [title for title, kinds in titles.items() if "embedding near" in kinds]
    assert at == ["Scored, silent but close (hard negatives)"] and titles[at[0]].count("embedding near") == 3
