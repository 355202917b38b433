"""`python -m autointerp explain` and `score` over any latents: engines give equal bytes, budgets stop, errors help."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from held_out import random_sae, stores
from loopback import ChatServer, Fault, completion
from tiny import save_tiny_embedder

from autointerp.__main__ import main
from autointerp.config import ExemplarConfig
from autointerp.doors import latents_of, newest_artefact
from autointerp.embedder import Embedder
from autointerp.exemplars import ExemplarTable, build_exemplars
from autointerp.latent_cache import LatentCache, build_latents
from autointerp.pipeline import open_explanations, open_scores
from sae import checkpoint
from sae.config import SubjectMeta
from sae.errors import ConfigError
from sae.exits import KEPT
from sae.language_model import LanguageModel
from sae.manifest import writing

CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=4,
    calibrate_positive=4, calibrate_silent=4, score_positive=8, score_silent=8, score_hard=2, min_windows=(6, 3, 8),
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one SAE, its latent cache and the exemplars of eight latents, and a tiny embedder."""
    root = tmp_path_factory.mktemp("made")
    held_out, sae = stores(root), random_sae()
    meta = SubjectMeta(lm="tiny", lm_revision="unknown", hookpoint="layers.1", lm_dtype="float32",
                       context_length_tokens=16)  # fmt: skip
    sae.cfg = replace(sae.cfg, meta=meta)
    with writing(root / "saes" / sae.sae_id, kind="saes", key=sae.sae_id, stage_version=1, config={}) as out:
        checkpoint.save(sae, out.path, held_out["explain"].read(slice(0, 64)))
    sizes = {"window_tokens": CFG.window_tokens, "min_window_tokens": CFG.min_window_tokens}
    cache = build_latents(root, sae, held_out, **sizes)
    build_exemplars(root, cache, cache.eligible(CFG)[:8], CFG)
    save_tiny_embedder(root / "embedder")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return Path(shutil.copytree(made, tmp_path / "root"))


def answer(body, n):
    """A text that depends on what is shown; some numbers of a list, one and the same for one and the same question."""
    said = body["messages"][-1]["content"]
    if "explanation" in json.dumps(body.get("response_format", {})):
        return completion(json.dumps({"explanation": f"about {len(said)} things"}))
    numbers = [int(i) for i in re.findall(r"^\[(\d+)\]", said, re.M)]
    return completion(json.dumps({"match": [i for i in numbers if (len(said) * i) % 3 == 0]}))


def arguments(door: str, root: Path, server: ChatServer, lm: Path, *more: str) -> list[str]:
    common = ["--root", str(root), "--model", str(lm), "--client", "openai", "--llm", "m", "--base-url", server.url]
    return [door, *common, "--embedder", str(root / "embedder"), *more]


FILES = ("explanations.jsonl", "scores.parquet", "items.parquet", "judges.jsonl")


def everything(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for kind in ("explanations", "scores") for p in sorted((root / kind).rglob("*"))
            if p.name in FILES}  # fmt: skip


def run(root: Path, lm: Path, *more: str, answer=answer) -> int:
    """Explain, then score; the number of requests that reached the server."""
    with ChatServer(answer) as server:
        assert main(arguments("explain", root, server, lm, "--explainers", "highlighted,token_list", *more)) == 0
        assert main(arguments("score", root, server, lm, "--scorers", "detection,late_interaction", *more)) == 0
        return len(server.bodies)


@pytest.mark.parametrize(("engine", "workers"), [("local", 1), ("local", 2), ("ray", 2)])
def test_engines_workers_and_parts_change_no_byte(root: Path, tiny_lm_dir, tmp_path, engine: str, workers: int) -> None:
    """Eight latents in three parts, on each engine, against one part in this process: same records, same requests."""
    if engine == "ray":
        pytest.importorskip("ray")
    whole = Path(shutil.copytree(root, tmp_path / "whole"))
    asked = run(whole, tiny_lm_dir)
    parts = run(root, tiny_lm_dir, "--engine", engine, "--workers", str(workers), "--part-latents", "3")
    assert parts == asked > 50
    assert everything(root) == everything(whole) and set(everything(root)) == set(FILES)
    found = open_explanations(newest_artefact(root, "explanations", random_sae().sae_id))
    assert len(found) == 16 and sum(e.selected for e in found) == 8 and not any(e.failure for e in found)


def test_a_second_run_asks_nothing_and_writes_nothing(root: Path, tiny_lm_dir) -> None:
    assert run(root, tiny_lm_dir) > 50
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and "sqlite" not in p.name}
    assert run(root, tiny_lm_dir) == 0
    after = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and "sqlite" not in p.name}
    assert {p: t for p, t in after.items() if "ledgers" not in p.parts} == {
        p: t for p, t in before.items() if "ledgers" not in p.parts
    }
    assert run(root, tiny_lm_dir, "--force") == 0, "every reply is known"


