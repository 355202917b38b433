"""A mesh of ranks, and what one training step costs it: bytes sent, bytes held (TRAINING 9 and 13). Free of torch.

World = data x latent ranks; rank = data rank * latent + latent rank, so that ranks which share latents are neighbours
(one machine). Latent f lies on latent rank ``f % latent``: contiguous ranges would put the busiest latents of a
Matryoshka SAE on one rank. N tokens of a global batch, D = d_in, F = d_sae, K latents a token.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from sae.config import TrainConfig, require

AXES = ("data", "latent")
CAPACITY = 4.0
"""Candidates that a latent rank sends for a top-K, as a multiple of its even share K / latent (TRAINING 9)."""
LEAST_CANDIDATES = 8
SUPPORTED = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")
"""Architectures that have a sharded loss (:mod:`sae.sharded`)."""


@dataclass(frozen=True)
class MeshShape:
    """How many ranks divide the tokens of a batch, and how many the latents of each SAE."""

    data: int = 1
    latent: int = 1

    def __post_init__(self) -> None:
        require(min(self.data, self.latent) >= 1, f"a mesh needs at least one rank along each axis, got {self}")

    @property
    def world(self) -> int:
        return self.data * self.latent

    def size(self, axis: str) -> int:
        """Ranks along ``data`` or ``latent``, or of the whole ``world``."""
        return {"data": self.data, "latent": self.latent, "world": self.world}[axis]

    def __str__(self) -> str:
        return f"data={self.data},latent={self.latent}"

    @staticmethod
    def parse(text: str) -> "MeshShape":
        """``data=2,latent=4``; an axis that is left out has one rank. ``ConfigError`` for anything else."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, equals, number = part.strip().partition("=")
            fits = bool(equals) and name in AXES and name not in sizes and number.isdigit()
            require(fits, f"mesh {text!r}: expected data=R,latent=S with whole numbers, e.g. data=2,latent=2")
            sizes[name] = int(number)
        return MeshShape(**sizes)


@dataclass(kw_only=True, frozen=True)
class DistributedConfig:
    """Limits of a run under torchrun; --mesh says how its processes divide the work."""

    capacity: float | None = CAPACITY
    """Candidates per token and latent rank of a top-K, as a multiple of k / ranks; none: k, exact on whatever data."""
    silent_s: float = 60.0
    """A rank on another machine counts as lost after so many seconds without a sign of life."""
    timeout_s: float = 600.0
    """Time limit of one collective."""
    join_s: float = 300.0
    """Time in which all ranks must have come."""

    def __post_init__(self) -> None:
        require(self.capacity is None or self.capacity >= 1, f"capacity must be 1 or more, got {self.capacity}")
        require(self.silent_s >= 2, f"silent_s must be at least 2 seconds, got {self.silent_s}")
        require(min(self.timeout_s, self.join_s) > 0, "timeout_s and join_s must be positive")


def check_divides(cfg: TrainConfig, shape: MeshShape) -> None:
    """:class:`sae.errors.ConfigError` where latents or tokens do not divide evenly, or nothing shards the loss or takes
    an option of it."""
    known = ", ".join(SUPPORTED)
    require(
        cfg.architecture in SUPPORTED,
        f"architecture {cfg.architecture!r} has no sharded training; on a mesh: {known}. Train it in one process",
    )
    require(
        cfg.encoder_dtype == "float32",
        f"train.encoder_dtype {cfg.encoder_dtype} is for one process on a CPU: leave it out on a mesh",
    )
    for what, size, axis in (("d_sae", cfg.d_sae, "latent"), ("batch_tokens", cfg.batch_tokens, "data")):
        ranks = shape.size(axis)
        near = sorted({max(ranks, size - size % ranks), size + (-size) % ranks})
        require(
            size % ranks == 0,
            f"train.{what} {size:,} does not divide by the {ranks} ranks of the mesh's axis {axis!r}: "
            f"take {' or '.join(f'{n:,}' for n in near)}, or another mesh",
        )


def candidates(k: int, ranks: int, width: int, capacity: float | None = CAPACITY) -> int:
    """Values per token that each of ``ranks`` sends for the K largest of all: ``min(K, max(8, c K / ranks))``, at most
    its ``width`` latents. ``capacity`` None: K, which is exact whatever the data."""
    if ranks == 1 or capacity is None:
        return min(k, width)
    return min(k, width, max(LEAST_CANDIDATES, math.ceil(capacity * k / ranks)))


class Collective(NamedTuple):
    """One row of a step's communication."""

    what: str
    axis: str
    """``data``, ``latent`` or ``world``."""
    kind: str
    """``reduce`` (all-reduce) or ``gather`` (all-gather)."""
    bytes: int
    """Size of the operand on each rank."""

    def wire_bytes(self, shape: MeshShape) -> int:
        """Bytes that each rank sends by ring algorithms: 2 (R - 1) / R of an operand that is reduced, R - 1 times one
        that is gathered."""
        ranks = shape.size(self.axis)
        return self.bytes * (ranks - 1) if self.kind == "gather" else 2 * self.bytes * (ranks - 1) // ranks


