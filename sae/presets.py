"""Presets of ``python -m sae train``, and what those for GPUs take, worked out on paper. Free of torch.

N tokens of a batch, D = d_in, F = d_sae, K latents a token; P = 2 F D + F + D parameters. Nothing here is measured on
the machine at hand: ``--plan`` does that, where model and device are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sae.config import StreamConfig, TokensConfig, TrainConfig
from sae.distributed_cost import MeshShape, check_divides, communication, state_bytes_per_rank, step_bytes_per_rank
from sae.errors import ConfigError, did_you_mean

DEAD_SHARE = 0.01
"""Share of dead latents that the time of the auxiliary loss is worked out for."""
BLOCK_BYTES = 2**27
"""Pre-activations of a block; no kernel stores more of them (KERNELS 5)."""


@dataclass(kw_only=True, frozen=True)
class Accelerator:
    """Rates of one GPU. Ceilings and share as in KERNELS 3; links are those of the maker's data sheets."""

    name: str = "H100 SXM, 8 in a machine"
    memory_bytes: float = 80e9
    product: float = 800e12
    """bfloat16 flop/s of a large product (measured: 798 on an H200)."""
    copy: float = 3.0e12
    """bytes/s, read and written."""
    instructions: float = 29.7e12
    """Thread instructions a second."""
    share: float = 0.75
    """Share of the floor that the fused step reaches (measured: .75 at N 8,192, .78 at 32,768; results/kernels.csv)."""
    node: int = 8
    """GPUs of one machine."""
    inside: float = 360e9
    """bytes/s that a GPU sends to its neighbours in the machine: 80 % of NVLink 4's 450 GB/s."""
    between: float = 40e9
    """and to other machines: 80 % of a 400 Gbit/s link."""
    lm_share: float = 0.4
    """Share of ``product`` that a language model's forward pass reaches (assumed)."""


@dataclass(kw_only=True, frozen=True)
class Preset:
    """Defaults of ``python -m sae train`` by one name; every flag still overrides them."""

    name: str
    about: str
    model: str
    hookpoint: str
    d_in: int
    """Width at the hookpoint."""
    lm_parameters: float = 0.0
    """Of the language model up to the hookpoint; 0: not known, its time is not counted."""
    device: str = "cpu"
    dtype: str = "auto"
    shape: MeshShape = field(default_factory=MeshShape)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    accelerator: Accelerator | None = None
    """What it is worked out for; None: it is tried on the machine at hand instead."""
    runs: bool = True
    """Whether there is a model that it can be run on."""

    def door(self) -> dict[str, Any]:
        """Fields of ``TrainDoor``."""
        mesh = {"mesh": str(self.shape)} if self.shape.world > 1 else {}
        return {
            "preset": self.name, "model": self.model, "hookpoint": self.hookpoint, "device": self.device,
            "dtype": self.dtype, "tokens": self.tokens, "stream": self.stream, "train": self.train, **mesh,
        }  # fmt: skip


_PAPER = TrainConfig(
    d_sae=32_768, k=32, lr=1e-4, lr_warmup_steps=0, lr_decay_share=0.0, batch_tokens=131_072,
    train_tokens=48_828 * 131_072, aux_k=512, dead_tokens=10_000_000, ema_decay=0.999,
)  # fmt: skip
PRESETS = (
    Preset(
        name="quick",
        about="two cores: SmolLM2-135M, layer 15, F 4,608, K 32, two passes over 409,600 tokens",
        model="default", hookpoint="layers.15", d_in=576, tokens=TokensConfig(train_tokens=409_600),
        train=TrainConfig(lr=3e-3, batch_tokens=4_096, train_tokens=819_200, dead_tokens=204_800),
    ),
    Preset(
        name="gpt2-small-paper",
        about="Gao et al. (arXiv 2406.04093): GPT-2 small, layer 8, context 64, 6.4 billion tokens; one GPU",
        model="gpt2", hookpoint="h.8", d_in=768, lm_parameters=9 * 12 * 768**2, device="cuda", dtype="bfloat16",
        tokens=TokensConfig(context_tokens=64, train_tokens=48_828 * 131_072),
        stream=StreamConfig(source="live", buffer_tokens=2**21, batch_rows=256), train=_PAPER,
        accelerator=Accelerator(),
    ),
    Preset(
        name="gpt4-16m",
        about="16,777,216 latents on paper; GPT-4's width and k are assumed, the model is not public",
        model="gpt-4", hookpoint="residual", d_in=12_288, device="cuda", dtype="bfloat16", runs=False,
        shape=MeshShape(data=4, latent=256), stream=StreamConfig(source="live", buffer_tokens=2**20),
        tokens=TokensConfig(context_tokens=64, train_tokens=40_000_000_000),
        train=TrainConfig(
            d_sae=2**24, k=256, lr=2e-4, lr_law="sqrt_width", lr_warmup_steps=0, lr_decay_share=0.0,
            batch_tokens=131_072, train_tokens=305_175 * 131_072, aux_k=8_192, dead_tokens=10_000_000, ema_decay=0.999,
        ),
        accelerator=Accelerator(),
    ),
)  # fmt: skip


