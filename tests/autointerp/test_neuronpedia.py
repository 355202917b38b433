"""Neuronpedia's files: its columns, deterministic bytes, and back again as explanations that can be scored."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
from held_out import random_sae, stores
from judges import COIN, TOKENIZER

from autointerp import neuronpedia, pipeline
from autointerp.__main__ import main
from autointerp.client import CachedClient
from autointerp.clients.scripted import ScriptedClient
from autointerp.config import ExemplarConfig
from autointerp.exemplars import build_exemplars
from autointerp.explainers.token_list import PLUGIN as TokenList
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.latent_cache import build_latents
from autointerp.neuronpedia import export_neuronpedia, import_explanations, read_explanations, source_name
from autointerp.records import Explanation, Failure
from autointerp.scorers.detection import PLUGIN as Detection
from sae.errors import ArtefactError, ConfigError, DataError

CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=4, explain_silent=3, explain_random=4,
    calibrate_positive=3, calibrate_silent=3, score_positive=6, score_silent=6, score_hard=2, min_windows=(6, 3, 8),
)  # fmt: skip


class Refuser:
    """Fails on every latent: nothing of it may be published."""

    name, version, needs = "refuser", 1, frozenset()

    def explain_many(self, views, ctx):
        failure = Failure(code="refusal", stage="explain")
        return [
            [Explanation(explanation_id=f"{v.sae_id}/{v.latent}/refuser/0", sae_id=v.sae_id, latent=v.latent,
                         explainer="refuser", failure=failure)]
            for v in views
        ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("root")
    cache = build_latents(root, random_sae(), stores(root), window_tokens=12, min_window_tokens=4)
    table = build_exemplars(root, cache, cache.eligible(CFG)[:5], CFG)
    ctx = ExplainContext(tokenizer=TOKENIZER)
    tokens = {i: ([f" up{i}", "\n"], [" down"]) for i in table.latents}
    pipeline.explain(root, table, [TokenList(), Refuser()], ctx, output_tokens=tokens)
    return root, table, cache


def export(root: Path, out: Path, **options) -> Path:
    [folder] = export_neuronpedia(root, out, TOKENIZER.decode, **options)
    return folder


def lines(folder: Path, name: str) -> list[dict]:
    found = sorted((folder / name).glob("batch-*.jsonl.gz"))
    return [json.loads(x) for f in found for x in gzip.decompress(f.read_bytes()).decode().splitlines()]


FEATURE = {
    "modelId", "layer", "index", "creatorId", "maxActApprox", "frac_nonzero", "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "pos_str", "pos_values",
    "neg_str", "neg_values", "topkCosSimIndices", "topkCosSimValues", "vector", "hasVector", "hookName",
}  # fmt: skip
ACTIVATION = {
    "id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue", "values", "creatorId",
    "dataSource", "dataIndex", "binMin", "binMax", "binContains", "qualifyingTokenIndex", "createdAt",
}  # fmt: skip
EXPLANATION = {
    "id", "modelId", "layer", "index", "description", "authorId", "embedding", "typeName", "explanationModelName",
    "notes", "createdAt",
}  # fmt: skip


def test_columns_and_values(world, tmp_path: Path) -> None:
    root, table, cache = world
    folder = export(root, tmp_path, model_id="my/Model")
    assert folder.parent.name == "my-model"
    features, activations, texts = (lines(folder, n) for n in ("features", "activations", "explanations"))
    assert [int(f["index"]) for f in features] == table.latents
    assert all(set(f) == FEATURE for f in features) and all(set(a) == ACTIVATION for a in activations)
    assert all(set(t) == EXPLANATION for t in texts)
    assert {r["layer"] for r in (*features, *activations, *texts)} == {folder.name}
    for f in features:
        stats = cache.stats.loc[int(f["index"])]
        assert sum(f["freq_hist_data_bar_heights"]) == stats["n_active_explain"]
        assert f["frac_nonzero"] == stats["density"] and f["maxActApprox"] == pytest.approx(stats["max_act"], abs=1e-4)
        assert f["topkCosSimIndices"] == list(stats["nearest"]) and f["pos_str"] == [f" up{f['index']}", "\n"]
    by_id = {e.exemplar_id: e for i in table.latents for s in ("explain", "calibrate", "score")
             for e in table.exemplars(i, s) if e.kind in ("top", "quantile")}  # fmt: skip
    assert len(activations) == len(by_id)
    for a in activations:
        assert len(a["tokens"]) == len(a["values"]) and a["values"][a["maxValueTokenIndex"]] == a["maxValue"]
        assert a["maxValue"] == max(a["values"]) > 0 and a["minValue"] == min(a["values"])
        assert a["binMin"] is None or a["binMin"] <= a["maxValue"] <= a["binMax"]
    assert {"".join(a["tokens"]) for a in activations} == {TOKENIZER.decode(list(e.token_ids)) for e in by_id.values()}
    ids = [r["id"] for r in (*activations, *texts)]
    assert len(set(ids)) == len(ids)


def test_failures_are_not_published_and_methods_keep_their_names(world, tmp_path: Path) -> None:
    root, table, _ = world
    texts = lines(export(root, tmp_path / "a"), "explanations")
    assert len(texts) == len(table.latents) and {t["typeName"] for t in texts} == {"saescope_token_list"}
    assert all(t["description"] and "selected" in t["notes"] for t in texts)
    named = lines(export(root, tmp_path / "b", type_names={"token_list": "their_name"}), "explanations")
    assert {t["typeName"] for t in named} == {"their_name"}


def test_the_same_artefacts_give_the_same_bytes_in_batches(world, tmp_path: Path, monkeypatch) -> None:
    root, table, _ = world
    whole, again = export(root, tmp_path / "1"), export(root, tmp_path / "2")
    files = sorted(p.relative_to(whole) for p in whole.rglob("*.gz"))
    assert len(files) == 3 and all((whole / f).read_bytes() == (again / f).read_bytes() for f in files)
    monkeypatch.setattr(neuronpedia, "BATCH_FEATURES", 2)
    parts = export(root, tmp_path / "3")
    assert [f.name for f in sorted((parts / "features").iterdir())] == [f"batch-{i}.jsonl.gz" for i in range(3)]
    for name in ("features", "activations", "explanations"):
        assert lines(parts, name) == lines(whole, name)


def test_texts_come_back_and_can_be_scored(world, tmp_path: Path) -> None:
    root, table, _ = world
    folder = export(root, tmp_path)
    rows = read_explanations(folder)
    said = {r["index"]: r["description"] for r in rows}
    path = import_explanations(tmp_path / "r", folder, table)
    found = pipeline.open_explanations(path)
    assert {e.latent: e.text for e in found} == {i: " ".join(t.split()) for i, t in said.items()}
    assert {e.explainer for e in found} == {"imported"} and all(e.selected for e in found)
    assert import_explanations(tmp_path / "r", folder, table) == path
    client = CachedClient(ScriptedClient(COIN, tokenizer=TOKENIZER))
    ctx = ScoreContext(client=client, tokenizer=TOKENIZER)
    scores = pipeline.open_scores(pipeline.score(tmp_path / "r", path, table, [Detection()], ctx)).scores
    assert {s.explainer for s in scores} == {"imported"} and {s.latent for s in scores} == set(table.latents)


def write(folder: Path, *rows: str) -> Path:
    (folder / "explanations").mkdir(parents=True)
    (folder / "explanations" / "batch-0.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    return folder


def test_foreign_files_keep_every_text_of_ours_and_nothing_else(world, tmp_path: Path) -> None:
    _, table, _ = world
    first, second, *_ = table.latents
    rows = [(first, "rivers"), (second, "rivers"), (first, "lakes"), (9_999, "elsewhere"), (second, " ")]
    folder = write(tmp_path / "f", *(json.dumps({"index": str(i), "description": t, "embedding": [0.1]})
                                     for i, t in rows))  # fmt: skip
    found = pipeline.open_explanations(import_explanations(tmp_path, folder, table))
    assert [(e.latent, e.text, e.selected) for e in found] == [
        (first, "rivers", True), (first, "lakes", False), (second, "rivers", True)
    ]  # fmt: skip


def test_half_a_character_in_a_foreign_text_is_no_reason_to_stop(world, tmp_path: Path) -> None:
    """Legal in JSON, impossible in a file of ours."""
    _, table, _ = world
    row = json.dumps({"index": str(table.latents[0]), "description": "smiles \ud83d \U0001f600"})
    assert "\\ud83d" in row
    [found] = pipeline.open_explanations(import_explanations(tmp_path, write(tmp_path / "f", row), table))
    assert found.text == "smiles � \U0001f600"


@pytest.mark.parametrize(
    ("row", "says"),
    [("{", "line 1"), ('{"index": "x", "description": "a"}', "line 1"), ('{"index": 1}', "line 1"),
     ('{"index": 1, "description": 3}', "wrong kind"), ('{"index": -1, "description": "a"}', "wrong kind"),
     ('{"index": 9999, "description": "a"}', "none of its 1 explanations")],
)  # fmt: skip
def test_bad_files_are_named(world, tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        import_explanations(tmp_path, write(tmp_path / "f", row), world[1])


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="batch-N"):
        read_explanations(tmp_path)
    folder = write(tmp_path / "f", '{"index": 1, "description": "a"}')
    whole = (folder / "explanations" / "batch-0.jsonl.gz").read_bytes()
    (folder / "explanations" / "batch-0.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        read_explanations(folder)


def test_source_names() -> None:
    assert source_name("LM.layers.15.topk-f64", "layers.15") == "15-lm.layers.15.topk-f64"
    assert source_name("a/b c", "") == "0-a-b-c"


def test_the_door(world, tmp_path: Path, capsys) -> None:
    root, _, _ = world
    TOKENIZER.save_pretrained(tmp_path / "lm")
    arguments = ["export-neuronpedia", "--root", str(root), "--out", str(tmp_path / "out"), "--tokenizer"]
    assert main([*arguments, str(tmp_path / "lm")]) == 0
    folder = Path("".join(capsys.readouterr().out.split()))
    assert lines(folder, "activations") == lines(export(root, tmp_path / "again"), "activations")
    assert main([*arguments, str(tmp_path / "lm")]) == 2 and "exists" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2 and "no tokenizer" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exists"):
        export_neuronpedia(root, tmp_path / "out", TOKENIZER.decode)
    with pytest.raises(ArtefactError, match="no finished explanations"):
        export_neuronpedia(tmp_path / "empty", tmp_path / "x", TOKENIZER.decode)


def test_the_door_in(world, tmp_path: Path, capsys) -> None:
    """Exported, taken in again through the door, and there to be scored; an SAE without exemplars is named."""
    root, table, _ = world
    here = Path(shutil.copytree(root, tmp_path / "root"))
    folder = export(here, tmp_path / "out")
    assert main(["import-neuronpedia", str(folder), "--root", str(here), "--sae", table.sae_id]) == 0
    said = capsys.readouterr().out
    [key] = re.findall(r"--explanations\s+([0-9a-f]{16})", said)
    found = pipeline.open_explanations(here / "explanations" / key)
    assert {e.explainer for e in found} == {"imported"} and {e.latent for e in found} == set(table.latents)
    assert main(["import-neuronpedia", str(folder), "--root", str(here), "--sae", "other"]) == 2
    assert "'other'" in capsys.readouterr().err
