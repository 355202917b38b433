"""``python -m autointerp explain`` and ``score``: any set of latents, any language model, here or on many workers.

They take what a run left below its root (SAEs, latent caches, exemplars) and add artefacts of the same kind.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sae import console
from sae.errors import ArtefactError, ConfigError, Unsupported, did_you_mean

if TYPE_CHECKING:
    from autointerp.exemplars import ExemplarTable
    from autointerp.fan_out import FanOut
    from autointerp.workplace import Opened, Workplace

logger = logging.getLogger(__name__)
WRITERS = ("openai", "batch", "vllm")
"""Clients whose models can write and answer; the embedded one can do neither (LLM)."""


def add_explain(doors: Any) -> None:
    """The door `explain`."""
    door = doors.add_parser("explain", help="explain latents: texts and patterns, one chosen per latent")
    _add_common(door)
    door.add_argument("--latents", help="such as 3,17,40-45 (default: those of the newest exemplars)")
    door.add_argument("--sample", type=int, help="so many latents, drawn uniformly from the eligible ones")
    door.add_argument("--explainers", help="file names in autointerp/explainers, separated by commas")
    door.add_argument("--candidates", type=int, default=1, help="texts per latent of a model that writes (default: 1)")


def add_score(doors: Any) -> None:
    """The door `score`."""
    door = doors.add_parser("score", help="score explanations, beside their shuffled floor; judges are checked first")
    _add_common(door)
    door.add_argument("--explanations", help="key of one explanations/ artefact (default: the newest of each SAE)")
    door.add_argument("--scorers", help="file names in autointerp/scorers, separated by commas")
    door.add_argument("--simulator", default="word_embedding", help="of the scorer simulation")
    door.add_argument("--costly-latents", type=int, help="scorers whose items are dear take at most so many latents")


def _add_common(door: argparse.ArgumentParser) -> None:
    door.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    door.add_argument("--sae", action="append", default=[], metavar="ID", help="an SAE below ROOT/saes (default: all)")
    door.add_argument("--model", default="default", help="subject model: default, a folder or a hub id")
    door.add_argument("--device", default="cpu")
    door.add_argument("--client", default="transformers", help="file name in autointerp/clients")
    door.add_argument("--llm", help="name of the model for the client (default: the embedded one)")
    door.add_argument("--base-url", help="openai: any compatible server; the key is read from OPENAI_API_KEY")
    door.add_argument("--next-token", action="store_true", help="openai: the server gives log-probabilities")
    door.add_argument("--concurrency", type=int, default=32, help="openai: requests in flight (default: 32)")
    door.add_argument("--timeout-s", type=float, default=120.0, help="openai: for one answer (default: 120)")
    door.add_argument("--embedder", default="default", help="default, none, or a folder")
    door.add_argument("--seed", type=int, default=0)
    door.add_argument("--max-llm-tokens", type=int, help="stop cleanly once so many LLM tokens were used")
    door.add_argument("--max-cost-usd", type=float, help="stop cleanly before the LLM costs more; needs --prices")
    door.add_argument("--prices", type=Path, help='JSON: {"model": {"prompt": 1.0, "cached": 0.5, "output": 4.0}}')
    door.add_argument("--engine", choices=("local", "ray"), default="local", help="who does the parts of the work")
    door.add_argument("--workers", type=int, default=1, help="parts at a time")
    door.add_argument("--part-latents", type=int, default=64, help="latents per part (default: 64)")
    door.add_argument("--dry-run", action="store_true", help="say what would be asked of the language model, and stop")
    door.add_argument("--force", action="store_true", help="compute again what is there")


def run_explain(options: argparse.Namespace) -> None:
    """Explain; says per SAE what was made and where. Raises :class:`sae.errors.SaescopeError`."""
    from autointerp import pipeline
    from autointerp.output_tokens import output_tokens
    from autointerp.workplace import needs_of

    for place, here in _places(options):
        explainers = _explainers(options)
        table = _exemplars(options, place)
        if options.dry_run:
            _say_estimate(here, explainers, [], len(table.latents))
            continue
        ctx = here.explaining(needs_of(explainers))
        _check_needs(explainers, ctx)
        fan = _fan(options, place)
        with _ledger_kept(place, here, fan, "explain"):
            folder = pipeline.explain(
                place.root, table, explainers, ctx, force=options.force, fan=fan,
                output_tokens=output_tokens(here.lm(), here.sae, table.latents),
            )  # fmt: skip
        found = pipeline.open_explanations(folder)
        failed = ", ".join(f"{n} {code}" for code, n in pipeline.failures_of(found).items()) or "none"
        console.say(
            f"{place.sae_id}: {len(table.latents)} latents, {len(found)} explanations by "
            f"{', '.join(e.name for e in explainers)}; failed: {failed}"
        )
        console.say(str(folder))


def run_score(options: argparse.Namespace) -> None:
    """Score; says per SAE where. Raises :class:`sae.errors.SaescopeError`."""
    from autointerp import pipeline
    from autointerp.exemplars import ExemplarTable
    from autointerp.workplace import needs_of
    from sae.manifest import artefact_dir, read_manifest

    for place, here in _places(options):
        scorers = _scorers(options)
        explanations = _explanations(options, place)
        table = ExemplarTable.open(
            artefact_dir(place.root, "exemplars", str(read_manifest(explanations)["inputs"]["exemplars"]))
        )
        if options.dry_run:
            there = sorted({e.explainer for e in pipeline.open_explanations(explanations)})
            stand_ins = [SimpleNamespace(name=name, needs=frozenset()) for name in there]
            _say_estimate(here, stand_ins, scorers, len(table.latents))
            continue
        ctx = here.scoring(needs_of(scorers))
        _check_needs(scorers, ctx)
        fan = _fan(options, place)
        with _ledger_kept(place, here, fan, "score"):
            folder = pipeline.score(place.root, explanations, table, scorers, ctx, force=options.force, fan=fan)
        _say_scores(place.sae_id, pipeline.open_scores(folder))
        console.say(str(folder))


def _places(options: argparse.Namespace) -> Iterator[tuple["Workplace", "Opened"]]:
    from autointerp.workplace import SERVER_CLIENTS, Workplace, opened

    if (options.llm or options.base_url) and options.client not in (*SERVER_CLIENTS, "transformers"):
        raise ConfigError(f"--client {options.client} takes no --llm or --base-url")
    for sae_id in _sae_ids(options):
        place = Workplace(
            root=options.root, sae_id=sae_id, model=options.model, device=options.device, client=options.client,
            llm=options.llm, base_url=options.base_url, concurrency=options.concurrency,
            timeout_s=options.timeout_s, next_token=options.next_token, embedder=options.embedder, seed=options.seed,
            max_tokens=options.max_llm_tokens, max_cost_usd=options.max_cost_usd, prices=options.prices,
        )  # fmt: skip
        yield place, opened(place)


def _sae_ids(options: argparse.Namespace) -> list[str]:
    from sae.manifest import is_complete

    there = sorted(f.name for f in (options.root / "saes").glob("*") if f.is_dir() and is_complete(f))
    if not there:
        raise ArtefactError(f"{options.root}/saes holds no SAE; run: python -m evals.run_all --root {options.root}")
    for wanted in options.sae:
        if wanted not in there:
            raise ConfigError(f"{options.root}/saes holds no SAE {wanted!r}{did_you_mean(wanted, there)}")
    return list(options.sae) or there


def newest_artefact(root: Path, kind: str, sae_id: str) -> Path | None:
    """The newest complete artefact of a kind whose counts name this SAE."""
    from sae.manifest import is_complete, read_manifest

    found = [(read_manifest(f), f) for f in sorted((root / kind).glob("*")) if f.is_dir() and is_complete(f)]
    mine = [(str(m["provenance"]["created_at"]), f) for m, f in found if _sae_of(m, f) == sae_id]
    return max(mine)[1] if mine else None


def _sae_of(manifest: dict[str, Any], folder: Path) -> str:
    if manifest["kind"] == "latents":
        from autointerp.latent_cache import LatentCache

        return LatentCache.open(folder).sae_id
    return str(manifest["counts"].get("sae_id"))


def _exemplars(options: argparse.Namespace, place: "Workplace") -> "ExemplarTable":
    """The newest table, or one of the latents asked for, drawn from the newest latent cache."""
    from autointerp.config import ExemplarConfig
    from autointerp.exemplars import ExemplarTable, build_exemplars, sample_latents
    from autointerp.latent_cache import LatentCache

    if options.latents is None and options.sample is None:
        folder = newest_artefact(place.root, "exemplars", place.sae_id)
        if folder is not None:
            return ExemplarTable.open(folder)
    where = newest_artefact(place.root, "latents", place.sae_id)
    if where is None:
        raise ArtefactError(f"{place.root} holds no latents of {place.sae_id}; run evals.run_all with this SAE first")
    cache, cfg = LatentCache.open(where), ExemplarConfig(seed=options.seed)
    wanted = latents_of(options.latents) if options.latents else None
    if wanted is None:
        wanted = [int(i) for i in sample_latents(cache, options.sample or 36, options.seed, cfg).latents]
    table = build_exemplars(place.root, cache, wanted, cfg)
    if missing := sorted(set(wanted) - set(table.latents)):
        logger.warning("%s: %d latents have too few active windows and are left out", place.sae_id, len(missing))
    if not table.latents:
        raise ConfigError(f"{place.sae_id}: none of the {len(wanted)} latents has enough active windows")
    return table


def latents_of(text: str) -> list[int]:
    """``3,17,40-45`` as numbers; :class:`ConfigError` for anything else."""
    out: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ConfigError(f"--latents {text!r}: expected numbers and ranges such as 3,17,40-45")
        out.update(range(int(low), int(high or low) + 1))
    return sorted(out)


def _explanations(options: argparse.Namespace, place: "Workplace") -> Path:
    from sae.manifest import artefact_dir, is_complete

    if options.explanations:
        folder = artefact_dir(place.root, "explanations", options.explanations)
        if not is_complete(folder):
            raise ArtefactError(f"there are no explanations {folder}")
        return folder
    newest = newest_artefact(place.root, "explanations", place.sae_id)
    if newest is None:
        raise ArtefactError(
            f"{place.sae_id} has no explanations; run: python -m autointerp explain --root {place.root}"
        )
    return newest


def _explainers(options: argparse.Namespace) -> list[Any]:
    from autointerp.config import InterpConfig
    from autointerp.pipeline import plugins_of

    names = _names(options.explainers) or (
        ("highlighted", "token_list") if options.client in WRITERS else InterpConfig().explainers
    )
    return plugins_of(InterpConfig(explainers=names, scorers=(), candidates=options.candidates))[0]


def _scorers(options: argparse.Namespace) -> list[Any]:
    from autointerp.config import InterpConfig
    from autointerp.pipeline import plugins_of

    names = _names(options.scorers) or (
        ("late_interaction", "detection", "fuzzing") if options.client in WRITERS else InterpConfig().scorers
    )
    cfg = InterpConfig(
        explainers=(), scorers=names, simulator=options.simulator, costly_latents=options.costly_latents
    )
    return plugins_of(cfg)[1]


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _check_needs(plugins: Sequence[Any], ctx: Any) -> None:
    from autointerp.interfaces import check_needs

    if ctx.client is None:
        raise Unsupported("no language model was opened")
    for plugin in plugins:
        check_needs(plugin, ctx)


def _fan(options: argparse.Namespace, place: "Workplace") -> "FanOut":
    from autointerp.fan_out import FanOut

    return FanOut(place, engine=options.engine, workers=options.workers, part_latents=options.part_latents)


@contextmanager
def _ledger_kept(place: "Workplace", here: "Opened", fan: "FanOut", stage: str) -> Iterator[None]:
    """Whatever happens inside, what was asked and paid is written to ROOT/ledgers/ and said."""
    from autointerp.fan_out import _add

    ledger = here.client().ledger
    try:
        yield
    finally:
        _add(ledger.entries, fan.entries)
        if ledger.entries:
            folder = place.root / "ledgers"
            folder.mkdir(parents=True, exist_ok=True)
            ledger.write(folder / f"{stage}.{place.sae_id}.parquet")
            sums = ledger.totals()
            cost = "" if sums["cost_usd"] is None else f", {sums['cost_usd']:.4f} US dollars"
            console.say(
                f"{here.client().identity.model}: {sums['requests']:,} requests ({sums['sent']:,} sent now, "
                f"{sums['failed']:,} failed), {sums['prompt_tokens']:,} prompt and {sums['output_tokens']:,} output "
                f"tokens{cost}"
            )
            ledger.entries = {}


def _say_estimate(here: "Opened", explainers: Sequence[Any], scorers: Sequence[Any], n_latents: int) -> None:
    from autointerp.config import ExemplarConfig
    from autointerp.estimate import estimate

    client = here.client()
    stages = estimate(
        explainers, scorers, ExemplarConfig(), latents=n_latents, tokenizer=here.tokenizer,
        capabilities=client.capabilities, embedder=here.place.embedder != "none",
    )  # fmt: skip
    rows = [(s.stage, f"{s.requests:,}", f"{s.prompt_tokens:,}", f"{s.output_tokens:,}") for s in stages]
    console.table(f"{here.place.sae_id}: {n_latents} latents, {client.identity.model}",
                  ("stage", "requests", "prompt tokens", "output tokens at most"), rows, right=(1, 2, 3))


def _say_scores(sae_id: str, found: Any) -> None:
    """Per scorer and explainer the mean of each headline over latents, with its floor and the judge's check."""
    import numpy as np

    headline = ("auc", "balanced_accuracy", "accuracy", "pearson", "surprisal_gain", "choice", "choice_likelihood")
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for s in found.scores:
        if not s.group and s.metric in headline and s.value is not None:
            values.setdefault((s.scorer, s.explainer, s.metric, s.floor_kind), []).append(s.value)
    weak = {c.scorer: c.weak for c in found.checks}
    rows = []
    for (scorer, explainer, metric, floor), mine in sorted(values.items()):
        if not floor:
            under = values.get((scorer, explainer, metric, "shuffled"))
            below = "" if not under else f"{np.mean(under):.3f}"
            note = "weak judge" if weak.get(scorer) else ""
            rows.append((scorer, explainer, metric, f"{np.mean(mine):.3f}", below, len(mine), note))
    console.table(sae_id, ("scorer", "explainer", "metric", "mean", "shuffled", "latents", ""), rows, right=(3, 4, 5))
