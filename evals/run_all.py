"""The main door: ``python -m evals.run_all``.

Text -> tokens -> activations -> SAEs -> latents -> exemplars -> explanations -> scores -> rows -> leaderboard, pages.
Only what ``--help`` needs is imported here; torch comes with the first stage.
"""

import sys
from collections.abc import Sequence

from evals.run_config import PRESET_FUNCTIONS, RunConfig
from sae import console, exits
from sae.errors import ConfigError, did_you_mean

LISTED_METRICS = 8


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """Flags over the preset's values; usage errors exit with status 2."""
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return tyro.cli(
        RunConfig, args=arguments, default=PRESET_FUNCTIONS[preset_of(arguments)](), prog="python -m evals.run_all"
    )


def preset_of(arguments: Sequence[str]) -> str:
    """The value of --preset, which decides the defaults of all other flags."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--preset":
            value = value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
            if value not in PRESET_FUNCTIONS:
                raise ConfigError(f"unknown --preset {value!r}{did_you_mean(value, PRESET_FUNCTIONS)}")
            return value
    return "quick"


def list_everything() -> None:
    """``--list``: every plug-in by kind, evaluations with their metrics."""
    from evals.measure import select
    from sae import plugins

    rows = []
    for evaluation in select(()):
        names = [m.name for m in evaluation.metrics]
        metrics = ", ".join(names[:LISTED_METRICS]) + (", ..." if len(names) > LISTED_METRICS else "")
        metrics = f"{len(names)}: {metrics}"
        needs = ", ".join(sorted(evaluation.needs))
        rows.append((evaluation.name, evaluation.version, evaluation.title, metrics, needs))
    console.table("Evaluations (evals/suite)", ("name", "version", "title", "metrics", "needs"), rows)
    kinds = {
        "SAE architectures": "sae.architectures",
        "explainers": "autointerp.explainers",
        "simulators": "autointerp.simulators",
        "scorers": "autointerp.scorers",
        "LLM clients": "autointerp.clients",
    }
    console.table("Other plug-ins", ("kind", "names"), [(k, ", ".join(plugins.names(p))) for k, p in kinds.items()])
    console.table("Presets", ("name", "meaning"), [(n, (f.__doc__ or "").strip()) for n, f in PRESET_FUNCTIONS.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: :mod:`sae.exits`."""
    return exits.run(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    cfg = parse(arguments)
    console.setup(cfg.verbose)
    if cfg.list_:
        list_everything()
        return exits.DONE
    if cfg.dry_run:
        from evals.plan import print_plan

        print_plan(cfg)
        return exits.DONE
    from evals.job import run_job

    return run_job(cfg)


if __name__ == "__main__":
    sys.exit(main())
