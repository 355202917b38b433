"""An evaluation that takes its time and says where it was measured, for engines of several machines."""

import os
import time
from pathlib import Path

from failing_eval import FailsOnRelu

from evals.base import EvalContext, EvalResult, RowMaker
from evals.results import Estimate


class Waits(FailsOnRelu):
    """The plug-in; notes of who measured go to the folder ``places`` beside the results."""

    name = "waits"
    title = "Waits"

    def run(self, ctx: EvalContext) -> EvalResult:
        machine = os.environ.get("SAESCOPE_HOST", "here")
        folder = Path(ctx.root).parent / "places"
        folder.mkdir(exist_ok=True)
        (folder / f"{machine}.{ctx.subject.info.sae_id}.{ctx.seed}.{os.getpid()}").touch()
        time.sleep(1.0)
        made = RowMaker(self, ctx)
        made.add("one", Estimate(value=1.0, n=1))
        return EvalResult(rows=made.rows)


PLUGIN = Waits()
