"""An evaluation that works on some subjects and fails on others, for the runner's own tests."""

from typing import Any

from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Estimate, Metric


class FailsOnRelu:
    """The plug-in."""

    name = "fails_on_relu"
    title = "Fails on ReLU"
    version = 1
    metrics = (Metric(name="one", title="One", unit="1", better="higher", description="1.", reference="test",
                      headline=True),)
    needs: frozenset[str] = frozenset()
    uses = frozenset({"sparse"})

    def config(self, preset: str) -> dict[str, Any]:
        return {"size": 1}

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        return {}

    def run(self, ctx: EvalContext) -> EvalResult:
        if ctx.subject.info.architecture == "relu" and ctx.subject.info.kind == "sae":
            raise ValueError("no relu here")
        made = RowMaker(self, ctx)
        made.add("one", Estimate(value=1.0, n=1))
        return EvalResult(rows=made.rows)


PLUGIN = FailsOnRelu()