def find(name: str) -> Preset:
    """The preset of that name; :class:`sae.errors.ConfigError` with the near names otherwise."""
    known = {preset.name: preset for preset in PRESETS}
    if name not in known:
        raise ConfigError(f"there is no preset {name!r}{did_you_mean(name, known)}")
    return known[name]


def named(arguments: Sequence[str]) -> Preset | None:
    """The preset that a command line asks for by ``--preset NAME``; None where it asks for none."""
    words = list(arguments)
    for i, word in enumerate(words):
        if word.startswith("--preset="):
            return find(word.partition("=")[2])
        if word == "--preset" and i + 1 < len(words):
            return find(words[i + 1])
    return None


# -- on paper ---------------------------------------------------------------------------------------------------------
class Estimate(NamedTuple):
    """What one GPU holds and what one step takes."""

    memory: dict[str, float]
    """Bytes per GPU."""
    seconds: dict[str, float]
    """Of one step; nothing overlaps."""
    n_steps: int
    gpus: int

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


def floor_s(n: float, d: int, f: float, k: int, gpu: Accelerator) -> dict[str, float]:
    """The four parts of the least time of a TopK step (KERNELS 3): encoder product, selection, sparse parts, Adam."""
    return {
        "encoder product": 2 * n * f * d / gpu.product,
        "selection": 20.6 * n * f / gpu.instructions,
        "decode and gradients": (6 * n * k * d + 6 * n * d + 8 * f * d) / gpu.copy,
        "Adam": 56 * f * d / gpu.copy,
    }


def estimate(
    cfg: TrainConfig, d_in: int, shape: MeshShape, gpu: Accelerator, *, lm_parameters: float = 0.0,
    buffer_tokens: int = 0,
) -> Estimate:  # fmt: skip
    """Memory of one GPU and time of one step of a TopK SAE on a mesh; ``ConfigError`` where it does not divide.

    float32 weights, gradients, Adam and average, bfloat16 copies for products (TRAINING 7, 13). The stream's buffer is
    divided among the GPUs; the language model, whose forward passes are, is held by each.
    """
    check_divides(cfg, shape)
    n, f, k = cfg.batch_tokens // shape.data, cfg.d_sae // shape.latent, cfg.k or 0
    shared_k = -(-k // shape.latent)
    memory = {
        "weights, gradients, Adam, average": float(state_bytes_per_rank(cfg, d_in, shape)),
        "bfloat16 copies": 4.0 * f * d_in,
        "block of pre-activations": float(min(BLOCK_BYTES, 4 * n * f)),
        "batch and codes": float(step_bytes_per_rank(cfg, d_in, shape)),
        "buffer of the stream": 2.0 * d_in * buffer_tokens / shape.world,
        "language model": 2.0 * lm_parameters,
    }
    seconds = {what: s / gpu.share for what, s in floor_s(n, d_in, f, shared_k, gpu).items()}
    n_dead = round(DEAD_SHARE * cfg.d_sae) if cfg.aux_alpha > 0 else 0
    seconds["auxiliary loss"] = 6 * n * d_in * (n_dead / shape.latent) / gpu.product / gpu.share
    for row in communication(cfg, d_in, shape, n_dead=n_dead):
        near = row.axis == "latent" and shape.latent <= gpu.node or shape.world <= gpu.node
        what = f"communication, {row.axis} axis"
        seconds[what] = seconds.get(what, 0.0) + row.wire_bytes(shape) / (gpu.inside if near else gpu.between)
    if lm_parameters:
        seconds["language model"] = 2 * lm_parameters * cfg.batch_tokens / shape.world / (gpu.product * gpu.lm_share)
    return Estimate(memory, seconds, max(1, cfg.train_tokens // cfg.batch_tokens), shape.world)


def paper(preset: Preset, cfg: TrainConfig, shape: MeshShape, buffer_tokens: int) -> Estimate:
    """:func:`estimate` for a preset whose flags may have been overridden. ``ConfigError`` for other architectures."""
    if cfg.architecture != "topk":
        raise ConfigError(f"presets are worked out for topk, not for {cfg.architecture!r}: use --plan on the machine")
    gpu = preset.accelerator or Accelerator()
    return estimate(cfg, preset.d_in, shape, gpu, lm_parameters=preset.lm_parameters, buffer_tokens=buffer_tokens)


def lines(preset: Preset, found: Estimate, batch_tokens: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Rows of two tables: memory of one GPU, and the time of one step."""
    gpu = preset.accelerator or Accelerator()
    memory = [(what, f"{size / 1e9:,.2f}") for what, size in found.memory.items() if size]
    memory.append(("in all", f"{found.memory_bytes / 1e9:,.2f} of {gpu.memory_bytes / 1e9:.0f}"))
    times = [(what, f"{1e3 * s:,.2f}") for what, s in found.seconds.items()]
    hours = found.n_steps * found.step_s / 3_600
    times.append(("one step", f"{1e3 * found.step_s:,.2f}"))
    times.append((f"{found.n_steps:,} steps on {found.gpus:,} GPU(s), hours", f"{hours:,.1f}"))
    times.append(("tokens a second", f"{batch_tokens / found.step_s:,.0f}"))
    return memory, times
