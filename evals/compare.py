"""The door ``python -m evals.compare A B``: a table, a plot, a verdict per metric. Torch-free."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sae import console, exits


def main(arguments: Sequence[str] | None = None) -> int:
    """Door of ``python -m evals.compare``; 0 whatever the verdict, else :mod:`sae.exits`."""
    parser = argparse.ArgumentParser(
        "python -m evals.compare", description="Is B better than A, at what, and is it real? Differences are B - A."
    )
    text = "sae_id, part of one (topk-f4608-k32), or glob; several seeds of one recipe are taken together"
    parser.add_argument("a", metavar="A", help=text)
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    parser.add_argument("--out", type=Path, help="folder of table and plot (default: ROOT/compare)")
    parser.add_argument("--all", action="store_true", help="every metric with a better side, not the headline alone")
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.more:
        parser.error(
            f"A and B are two, {2 + len(options.more)} are given: compare them in pairs, or see all in the leaderboard "
            f"(python -m evals.leaderboard --root {options.root}); seeds of one recipe are one name with commas"
        )
    return exits.run(lambda: _run(options), kept="")


def _run(options: argparse.Namespace) -> int:
    from evals.compare_page import print_comparison, write_comparison
    from evals.comparison import compare

    console.setup()
    found = compare(options.root, options.a, options.b, everything=options.all)
    paths = write_comparison(found, options.out or options.root / "compare")
    print_comparison(found)
    for path in paths:
        console.say(str(path))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
