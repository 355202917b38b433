"""The SAE module that every architecture extends: one forward pass for all of them (FORMATS 1).

    n = norm_in(x);  u = n - b_dec (if apply_b_dec_to_input);  h = u @ W_enc_DF + b_enc;  z = act(h)
    y = z @ W_dec_FD + b_dec;  x_hat = the inverse of norm_in, with the statistics of x

Shapes: N tokens, D = d_in = d_out, F = d_sae, K slots per token. Inputs of any float type are converted to the type of
the weights (float32; float64 in tests), outputs have the type of the weights. The encoder lies latent-major in memory
(``W_enc_FD``); ``W_enc_DF`` is its transposed view.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sae import losses, ops, optim
from sae.config import SAEConfig, TrainConfig
from sae.errors import ConfigError, DataError
from sae.manifest import key_of, seed_of
from sae.norm import NormStats, normalise
from sae.ops import Entries, SparseLatents, to_dense
from sae.plugins import find

__all__ = ["SAE", "NormStats", "SparseLatents", "StepLoss", "TrainState", "normalise", "random_like"]
FIRE_EPS = 1e-3
"""A latent fired if its value exceeds this many times the root mean square of an input component (TRAINING 5)."""
B_DEC_SAMPLE_TOKENS = 32_768
RANDOM_SAE_VERSION = 1


@dataclass
class TrainState:
    """What the training of one SAE knows beside its weights."""

    cfg: TrainConfig
    v0: float
    """Variance of the normalised start sample, the unit of the loss."""
    input_rms_norm: float
    """c: root mean square norm of a normalised token of the start sample."""
    last_fired_tokens_F: Tensor
    """int64: the token counter when each latent last fired."""
    d_in: int
    tokens: int = 0
    """Tokens seen."""
    v_e: float | Tensor = 0.0
    """Variance of the error of the last step (auxiliary loss); like all figures of a step, on a GPU a tensor."""
    l0: float | Tensor = 0.0
    """Mean active latents per token of the last step."""
    logged: bool = True
    """Whether the figures of this step will be read."""
    n_dead_late: int = 0
    """Number of dead latents as the host last heard of it; only what runs on a GPU uses it (sae.fused_step)."""
    target_ND: Tensor | None = None
    """Normalised targets of the batch, where they are not its inputs (transcoders)."""
    sparsity_ramp: float = 1.0
    """Warm-up factor of the sparsity coefficient."""

    @property
    def fire_eps(self) -> float:
        return FIRE_EPS * self.input_rms_norm / self.d_in**0.5

    @property
    def dead_F(self) -> Tensor:
        """bool: silent for more than ``dead_tokens`` at the end of the last step."""
        return self.tokens - self.last_fired_tokens_F > self.cfg.dead_tokens

    def after_step(self, n_tokens: int, step: "StepLoss") -> None:
        """Counters move at the end of a step, so the loss of step t uses the dead of step t - 1."""
        self.tokens += n_tokens
        self.last_fired_tokens_F.masked_fill_(step.fired_F, self.tokens)
        self.v_e, self.l0 = step.v_e, step.l0


class StepLoss(NamedTuple):
    """What an architecture returns for one batch."""

    total: Tensor
    """Scalar to differentiate."""
    mse: Tensor
    """Detached parts of it: normalised squared error,"""
    aux: Tensor
    """auxiliary loss times its weight,"""
    sparsity: Tensor
    """sparsity penalty times its weight."""
    y_ND: Tensor | None
    """Detached reconstruction in normalised space; None where nobody reads it (``TrainState.logged``)."""
    fired_F: Tensor
    """bool: latents above ``fire_eps`` on some token; being selected with value 0 is not firing."""
    l0: float | Tensor
    """Mean active latents per token."""
    v_e: float | Tensor
    """Variance of the error."""
    aux_active: float | Tensor
    """Mean dead latents per token that took part in the auxiliary loss with a positive value."""
    flagged: float | Tensor | None = None
    """Tokens whose latents need not be exactly the K largest (KERNELS 5); None where selection is exact or unread."""


class TokenSource(Protocol):
    """What :meth:`SAE.finish` needs of a store of activations."""

    @property
    def kept_N(self) -> np.ndarray:
        """int64: tokens that pass the filter, ascending."""

    def read(self, flat: Any) -> Tensor:
        """Raw activations, float32 [n, D]."""


class SAE(nn.Module):
    """Base class; an architecture sets ``activation`` and defines ``encode_entries`` and ``training_loss``."""

    activation: ClassVar[str]
    """Value of ``cfg.activation`` this class runs."""
    uses_k: ClassVar[bool] = False
    """Whether training needs ``TrainConfig.k``."""
    transcodes: ClassVar[bool] = False
    """Whether the target is another activation than the input (:class:`sae.transcoding.Pairs`)."""
    latent_scaled: ClassVar[tuple[str, ...]] = ()
    """Tensors [F], beside W_enc and b_enc, that take a factor when the codes do."""

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        if cfg.activation != self.activation:
            raise ConfigError(f"{type(self).__name__} runs activation {self.activation!r}, cfg says {cfg.activation!r}")
        if cfg.d_in != cfg.d_out and not self.transcodes:
            raise ConfigError(f"d_in {cfg.d_in} and d_out {cfg.d_out} differ: only transcoders have two widths")
        if cfg.input_norm.kind == "layer_norm" and cfg.d_in <= cfg.input_norm.ddof:
            raise ConfigError(f"layer_norm needs more than {cfg.input_norm.ddof} input channels, got {cfg.d_in}")
        self.cfg = cfg
        self.W_enc_FD = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in))
        self.W_dec_FD = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_out))
        self.b_enc_F = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec_D = nn.Parameter(torch.zeros(cfg.d_out))

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    @property
    def sae_id(self) -> str:
        return self.cfg.sae_id

    @property
    def W_enc_DF(self) -> Tensor:
        """[D, F], a view of the latent-major parameter."""
        return self.W_enc_FD.t()

    @property
    def b_pre_D(self) -> Tensor | None:
        """What is subtracted from the normalised input; None where the encoder sees it as it is."""
        return self.b_dec_D if self.cfg.apply_b_dec_to_input else None

    def normalise(self, x_ND: Tensor) -> tuple[Tensor, NormStats]:
        """Normalised input, in the type and on the device of the weights. ``DataError`` for a wrong width."""
        if x_ND.dim() != 2 or x_ND.shape[1] != self.d_in:
            raise DataError(f"{self.sae_id} wants activations of shape [N, {self.d_in}], got {tuple(x_ND.shape)}")
        return normalise(x_ND.to(self.W_dec_FD), self.cfg.input_norm)

    def encode_entries(self, n_ND: Tensor) -> Entries:
        """Active latents of normalised inputs; defined by the architecture. Empty slots (value 0) are allowed."""
        raise NotImplementedError

    def training_loss(self, n_ND: Tensor, state: TrainState) -> StepLoss:
        """Loss of one batch of normalised inputs; defined by the architecture."""
        raise NotImplementedError

    @classmethod
    def cfg_fields(cls, cfg: TrainConfig) -> dict[str, Any]:
        """Fields of :class:`SAEConfig` that the architecture decides, for a training configuration."""
        return {"activation": cls.activation, "k": cfg.k if cls.uses_k else None, "decoder_unit_norm": True}

    @classmethod
    def tensor_shapes(cls, cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
        """Tensors of the file (FORMATS 2), each an attribute of this name: ``W_enc_DF`` and ``W_dec_FD`` in the type of
        ``cfg.weights_dtype``, the others in float32."""
        return {
            "W_enc_DF": (cfg.d_in, cfg.d_sae), "W_dec_FD": (cfg.d_sae, cfg.d_out), "b_enc_F": (cfg.d_sae,),
            "b_dec_D": (cfg.d_out,),
        }  # fmt: skip

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser; ``lr_scale`` multiplies the learning rate of a group."""
        return [{"params": list(self.parameters()), "lr_scale": 1.0}]

    def constrain_(self) -> None:
        """What the optimiser's step must not leave behind, after unit rows (TRAINING 6, step 8)."""

    def finish(self, source: TokenSource) -> None:
        """Last change of the weights, after training and before saving; ``source``: the training activations.
        ``DataError`` if the SAE cannot be saved as it is."""

    def selection_gap(self, x_ND: Tensor) -> Tensor | None:
        """gap_N: how far each token of raw x is from another set of latents, relative to its largest one; None where
        the code is a continuous function of x."""
        return None

    def pre_activations(self, x_ND: Tensor, latents: Tensor | None = None) -> Tensor:
        """h_NF before the activation function, for raw x; only the columns ``latents`` (int64) where given."""
        n_ND, _ = self.normalise(x_ND)
        picked = slice(None) if latents is None else latents
        return ops.encode_dense(n_ND, self.b_pre_D, self.W_enc_FD[picked], self.b_enc_F[picked])

    def encode_sparse(self, x_ND: Tensor) -> SparseLatents:
        """Active latents of raw x. The width is K (topk) or the largest L0 of the batch (relu), padded with value 0."""
        return self.encode_entries(self.normalise(x_ND)[0]).padded()

    def encode(self, x_ND: Tensor) -> Tensor:
        """Dense codes z_NF of raw x: for small F and tests; :meth:`encode_sparse` holds the same codes."""
        return to_dense(self.encode_sparse(x_ND), self.d_sae)

    def decode_normalised(self, latents: Tensor | SparseLatents | Entries, n_ND: Tensor | None = None) -> Tensor:
        """y_ND = z @ W_dec + b_dec, in normalised space; a skip transcoder wants the normalised input too."""
        if isinstance(latents, SparseLatents):
            return ops.sparse_decode(*latents, self.W_dec_FD) + self.b_dec_D
        if isinstance(latents, Entries):
            return ops.decode_entries(latents, self.W_dec_FD) + self.b_dec_D
        return latents @ self.W_dec_FD + self.b_dec_D

    def decode(self, latents: Tensor | SparseLatents, x_ND: Tensor) -> Tensor:
        """x_hat_ND in raw units; ``x_ND`` gives the per-token mean and scale that the input norm took away."""
        n_ND, stats = self.normalise(x_ND)
        return self.denormalise(self.decode_normalised(latents, n_ND), stats)

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_hat_ND of raw x."""
        n_ND, stats = self.normalise(x_ND)
        return self.denormalise(self.decode_normalised(self.encode_entries(n_ND), n_ND), stats)

    @staticmethod
    def denormalise(y_ND: Tensor, stats: NormStats) -> Tensor:
        """Normalised space to raw units, with the constants that :meth:`normalise` returned."""
        x_hat_ND = y_ND * stats.scale_N[:, None]
        return x_hat_ND if stats.mean_N1 is None else x_hat_ND + stats.mean_N1

    def output_scale(self, x_ND: Tensor) -> Tensor:
        """s_N: latent f adds ``z_nf * s_n * W_dec_FD[f]`` to x_hat (METRICS 1, units)."""
        return self.normalise(x_ND)[1].scale_N

    @torch.no_grad()
    def initialise(self, n_ND: Tensor, seed: int) -> None:
        """Starting weights from a normalised sample (TRAINING 4): b_dec its geometric median, random unit decoder rows,
        encoder = decoder times one factor, the one for which the reconstruction of the sample is best."""
        self.b_dec_D.copy_(optim.geometric_median(n_ND[:B_DEC_SAMPLE_TOKENS]))
        self.W_dec_FD.copy_(optim.unit_rows(self.d_sae, self.d_in, seed_of("sae-init", seed)))
        self.W_enc_FD.copy_(self.W_dec_FD)
        self.b_enc_F.zero_()
        self.start_sparse(n_ND)
        self._scale_encoder(n_ND[:4096])

    def normalise_target(self, t_NO: Tensor) -> Tensor:
        """Raw targets in the units of the reconstruction; defined by transcoders."""
        raise NotImplementedError

    def initialise_pair(self, n_ND: Tensor, t_NO: Tensor, seed: int) -> None:
        """Starting weights of a transcoder, from normalised inputs and targets."""
        raise NotImplementedError

    def start_sparse(self, n_ND: Tensor) -> None:
        """Choose what makes the first codes sparse (thresholds, biases), for W_enc = W_dec transposed and b_enc 0."""

    @torch.no_grad()
    def _scale_encoder(self, n_ND: Tensor) -> None:
        """Codes times the least-squares factor of (z @ W_dec) on (n - b_dec)."""
        y_ND = self.decode_normalised(self.encode_entries(n_ND)) - self.b_dec_D
        target_ND = n_ND - self.b_dec_D
        power = float(y_ND.double().square().sum())
        factor = float((y_ND.double() * target_ND.double()).sum()) / power if power > 0 else 1.0
        if factor > 0:
            self.scale_codes_(factor)

    @torch.no_grad()
    def scale_codes_(self, factor: float | Tensor) -> None:
        """All codes times ``factor`` (a number, or one per latent): they are homogeneous in the encoder's tensors."""
        per_latent = torch.as_tensor(factor, dtype=self.W_enc_FD.dtype, device=self.W_enc_FD.device).reshape(-1)
        self.W_enc_FD.mul_(per_latent[:, None])
        for name in ("b_enc_F", *self.latent_scaled):
            getattr(self, name).mul_(per_latent)


