"""k-sparse probing against sae-probes 0.4.2 on activations of the embedded model: five of the package's data sets, all
rows as the files have them, its split. The cleaning is undone; nothing else is.

``goldens/codes_embedded.npz`` holds the codes that both sides probe, ``goldens/probes_embedded.json`` what sae-probes
makes of them (``make crosscheck``). The regressions differ in scaling and in how strength is chosen, so scores agree to
what the test rows can tell, not to digits; which latents are chosen, and the AUC of one latent, agree exactly.
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


def load(name: str) -> Any:
    spec = spec_from_file_location(name, HERE / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


case, probe_case = load("embedded_case"), load("probe_case")
GOLDEN = json.loads((HERE / "goldens" / "probes_embedded.json").read_text())


def auc(logit: np.ndarray, y: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, logit))


@pytest.fixture(scope="module")
def codes() -> dict[str, dict[str, np.ndarray]]:
    with np.load(HERE / "goldens" / "codes_embedded.npz") as flat:
        parts = ("values", "indices", "y", "prompt")
        return {name: {part: flat[f"{name}.{part}"] for part in parts} for name in case.DATASETS}


@pytest.fixture(scope="module")
def found(codes) -> dict[str, dict[str, Any]]:
    made = {}
    for name, c in codes.items():
        y, n = c["y"].astype(np.int64), len(c["y"])
        assert float(c["values"].astype(np.float64).sum()) == pytest.approx(GOLDEN[name]["codes_sum"], rel=1e-12)
        train, test = probe_case.split(y, n, n)
        features = SparseFeatures(c["values"].astype(np.float64), c["indices"].astype(np.int64), case.F)
        scores = features.scores(y, [TaskSplit(name, 0, train, test)])[0]
        folds = np.arange(len(train)) % 3
        columns = {k: best_columns(scores, k) for k in probe_case.KS}
        z = {k: features.take(chosen) for k, chosen in columns.items()}
        logits = {k: probe_k(z[k][train], y[train], folds, z[k][test])[0] for k in probe_case.KS}
        made[name] = {"columns": columns, "auc": [auc(logits[k], y[test]) for k in probe_case.KS], "train": train,
                      "test": test}
    return made


@pytest.mark.parametrize("name", case.DATASETS)
def test_the_same_latents_are_chosen(found, name: str) -> None:
    for penalty in ("l1", "l2"):
        theirs = GOLDEN[name][penalty]["indices"]
        for k, ours in found[name]["columns"].items():
            assert set(ours) == set(theirs[:k]), (penalty, k)


@pytest.mark.parametrize("name", case.DATASETS)
def test_one_latent_has_the_same_auc_and_more_agree_within_the_noise(found, name: str) -> None:
    """No pair differs by more than one standard error that an AUC of chance has on these rows."""
    n = len(found[name]["test"]) / 2
    error = float(np.sqrt((2 * n + 1) / (12 * n * n)))
    for penalty in ("l2", "l1"):
        assert found[name]["auc"] == pytest.approx(GOLDEN[name][penalty]["auc"], abs=error), penalty
    assert found[name]["auc"][0] == pytest.approx(GOLDEN[name]["l2"]["auc"][0], abs=1e-6)


def test_scores_agree_on_average_and_are_no_chance(found) -> None:
    for penalty in ("l2", "l1"):
        gaps = [np.subtract(f["auc"], GOLDEN[name][penalty]["auc"]) for name, f in found.items()]
        assert abs(np.mean(gaps)) < 0.005 and np.abs(gaps).mean() < 0.015, (penalty, gaps)
    assert np.mean([f["auc"][-1] for f in found.values()]) > 0.63  # real features: something to agree on
    # In the mean: which way one data set goes hangs on the SAE, which each rebuild trains anew, where the labels are
    # near chance (truth of an answer), while 16 latents must know more than one over all sets.
    assert np.mean([f["auc"][-1] - f["auc"][0] for f in found.values()]) > 0.05


def test_pinned_their_split_lets_prompts_of_train_into_test(found, codes) -> None:
    """What our groups prevent: equal prompts on both sides."""
    shares = {}
    for name, f in found.items():
        seen = set(codes[name]["prompt"][f["train"]])
        shares[name] = float(np.mean([p in seen for p in codes[name]["prompt"][f["test"]]]))
    assert max(shares.values()) > 0.3, shares


@pytest.mark.assets
@pytest.mark.timeout(900)
def test_the_labels_are_those_of_the_package(codes) -> None:
    for name, c in codes.items():
        prompts, y = probe_case.table(name)
        assert len(prompts) == len(c["y"]) and np.array_equal(y, c["y"])
        assert all(prompts[i] == prompts[int(first)] for i, first in enumerate(c["prompt"]))
        assert len(set(prompts)) == len(set(c["prompt"].tolist()))
