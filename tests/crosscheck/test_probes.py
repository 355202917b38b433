"""k-sparse probing against sae-probes 0.4.2 on five data sets, with our cleaning undone: raw rows, their split.

``goldens/probes.json`` was computed by sae-probes (``make crosscheck``). Latents are ranked alike; the regressions
differ in scaling and in how strength is chosen, so scores agree to what 98 to 975 test rows can tell, not to digits.
"""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.probe_activations import TaskSplit
from evals.sparse_probes import SparseFeatures, best_columns, probe_k

HERE = Path(__file__).parent
pytestmark = [pytest.mark.assets, pytest.mark.timeout(900)]


def load(name: str) -> Any:
    spec = spec_from_file_location(name, HERE / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


case, probe_case = load("case"), load("probe_case")
GOLDEN = json.loads((HERE / "goldens" / "probes.json").read_text())


def encode(x: np.ndarray) -> np.ndarray:
    """float64 [N, F]."""
    import torch

    w = {name: torch.from_numpy(a) for name, a in case.sae_weights().items()}
    h = torch.relu((torch.from_numpy(x) - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    top = h.topk(case.K, dim=-1)
    return torch.zeros_like(h).scatter(-1, top.indices, top.values).double().numpy()


def auc(logit: np.ndarray, y: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, logit))


@pytest.fixture(scope="module")
def found(tiny_lm) -> dict[str, dict[str, Any]]:
    made = {}
    for name in probe_case.DATASETS:
        prompts, y = probe_case.table(name)
        x = probe_case.activations(tiny_lm, f"layers.{case.LAYER}", prompts)
        n = min(len(x), probe_case.MAX_ROWS)
        assert float(np.abs(x).mean()) == pytest.approx(GOLDEN[name]["x_mean_abs"], rel=1e-5)
        train, test = probe_case.split(y[:n], n, len(y))
        z = encode(x[:n])
        f = np.broadcast_to(np.arange(case.F), z.shape)
        features = SparseFeatures(z, f, case.F)
        scores = features.scores(y[:n], [TaskSplit(name, 0, train, test)])[0]
        folds = np.arange(len(train)) % 3
        columns = {k: best_columns(scores, k) for k in probe_case.KS}
        logits = {k: probe_k(z[train][:, c], y[train], folds, z[test][:, c])[0] for k, c in columns.items()}
        made[name] = {"columns": columns, "auc": [auc(logits[k], y[test]) for k in probe_case.KS],
                      "train": train, "test": test, "prompts": prompts}
    return made


@pytest.mark.parametrize("name", probe_case.DATASETS)
def test_the_same_latents_are_chosen(found, name: str) -> None:
    for penalty in ("l1", "l2"):
        theirs = GOLDEN[name][penalty]["indices"]
        for k, ours in found[name]["columns"].items():
            assert set(ours) == set(theirs[:k]), (penalty, k)


@pytest.mark.parametrize("name", probe_case.DATASETS)
def test_scores_agree_within_what_the_test_rows_can_tell(found, name: str) -> None:
    """No pair differs by more than one (L2) or two (L1) standard errors that an AUC of chance has on these rows."""
    n = len(found[name]["test"]) / 2
    error = float(np.sqrt((2 * n + 1) / (12 * n * n)))
    for penalty, errors in (("l2", 1), ("l1", 2)):
        assert found[name]["auc"] == pytest.approx(GOLDEN[name][penalty]["auc"], abs=errors * error), penalty
    assert found[name]["auc"][0] == pytest.approx(GOLDEN[name]["l2"]["auc"][0], abs=1e-6)  # one latent: only its order


def test_scores_agree_on_average(found) -> None:
    for penalty in ("l2", "l1"):
        gaps = [np.subtract(f["auc"], GOLDEN[name][penalty]["auc"]) for name, f in found.items()]
        assert abs(np.mean(gaps)) < 0.005 and np.abs(gaps).mean() < 0.015, (penalty, gaps)


def test_pinned_their_split_lets_prompts_of_train_into_test(found) -> None:
    """What our groups prevent: equal prompts on both sides (18.6 % of test in the mean over all their sets)."""
    shares = {}
    for name, f in found.items():
        seen = {f["prompts"][i] for i in f["train"]}
        shares[name] = float(np.mean([f["prompts"][i] in seen for i in f["test"]]))
    assert max(shares.values()) > 0.1, shares
