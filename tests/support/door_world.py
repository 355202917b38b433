"""A root in which the doors ``explain`` and ``score`` find all they need, and a server that answers them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from held_out import random_sae, stores
from loopback import completion
from tiny import save_tiny_embedder

from autointerp.config import ExemplarConfig
from autointerp.exemplars import build_exemplars
from autointerp.latent_cache import build_latents
from sae import checkpoint
from sae.config import SubjectMeta
from sae.manifest import writing

CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=4,
    calibrate_positive=4, calibrate_silent=4, score_positive=8, score_silent=8, score_hard=2, min_windows=(6, 3, 8),
)  # fmt: skip


def make_root(root: Path, n_latents: int = 8) -> None:
    """One SAE, its latent cache, the exemplars of some latents, and a tiny embedder."""
    held_out, sae = stores(root), random_sae()
    meta = SubjectMeta(lm="tiny", lm_revision="unknown", hookpoint="layers.1", lm_dtype="float32",
                       context_length_tokens=16)  # fmt: skip
    sae.cfg = replace(sae.cfg, meta=meta)
    with writing(root / "saes" / sae.sae_id, kind="saes", key=sae.sae_id, stage_version=1, config={}) as out:
        checkpoint.save(sae, out.path, held_out["explain"].read(slice(0, 64)))
    cache = build_latents(root, sae, held_out, window_tokens=CFG.window_tokens, min_window_tokens=CFG.min_window_tokens)
    build_exemplars(root, cache, cache.eligible(CFG)[:n_latents], CFG)
    save_tiny_embedder(root / "embedder")


def answer(body: dict[str, Any], n: int) -> Any:
    """A text that depends on what is shown; some numbers of a list, one and the same for one and the same question."""
    said = body["messages"][-1]["content"]
    if "explanation" in json.dumps(body.get("response_format", {})):
        return completion(json.dumps({"explanation": f"about {len(said)} things"}))
    numbers = [int(i) for i in re.findall(r"^\[(\d+)\]", said, re.M)]
    return completion(json.dumps({"match": [i for i in numbers if (len(said) * i) % 3 == 0]}))
