"""What a run refuses before it loads a model, what its plan lists, and what it says after loading."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import write_texts

from evals import checks
from evals.plan import make_plan
from evals.run_all import main
from evals.run_config import RunConfig, tiny
from sae.errors import ConfigError, DataError, SaescopeError
from sae.language_model import LanguageModel
from sae.manifest import writing


@pytest.fixture
def cfg(tmp_path: Path, tiny_lm_dir: Path) -> RunConfig:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a b c"}) + "\n")
    return replace(tiny(), root=tmp_path / "out", model=str(tiny_lm_dir), texts=str(texts))


def test_a_good_run_passes_and_nothing_is_written(cfg: RunConfig) -> None:
    checks.check_before_loading(cfg)
    assert not cfg.root.exists()


@pytest.mark.parametrize(("changes", "says"), [
    ({"texts": "no.jsonl"}, "there is no such file or folder"),
    ({"texts": "hf:nothing"}, "expected hf:REPO"),
    ({"texts": "x.md"}, "there is no such file"),
    ({"sae": ("./no/such",)}, "does not exist"),
    ({"task_csv": ("mood=no.csv",)}, "--task-csv: there is no file no.csv"),
    ({"pretraining_curve": Path("no.csv")}, "--pretraining-curve: there is no file"),
    ({"evals": ("recontruction",)}, "did you mean 'reconstruction'"),
    ({"evals": ("probe_loss",)}, "--evals probe_loss: the preset tiny has no probe task"),
    ({"evals": ("ground_truth",)}, "give --truth"),
    ({"evals": ("seed_stability",)}, "give --train-seeds 0 1"),
    ({"evals": ("transcoding",)}, "give one with --sae"),
    ({"architectures": ("topkk",)}, "did you mean 'topk'"),
    ({"architectures": ("transcoder",)}, "the evaluations are for autoencoders"),
])  # fmt: skip
def test_refused_before_a_model_is_loaded(cfg: RunConfig, changes: dict, says: str) -> None:
    with pytest.raises(SaescopeError, match=says):
        checks.check_before_loading(replace(cfg, **changes))


def test_a_server_that_is_not_there_is_told_at_once_and_no_error(cfg: RunConfig, caplog) -> None:
    """All its answers may lie in the reply cache. One that listens is not spoken of; another client needs none."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        asked = replace(cfg, interp=replace(cfg.interp, client="openai", llm="x", base_url=url))
        checks.check_before_loading(asked)
        assert f"no server can be reached at {url} (Connection refused)" in caplog.text
        caplog.clear()
        server.listen()
        checks.check_before_loading(asked)
    checks.check_before_loading(cfg)
    assert not caplog.text


@pytest.mark.parametrize(("changes", "says"), [
    ({"scorers": ("detectoin",)}, "did you mean 'detection'"),
    ({"explainers": ("n2gg",)}, "did you mean 'n2g'"),
    ({"client": "openaii"}, "did you mean 'openai'"),
])  # fmt: skip
def test_names_of_the_explaining_half(cfg: RunConfig, changes: dict, says: str) -> None:
    wrong = replace(cfg, interp=replace(cfg.interp, **changes))
    with pytest.raises(ConfigError, match=says):
        checks.check_before_loading(wrong)
    checks.check_before_loading(replace(wrong, evals=("reconstruction",)))  # which explains nothing


