"""Every metric with its definition, as the evaluations declare them: ``python -m evals.glossary [EVALUATION ...]``.

The tables of docs/metrics.md are these (``--write docs/metrics.md`` makes them anew); a test holds them equal.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae import exits
from sae.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from evals.base import Eval
    from evals.results import Metric

BLOCK = re.compile(r"(<!-- metrics of (\w+) -->\n).*?(<!-- end -->)", flags=re.S)
HEAD = ("metric", "better", "unit", "what it is", "source")


def bounds(metric: "Metric") -> str:
    """``0 to 1``, ``>= 0``, or nothing where any number may stand."""
    low, high = (f"{end:g}" if abs(end) != float("inf") else "" for end in (metric.low, metric.high))
    if low and high:
        return f"{low} to {high}"
    return f"≥ {low}" if low else f"≤ {high}" if high else ""


def unit_text(metric: "Metric") -> str:
    """``share, 0 to 1``."""
    return ", ".join(part for part in (metric.unit, bounds(metric)) if part)


def cell(text: str) -> str:
    """One line that markdown shows as it stands."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def table(evaluation: "Eval") -> str:
    """A markdown table of the evaluation's metrics, the headline ones in bold, in the order of their declaration."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for metric in evaluation.metrics:
        name = f"**`{metric.name}`**" if metric.headline else f"`{metric.name}`"
        better = "–" if metric.better == "neither" else metric.better
        what = f"{metric.title}: {metric.description}"
        lines.append(f"| {name} | {better} | {cell(unit_text(metric))} | {cell(what)} | {cell(metric.reference)} |")
    return "\n".join(lines)


def block(evaluation: "Eval") -> str:
    """What stands between the marks of docs/metrics.md."""
    needs, uses = (", ".join(sorted(names)) or "nothing" for names in (evaluation.needs, evaluation.uses))
    return f"Version {evaluation.version}. Reads: {needs}. Of a subject it asks: {uses}.\n\n{table(evaluation)}\n"


def rewritten(text: str, evaluations: Sequence["Eval"]) -> str:
    """``text`` with the tables of today, those of evaluations that it does not know yet at its end.

    ConfigError where a place names no evaluation, or an evaluation has two.
    """
    blocks = {evaluation.name: block(evaluation) for evaluation in evaluations}
    found = [name for _, name, _ in BLOCK.findall(text)]
    for name in found:
        if name not in blocks or found.count(name) > 1:
            times = f"<!-- metrics of {name} --> stands {found.count(name)} times"
            raise ConfigError(f"{times}; each evaluation has one place: {', '.join(blocks)}")
    for evaluation in evaluations:
        if evaluation.name not in found:
            text += f"\n## {evaluation.title}\n\n<!-- metrics of {evaluation.name} -->\n<!-- end -->\n"
    return BLOCK.sub(lambda match: match[1] + blocks[match[2]] + match[3], text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: :mod:`sae.exits`."""
    return exits.run(lambda: _run(arguments), kept="")


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.glossary", description="Every metric with its definition.")
    parser.add_argument("evaluations", nargs="*", metavar="EVALUATION", help="names of run_all --list; default: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="make the tables of this file anew")
    asked = parser.parse_args(arguments)
    from evals.measure import select

    every = {evaluation.name: evaluation for evaluation in select(())}
    for name in asked.evaluations:
        if name not in every:
            raise ConfigError(f"no evaluation {name!r}{did_you_mean(name, every)}")
    if asked.write:
        if asked.evaluations:
            raise ConfigError("--write makes all tables; leave the names out")
        text = asked.write.read_text(encoding="utf-8")
        asked.write.write_text(rewritten(text, list(every.values())), encoding="utf-8")
        return exits.DONE
    for name in asked.evaluations or every:
        print(f"# {every[name].title} (`{name}`)\n\n{block(every[name])}")
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
