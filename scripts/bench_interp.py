"""What explaining and scoring cost with the embedded models: ``python scripts/bench_interp.py --latents 200``.

Every explainer and scorer of the default configuration in turn, on latents of an SAE of a finished run, nothing cached:
processor and wall seconds of each, latents per minute, and with --profile the functions that take them.
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from autointerp.config import ExemplarConfig, InterpConfig
from autointerp.doors import newest_artefact
from autointerp.exemplars import build_exemplars, sample_latents
from autointerp.latent_cache import LatentCache
from autointerp.pipeline import explain_part, jobs_for, make_jobs, plugins_of
from autointerp.workplace import Workplace, needs_of, opened

SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("results"))
    parser.add_argument("--sae", help="default: the first one there")
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    sae_id = options.sae or sorted(p.name for p in (options.root / "saes").glob("*") if "random" not in p.name)[0]
    where = newest_artefact(options.root, "latents", sae_id)
    if where is None:
        raise SystemExit(f"{options.root} holds no latents of {sae_id}; run evals.run_all first")
    cache, cfg = LatentCache.open(where), ExemplarConfig()
    latents = [int(i) for i in sample_latents(cache, options.latents, 0, cfg).latents]
    with tempfile.TemporaryDirectory(dir=options.root) as folder:
        table = build_exemplars(Path(folder), cache, latents, cfg)
        here = opened(Workplace(root=options.root, sae_id=sae_id))
        explainers, scorers = plugins_of(InterpConfig())
        here.client().cache = None  # nothing is remembered: everything is computed
        spent: dict[str, list[float]] = {}
        ctx, scoring = here.explaining(needs_of(explainers)), here.scoring(needs_of(scorers))
        found: list[Any] = []
        for explainer in explainers:
            name = f"explain {explainer.name}"
            with _Timed(name, spent, options.profile):
                found += explain_part(table.latents, table, [explainer], ctx, {}, prompted=False).explanations
        chosen = [replace(e, selected=e.explainer == "token_list") for e in found]
        jobs = make_jobs(chosen, table, 0)
        for scorer in scorers:
            with _Timed(f"score {scorer.name}", spent, options.profile):
                scorer.score_many(jobs_for(scorer, jobs), scoring)
    n = len(table.latents)
    total = [sum(v[i] for v in spent.values()) for i in (0, 1)]
    for name, (cpu, wall) in spent.items():
        print(json.dumps({"what": name, "cpu_s": round(cpu, 1), "wall_s": round(wall, 1),
                          "share": round(cpu / total[0], 3)}))  # fmt: skip
    print(json.dumps({"latents": n, "cpu_s": round(total[0], 1), "wall_s": round(total[1], 1),
                      "latents_per_cpu_minute": round(60 * n / total[0], 1),
                      "latents_per_minute": round(60 * n / total[1], 1)}))  # fmt: skip


class _Timed:
    """Adds the processor and wall seconds of a block, and prints its profile where asked."""

    def __init__(self, name: str, spent: dict[str, list[float]], profile: bool) -> None:
        self.name, self.spent = name, spent
        self.profile = cProfile.Profile(time.process_time) if profile else None

    def __enter__(self) -> None:
        self.began = time.process_time(), time.monotonic()
        if self.profile:
            self.profile.enable()

    def __exit__(self, *_: object) -> None:
        if self.profile:
            self.profile.disable()
            print(f"== {self.name}")
            pstats.Stats(self.profile).sort_stats("tottime").print_stats(SHOWN)
        self.spent[self.name] = [time.process_time() - self.began[0], time.monotonic() - self.began[1]]


if __name__ == "__main__":
    main()
