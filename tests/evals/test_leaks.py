"""What must not leak into a score, one test per way (the table in docs/decisions/021-suite.md names the others)."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.probe_activations import TaskSplit
from evals.probe_search import search
from evals.sparse_probes import DenseFeatures, SparseFeatures, best_columns

N, F = 200, 40


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, TaskSplit]:
    """Codes [N, F] of which latent 7 carries the label, labels, a split into halves."""
    r = np.random.default_rng(seed)
    y = np.arange(N) % 2
    x = np.where(r.random((N, F)) < 0.3, np.abs(r.standard_normal((N, F))), 0.0)
    x[:, 7] += 2.0 * y
    return x, y, TaskSplit("t", 0, np.arange(0, N, 4).repeat(2) + np.tile([0, 1], N // 4), np.arange(2, N, 4))


def with_other_test_rows(x: np.ndarray, y: np.ndarray, split: TaskSplit) -> tuple[np.ndarray, np.ndarray]:
    """The same but for the test side, where latent 3 now carries inverted labels."""
    x, y = x.copy(), y.copy()
    y[split.test] = 1 - y[split.test]
    x[split.test] = 0.0
    x[split.test, 3] = 100.0 * y[split.test]
    return x, y


def test_no_latent_is_chosen_by_its_test_rows() -> None:
    x, y, split = planted()
    other_x, other_y = with_other_test_rows(x, y, split)
    for kind in (lambda a: SparseFeatures(a, np.broadcast_to(np.arange(F), a.shape), F),
                 lambda a: DenseFeatures(lambda c, a=a: torch.from_numpy(a)[:, c], N, F)):  # fmt: skip
        scores = [kind(a).scores(b, [split])[0] for a, b in ((x, y), (other_x, other_y))]
        assert np.array_equal(*scores) and best_columns(scores[0], 1).tolist() == [7]


def test_the_one_latent_probe_is_chosen_and_fitted_on_train_alone() -> None:
    x, y, split = planted()
    found = []
    for a, b in ((x, y), with_other_test_rows(x, y, split)):
        h = torch.from_numpy(np.ascontiguousarray(a.T)).float()
        found.append(search(lambda start, stop, h=h: h[start:stop], F, N, torch.from_numpy(b), [split], "t").choices[0])
    first, other = found
    assert first is not None and other is not None and first.feature == other.feature == 7
    assert np.array_equal(first.train.loss_N, other.train.loss_N)
    assert not np.array_equal(first.test.loss_N, other.test.loss_N)  # the change did reach the score


def test_rows_are_never_reused_under_another_question(tmp_path: Path) -> None:
    """SAEBench and sae-probes skip what a file name says is there, whatever its configuration, seed or SAE."""
    from failing_eval import FailsOnRelu
    from memory_store import info

    from evals.base import SAESubject
    from evals.measure import Measurement
    from evals.run_log import RunLog

    class Asked(FailsOnRelu):
        size, token_key = 1, "a"
        version = 1

        def config(self, preset: str) -> dict[str, Any]:
            return {"size": self.size, "seed": 0}  # an evaluation's own seed may not hide the run's

        def inputs(self, ctx: Any) -> dict[str, str]:
            return {"test": self.token_key}

    class LM:
        name, revision = "lm", "r"

    def measured(evaluation: Any, preset: str = "tiny", seed: int = 0, sha: str = "0" * 64) -> Path:
        log = RunLog(root=tmp_path, preset=preset, key="k", config={})
        m = Measurement(root=tmp_path, preset=preset, seed=seed, hookpoint="h", log=log, parts={},
                        latents=lambda i: None, scores=lambda i: None, load_lm=lambda: None)  # fmt: skip
        subject = SAESubject.__new__(SAESubject)
        subject.info = replace(info(LM, "h", "one", d_in=4), sae_sha256=sha)
        subject.provides = frozenset({"sparse"})
        return m.run(evaluation, subject)

    base = measured(Asked())
    stamp = (base / "manifest.json").stat().st_mtime_ns
    assert measured(Asked()) == base and (base / "manifest.json").stat().st_mtime_ns == stamp
    changed = {
        "preset": measured(Asked(), preset="quick"), "seed": measured(Asked(), seed=1),
        "sae": measured(Asked(), sha="1" * 64),
        "size": measured(type("Size", (Asked,), {"size": 2})()),
        "data": measured(type("Data", (Asked,), {"token_key": "b"})()),
        "version": measured(type("Version", (Asked,), {"version": 2})()),
    }  # fmt: skip
    assert len({base, *changed.values()}) == 7, changed


@pytest.mark.assets
def test_news_is_told_from_news_not_from_code() -> None:
    """The negatives of sae-probes' 161 to 163 are source files; all four tasks are rebuilt from 97_news_class."""
    from evals.probe_datasets import build_task, read_table
    from sae.assets import probe_csv

    code = re.compile(r"\b(def|import|return|public|static|void|function|var|#include)\b.*[({;:]", re.S)
    share = lambda texts: float(np.mean([bool(code.search(t)) for t in texts]))  # noqa: E731
    for name in ("ag_world", "ag_sports", "ag_business", "ag_scitech"):
        task = build_task(name)
        labels = np.asarray(task.labels)
        sides = [[p for p, y in zip(task.prompts, labels, strict=True) if y == side] for side in (0, 1)]
        assert all(share(side) < 0.05 for side in sides), name
    theirs = [p for p, y in read_table(probe_csv(161)) if y in ("0", "False", "0.0")]
    assert share(theirs) > 0.5  # the search does find code where it is


def test_every_test_of_the_table_exists() -> None:
    """Names in the table of leaks; an ellipsis stands for `test` after a name of the same file."""
    root = Path(__file__).parents[2]
    table = (root / "docs" / "decisions" / "021-suite.md").read_text().partition("## Leaks")[2]
    named = {name for name in re.findall(r"`([^`]*test_[a-z_]+[^`]*|…_[a-z_]+)`", table)}
    files = {path.stem: path.read_text() for path in (root / "tests").rglob("test_*.py")}
    functions = {f for text in files.values() for f in re.findall(r"def (test_\w+)", text)}
    assert len(named) >= 15
    for name in named:
        last = re.split(r"[./:]+", name)[-1].replace("…", "test")
        assert last in functions | files.keys(), name
