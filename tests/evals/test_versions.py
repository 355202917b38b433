"""No value moves without a new version (METRICS 2): every evaluation on a fixed SAE against ``tests/golden/evals``.

Inputs are numpy's: a random tiny model, an SAE of drawn weights, random bytes. Instruction sets (AVX-512, AVX2, none)
move these values by 2e-5 at most, float32 being what it is; a value that moves by more than 5e-5 means: raise the
evaluation's version and write a new file with
``SAESCOPE_WRITE_GOLDENS=1 python -m pytest tests/evals/test_versions.py``; the old file stays, as its rows do.
"""

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from believable import complaints
from golden_worlds import CONTEXTS
from memory_cache import MemoryCache
from memory_store import context, info, memory_store
from planted import planted, truth_of

from evals.base import SAESubject
from sae import plugins
from sae.config import InputNorm, SAEConfig

GOLDENS = Path(__file__).parents[1] / "golden" / "evals"
EVALUATIONS = ("reconstruction", "downstream_loss", "ablation_sparsity", "probe_loss", "sparse_probing",
               "seed_stability", "ground_truth")  # fmt: skip
"""Those that read activations; the others read what earlier stages made (tests/support/golden_worlds.py)."""
D, F, K = 32, 64, 8
TOLERANCE = 5e-5


def drawn_sae(lm: Any, hookpoint: str, seed: int) -> SAESubject:
    """Weights by numpy; the twin of another seed shares a third of its decoder rows."""
    r = np.random.default_rng(100 + seed)
    w_dec = r.standard_normal((F, D))
    w_dec[: F // 3] = np.random.default_rng(7).standard_normal((F // 3, D))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=D, d_out=D, d_sae=F, k=K, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id=f"drawn.s{seed}", meta=None, train_tokens=0,
        train_steps=0, seed=seed)
    sae = plugins.find("sae.architectures", "topk")(cfg)
    with torch.no_grad():
        sae.W_dec_FD.copy_(torch.from_numpy(w_dec))
        (sae.W_enc_FD if hasattr(sae, "W_enc_FD") else sae.W_enc_DF.T).copy_(torch.from_numpy(0.6 * w_dec))
        sae.b_enc_F.copy_(torch.from_numpy(0.1 * r.standard_normal(F)))
        sae.b_dec_D.copy_(torch.from_numpy(0.3 * r.standard_normal(D)))
    sae.requires_grad_(False)
    return SAESubject(sae, info(lm, hookpoint, cfg.sae_id, d_in=D, d_sae=F, k=K))


@pytest.fixture(scope="module")
def world(tiny_lm, tmp_path_factory) -> dict[str, Any]:
    from evals.probe_activations import ProbeConfig, build_probes

    root, hookpoint = tmp_path_factory.mktemp("golden"), tiny_lm.default_hookpoint()
    path, r = root / "task.csv", np.random.default_rng(3)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "target"])
        for i in range(480):
            letters = "".join(chr(97 + c) for c in r.integers(26, size=10))
            writer.writerow([f"{letters} {i} {'yes' if i % 2 else 'nope'}", i % 2])
    task = ProbeConfig(own=(f"yes={path}",), cap_rows=120, max_tokens=16, seeds=(0,))
    return {
        "lm": tiny_lm, "hookpoint": hookpoint, "root": root, "store": memory_store(tiny_lm, hookpoint, rows=12),
        "probes": build_probes(root, tiny_lm, hookpoint, task), "truth": truth_of(planted(n=600, d=D, g=24)),
        "subject": drawn_sae(tiny_lm, hookpoint, 0), "peers": [drawn_sae(tiny_lm, hookpoint, 1)],
    }  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_values_are_those_of_the_version(name: str, world: dict[str, Any]) -> None:
    evaluation = plugins.find("evals.suite", name)
    more = {n: world[n] for n in ("probes", "truth", "peers") if n in evaluation.needs}
    ctx = context(world["lm"], world["hookpoint"], world["store"], world["subject"], world["root"], **more)
    check_golden(evaluation, evaluation.run(ctx).rows)


@pytest.mark.parametrize("name", sorted(CONTEXTS))
def test_values_on_earlier_stages_are_those_of_the_version(name: str, tmp_path: Path) -> None:
    """n2g: patterns built on planted text. explanation: scores read from disk. absorption: words of a planted model."""
    evaluation = plugins.find("evals.suite", name)
    check_golden(evaluation, evaluation.run(CONTEXTS[name](tmp_path)).rows)


def test_values_of_reconstructions_from_patterns_are_those_of_the_version(world, monkeypatch) -> None:
    """n2g_loss in both modes, whose metrics have names of their own; patterns are built on random bytes.

    Of some random bytes taking 24 latents out adds no loss, which leaves no share: seed 5 has one."""
    from evals import patterns
    from evals.suite import n2g_loss

    lm, hookpoint, subject = world["lm"], world["hookpoint"], world["subject"]
    stores = {split: memory_store(lm, hookpoint, rows=rows, seed=seed, split=split)
              for split, rows, seed in (("explain", 48, 1), ("score", 24, 2), ("train", 48, 3), ("test", 16, 5))}
    cache = MemoryCache(subject.sae, {split: stores[split] for split in ("explain", "score")}, min_active=16)
    monkeypatch.setitem(patterns.LATENTS, "tiny", 24)
    rows, shared = [], {}
    for full_up_to in (0, F):
        monkeypatch.setitem(n2g_loss.FULL_UP_TO, "tiny", full_up_to)
        rows += n2g_loss.PLUGIN.run(context(
            lm, hookpoint, stores["test"], subject, world["root"], shared, latents=cache,
            train_text=stores["train"].tokens)).rows
    assert {r.metric for r in rows} == {m.name for m in n2g_loss.PLUGIN.metrics}
    check_golden(n2g_loss.PLUGIN, rows)


def check_golden(evaluation: Any, rows: list[Any]) -> None:
    name = evaluation.name
    found = {f"{r.metric}|{r.slice}|{r.split}": r.failure if r.value is None else r.value for r in rows}
    assert complaints(pd.DataFrame([asdict(r) for r in rows]), {(name, m.name): m for m in evaluation.metrics}) == []
    assert any(isinstance(v, float) and v not in (0.0, 1.0) for v in found.values())
    path = GOLDENS / f"{name}.v{evaluation.version}.json"
    if os.environ.get("SAESCOPE_WRITE_GOLDENS") and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert path.is_file(), f"{path.name} is missing: write it as the head of this file says"
    expected = json.loads(path.read_text())
    assert found.keys() == expected.keys()
    near = lambda v: pytest.approx(v, rel=TOLERANCE, abs=TOLERANCE) if isinstance(v, (int, float)) else v  # noqa: E731
    wrong = {k: (found[k], v) for k, v in expected.items() if found[k] != near(v)}
    assert not wrong, f"{name} v{evaluation.version} moved: raise its version. {wrong}"
