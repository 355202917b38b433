"""``python -m autointerp explain`` and ``score``: any set of latents, any language model, here or on many workers.

They take what a run left below its root (SAEs, latent caches, exemplars) and add artefacts of the same kind.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from autointerp.door_tables import say_estimate, say_scores
from sae import console
from sae.errors import ArtefactError, ConfigError, Unsupported, did_you_mean

if TYPE_CHECKING:
    from autointerp.config import ExemplarConfig
    from autointerp.exemplars import ExemplarTable
    from autointerp.fan_out import FanOut
    from autointerp.latent_cache import LatentCache
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
    door.add_argument("--exemplars", action="append", default=[], metavar="NAME=VALUE",
                      help="draw windows anew with this setting, such as score_embedding_near=5 (may be repeated); "
                           "all else as in the newest exemplars")  # fmt: skip


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
    door.add_argument("--llm-revision", help="of a hub id; of a server, what tells apart two models under one name")
    door.add_argument("--base-url", help="openai: any compatible server; the key is read from OPENAI_API_KEY")
    door.add_argument("--next-token", action="store_true", help="openai: the server gives log-probabilities")
    door.add_argument("--concurrency", type=int, default=32, help="openai: requests in flight (default: 32)")
    door.add_argument("--timeout-s", type=float, default=120.0, help="openai: for one answer (default: 120)")
    door.add_argument("--replicas", type=int, default=1, metavar="N",
                      help="vllm: so many engines side by side, each on GPUs of its own (default: 1)")  # fmt: skip
    door.add_argument("--vllm", action="append", default=[], metavar="NAME=VALUE",
                      help="vllm: for its engines: max_model_len=8192, tensor_parallel_size=2, ...")  # fmt: skip
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

    spent = _Spent()
    for place, here in _places(options, spent):
        explainers = _explainers(options)
        table = _exemplars(options, place, here)
        if options.dry_run:
            say_estimate(place, here.tokenizer, explainers, [], table)
            continue
        ctx = here.explaining(needs_of(explainers), place)
        _check_needs(explainers, ctx)
        fan = _fan(options, place)
        with _ledger_kept(place, here, fan, "explain", spent):
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

    spent = _Spent()
    for place, here in _places(options, spent):
        scorers = _scorers(options)
        explanations = _explanations(options, place)
        table = ExemplarTable.open(
            artefact_dir(place.root, "exemplars", str(read_manifest(explanations)["inputs"]["exemplars"]))
        )
        if options.dry_run:
            there = sorted({e.explainer for e in pipeline.open_explanations(explanations)})
            stand_ins = [SimpleNamespace(name=name, needs=frozenset()) for name in there]
            say_estimate(place, here.tokenizer, stand_ins, scorers, table)
            continue
        ctx = here.scoring(needs_of(scorers), place)
        _check_needs(scorers, ctx)
        fan = _fan(options, place)
        with _ledger_kept(place, here, fan, "score", spent):
            folder = pipeline.score(place.root, explanations, table, scorers, ctx, force=options.force, fan=fan)
        say_scores(place.sae_id, pipeline.open_scores(folder))
        console.say(str(folder))


@dataclass
class _Spent:
    """What this run has sent for the SAEs before."""

    tokens: int = 0
    usd: float = 0.0


def _places(options: argparse.Namespace, spent: _Spent) -> Iterator[tuple["Workplace", "Opened"]]:
    """Per SAE its place, with what the SAEs before have left of the budget. Checks all that needs no model first."""
    from autointerp.engine_options import engine_options
    from autointerp.retries import check_base_url, why_silent
    from autointerp.vllm_engine import engines_planned
    from autointerp.workplace import ONE_PROCESS_CLIENTS, SERVER_CLIENTS, Workplace, forget_clients, opened
    from sae.engines import check_engine

    if options.llm_revision and not options.llm:
        raise ConfigError("--llm-revision is of a model; add --llm NAME")
    check_base_url(options.base_url)
    if (options.llm or options.base_url) and options.client not in (*SERVER_CLIENTS, "transformers"):
        raise ConfigError(f"--client {options.client} takes no --llm or --base-url")
    if options.max_cost_usd is not None and options.prices is None:
        raise ConfigError("--max-cost-usd needs --prices FILE, the price of the model")
    engine = engine_options(options.client, options.replicas, options.vllm)
    if options.client in ONE_PROCESS_CLIENTS and (options.engine != "local" or options.workers > 1):
        more = "; --replicas gives it more engines" if options.client == "vllm" else ""
        raise ConfigError(f"--client {options.client} works in one process: no --workers or --engine ray{more}")
    if options.client == "vllm":
        planned = engines_planned(options.replicas, engine)
        console.say(planned) if options.dry_run else logger.info("%s", planned)
    if options.client == "batch":
        forget_clients()
    if options.client == "openai" and (silence := why_silent(options.base_url)):
        logger.warning("%s", silence)
    sae_ids = _sae_ids(options)
    if not options.dry_run:
        check_engine(options.engine, gpus=float(options.device.startswith("cuda")), shared=[options.root])
    for sae_id in sae_ids:
        most, most_usd = options.max_llm_tokens, options.max_cost_usd
        place = Workplace(
            root=options.root, sae_id=sae_id, model=options.model, device=options.device, client=options.client,
            llm=options.llm, llm_revision=options.llm_revision, base_url=options.base_url,
            concurrency=options.concurrency, timeout_s=options.timeout_s, next_token=options.next_token,
            replicas=options.replicas, engine_options=tuple(engine.items()), embedder=options.embedder,
            seed=options.seed,
            max_tokens=None if most is None else max(0, most - spent.tokens),
            max_cost_usd=None if most_usd is None else max(0.0, most_usd - spent.usd), prices=options.prices,
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


def _exemplars(options: argparse.Namespace, place: "Workplace", here: "Opened") -> "ExemplarTable":
    """The newest table; or one of the latents or with the settings asked for, drawn from the newest latent cache."""
    from autointerp.exemplars import ExemplarTable, build_exemplars, sample_latents
    from autointerp.latent_cache import LatentCache

    folder = newest_artefact(place.root, "exemplars", place.sae_id)
    newest = None if folder is None else ExemplarTable.open(folder)
    anew = options.latents is not None or options.sample is not None or options.exemplars
    if newest is not None and not anew:
        return newest
    where = newest_artefact(place.root, "latents", place.sae_id)
    if where is None:
        raise ArtefactError(f"{place.root} holds no latents of {place.sae_id}; run evals.run_all with this SAE first")
    cache = LatentCache.open(where)
    cfg = _exemplar_config(options, cache, newest)
    if options.latents:
        wanted = latents_of(options.latents)
    elif options.sample is None and newest is not None:
        wanted = newest.requested
    else:
        wanted = [int(i) for i in sample_latents(cache, options.sample or 36, options.seed, cfg).latents]
    near = {"embedder": here.embedder, "tokenizer": here.tokenizer} if cfg.score_embedding_near else {}
    table = build_exemplars(place.root, cache, wanted, cfg, **near)
    if missing := sorted(set(wanted) - set(table.latents)):
        logger.warning("%s: %d latents have too few active windows and are left out", place.sae_id, len(missing))
    if not table.latents:
        raise ConfigError(f"{place.sae_id}: none of the {len(wanted)} latents has enough active windows")
    return table


def _exemplar_config(
    options: argparse.Namespace, cache: "LatentCache", newest: "ExemplarTable | None"
) -> "ExemplarConfig":
    """Settings of the newest table of this cache, else the default ones on its windows, with ``--exemplars``."""
    import json

    from autointerp.config import ExemplarConfig
    from sae.config import from_dict, to_dict

    if newest is not None and newest.latents_key == cache.key:
        settings = to_dict(newest.config)
    else:
        left = min(ExemplarConfig.left_tokens, cache.window_tokens - 1)
        settings = {"window_tokens": cache.window_tokens, "min_window_tokens": cache.min_window_tokens,
                    "left_tokens": left}  # fmt: skip
    settings["seed"] = options.seed
    for setting in options.exemplars:
        name, sign, text = setting.partition("=")
        try:
            settings[name.strip().replace("-", "_")] = json.loads(text)
        except ValueError:
            sign = ""
        if not sign:
            raise ConfigError(f"--exemplars {setting!r}: expected NAME=VALUE, such as score_embedding_near=5")
    return from_dict(ExemplarConfig, settings)


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
def _ledger_kept(place: "Workplace", here: "Opened", fan: "FanOut", stage: str, spent: _Spent) -> Iterator[None]:
    """Begins the budget; whatever happens inside, what was asked and paid is written to ROOT/ledgers/ and said."""
    from autointerp.fan_out import _add

    client = here.client(place)
    client.allow(place.max_tokens, place.max_cost_usd)
    ledger = client.ledger
    try:
        yield
    finally:
        _add(ledger.entries, fan.entries)
        if ledger.entries:
            folder = place.root / "ledgers"
            folder.mkdir(parents=True, exist_ok=True)
            ledger.write(folder / f"{stage}.{place.sae_id}.parquet")
            sums = ledger.totals()
            spent.tokens, spent.usd = spent.tokens + sums["sent_tokens"], spent.usd + (sums["sent_usd"] or 0.0)
            cost = ""
            if sums["cost_usd"] is not None:
                cost = f", {sums['cost_usd']:.4f} US dollars ({sums['sent_usd']:.4f} of them now)"
            console.say(
                f"{client.identity.model}: {sums['requests']:,} requests ({sums['sent']:,} sent now, "
                f"{sums['failed']:,} failed), {sums['prompt_tokens']:,} prompt and {sums['output_tokens']:,} output "
                f"tokens{cost}"
            )
            ledger.entries = {}
