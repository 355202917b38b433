"""Processor time of a whole training step of every architecture against TopK, alternating: normalise, loss, backward,
projection, Adam, unit rows.

    OMP_NUM_THREADS=1 python scripts/bench_architectures.py [N D F K rounds]

N tokens, D channels, F latents, K active per token. Data are sparse sums of 3,000 directions.
"""

import statistics
import sys
import time

import torch
from torch import Tensor

from sae import losses, optim
from sae.base import SAE, TrainState
from sae.config import InputNorm, SAEConfig, TrainConfig
from sae.plugins import find

CASES = {
    "topk": {}, "batchtopk": {}, "matryoshka": {}, "jumprelu": {}, "relu": {}, "gated": {},
    "topk, multi_topk": {"multi_topk": True},
}  # fmt: skip
WARM_ROUNDS = 2


def data(n_tokens: int, d_in: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(3_000, d_in, generator=generator), dim=1)
    active = torch.rand(n_tokens, 3_000, generator=generator) < 0.01
    codes = active.float() * torch.rand(n_tokens, 3_000, generator=generator)
    return codes @ directions + 0.05 * torch.randn(n_tokens, d_in, generator=generator)


class Case:
    """One SAE in training."""

    def __init__(self, architecture: str, options: dict[str, bool], x_ND: Tensor, d_sae: int, k: int) -> None:
        plugin = find("sae.architectures", architecture)
        batch = len(x_ND) // 2
        cfg = TrainConfig(
            architecture=architecture, d_sae=d_sae, k=k, batch_tokens=batch, train_tokens=1_000 * batch, **options
        )
        d_in = x_ND.shape[1]
        self.sae: SAE = plugin(SAEConfig(
            architecture=architecture, d_in=d_in, d_out=d_in, d_sae=d_sae, apply_b_dec_to_input=True,
            input_norm=InputNorm(kind="layer_norm"), sae_id="bench", meta=None, train_tokens=0, train_steps=0, seed=0,
            **plugin.cfg_fields(cfg),
        ))  # fmt: skip
        n_ND, _ = self.sae.normalise(x_ND)
        self.sae.initialise(n_ND, 0)
        self.state = TrainState(
            cfg=cfg, v0=float(losses.variance(n_ND)), input_rms_norm=float(n_ND.square().sum(1).mean().sqrt()),
            last_fired_tokens_F=torch.zeros(d_sae, dtype=torch.int64), d_in=d_in,
        )  # fmt: skip
        self.adam = optim.adam(self.sae.parameter_groups(), cfg)
        self.seconds: list[float] = []
        self.l0 = 0.0

    def step(self, x_ND: Tensor) -> None:
        begun = time.process_time()
        found = self.sae.training_loss(self.sae.normalise(x_ND)[0], self.state)
        found.total.backward()
        assert self.sae.W_dec_FD.grad is not None
        optim.project_gradient_(self.sae.W_dec_FD.grad, self.sae.W_dec_FD)
        self.adam.step()
        optim.normalise_rows_(self.sae.W_dec_FD)
        self.sae.constrain_()
        self.adam.zero_grad()
        self.state.after_step(len(x_ND), found)
        self.seconds.append(time.process_time() - begun)
        self.l0 = float(found.l0)


def main(n_tokens: int = 4_096, d_in: int = 576, d_sae: int = 4_608, k: int = 32, rounds: int = 5) -> None:
    torch.set_num_threads(1)
    x_ND = data(2 * n_tokens, d_in)
    cases = {name: Case(name.split(",")[0], options, x_ND, d_sae, k) for name, options in CASES.items()}
    for index in range(WARM_ROUNDS + rounds):
        half = x_ND[:n_tokens] if index % 2 == 0 else x_ND[n_tokens:]
        for case in cases.values():
            case.step(half)
    base = statistics.median(cases["topk"].seconds[WARM_ROUNDS:])
    print(f"N {n_tokens} D {d_in} F {d_sae} K {k}, {rounds} rounds, one thread, torch {torch.__version__}")
    for name, case in cases.items():
        kept = sorted(case.seconds[WARM_ROUNDS:])
        middle = statistics.median(kept)
        spread = f"{kept[0] * 1e3:.0f} to {kept[-1] * 1e3:.0f}"
        print(f"{name:18} {middle * 1e3:6.0f} ms ({spread})  {middle / base:.2f} x topk  L0 {case.l0:.1f}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
