"""Windows of another size in the main job: the latent cache is cut as the exemplars want it."""

from dataclasses import replace
from pathlib import Path

from held_out import random_sae, stores

from evals.run_config import tiny
from evals.run_log import RunLog
from evals.stages import Pipeline


def test_latents_are_cut_into_the_windows_of_the_exemplars(tmp_path: Path) -> None:
    cfg = tiny()
    exemplars = replace(
        cfg.exemplars, window_tokens=16, min_window_tokens=4, left_tokens=10, min_windows=(3, 2, 3)
    )  # fmt: skip
    cfg = replace(cfg, root=tmp_path, exemplars=exemplars)
    log = RunLog(root=tmp_path, preset="tiny", key="", config={})
    stages, held_out = Pipeline(cfg, log), stores(tmp_path)
    stages.__dict__["saes"] = [random_sae()]
    stages.store = held_out.__getitem__  # type: ignore[method-assign,assignment]
    table = stages.exemplars[random_sae().sae_id]
    assert not log.failures and len(table.latents) == cfg.interp.latents
    scored = [e for i in table.latents for e in table.scored(i)]
    assert max(len(e.token_ids) for e in scored) == 16 and min(len(e.token_ids) for e in scored) < 8
