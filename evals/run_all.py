"""The main door: ``python -m evals.run_all``.

Text -> tokens -> activations -> SAEs -> latents -> exemplars -> explanations -> scores -> rows -> leaderboard, pages.
Only what ``--help`` needs is imported here; torch comes with the first stage.
"""

import logging
import os
import sys
from collections.abc import Sequence

from evals.run_config import PRESET_FUNCTIONS, RunConfig
from sae import console
from sae.errors import BudgetExceeded, ConfigError, SaescopeError, did_you_mean, os_error_text

logger = logging.getLogger(__name__)
LISTED_METRICS = 8
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


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
    """Parse, run, and turn every expected error into one clear message and an exit status."""
    verbose = False
    try:
        cfg = parse(arguments)
        verbose = cfg.verbose
        console.setup(cfg.verbose)
        if cfg.list_:
            list_everything()
            return EXIT_OK
        if cfg.dry_run:
            from evals.plan import print_plan

            print_plan(cfg)
            return EXIT_OK
        from evals.job import run_job

        return run_job(cfg)
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept, the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except SaescopeError as error:
        logger.debug("traceback", exc_info=error)
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, BudgetExceeded):
            return EXIT_STOPPED
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except OSError as error:
        if verbose:
            raise
        kept = "finished stages are kept, the same command goes on from there"
        print(f"error: {os_error_text(error)}; {kept}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
