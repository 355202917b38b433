"""The main door: ``python -m evals.run_all``.

Text -> tokens -> activations -> SAEs -> latents -> exemplars -> explanations -> scores -> rows -> leaderboard, pages.
Only what ``--help`` needs is imported here; torch comes with the first stage.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from evals.run_config import PRESET_FUNCTIONS, RunConfig, saved_config
from sae import console, exits
from sae.errors import ConfigError, did_you_mean

LISTED_METRICS = 8


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """Flags over the values of the preset, or of a saved configuration; usage errors exit with status 2."""
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return tyro.cli(RunConfig, args=arguments, default=defaults(arguments), prog="python -m evals.run_all")


def defaults(arguments: Sequence[str]) -> RunConfig:
    """Where flags start from: --config, else --preset, else quick. ConfigError for both, and for unknown ones."""
    saved, preset = _value_of("--config", arguments), _value_of("--preset", arguments)
    if saved is not None:
        if preset is not None:
            raise ConfigError("--config brings the preset of its run; leave --preset")
        return saved_config(Path(saved))
    if preset is not None and preset not in PRESET_FUNCTIONS:
        raise ConfigError(f"unknown --preset {preset!r}{did_you_mean(preset, PRESET_FUNCTIONS)}")
    return PRESET_FUNCTIONS[preset or "quick"]()


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
    return None


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
