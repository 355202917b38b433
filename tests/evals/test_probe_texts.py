"""What the text of a run is cleaned of: the prompts of its probe tasks (DATA 7)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals import probe_texts
from evals.probe_texts import kept_out
from evals.run_config import PRESET_FUNCTIONS, RunConfig
from evals.run_log import RunLog
from evals.stages import Pipeline
from sae.errors import MissingAsset
from sae.kept_out import KeptOut

LEAKED = "a task asks whether this very sentence of more than ten words was written by a man or a machine"


def run_config(tmp_path: Path, preset: str = "tiny", **changes) -> RunConfig:
    return replace(PRESET_FUNCTIONS[preset](), root=tmp_path, **changes)


def own_task(tmp_path: Path, prompt: str = LEAKED, column: str = "prompt") -> str:
    path = tmp_path / "own.csv"
    path.write_text(f"{column},target\n{prompt},1\nAnother prompt,0\n", encoding="utf-8")
    return f"own={path}:{column}:target:1"


def own_text(tmp_path: Path) -> str:
    """One document in four holds the sentence of the task."""
    draw = np.random.default_rng(0)
    lines = []
    for i in range(2_000):
        words = " ".join("".join(draw.choice(list("abcdefgh"), size=4)) for _ in range(12))
        lines.append(json.dumps({"text": f"{words} {LEAKED if i % 4 == 0 else 'and so on'} {i}"}))
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_what_is_kept_out_hangs_on_the_tasks_and_the_text(tmp_path, monkeypatch):
    own, text = own_task(tmp_path), own_text(tmp_path)
    assert kept_out(run_config(tmp_path, texts=text)) is None  # preset tiny has no tasks
    assert kept_out(run_config(tmp_path, "quick")) is None  # the default text is free of them
    assert kept_out(run_config(tmp_path, texts=text, task_csv=(own,), decontaminate=False)) is None
    mine = kept_out(run_config(tmp_path, texts=text, task_csv=(own,)))
    assert mine is not None and mine.shared([f"x {LEAKED}", "another prompt", "other"]).tolist() == [True, True, False]
    quick = kept_out(run_config(tmp_path, "quick", texts=text))
    both = kept_out(run_config(tmp_path, "quick", texts=text, task_csv=(own,)))
    some = kept_out(run_config(tmp_path, "quick", texts=text, evals=("reconstruction",)))
    assert quick and both and some and quick.key == some.key and len({mine.key, quick.key, both.key}) == 3
    own_task(tmp_path, "Quite another sentence")
    assert kept_out(run_config(tmp_path, texts=text, task_csv=(own,))).key != mine.key
    touched = {True: KeptOut, False: type(None)}
    for touches, kind in touched.items():
        monkeypatch.setattr(KeptOut, "touches_default", lambda self, touches=touches: touches)
        assert isinstance(kept_out(run_config(tmp_path, task_csv=(own,))), kind)


def test_the_tokens_of_a_run_hold_no_prompt_and_the_log_says_how_many_did(tmp_path, tiny_lm_dir):
    own, text = own_task(tmp_path), own_text(tmp_path)
    found = {}
    for clean in (True, False):
        cfg = run_config(tmp_path, model=str(tiny_lm_dir), texts=text, task_csv=(own,), decontaminate=clean)
        log = RunLog(root=tmp_path, preset="tiny", key=cfg.key(), config={})
        stages = Pipeline(cfg, log)
        tokenizer = stages.lm().tokenizer
        texts = {s: tokenizer.decode(np.asarray(t.tokens_BL).reshape(-1).tolist()) for s, t in stages.tokens.items()}
        found[clean] = (texts, log.notes.get("documents_with_probe_prompts"), cfg.key())
    assert not any("man or a machine" in one for one in found[True][0].values())
    assert sum("man or a machine" in one for one in found[False][0].values()) >= 3
    assert found[True][1] > 10 and found[False][1] is None and found[True][2] != found[False][2]


def test_without_the_tasks_texts_the_way_out_is_named(tmp_path, monkeypatch):
    def missing(name: str):
        raise MissingAsset("the asset sae-probes is not here")

    monkeypatch.setattr(probe_texts, "raw_rows", missing)
    keep = kept_out(run_config(tmp_path, "quick", texts=own_text(tmp_path)))
    with pytest.raises(MissingAsset, match="--no-decontaminate"):
        keep.shared(["a text"])


@pytest.mark.assets
def test_prompts_of_the_built_in_tasks_are_found_in_a_text(tmp_path):
    from evals.probe_datasets import build_task, task_names

    keep = kept_out(run_config(tmp_path, "quick", texts=own_text(tmp_path)))
    for name in task_names("quick"):
        prompts = [p for p in build_task(name).prompts if len(p.split()) >= 12][:50]
        if name != "base64":
            assert prompts and keep.shared([f"Someone wrote: {p} They did." for p in prompts]).all(), name