def test_a_budget_in_parts_stops_cleanly_and_goes_on(root: Path, tiny_lm_dir, capsys) -> None:
    more = ("--explainers", "highlighted,token_list", "--part-latents", "3")
    with ChatServer(answer) as server:
        code = main(arguments("explain", root, server, tiny_lm_dir, *more, "--max-llm-tokens", "100"))
        first = len(server.bodies)
        assert code == 3 and first == 0 and not list(root.glob("explanations/*")), "no part's share pays for a request"
        assert "--max-llm-tokens" in capsys.readouterr().err
        assert main(arguments("explain", root, server, tiny_lm_dir, *more)) == 0
        assert len(server.bodies) == 8, "the same command with a budget goes on"


def test_stopped_after_any_request_and_resumed_gives_the_same_bytes(root: Path, tiny_lm_dir, tmp_path) -> None:
    """The server refuses the key after n answers, which stops the run; the same command later ends as if it had not."""
    whole = Path(shutil.copytree(root, tmp_path / "whole"))
    total = run(whole, tiny_lm_dir)
    for n in (1, 7, total - 3):
        again, asked = Path(shutil.copytree(root, tmp_path / str(n))), 0

        def until(body, _, n=n):
            nonlocal asked
            asked += 1
            return answer(body, _) if asked <= n else Fault("status", status=401, body={})

        with ChatServer(until) as server:
            codes = [
                main(arguments("explain", again, server, tiny_lm_dir, "--explainers", "highlighted,token_list")),
                main(arguments("score", again, server, tiny_lm_dir, "--scorers", "detection,late_interaction")),
            ]
        assert codes[1] == 2 and not list(again.glob("scores/*"))
        run(again, tiny_lm_dir)
        assert everything(again) == everything(whole)


@pytest.mark.parametrize(("status", "body", "code"), [
    (401, {}, 2), (402, {}, 3), (429, {"error": {"code": "insufficient_quota"}}, 3),
])  # fmt: skip
def test_an_empty_account_or_a_refused_key_scores_nothing(root: Path, tiny_lm_dir, capsys, status, body, code) -> None:
    more = ("--explainers", "token_list")
    with ChatServer(lambda *_: Fault("status", status=status, body=body)) as server:
        assert main(arguments("explain", root, server, tiny_lm_dir, *more)) == 0, "token_list asks nobody"
        assert main(arguments("score", root, server, tiny_lm_dir, "--scorers", "detection")) == code
    assert not list(root.glob("scores/*")) and "m" in capsys.readouterr().err


def test_any_set_of_latents(root: Path, tiny_lm_dir) -> None:
    """Latents that no run had drawn: new exemplars from the cache, drawn as the run did, then explained; too rare ones
    are left out."""
    with ChatServer(answer) as server:
        assert main(arguments("explain", root, server, tiny_lm_dir, "--latents", "20-24,30,63")) == 0
    sae_id = random_sae().sae_id
    table = ExemplarTable.open(newest_artefact(root, "exemplars", sae_id))
    assert table.latents and set(table.latents) <= {20, 21, 22, 23, 24, 30, 63}
    found = open_explanations(newest_artefact(root, "explanations", sae_id))
    assert {e.latent for e in found} == set(table.latents)
    assert table.config == CFG and table.requested == [20, 21, 22, 23, 24, 30, 63]


def test_hard_negatives_by_embedding_are_drawn_at_the_door(root: Path, made: Path, tiny_lm_dir, tmp_path) -> None:
    """The same latents again, with the embedder that the door opens: the table that a run with it would have drawn."""
    sae_id, before = random_sae().sae_id, ExemplarTable.open(newest_artefact(root, "exemplars", random_sae().sae_id))
    with ChatServer(answer) as server:
        more = ("--exemplars", "score_embedding_near=3", "--explainers", "token_list")
        assert main(arguments("explain", root, server, tiny_lm_dir, *more)) == 0
        assert main(arguments("score", root, server, tiny_lm_dir, "--scorers", "detection")) == 0
    table = ExemplarTable.open(newest_artefact(root, "exemplars", sae_id))
    assert table.latents == before.latents and table.key != before.key
    cache = LatentCache.open(newest_artefact(root, "latents", sae_id))
    expected = build_exemplars(
        tmp_path / "by_hand", cache, before.requested, replace(CFG, score_embedding_near=3),
        embedder=Embedder(root / "embedder"), tokenizer=LanguageModel.load(str(tiny_lm_dir)).tokenizer,
    )  # fmt: skip
    assert expected.key == table.key
    assert (expected.folder / "exemplars.parquet").read_bytes() == (table.folder / "exemplars.parquet").read_bytes()
    near = [e for i in table.latents for e in table.scored(i) if e.kind == "embedding_near"]
    assert len(near) == 3 * len(table.latents) and not any(any(e.acts) for e in near)
    scores = open_scores(newest_artefact(root, "scores", sae_id)).scores
    assert {s.metric for s in scores if s.group == "kind=embedding_near"} >= {"fpr"}


