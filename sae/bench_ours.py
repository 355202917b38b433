"""What ``python -m sae bench`` measures of this package: a training step, and the parts it cannot do without.

Shapes: N tokens of one batch, D = d_in, F = d_sae. Data come as in :mod:`sae.bench_worker`, and so do the rules.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import ops, train_run
from sae.config import SubjectMeta, TrainConfig
from sae.metric_log import MetricLog

LOGGED_STEPS = 200
"""A run is told that it has at least so many steps, so that it writes its log as often as a real one does."""

ENCODER_SCALE = 0.8
"""Of the short runs measured here (docs/decisions/017)."""


class SampleStore:
    """Start sample in the place of a store."""

    key = "bench"

    def __init__(self, sample_ND: Tensor) -> None:
        self.sample_ND = sample_ND
        self.n_kept, self.d_in = sample_ND.shape
        self.kept_N: np.ndarray = np.arange(self.n_kept)

    def read(self, flat: Any) -> Tensor:
        """float32 [n, D]."""
        return self.sample_ND[torch.from_numpy(np.asarray(flat))]

    def batches(self, batch_tokens: int, *, seed: int, epochs: int, first: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """None: batches come from the bench."""
        return iter(())


class Ours:
    """TopK SAEs of one shape as :func:`sae.train.train_many` trains them, the log included."""

    def __init__(self, spec: dict[str, Any], sample_ND: Tensor) -> None:
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        batch = int(spec["batch"])
        meta = SubjectMeta(lm="", lm_revision="", hookpoint="", lm_dtype="", context_length_tokens=1)
        self.runs = []
        for seed in range(spec["seed"], spec["seed"] + spec.get("n_saes", 1)):
            cfg = TrainConfig(
                d_sae=spec["d_sae"], k=spec["k"], lr=spec["lr"], lr_warmup_steps=0, lr_decay_share=0.0,
                batch_tokens=batch, train_tokens=batch * max(LOGGED_STEPS, spec["steps"]), aux_alpha=spec["aux_alpha"],
                dead_tokens=spec["dead_tokens"], seed=seed, encoder_dtype=spec.get("encoder_dtype", "float32"),
                encoder_scale=ENCODER_SCALE,
            )  # fmt: skip
            log = self.stack.enter_context(MetricLog(folder / f"{seed}.jsonl"))
            store = SampleStore(sample_ND)
            self.runs.append(train_run.start(cfg, meta, "", folder / str(seed), store, sample_ND, log))

    def step(self, x_ND: Tensor) -> None:
        normalised = self.runs[0].sae.normalise(x_ND)
        train_run.step_many(self.runs, x_ND, *normalised)
        for run in self.runs:
            if run.failure:
                raise RuntimeError(run.failure)

    @torch.no_grad()
    def reconstruct(self, x_ND: Tensor) -> tuple[Tensor, float]:
        sae = self.runs[0].sae
        codes = sae.encode_sparse(x_ND)
        return sae.decode(codes, x_ND), float((codes.values_NK > 0).sum()) / len(x_ND)

    def n_dead(self) -> int:
        return int(self.runs[0].state.dead_F.sum())


class Product:
    """The arithmetic floor: the encoder product alone, as a step computes it, block by block. It learns nothing."""

    def __init__(self, spec: dict[str, Any], sample_ND: Tensor) -> None:
        generator = torch.Generator().manual_seed(spec["seed"])
        self.W_enc_FD = torch.randn(spec["d_sae"], spec["d_in"], generator=generator)
        self.b_enc_F = torch.zeros(spec["d_sae"])
        self.dtype = torch.bfloat16 if spec.get("encoder_dtype") == "bfloat16" else None

    def step(self, x_ND: Tensor) -> None:
        for _ in ops._blocks(x_ND, self.W_enc_FD, self.b_enc_F, self.dtype):
            pass

    def reconstruct(self, x_ND: Tensor) -> tuple[Tensor, float]:
        return torch.zeros_like(x_ND), 0.0

    def n_dead(self) -> int:
        return 0


def trainer(spec: dict[str, Any], sample_ND: Tensor) -> Ours | Product:
    """``saescope`` or ``product``; ``ValueError`` for another name."""
    kinds: dict[str, type[Ours] | type[Product]] = {"saescope": Ours, "product": Product}
    if spec["trainer"] not in kinds:
        raise ValueError(f"no trainer {spec['trainer']!r}; expected one of {', '.join(kinds)}")
    return kinds[spec["trainer"]](spec, sample_ND)
