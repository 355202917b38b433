"""Losses as pure functions. Shapes: N tokens, D = d_in, F = d_sae; t the normalised target, y the reconstruction.

All are in normalised space and means over tokens, so their size does not depend on the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae import ops


def variance(e_ND: Tensor) -> Tensor:
    """``mean over n of |e - mean e|^2``, summed over D, in float64; 0 for no token."""
    if len(e_ND) == 0:
        return torch.zeros((), dtype=torch.float64)
    mean_D = e_ND.mean(0, keepdim=True)
    return (e_ND - mean_D).square().sum(1).double().mean()


def normalised_mse(residual_ND: Tensor, v0: float) -> Tensor:
    """``mean |t - y|^2 / v0``: Gao et al. (arXiv 2406.04093) section 2.1, baseline = the mean activation.

    ``v0`` is :func:`variance` of the start sample. Their README divides by ``|t|^2`` instead
    (openai/sparse_autoencoder #8), which is about half of this for a residual stream.
    """
    return residual_ND.square().sum() / (max(len(residual_ND), 1) * v0)


def l1(values_E: Tensor, n_tokens: int, scale: float) -> Tensor:
    """``mean over n of (sum of z) / c``, c the root mean square norm of a token: OpenAI's normalised L1.

    Decoder rows are unit, so the usual factor ``|W_dec[f]|`` is 1, and its gradient, which is parallel to the row, is
    what the projection of the decoder gradient removes.
    """
    return values_E.sum() / (max(n_tokens, 1) * scale)


class AuxLoss(NamedTuple):
    """Result of :func:`aux_k`."""

    loss: Tensor
    """Scalar; 0 where it would not be finite."""
    active: float
    """Mean number of dead latents per token that took part with a positive value."""


def aux_k(
    error_ND: Tensor,
    n_ND: Tensor,
    b_pre_D: Tensor | None,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    dead_F: Tensor,
    k_aux: int,
    v_e: float,
) -> AuxLoss:
    """Auxiliary loss of dead latents, Gao et al. appendix A.2: they model the error that the live latents leave.

    ``error_ND`` = t - y is detached here; no bias is added; candidates are ReLU'd; ``v_e`` = variance of the error of
    the previous step (OpenAI's code takes the current batch: one step of lag, see TRAINING 5). The gradient reaches
    rows, columns and biases of dead latents and the pre-bias; nothing else. ``dead_F`` is a bool mask.
    """
    dead_d = dead_F.nonzero().squeeze(1)
    if len(dead_d) == 0 or len(n_ND) == 0 or not v_e > 0:
        return AuxLoss(error_ND.new_zeros(()), 0.0)
    # The dead are few or many but k_aux is about D / 2, where dense products beat gathering (KERNELS 1).
    h_Nd = ops.encode_dense(n_ND, b_pre_D, W_enc_FD[dead_d], b_enc_F[dead_d])
    z_Nd = h_Nd.relu()
    if k_aux < len(dead_d):
        kept = torch.topk(z_Nd.detach(), k_aux, dim=1, sorted=False).indices
        z_Nd = z_Nd * torch.zeros_like(z_Nd).scatter_(1, kept, 1.0)
    difference_ND = z_Nd @ W_dec_FD[dead_d] - error_ND.detach()
    loss = difference_ND.square().sum() / (len(n_ND) * v_e)
    active = float((z_Nd.detach() > 0).sum()) / len(n_ND)
    return AuxLoss(loss if bool(torch.isfinite(loss)) else loss.new_zeros(()), active)
