"""METRICS J: every measure tells the true dictionary from a random one, and a permuted decoder ruins those that read
it and leaves the others as they are. Planted data, the evaluations themselves. N tokens, G true directions, D channels.

Of METRICS' list two are not ruined by a permuted decoder (decision 026): E, whose directions are still true ones, and
as a set J's cosine. B is held by its own oracles in test_downstream_loss.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from golden_worlds import n2g_context, topk
from memory_store import MemoryStore, MemoryTokens
from planted import planted, truth_of

from evals.base import EvalContext, SAESubject
from evals.probe_activations import ProbeActivations
from sae import plugins
from sae.manifest import canonical_json, rng, writing
from sae.ops import SparseLatents

N, D, G, L = 1_600, 24, 32, 40
DATA = planted(n=N, d=D, g=G, l0=3.0, sigma=0.0)
TRUTH = truth_of(DATA)
TASKS, SIDE = (0, 3, 6), 60
"""True directions whose presence is a task; rows of a class on a side."""


class Oracle(SAESubject):
    """Knows the true codes of the planted tokens."""

    def _codes(self, x_ND: torch.Tensor) -> torch.Tensor:
        return DATA.codes_NG[torch.cdist(x_ND.double(), DATA.x_ND.double()).argmin(dim=1)]

    def encode_sparse(self, x_ND: torch.Tensor) -> SparseLatents:
        return SparseLatents(self._codes(x_ND), torch.arange(G).expand(len(x_ND), G))

    def codes_and_reconstruction(self, x_ND: torch.Tensor) -> tuple[SparseLatents, torch.Tensor]:
        codes = self.encode_sparse(x_ND)
        return codes, codes.values_NK @ self.sae.W_dec_FD + DATA.bias_D

    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.codes_and_reconstruction(x_ND)[1]

    def features(self, x_ND: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        codes = self._codes(x_ND)
        return codes if columns is None else codes[:, columns]


def oracle(*, roll: int = 0) -> SAESubject:
    base = topk(np.roll(DATA.directions_GD.numpy(), roll, axis=0), 0.0, 3, "oracle")
    base.sae.W_enc_FD.copy_(DATA.directions_GD)
    return Oracle(base.sae, base.info)


def random(seed: int = 0) -> SAESubject:
    rows = np.random.default_rng([9, seed]).standard_normal((G, D)).astype(np.float32)
    found = topk(rows / np.linalg.norm(rows, axis=1, keepdims=True), 0.0, 3, f"random{seed}")
    found.sae.b_dec_D.copy_(DATA.x_ND.mean(dim=0))
    return found


def probes(root: Path) -> ProbeActivations:
    """Tasks "is direction j there?", as many of each class on both sides."""
    picked, label, records = [], [], []
    for t, j in enumerate(TASKS):
        active = (DATA.codes_NG[:, j] > 0).numpy()
        rows = np.concatenate([
            rng("controls", j, side).permutation(np.flatnonzero(active == side))[: 2 * SIDE] for side in (True, False)])
        for i, row in enumerate(rows):
            records.append((t, 0, "train" if i % 2 else "test", len(picked)))
            picked.append(row)
            label.append(int(active[row]))
    names = [f"direction{j}" for j in TASKS]
    meta = {"tasks": names, "families": {n: n for n in names}, "failures": {}, "missing": {}, "task_set": "controls",
            "n_tokens": 0}  # fmt: skip
    with writing(root / "probes" / "k", kind="probes", key="k", stage_version=1, config={}) as out:
        np.save(out.path / "acts.npy", DATA.x_ND.numpy()[picked])
        pd.DataFrame({
            "task": np.repeat(names, 4 * SIDE), "label": np.array(label, dtype=np.int8),
            "group": np.tile(np.arange(4 * SIDE), len(TASKS)).astype(np.int32),
        }).to_parquet(out.path / "rows.parquet")
        pd.DataFrame(records, columns=["order", "seed", "side", "row"]).to_parquet(out.path / "splits.parquet")
        (out.path / "tasks.json").write_text(canonical_json(meta))
    return ProbeActivations.open(root / "probes" / "k")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tokens = MemoryTokens(np.zeros((N // L, L), dtype=np.uint16), np.repeat(np.arange(N // L), L).reshape(-1, L))
    return {"store": MemoryStore(tokens, DATA.x_ND, np.arange(N) % L > 0),
            "probes": probes(tmp_path_factory.mktemp("controls"))}  # fmt: skip


def measured(world: dict[str, Any], name: str, subject: SAESubject, **more: Any) -> dict[str, Any]:
    ctx = EvalContext(root=Path("."), subject=subject, preset="tiny", seed=0, hookpoint="planted", run_key="r",
                      stores={"test": world["store"]}, probes=world["probes"], truth=TRUTH, **more)  # fmt: skip
    return {row.metric: row for row in plugins.find("evals.suite", name).run(ctx).rows if row.slice == ""}


@pytest.mark.parametrize(("name", "metric", "better", "gap"), [
    ("reconstruction", "fvu", -1, 0.3), ("probe_loss", "probe_loss", -1, 0.2), ("sparse_probing", "auc_k1", 1, 0.1),
    ("ground_truth", "mcc", 1, 0.3), ("ground_truth", "firing_f1", 1, 0.3), ("ground_truth", "fvu_gap", -1, 0.3),
])  # fmt: skip
def test_the_truth_is_told_from_a_random_dictionary(world, name: str, metric: str, better: int, gap: float) -> None:
    good, poor = (measured(world, name, s)[metric].value for s in (oracle(), random()))
    assert better * (good - poor) > gap, (good, poor)


def test_two_oracles_share_their_latents_and_two_random_ones_do_not(world) -> None:
    good = measured(world, "seed_stability", oracle(), peers=[_named(oracle(), "twin")])["shared_frac"].value
    poor = measured(world, "seed_stability", random(), peers=[random(1)])["shared_frac"].value
    assert good == 1 and poor < 0.1


def _named(subject: SAESubject, name: str) -> SAESubject:
    subject.info = type(subject.info)(**{**vars(subject.info), "sae_id": name})
    return subject


@pytest.mark.parametrize(("name", "metric", "worst"), [
    ("reconstruction", "fvu", 1.0), ("ground_truth", "fvu_gap", 0.9), ("ground_truth", "firing_f1", 0.3),
])  # fmt: skip
def test_a_permuted_decoder_ruins_what_reads_it(world, name: str, metric: str, worst: float) -> None:
    good, ruined = (measured(world, name, oracle(roll=r))[metric].value for r in (0, 1))
    assert (good < 0.01 and ruined > worst) if metric != "firing_f1" else (good == 1 and ruined < worst)


@pytest.mark.parametrize("name", ["probe_loss", "sparse_probing"])
def test_a_permuted_decoder_leaves_probes_as_they_are(world, name: str) -> None:
    good, permuted = (measured(world, name, oracle(roll=r)) for r in (0, 1))
    assert good == permuted


def test_a_permuted_decoder_leaves_n2g_as_it_is(tmp_path) -> None:
    ctx = n2g_context(tmp_path)
    evaluation = plugins.find("evals.suite", "n2g")
    before = evaluation.run(ctx).rows
    ctx.subject.sae.W_dec_FD.copy_(ctx.subject.sae.W_dec_FD.roll(1, dims=0))
    ctx.shared.clear()
    assert evaluation.run(ctx).rows == before and any(r.value not in (None, 0.0, 1.0) for r in before)


def test_the_planted_world_is_what_it_says() -> None:
    assert DATA.codes_NG.shape == (N, G)
    assert all(int((DATA.codes_NG[:, j] > 0).sum()) >= 2 * SIDE for j in TASKS)
