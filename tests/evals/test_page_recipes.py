"""SAEs of several training seeds on one line of the leaderboard page."""

import statistics
from dataclasses import replace

import pytest
from synthetic_recipes import NUMBERS, RELU_HIGH, RELU_LOW, SINGLE, TOPK, write_recipes

from evals.board import Board, build_board
from evals.latent_page import SaeDigest
from evals.page_data import RunInfo
from evals.page_index import index_context
from evals.page_recipes import counted, find_recipes, spread
from evals.results import load_results
from evals.seed_noise import spread_of


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Board, dict[str, SaeDigest]]:
    root = tmp_path_factory.mktemp("recipes")
    data = write_recipes(root)
    return build_board(load_results(root)), {i: SaeDigest.of(sae) for i, sae in data.items()}


def test_seeds_of_one_configuration_are_one_recipe(found: tuple[Board, dict[str, SaeDigest]]) -> None:
    board, digests = found
    recipes = find_recipes(board, {i: d.train for i, d in digests.items()})
    members = {r.title: tuple(s.sae_id for s in r.members) for r in recipes}
    assert members == {"topk, k 32": TOPK, "relu, L0 62": RELU_HIGH, "relu, L0 32": RELU_LOW}
    # Without configurations two penalties cannot be told apart: nothing is averaged over what may differ.
    assert [r.title for r in find_recipes(board, {})] == ["topk, k 32"]
    wider = replace(board.saes[0], fields=board.saes[0].fields | {"d_sae": 9216})
    other = replace(board, subjects=[wider, *board.subjects[1:]])
    titles = [r.title for r in find_recipes(other, {i: d.train for i, d in digests.items()})]
    assert "topk, k 32, 4,608 latents" in titles and len(titles) == 3
    stranger = {i: d.train | {"lr": float(n)} for n, (i, d) in enumerate(digests.items())}
    assert find_recipes(board, stranger) == []


def test_a_mean_needs_every_seed(found: tuple[Board, dict[str, SaeDigest]]) -> None:
    board, digests = found
    topk = find_recipes(board, {})[0].members
    columns = {c.id: c for c in board.columns}
    values = [NUMBERS[i][1] for i in TOPK]
    fvu = spread(board, topk, columns["fvu"])
    assert fvu.value == pytest.approx(0.32) and fvu.sd == pytest.approx(statistics.stdev(values))
    assert (fvu.low, fvu.high) == (0.30, 0.34)
    dead = next(c for c in board.columns if c.spec.metric == "dead_frac")
    missing = spread(board, topk, dead)
    assert missing.value is None and missing.reason.startswith("2 of 3 seeds") and "too_few_tokens" in missing.reason
    assert spread(board, topk, columns["kl"]).reason == "not run"
    assert spread_of([1.0]).sd is None and spread_of([]).value is None
    assert spread_of([1.0, 3.0]).sd == pytest.approx(2**0.5)
    assert spread_of([1.65, 1.65, 1.65]).sd == 0.0  # a plain sum leaves 2.7e-16


def test_the_page_groups_and_leaves_out_what_nobody_has(found: tuple[Board, dict[str, SaeDigest]]) -> None:
    board, digests = found
    context = index_context(board, RunInfo(), digests)
    heads = [(g["head"] or {}).get("title") for g in context["groups"]]
    assert heads == ["topk, k 32", None, "relu, L0 62", "relu, L0 32"]
    assert [r["subject"].sae_id for g in context["groups"] for r in g["rows"]] == [*TOPK, SINGLE, *RELU_HIGH, *RELU_LOW]
    assert {"kl", "architecture", "k"} <= context["off"] and not {"fvu", "l0"} & context["off"]
    bars = dict(zip((c.id for c in board.columns), context["board_data"]["bars"], strict=True))
    assert bars["l0"] is None and bars["kl"] is None and bars["fvu"]["low"] < 0.3 and bars["fvu"]["high"] > 0.9
    gains = dict(context["gain_recipes"])
    assert gains["topk, k 32"][0]["value"] == "−0.580" and gains["topk, k 32"][0]["says"] == "better 3 of 3"
    assert len(context["plots"][0]["svg"].split('class="point')) - 1 == 3 + 1 + 1
    assert dict(context["pareto_rows"])["relu, L0 32"][0] == "front 1, dominated 1"  # one is the sparsest of all


def test_many_saes_keep_the_page_light(
    found: tuple[Board, dict[str, SaeDigest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, digests = found
    assert len(index_context(board, RunInfo(), digests)["gain_rows"]) == len(board.saes)
    monkeypatch.setattr("evals.page_index.MANY", 3)
    context = index_context(board, RunInfo(), digests)
    assert context["gain_rows"] == [] and context["gain_many"] and len(context["gain_recipes"]) == 3


def test_words_are_counted() -> None:
    assert counted(["front", "front"]) == "front"
    assert counted(["front", "", "dominated", "front"]) == "front 2, dominated 1"
    assert counted(["", ""]) == ""