def test_an_own_task_is_read_before_a_model_is_loaded(cfg: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,target\na,1\nb,0\n")
    checks.check_before_loading(replace(cfg, task_csv=(f"mood={tmp_path / 't.csv'}",)))
    with pytest.raises(DataError, match="columns 'text' and 'target'"):
        checks.check_before_loading(replace(cfg, task_csv=(f"mood={tmp_path / 't.csv'}:text:target:1",)))


def test_a_root_that_is_a_file(cfg: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        checks.check_before_loading(replace(cfg, root=tmp_path / "file" / "below"))


def test_a_root_that_cannot_be_written_to(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who can write anywhere
    with pytest.raises(ConfigError, match="cannot be written to"):
        checks.check_before_loading(cfg)


def test_rows_longer_than_the_model_reads(cfg: RunConfig, tiny_gpt2: LanguageModel) -> None:
    checks.check_context(cfg, tiny_gpt2)
    long = replace(cfg, tokens=replace(cfg.tokens, context_tokens=128))
    with pytest.raises(ConfigError, match="reads at most 64 tokens, rows have 128; give --tokens.context-tokens 64"):
        checks.check_context(long, tiny_gpt2)


def test_a_disk_that_is_nearly_full(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a finished run has stored needs no room again: it can be repeated on a disk that it has filled."""
    monkeypatch.setattr(checks, "free_disk_gb", lambda root: 0.85)
    checks.check_disk(cfg, "layers.1", 32)  # 41,000 tokens x 32 channels: 3 MB
    large = replace(cfg, tokens=replace(cfg.tokens, train_tokens=2_000_000))
    with pytest.raises(ConfigError, match=r"0\.85 GB free, the run writes about 0\.43 GB"):
        checks.check_disk(large, "layers.1", 32)
    with writing(cfg.root / "activations" / "k", kind="activations", key="k", stage_version=1,
                 config={"hookpoint": "layers.1"}) as out:  # fmt: skip
        with open(out.path / "shard", "wb") as file:
            file.truncate(128_000_000)  # a hole: no block of the disk is used
    checks.check_disk(large, "layers.1", 32)
    with pytest.raises(ConfigError, match="free some space"):
        checks.check_disk(large, "layers.2", 32)


def test_the_plan_lists_what_would_run(
    cfg: RunConfig, tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals.plan.machine_flops", lambda *a, **k: 1e11)

    def stages(**changes) -> set[str]:
        return {p.stage for p in make_plan(replace(cfg, **changes), tiny_lm, "layers.1", 32)}

    assert not stages() & {"eval: transcoding", "eval: ground_truth", "eval: seed_stability", "eval: probe_loss"}
    assert {"scores", "explanations", "latents", "effects", "eval: n2g"} <= stages()
    assert not stages(evals=("reconstruction",)) & {"scores", "explanations", "latents", "effects"}
    assert "eval: seed_stability" in stages(train_seeds=(0, 1))
    assert "eval: probe_loss" in stages(preset="quick")


def test_the_dry_run_refuses_what_the_run_would(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--preset", "tiny", "--model", cfg.model, "--texts", cfg.texts, "--root", str(cfg.root), "--dry-run"]
    assert main([*given, "--sae", "./no/such"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*given, "--hookpoint", "layers.9"]) == 2
    assert "did you mean 'layers.2'" in capsys.readouterr().err
    assert not cfg.root.exists()


def imported(name: str, hookpoint: str | None) -> SimpleNamespace:
    """An SAE as a run sees it before it is measured."""
    meta = None if hookpoint is None else SimpleNamespace(hookpoint=hookpoint, lm="lm", lm_revision="unknown")
    return SimpleNamespace(sae_id=name, d_in=32, transcodes=False, cfg=SimpleNamespace(meta=meta))


def test_where_given_saes_are_measured(cfg: RunConfig, tiny_lm: LanguageModel) -> None:
    a, b = imported("a", "layers.1"), imported("b", "layers.1")
    two = replace(cfg, sae=("x", "y"))
    assert checks.hookpoint_of(two, tiny_lm, [a, b]) == "layers.1"
    assert checks.hookpoint_of(cfg, tiny_lm, []) == tiny_lm.default_hookpoint()
    with pytest.raises(ConfigError, match="b was trained at layers.2, the run measures layers.1; give --hookpoint"):
        checks.hookpoint_of(two, tiny_lm, [a, imported("b", "layers.2")])
    with pytest.raises(ConfigError, match="b: its file does not say where it reads; give --hookpoint"):
        checks.hookpoint_of(two, tiny_lm, [a, imported("b", None)])  # the place of another is no answer
    assert checks.hookpoint_of(replace(two, hookpoint="layers.1"), tiny_lm, [a, imported("b", None)]) == "layers.1"


def test_an_evaluation_asked_for_measures_one_of_the_saes_given(
    cfg: RunConfig, tiny_lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Not its floors alone: a transcoder has no reconstruction of what it reads."""
    sae, transcoder = imported("a", "layers.1"), imported("b", "layers.1")
    transcoder.transcodes, transcoder.cfg.meta.hookpoint_out = True, None
    asked = replace(cfg, sae=("x",), evals=("reconstruction",))
    assert checks.hookpoint_of(asked, tiny_lm, [sae]) == "layers.1"
    with pytest.raises(ConfigError, match="reconstruction can measure none of the transcoders, and takes SAEs"):
        checks.hookpoint_of(asked, tiny_lm, [transcoder])
    with pytest.raises(ConfigError, match="transcoding can measure none of the SAEs, and takes transcoders"):
        checks.hookpoint_of(replace(asked, evals=("transcoding",)), tiny_lm, [sae])
    both = replace(asked, sae=("x", "y"), evals=("transcoding", "reconstruction"))
    assert not caplog.records
    assert checks.hookpoint_of(replace(both, sae=("x",)), tiny_lm, [sae]) == "layers.1"
    assert "transcoding can measure none of the SAEs, and takes transcoders: it measures floors alone" in caplog.text
    assert checks.hookpoint_of(both, tiny_lm, [sae, transcoder]) == "layers.1"


def test_one_sae_given_twice(cfg: RunConfig, tiny_lm: LanguageModel) -> None:
    twice = [imported("a", "layers.1"), imported("a", "layers.1")]
    with pytest.raises(ConfigError, match=r"x, copy/x hold the same SAE \(a\)"):
        checks.hookpoint_of(replace(cfg, sae=("x", "copy/x")), tiny_lm, twice)


def test_a_first_run_without_probe_tasks_ends_well(tmp_path: Path, tiny_lm_dir: Path) -> None:
    """The preset tiny names no probe task: what needs one is left out and noted, and nothing has failed."""
    texts = write_texts(tmp_path / "my texts é.jsonl", documents=1200)
    root = tmp_path / "mes résultats"
    given = ["--preset", "tiny", "--model", str(tiny_lm_dir), "--texts", str(texts), "--root", str(root)]
    sizes = ["--interp.embedder", "none", "--interp.explainers", "n2g", "--interp.scorers", "surprisal",
             "--interp.latents", "2", "--architectures", "topk"]  # fmt: skip
    assert main([*given, *sizes]) == 0
    log = json.loads((root / "run.json").read_text(encoding="utf-8"))
    assert not log["failures"]
    left_out = log["notes"]["not_applicable"]
    assert {"probe_loss", "sparse_probing"} <= set(left_out) and "--task-csv" in left_out["probe_loss"]


@pytest.mark.parametrize(
    ("trained", "keep", "rows", "says"),
    [
        ((), False, 64, ""),
        ((64, 128), False, 64, ""),
        ((0,), False, 64, ""),  # its file does not say
        ((None,), False, 64, ""),
        ((128, 48, 56), False, 48, "rows have 48 tokens instead of 64: sae-1 was trained on 48"),
        ((8,), False, 32, "rows have 32 tokens instead of 64: sae-0 was trained on 8"),  # no shorter than a window
        ((48,), True, 64, "sae-0 was trained on rows of 48 tokens, the run reads 64"),
    ],
)
def test_rows_are_no_longer_than_those_of_the_training(cfg: RunConfig, trained, keep, rows, says, caplog) -> None:
    metas = [n if n is None else SimpleNamespace(context_length_tokens=n) for n in trained]
    given = [SimpleNamespace(sae_id=f"sae-{i}", cfg=SimpleNamespace(meta=meta)) for i, meta in enumerate(metas)]
    found = checks.fitted(replace(cfg, keep_context=keep), given)
    assert found.tokens.context_tokens == rows and (says in caplog.text if says else not caplog.text)
