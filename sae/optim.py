"""Steps around the optimiser: unit decoder rows, gradient projection, schedules, starting points.

Shapes: N tokens, D = d_in, F = d_sae.
"""

from typing import Any

import torch
from torch import Tensor

from sae.config import TrainConfig


@torch.no_grad()
def normalise_rows_(W_FD: Tensor) -> Tensor:
    """Rows to length 1, in place. A zero row stays zero. To be called after the optimiser step, so that what is saved
    and used next is unit (OpenAI's code does it before)."""
    norms_F1 = torch.linalg.vector_norm(W_FD, dim=1, keepdim=True)
    # Squares of a row below 1e-22 underflow: its computed length is 0 and no clamp would make the row unit.
    return W_FD.div_(torch.where(norms_F1 > 0, norms_F1, 1.0))


@torch.no_grad()
def project_gradient_(grad_FD: Tensor, W_FD: Tensor) -> Tensor:
    """``g_f -= (g_f . w_f) w_f`` in place, for unit rows w_f: what is left is tangent to the unit sphere."""
    along_F1 = (grad_FD * W_FD).sum(1, keepdim=True)
    return grad_FD.addcmul_(W_FD, along_F1, value=-1.0)


def adam(parameters: list[torch.nn.Parameter] | list[dict[str, Any]], cfg: TrainConfig) -> torch.optim.Adam:
    """Fused Adam, betas (0.9, 0.999), no weight decay (TRAINING 7). ``parameters``: a list, or groups as torch's; what
    a group says of ``lr_scale`` is for the training loop, which sets every group's rate at every step."""
    return torch.optim.Adam(parameters, lr=cfg.lr, betas=(0.9, 0.999), eps=cfg.adam_eps, fused=True)


LAW_WIDTH = 2**14
"""Width at which both learning-rate laws give ``lr``."""


def full_rate(cfg: TrainConfig) -> float:
    """``lr``, or under ``sqrt_width`` ``lr * sqrt(2^14 / d_sae)``: the slope of Gao et al. (arXiv 2406.04093), whose
    law is 2e-4 at 16,384 latents (TRAINING 7)."""
    return cfg.lr * (LAW_WIDTH / cfg.d_sae) ** 0.5 if cfg.lr_law == "sqrt_width" else cfg.lr


@torch.no_grad()
def clip_gradients_(parameters: list[torch.nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most ``limit``; returns the norm before, on the device.

    ``limit / norm`` exactly where it clips, 1 elsewhere (torch's own adds 1e-6 to the norm); no host sync.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    torch._foreach_mul_(gradients, torch.where(norm > limit, limit / norm, torch.ones_like(norm)))
    return norm


class Average:
    """Exponential moving average of parameters, started at 0 and bias-corrected (TRAINING 7): the weights of step i
    count ``(1 - d) d^(n - i) / (1 - d^n)`` after n steps. To be updated after the step and the unit rows (TRAINING 6,
    step 9; OpenAI's code averages before the optimiser, one step late)."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.n_steps = 0
        self.mean: dict[str, Tensor] = {name: torch.zeros_like(p.detach()) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Take in the parameters of one step; the names are those given at the start."""
        self.n_steps += 1
        current = [parameters[name].detach() for name in self.mean]
        torch._foreach_lerp_(list(self.mean.values()), current, 1.0 - self.decay)

    def corrected(self) -> dict[str, Tensor]:
        """The averages. ``ValueError`` before the first step."""
        if self.n_steps == 0:
            raise ValueError("an average of no step")
        return {name: mean / (1.0 - self.decay**self.n_steps) for name, mean in self.mean.items()}


def lr_factor(step: int, n_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Share of the full learning rate at ``step`` (0-based): linear up, constant, linear down over the last share.

    The first step of a warm-up is 1 / warmup_steps, the last step of a decay is above 0, so no step is wasted.
    """
    up = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    decay_steps = round(decay_share * n_steps)
    down = min(1.0, (n_steps - step) / (decay_steps + 1)) if decay_steps > 0 else 1.0
    return min(up, down)


def ramp(step: int, n_steps: int, share: float) -> float:
    """0 to 1 linearly over the first ``share`` of the steps."""
    ramp_steps = share * n_steps
    return 1.0 if ramp_steps <= 0 else min(1.0, (step + 1) / ramp_steps)


def geometric_median(x_ND: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least mean distance to the rows (Weiszfeld), from the mean; stops at a relative change of
    ``tolerance``. ``ValueError`` for no row."""
    if len(x_ND) == 0:
        raise ValueError("geometric_median needs at least one row")
    median_D = x_ND.mean(0)
    for _ in range(iterations):
        weights_N = 1.0 / torch.linalg.vector_norm(x_ND - median_D, dim=1).clamp_min(1e-12)
        new_D = (weights_N @ x_ND) / weights_N.sum()
        change = torch.linalg.vector_norm(new_D - median_D)
        median_D = new_D
        if float(change) <= tolerance * float(torch.linalg.vector_norm(median_D)):
            break
    return median_D


def unit_rows(n_rows: int, width: int, seed: int) -> Tensor:
    """Random unit rows [n_rows, width], float32, a function of ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    return normalise_rows_(torch.randn(n_rows, width, generator=generator))
