"""Planted inputs with targets that are a function of them, for transcoders; tests only."""

from typing import Any

import torch
from planted_store import PlantedStore

from sae.config import TrainConfig

TRANSCODER = TrainConfig(
    architecture="transcoder", d_sae=48, k=4, batch_tokens=256, train_tokens=256 * 60, lr=5e-3, lr_warmup_steps=2,
    aux_k=8, dead_tokens=2_048, seed=0, input_norm="dataset_rms",
)  # fmt: skip
D_OUT = 20


class Pairs(PlantedStore):
    """Targets: a nonlinear part of other width and size than the inputs, and a linear one."""

    def read_target(self, flat: Any) -> torch.Tensor:
        x = self.read(flat)
        generator = torch.Generator().manual_seed(3)
        first, second, linear = (torch.randn(self.d_in, D_OUT, generator=generator) for _ in range(3))
        return 7.0 * ((x @ first).relu() - (x @ second).relu()) + 20.0 * (x @ linear) + 5.0