def test_settings_of_the_windows(root: Path, tiny_lm_dir, capsys) -> None:
    with ChatServer(answer) as server:
        def complaint(*more: str) -> str:
            assert main(arguments("explain", root, server, tiny_lm_dir, *more)) == 2
            return capsys.readouterr().err

        assert "--embedder default" in complaint("--exemplars", "score_embedding_near=3", "--embedder", "none")
        assert "did you mean 'score_silent'" in complaint("--exemplars", "score_silnt=3")
        assert "expected NAME=VALUE" in complaint("--exemplars", "score_silent")
        assert "expected int" in complaint("--exemplars", 'score_silent="x"')
        assert "build it with the same numbers" in complaint("--exemplars", "window_tokens=16")
        assert not server.bodies and not (root / "window_embeddings").exists()
        shutil.rmtree(root / "exemplars")  # nothing to draw alike: the windows of the cache, else the default numbers
        drawn = ("--exemplars", "min_windows=[6,3,8]", "--exemplars", "score-silent=5", "--seed", "4")
        more = ("--latents", "0-9", *drawn)
        assert main(arguments("explain", root, server, tiny_lm_dir, "--explainers", "token_list", *more)) == 0
    table = ExemplarTable.open(newest_artefact(root, "exemplars", random_sae().sae_id))
    sizes = {"window_tokens": 12, "min_window_tokens": 4, "left_tokens": 11}
    assert table.config == ExemplarConfig(**sizes, min_windows=(6, 3, 8), score_silent=5, seed=4)


def test_dry_run_asks_nothing(root: Path, tiny_lm_dir, capsys) -> None:
    with ChatServer(answer) as server:
        assert main(arguments("explain", root, server, tiny_lm_dir, "--dry-run")) == 0
        assert main(arguments("explain", root, server, tiny_lm_dir)) == 0
        asked = len(server.bodies)
        assert main(arguments("score", root, server, tiny_lm_dir, "--dry-run")) == 0
        assert len(server.bodies) == asked == 8
    said = capsys.readouterr().out
    assert "explain.highlighted" in said and "score.detection" in said


def test_what_is_wrong_is_said_in_one_line(root: Path, tiny_lm_dir, capsys) -> None:
    with ChatServer(answer) as server:
        def complaint(door: str, *more: str) -> str:
            assert main(arguments(door, root, server, tiny_lm_dir, *more)) == 2
            return capsys.readouterr().err

        assert "did you mean" in complaint("explain", "--sae", "tiny.topk.s0-6")
        assert "run: python -m autointerp explain" in complaint("score")
        assert "no explanations" in complaint("score", "--explanations", "0" * 16)
        assert "expected numbers and ranges" in complaint("explain", "--latents", "3,x")
        assert "did you mean 'highlighted'" in complaint("explain", "--explainers", "highlihted")
        assert "needs" in complaint("explain", "--explainers", "pmi")
    assert main(["explain", "--root", str(root / "nowhere")]) == 2


def test_scores_of_the_door_are_read_back(root: Path, tiny_lm_dir) -> None:
    run(root, tiny_lm_dir)
    scores = open_scores(newest_artefact(root, "scores", random_sae().sae_id))
    assert {s.scorer for s in scores.scores} == {"detection", "late_interaction"}
    assert {s.floor_kind for s in scores.scores} == {"", "shuffled"} and len(scores.checks) == 2
    assert (root / "ledgers").is_dir()


def test_numbers_and_ranges() -> None:
    assert latents_of("3,17,40-42, 17") == [3, 17, 40, 41, 42]
    for wrong in ("", "a", "1-", "-3", "1,,2"):
        with pytest.raises(ConfigError, match="ranges"):
            latents_of(wrong)


def test_without_a_command_all_are_listed(capsys) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert "explain latents" in said and "import-neuronpedia" in said


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("autointerp.dataset.export", full)
    assert main(["export", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: No space left on device ({tmp_path / 'x'}); {KEPT}\n"


def test_nothing_to_show_is_said(tmp_path: Path, capsys) -> None:
    assert main(["show", "--root", str(tmp_path)]) == 2
    assert "holds no finished explanations; run: python -m evals.run_all" in capsys.readouterr().err
