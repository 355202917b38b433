"""`--tokens.prefix-id`: rows, prompts and probes of a run begin with the same token (METRICS 1)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evals.probe_activations import ProbeConfig, build_probes
from evals.run_config import PRESET_FUNCTIONS
from evals.run_log import RunLog
from evals.spelling import SpellingConfig, build_spelling
from evals.stages import Pipeline
from sae.language_model import LanguageModel
from sae.tokens import prefix_id

CHOSEN = 7


def pipeline(root: Path, model: Path, chosen: int | None) -> Pipeline:
    cfg = PRESET_FUNCTIONS["tiny"]()
    cfg = replace(cfg, model=str(model), root=root, tokens=replace(cfg.tokens, prefix_id=chosen))
    return Pipeline(cfg, RunLog(root=root, preset="tiny", key="k", config={}))


def own_task(path: Path) -> str:
    """Prompts of eight letters, all different words, so that none is another's near copy."""
    draw = np.random.default_rng(0)
    lines = ["prompt,target"]
    for i in range(800):
        word = "".join(draw.choice(list("abcdefghijklmnop"), size=8))
        lines.append(f"{word},{i % 2}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"own={path}"


def test_the_models_of_a_run_know_the_prefix_that_was_chosen(tmp_path, tiny_lm_dir):
    own = prefix_id(LanguageModel.load(str(tiny_lm_dir), dtype="float32").tokenizer)
    stages = pipeline(tmp_path, tiny_lm_dir, CHOSEN)
    assert own != CHOSEN
    assert [prefix_id(lm.tokenizer) for lm in (stages.lm(), stages.lm_float32())] == [CHOSEN, CHOSEN]
    assert prefix_id(pipeline(tmp_path, tiny_lm_dir, None).lm().tokenizer) == own


def test_probe_prompts_begin_as_the_rows_do(tmp_path, tiny_lm_dir):
    cfg = ProbeConfig(own=(own_task(tmp_path / "own.csv"),), cap_rows=120, max_tokens=16, seeds=(0,))
    found = {}
    for chosen in (None, CHOSEN):
        lm = pipeline(tmp_path, tiny_lm_dir, chosen).lm_float32()
        found[chosen] = build_probes(tmp_path, lm, "layers.1", cfg)
    assert found[None].key != found[CHOSEN].key and np.array_equal(found[None].rows, found[CHOSEN].rows)
    prompts = [line.split(",")[0] for line in (tmp_path / "own.csv").read_text().splitlines()[1:]]
    ids = lm.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        alone = [lm.capture(torch.tensor([[CHOSEN, *row[-15:]]]), ["layers.1"])["layers.1"][0, -1] for row in ids]
    # every stored row is the activation of some prompt behind the chosen prefix, and of none behind the other
    nearest = {c: _nearest(np.array(found[c].x_ND), torch.stack(alone)) for c in found}
    assert float(nearest[CHOSEN].max()) < 1e-4 and float(nearest[None].min()) > 1e-3


def _nearest(x_ND: np.ndarray, y_MD: torch.Tensor) -> torch.Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(torch.from_numpy(x_ND), y_MD.float(), compute_mode=exact).min(dim=1).values


def test_spelling_prompts_of_another_prefix_are_another_artefact(tmp_path, tiny_lm_dir):
    folders = {c: build_spelling(tmp_path, pipeline(tmp_path, tiny_lm_dir, c).lm_float32(), "layers.1",
                                 SpellingConfig(seed=0)) for c in (None, CHOSEN)}  # fmt: skip
    configs = {c: json.loads((f / "manifest.json").read_text())["config"] for c, f in folders.items()}
    assert folders[None] != folders[CHOSEN] and "prefix_id" not in configs[None]
    assert configs[CHOSEN]["prefix_id"] == CHOSEN