class Fit(NamedTuple):
    """Reconstruction of one batch where an architecture has a loss of its own for it."""

    mse: Tensor
    """Scalar reconstruction loss."""
    y_ND: Tensor
    """Reconstruction of the code that is run, in normalised space,"""
    residual_ND: Tensor
    """and n - y."""


def step_loss(
    sae: SAE, n_ND: Tensor, entries: Entries, state: TrainState, sparsity: Tensor, *, with_aux: bool,
    fit: Fit | None = None,
) -> StepLoss:  # fmt: skip
    """Reconstruction and auxiliary loss of one batch, shared by architectures; ``sparsity`` is added as it is.

    ``entries``: the code that is run; ``fit``: its reconstruction loss, by default the normalised squared error.
    """
    if fit is None:
        y_ND = sae.decode_normalised(entries, n_ND)
        residual_ND = (n_ND if state.target_ND is None else state.target_ND) - y_ND
        fit = Fit(losses.normalised_mse(residual_ND, state.v0), y_ND, residual_ND)
    mse, y_ND, residual_ND = fit
    total, aux, aux_active = mse + sparsity, mse.new_zeros(()), 0.0
    if with_aux and state.cfg.aux_alpha > 0 and bool((dead_F := state.dead_F).any()):
        found = losses.aux_k(
            residual_ND, n_ND, sae.b_pre_D, sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, dead_F, state.cfg.aux_k,
            float(state.v_e),
        )  # fmt: skip
        aux, aux_active = state.cfg.aux_alpha * found.loss, found.active
        total = total + aux
    values_E = entries.values_E.detach()
    fired_F = torch.zeros(sae.d_sae, dtype=torch.bool, device=values_E.device)
    fired_F[entries.indices_E[values_E > state.fire_eps]] = True
    return StepLoss(
        total=total,
        mse=mse.detach(),
        aux=aux.detach(),
        sparsity=sparsity.detach(),
        y_ND=y_ND.detach(),
        fired_F=fired_F,
        l0=float((values_E > 0).sum()) / max(len(n_ND), 1),
        v_e=float(losses.variance(residual_ND.detach())),
        aux_active=aux_active,
    )


