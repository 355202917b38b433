"""Transcoders: the code of one activation reconstructs another, such as an MLP's output from its input.

Shapes: N tokens, D = d_in, O = d_out, F = d_sae. ``u = n - b_pre``; ``z = act(u W_enc + b_enc)``, act TopK, ReLU or
JumpReLU; ``y = z W_dec + b_dec (+ n W_skip.T)``. Inputs and targets have one factor each for all tokens
(``dataset_rms``), or none: the norm of a target is unknown at inference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sae import optim
from sae.base import B_DEC_SAMPLE_TOKENS, SAE, Entries, SparseLatents, StepLoss, TrainState, step_loss
from sae.config import SAEConfig, TrainConfig
from sae.errors import ConfigError
from sae.jump_code import JumpReLUCode
from sae.manifest import seed_of
from sae.relu_code import ReLUCode
from sae.topk_code import TopKCode

START_SHARE = 0.1
"""Mean length of the first reconstructions over that of the centred targets (TRAINING 4)."""


class Pairs(SAE):
    """Put before a code of n, makes it reconstruct t; ``b_dec`` is in the space of t, ``b_pre`` in that of n."""

    transcodes = True

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        if cfg.apply_b_dec_to_input:
            raise ConfigError("a transcoder subtracts b_pre, not b_dec, from its input: apply_b_dec_to_input is false")
        if cfg.input_norm.kind not in ("none", "dataset_rms"):
            raise ConfigError(
                f"a transcoder cannot have the input norm {cfg.input_norm.kind!r}: the norm of a target is unknown at "
                "inference. Use input_norm dataset_rms or none"
            )
        self.b_in_D = nn.Parameter(torch.zeros(cfg.d_in))

    @property
    def b_pre_D(self) -> Tensor:
        return self.b_in_D

    @classmethod
    def cfg_fields(cls, cfg: TrainConfig) -> dict[str, Any]:
        return super().cfg_fields(cfg) | {"apply_b_dec_to_input": False}

    @classmethod
    def tensor_shapes(cls, cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
        return super().tensor_shapes(cfg) | {"b_pre_D": (cfg.d_in,)}

    def normalise_target(self, t_NO: Tensor) -> Tensor:
        """Raw targets in the units of y."""
        norm = self.cfg.input_norm
        return t_NO.to(self.W_dec_FD) * (norm.scale_out if norm.kind == "dataset_rms" else 1.0)

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Loss of the code, with its penalties, on ``state.target_ND``."""
        if state.target_ND is None:
            raise ConfigError("a transcoder is trained on pairs: give train_many a sae.paired.PairedStore")
        return super().training_loss(n_ND, state)

    @torch.no_grad()
    def initialise_pair(self, n_ND: Tensor, t_NO: Tensor, seed: int) -> None:
        """Starting weights from normalised pairs: b_dec the mean target, b_pre the geometric median of the inputs, both
        matrices random unit rows, the encoder scaled such that the first reconstructions are short (TRAINING 4)."""
        self.b_dec_D.copy_(t_NO.mean(0))
        self.b_in_D.copy_(optim.geometric_median(n_ND[:B_DEC_SAMPLE_TOKENS]))
        self.W_dec_FD.copy_(optim.unit_rows(self.d_sae, self.cfg.d_out, seed_of("transcoder-init-dec", seed)))
        self.W_enc_FD.copy_(optim.unit_rows(self.d_sae, self.d_in, seed_of("transcoder-init-enc", seed)))
        self.b_enc_F.zero_()
        self.start_sparse(n_ND)
        first_nO = SAE.decode_normalised(self, self.encode_entries(n_ND[:4096])) - self.b_dec_D
        length = self.typical_length(torch.linalg.vector_norm(first_nO, dim=1))
        wanted = START_SHARE * float(torch.linalg.vector_norm(t_NO - self.b_dec_D, dim=1).mean())
        if length > 0 and wanted > 0:
            self.scale_codes_(wanted / length)

    @staticmethod
    def typical_length(lengths_N: Tensor) -> float:
        """Of the first reconstructions."""
        return float(lengths_N.mean())


class SkipPairs(Pairs):
    """With a linear path from input to output (Paulo et al., arXiv 2501.18823); W_skip starts at 0."""

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        self.W_skip_DD = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in))

    @classmethod
    def tensor_shapes(cls, cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
        return super().tensor_shapes(cfg) | {"W_skip_DD": (cfg.d_out, cfg.d_in)}

    def decode_normalised(self, latents: Tensor | SparseLatents | Entries, n_ND: Tensor | None = None) -> Tensor:
        if n_ND is None:
            raise ValueError("a skip transcoder decodes latents together with the normalised input n_ND")
        return super().decode_normalised(latents) + n_ND @ self.W_skip_DD.t()


class _TopKFit(TopKCode):
    """The TopK code with the loss that a transcoder has."""

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Normalised squared error plus the auxiliary loss of dead latents on its residual."""
        no_penalty = torch.zeros((), dtype=n_ND.dtype, device=n_ND.device)
        return step_loss(self, n_ND, self.encode_entries(n_ND), state, no_penalty, with_aux=True)


class TopKPairs(Pairs, _TopKFit):
    """A transcoder with the TopK code."""


class ReLUPairs(Pairs, ReLUCode):
    """A transcoder with the ReLU code, sparse from the first step."""

    def start_sparse(self, n_ND: Tensor) -> None:
        self.lower_biases_(n_ND)

    @staticmethod
    def typical_length(lengths_N: Tensor) -> float:
        """Root mean square: most tokens have no latent at the start, and the mean would let the others be long."""
        return float(lengths_N.square().mean().sqrt())


class JumpReLUPairs(Pairs, JumpReLUCode):
    """A transcoder with the JumpReLU code, its window fitted to the first pre-activations."""

    @torch.no_grad()
    def initialise_pair(self, n_ND: Tensor, t_NO: Tensor, seed: int) -> None:
        super().initialise_pair(n_ND, t_NO, seed)
        self.fit_window_(n_ND)
