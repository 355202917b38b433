"""One training configuration per architecture, each with its own options alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from autointerp.clients.scripted import ScriptedClient
from autointerp.config import InterpConfig
from evals.interp import Interpretation
from evals.run_all import main, parse
from evals.run_config import paper, quick, tiny
from evals.run_log import RunLog
from sae.config import TrainConfig, to_dict


def test_options_of_other_architectures_do_not_change_an_sae() -> None:
    names = ("topk", "relu", "gated", "jumprelu", "batchtopk")
    base = quick()
    options = replace(base.train, multi_topk=True, l1_decoder_norm=True, data_start=True, gate_l1=0.7, l0_weight=2.0)
    cfgs = {c.architecture: c for c in replace(base, architectures=names, train=options).train_configs()}
    plain = TrainConfig()
    assert [cfgs[name].k for name in names] == [32, None, None, 32, 32]
    assert [name for name in names if cfgs[name].multi_topk] == ["topk"]
    assert [name for name in names if cfgs[name].l1_decoder_norm] == ["relu"]
    assert [name for name in names if cfgs[name].data_start] == ["relu"]
    assert [name for name in names if cfgs[name].gate_l1 != plain.gate_l1] == ["gated"]
    assert [name for name in names if cfgs[name].l0_weight != plain.l0_weight] == ["jumprelu"]
    assert {c.train_tokens for c in cfgs.values()} == {base.train.train_tokens}


def test_quick_starts_its_relu_sae_at_tokens_and_topk_at_random() -> None:
    starts = {c.architecture: (c.data_start, c.train_tokens) for c in quick().train_configs()}
    assert starts == {"topk": (False, 999_424), "relu": (True, 999_424)}


# --- the language model's engines ------------------------------------------------------------------------------------


def test_engines_of_the_main_job(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """`--interp.replicas` and `--interp.vllm` reach the client; where engines run is no part of a run's identity."""
    words = ["--preset", "tiny", "--root", str(tmp_path), "--interp.client", "vllm", "--interp.llm", "m",
             "--interp.replicas", "2", "--interp.vllm", "max_model_len=512", "enforce_eager=true"]  # fmt: skip
    cfg = parse(words)
    assert cfg.key() == parse(words[:8]).key() != parse([*words, "--interp.llm-revision", "b"]).key()
    opened: list[dict] = []

    def plugin(**options):
        opened.append(options)
        return ScriptedClient(lambda r: "x")

    monkeypatch.setattr("autointerp.clients.vllm.PLUGIN", plugin)
    here = SimpleNamespace(cfg=replace(cfg, interp=replace(cfg.interp, llm_revision="b")), stages=None)
    Interpretation.client.func(here)
    assert opened == [{"model": "m", "revision": "b", "replicas": 2, "max_model_len": 512, "enforce_eager": True}]
    monkeypatch.setattr("autointerp.clients.openai.PLUGIN", plugin)
    asking = InterpConfig(client="openai", llm="m", base_url="http://h/v1", timeout_s=900.0, next_token=True)
    Interpretation.client.func(SimpleNamespace(cfg=replace(tiny(), root=tmp_path, interp=asking), stages=None))
    assert opened[1] == {"model": "m", "base_url": "http://h/v1", "concurrency": 32, "timeout_s": 900.0,
                         "next_token": True}  # fmt: skip


@pytest.mark.parametrize(("more", "said"), [
    (("--interp.replicas", "0", "--interp.client", "vllm"), "replicas must be at least 1"),
    (("--interp.replicas", "2"), "give --client vllm"),
    (("--interp.client", "vllm", "--workers", "2"), "--interp.replicas N"),
    (("--interp.client", "vllm", "--interp.vllm", "max_len=3"), "no option of ours"),
    (("--interp.max-cost-usd", "3"), "--interp.prices FILE"),
    (("--interp.base-url", "http://me:secret@host/v1"), "OPENAI_API_KEY"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_read(more, said, tmp_path, capsys) -> None:
    try:
        code = main(["--preset", "tiny", "--root", str(tmp_path / "r"), *more])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2 and said in " ".join((printed.out + printed.err).split()) and "secret" not in printed.err
    assert not (tmp_path / "r").exists()


def test_the_plan_names_engines_and_dollars_and_opens_nothing(tiny_lm_dir, tmp_path, monkeypatch, capsys) -> None:
    from evals.plan import print_plan

    prices = tmp_path / "prices.json"
    prices.write_text('{"m": {"prompt": 1000, "cached": 0, "output": 1000}}')
    monkeypatch.setattr("evals.plan.machine_flops", lambda *a, **k: 1e11)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    interp = InterpConfig(client="vllm", llm="m", replicas=2, vllm=("tensor_parallel_size=2",), prices=prices,
                          latents=2, explainers=("highlighted",), scorers=("detection",), embedder="none")  # fmt: skip
    print_plan(replace(tiny(), root=tmp_path, model=str(tiny_lm_dir), interp=interp))
    said = " ".join(capsys.readouterr().out.split())
    assert "vllm: 2 engines side by side on GPU 0,1 | 2,3" in said and "US dollars at most" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(Exception, match="need 4, and 1 is visible"):
        print_plan(replace(tiny(), root=tmp_path, model=str(tiny_lm_dir), interp=interp))


# --- a run again from what it left -----------------------------------------------------------------------------------


def test_a_saved_configuration_is_that_run_again(tmp_path) -> None:
    """`--config run.json`: every value, paths and nested ones too, but not what was to be done that day."""
    words = ["--preset", "tiny", "--root", str(tmp_path), "--architectures", "topk", "gated", "--train-seeds", "0", "1",
             "--truth", "a/truth.safetensors", "--interp.prices", "p.json", "--task-csv", "a=b.csv", "--hookpoint",
             "layers.1", "--no-decontaminate", "--train.lr", "0.002", "--exemplars.score-hard", "3",
             "--force"]  # fmt: skip
    first = parse(words)
    RunLog(root=tmp_path, preset="tiny", key=first.key(), config=to_dict(first)).write()
    saved = str(tmp_path / "run.json")
    again = parse(["--config", saved])
    assert first.force and again == replace(first, force=False, config=tmp_path / "run.json")
    assert again.key() == first.key() and isinstance(again.interp.prices, Path)
    changed = parse([f"--config={saved}", "--train.lr", "0.001", "--root", "elsewhere"])
    assert changed.train == replace(first.train, lr=0.001) and changed.root == Path("elsewhere")
    RunLog(root=tmp_path, preset="tiny", key="k", config=to_dict(again)).write()  # of a run that was replayed itself
    assert parse(["--config", saved]) == again


def test_presets_keep_their_values_through_a_file(tmp_path) -> None:
    for make in (quick, paper, tiny):
        cfg = replace(make(), root=tmp_path)
        RunLog(root=tmp_path, preset=cfg.preset, key="k", config=to_dict(cfg)).write()
        assert parse(["--config", str(tmp_path / "run.json")]) == replace(cfg, config=tmp_path / "run.json")


@pytest.mark.parametrize(
    ("content", "words", "says"),
    [
        (None, [], "cannot be read"),
        ("no json", [], "cannot be read"),
        ("{}", [], "holds no configuration of a run"),
        ('{"config": {"preset": "tiny", "sede": 1}}', [], "no field 'sede'; did you mean 'seed'"),
        ('{"config": {"preset": "tiny"}}', ["--preset", "quick"], "leave --preset"),
    ],
)
def test_a_file_that_is_no_saved_configuration(tmp_path, capsys, content, words, says) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert main(["--config", str(path), *words]) == 2
    assert says in capsys.readouterr().err