@torch.no_grad()
def random_like(sae: SAE, seed: int, x_sample_ND: Tensor, sample: str = "") -> SAE:
    """The random-SAE floor (METRICS A): an untrained TopK SAE of the same size and L0 as ``sae``.

    Unit random decoder rows, encoder = decoder transposed, b_enc 0, b_dec the mean of the normalised sample, values
    scaled by one least-squares factor on the raw-x sample ``x_sample_ND`` (folded into the encoder). K is that of
    ``sae``, or its rounded mean L0 on the sample where it has none. ``sae_id`` is ``baseline.random_sae.<8 hex>``;
    ``sample`` names the sample for it where the id of ``sae`` does not, which was then trained on other text.
    For a transcoder it is an SAE of the transcoder's inputs.
    """
    if len(x_sample_ND) == 0:
        raise DataError("random_like needs at least one sample token")
    k = sae.cfg.k
    if sae.activation != "topk" or k is None:  # elsewhere k is a mean or an aim
        active = int((sae.encode_sparse(x_sample_ND).values_NK > 0).sum())
        k = min(max(1, round(active / len(x_sample_ND))), sae.d_sae)
    inputs = {"sae": sae.sae_id} | ({"sample": sample} if sample else {})
    key = key_of("random_sae", RANDOM_SAE_VERSION, {"seed": seed, "k": k}, inputs)
    own = sae.cfg
    if sae.transcodes:  # its floor is a random SAE of what it reads: random latents beside learned ones
        norm = replace(own.input_norm, scale_out=own.input_norm.scale_in)
        meta = None if own.meta is None else replace(own.meta, hookpoint_out=None)
        own = replace(own, d_out=own.d_in, input_norm=norm, meta=meta)
    cfg = replace(
        own,
        architecture="topk",
        activation="topk",
        k=k,
        decoder_unit_norm=True,
        apply_b_dec_to_input=True,
        sae_id=f"baseline.random_sae.{key[:8]}",
        train=None,
        train_tokens=0,
        train_steps=0,
        seed=seed,
        weights="raw",
        weights_dtype="float32",
        group_sizes=None,
        threshold_source=None,
        source=None,
        extra={"like": sae.sae_id},
    )
    found: SAE = find("sae.architectures", "topk")(cfg)
    found.to(sae.W_dec_FD)
    n_ND, _ = found.normalise(x_sample_ND)
    rows_FD = optim.unit_rows(sae.d_sae, sae.d_in, seed_of("random-sae", seed, sae.sae_id))
    found.W_dec_FD.copy_(rows_FD)
    found.W_enc_FD.copy_(rows_FD)
    found.b_dec_D.copy_(n_ND.mean(0))
    found._scale_encoder(n_ND)
    return found.requires_grad_(False)
