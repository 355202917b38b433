"""Equivalent pretraining compute on a model's own loss curve."""

from pathlib import Path

import numpy as np
import pytest
from memory_store import context, memory_store, topk_subject

from evals.pretraining import Curve, Pretraining, falling
from evals.suite.downstream_loss import PLUGIN, equivalent_compute, pretraining_tokens
from sae.errors import DataError


def written(path: Path, steps: np.ndarray, losses: np.ndarray) -> Path:
    path.write_text("step,loss\n" + "".join(f"{s!r},{x!r}\n" for s, x in zip(steps.tolist(), losses.tolist(),
                                                                          strict=True)))  # fmt: skip
    return path


@pytest.fixture
def curve(tmp_path: Path) -> Curve:
    """L(s) = 2 + s^(-1/2) at a million steps, densely."""
    steps = np.geomspace(1, 1e6, 200_001)
    return Curve.open(written(tmp_path / "curve.csv", steps, 2 + steps**-0.5))


def test_the_curve_is_inverted(curve: Curve) -> None:
    for step in (10.0, 333.0, 54_321.0):
        delta = step**-0.5 - 1e6**-0.5
        assert float(curve.share(delta)) == pytest.approx(step / 1e6, rel=1e-6)
    assert float(curve.share(0.0)) == 1.0 and float(curve.share(-0.3)) == 1.0
    assert np.isnan(curve.share(np.nan)) and curve.share(np.array([0.0, 0.1])).shape == (2,)


def test_above_the_first_point_it_is_a_bound(curve: Curve) -> None:
    assert float(curve.share(5.0)) == pytest.approx(1e-6) and curve.clipped(5.0) and not curve.clipped(0.1)


def test_noise_is_pooled_and_a_plateau_counts_from_where_it_was_reached(tmp_path: Path) -> None:
    assert falling(np.array([5.0, 3.0, 4.0, 2.0])).tolist() == [5.0, 3.5, 3.5, 2.0]
    assert falling(np.array([1.0, 2.0, 3.0])).tolist() == [2.0, 2.0, 2.0]
    steps, losses = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([4.0, 3.0, 3.0, 2.0])
    made = Curve.open(written(tmp_path / "c.csv", steps, losses))
    assert float(made.share(1.0)) == pytest.approx(0.01)  # loss 3 was reached at step 10


@pytest.mark.parametrize(
    "text", ["", "step,loss\n", "step,loss\n0,3\n5,2\n", "a,b\n1,2\n3,4\n", "step,loss\n1,x\n2,3\n"]
)
def test_what_is_no_curve_is_said_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="c.csv"):
        Curve.open(path)
    with pytest.raises(DataError, match="no loss curve"):
        Curve.open(tmp_path / "absent.csv")


def test_the_evaluation_places_the_loss_on_the_curve(tiny_lm, tmp_path: Path, curve: Curve) -> None:
    hookpoint = tiny_lm.default_hookpoint()
    store = memory_store(tiny_lm, hookpoint, rows=8)
    subject = topk_subject(tiny_lm, hookpoint, store)

    def rows(known: Pretraining | None) -> dict[str, float]:
        ctx = context(tiny_lm, hookpoint, store, subject, tmp_path, pretraining=known)
        return {r.metric: r for r in PLUGIN.run(ctx).rows}

    plain, with_curve, with_tokens = rows(None), rows(Pretraining(None, curve)), rows(Pretraining(3e11))
    assert "equiv_compute_curve" not in plain and pretraining_tokens(tiny_lm.name) is None
    assert plain["equiv_compute"].value is None  # nobody knows how long this model was trained
    delta = plain["delta_ce"].value
    row = with_curve["equiv_compute_curve"]
    assert row.value == pytest.approx(float(curve.share(delta))) and row.ci_low <= row.value <= row.ci_high
    from evals.suite.downstream_loss import HOFFMANN

    assert with_tokens["equiv_compute"].value == pytest.approx(float(equivalent_compute(delta, 3e11, HOFFMANN)))
    inputs = [PLUGIN.inputs(context(tiny_lm, hookpoint, store, subject, tmp_path, pretraining=p))
              for p in (None, Pretraining(None, curve), Pretraining(3e11))]  # fmt: skip
    assert len({tuple(sorted(i.items())) for i in inputs}) == 3