def communication(
    cfg: TrainConfig, d_in: int, shape: MeshShape, *, capacity: float | None = CAPACITY, n_dead: int = 0,
    float_bytes: int = 4,
) -> list[Collective]:  # fmt: skip
    """Every collective of one optimiser step that moves more than a few numbers, in order (TRAINING 9, table).

    ``n_dead``: dead latents in all; the auxiliary loss is only computed where there are some. ``float_bytes``: of
    weights and activations. Left out: ties (none with real activations), a second try of BatchTopK's candidates, and
    the eight figures of a logged step.
    """
    tokens, width, f = cfg.batch_tokens // shape.data, cfg.d_sae // shape.latent, float_bytes
    found: list[Collective] = []
    k = cfg.k or 0
    if cfg.architecture == "topk":
        wide = 4 * k if cfg.multi_topk else k
        sent = candidates(wide, shape.latent, width, capacity)
        found.append(Collective("top-K values", "latent", "gather", tokens * sent * f))
    if cfg.architecture in ("batchtopk", "matryoshka"):
        found.append(Collective("batch top-K counts", "world", "reduce", (f * 256 + 2) * 8))
    decodes = {"gated": 2, "matryoshka": _groups(cfg.d_sae), "topk": 2 if cfg.multi_topk else 1}
    n_decodes = decodes.get(cfg.architecture, 1)
    found.append(Collective("reconstructions", "latent", "reduce", n_decodes * tokens * d_in * f))
    if cfg.architecture == "jumprelu":
        found.append(Collective("L0", "world", "reduce", f))
    if n_dead and cfg.aux_alpha > 0 and cfg.architecture != "relu":
        if cfg.aux_k < n_dead:
            sent = candidates(cfg.aux_k, shape.latent, width, capacity)
            found.append(Collective("auxiliary top-K values", "latent", "gather", tokens * sent * f))
        found.append(Collective("auxiliary reconstruction", "latent", "reduce", tokens * d_in * f))
    found.append(Collective("figures of the step", "world", "reduce", 8 * (d_in + FIGURES)))
    found.append(Collective("pre-bias gradient", "latent", "reduce", d_in * f))
    found.append(Collective("gradients", "data", "reduce", f * _local_parameters(cfg, d_in, width)))
    found.append(Collective("latents that fired", "data", "reduce", width))
    found.append(Collective("number of dead latents", "latent", "reduce", 8))
    return [row for row in found if shape.size(row.axis) > 1]


FIGURES = 8
"""Numbers of a step that are summed over all ranks, beside the mean error."""


def communication_bytes(
    cfg: TrainConfig, d_in: int, shape: MeshShape, *, capacity: float | None = CAPACITY, n_dead: int = 0,
    float_bytes: int = 4,
) -> int:  # fmt: skip
    """Bytes that each rank sends in one optimiser step, ring algorithms, operands as in :func:`communication`."""
    rows = communication(cfg, d_in, shape, capacity=capacity, n_dead=n_dead, float_bytes=float_bytes)
    return sum(row.wire_bytes(shape) for row in rows)


def state_bytes_per_rank(cfg: TrainConfig, d_in: int, shape: MeshShape, *, float_bytes: int = 4) -> int:
    """Weights, gradients and Adam's moments of one rank, its average where there is one, its counters."""
    width = cfg.d_sae // shape.latent
    copies = 5 if cfg.ema_decay > 0 else 4
    return float_bytes * copies * _local_parameters(cfg, d_in, width) + 8 * width


def step_bytes_per_rank(
    cfg: TrainConfig, d_in: int, shape: MeshShape, *, capacity: float | None = CAPACITY, float_bytes: int = 4
) -> int:
    """Activations of one rank's share of a batch: input, reconstruction, residual and their gradients, and the code."""
    tokens, width = cfg.batch_tokens // shape.data, cfg.d_sae // shape.latent
    slots = candidates(cfg.k, shape.latent, width, capacity) if cfg.k else max(1, width // 50)
    gathered = shape.latent * slots if cfg.architecture == "topk" and shape.latent > 1 else 0
    return tokens * (6 * d_in * float_bytes + slots * 4 * (float_bytes + 8) + gathered * float_bytes)


def _local_parameters(cfg: TrainConfig, d_in: int, width: int) -> int:
    vectors = {"gated": 3, "jumprelu": 2}.get(cfg.architecture, 1)
    return width * (2 * d_in + vectors) + d_in


def _groups(d_sae: int) -> int:
    return len({d_sae >> s for s in range(5)} - {0})
