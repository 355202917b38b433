"""Compute copy of encoder weights in tile order, for :mod:`sae_kernels.topk_encode`.

Shapes: D = d_in, F = d_sae, BN latents per tile, T = F / BN tiles (rounded up), P = T BN. Tile t holds latents t,
t + T, t + 2 T, ...: tiles are contiguous in memory, and every prefix of the latents is spread over all of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels import launch

TILE = 128
"""Latents per tile, BN."""


class PreparedEncoder(NamedTuple):
    """Encoder weights in tile order: latent f is row (f mod T) BN + f div T; padding is 0 with bias -inf."""

    W_PD: Tensor
    """float32, bfloat16 or float16."""
    b_P: Tensor
    """float32."""
    n_latents: int
    tile: int
    """BN."""

    @property
    def n_tiles(self) -> int:
        """T."""
        return len(self.W_PD) // self.tile

    def refresh(self, W_enc_FD: Tensor, b_enc_F: Tensor) -> None:
        """Take over changed weights, cast to the prepared type. ``ValueError`` for another shape."""
        if W_enc_FD.shape != (self.n_latents, self.W_PD.shape[1]) or b_enc_F.shape != (self.n_latents,):
            raise ValueError(
                f"prepared for W_enc {(self.n_latents, self.W_PD.shape[1])}, got W_enc {tuple(W_enc_FD.shape)} and "
                f"b_enc {tuple(b_enc_F.shape)}"
            )
        n_tiles = self.n_tiles
        columns, rest = divmod(self.n_latents, n_tiles)
        with torch.no_grad():
            for made, source in ((self.W_PD, W_enc_FD), (self.b_P, b_enc_F)):
                tiled = made.view(n_tiles, self.tile, *made.shape[1:])
                whole = source[: columns * n_tiles].unflatten(0, (columns, n_tiles))
                tiled[:, :columns].copy_(whole.transpose(0, 1))
                if rest:
                    tiled[:rest, columns].copy_(source[columns * n_tiles :])


def prepare(
    W_enc_FD: Tensor, b_enc_F: Tensor, BN: int = TILE, dtype: torch.dtype | None = None
) -> PreparedEncoder:
    """Compute copy of encoder weights for :func:`encode_topk`; ``refresh`` it after every change of the weights.

    ``BN``: latents per tile, a power of two from 16 to 1,024. ``dtype``: of the copy of W, that of W by default.
    ``ValueError`` for shapes, ``TypeError`` for types.
    """
    dtype = W_enc_FD.dtype if dtype is None else dtype
    found = f"W_enc {tuple(W_enc_FD.shape)} {W_enc_FD.dtype}, b_enc {tuple(b_enc_F.shape)}"
    if dtype not in launch.FLOATS:
        raise TypeError(f"the encoder product takes float32, bfloat16 or float16, got {dtype} for {found}")
    if W_enc_FD.dim() != 2 or b_enc_F.shape != W_enc_FD.shape[:1] or 0 in W_enc_FD.shape:
        raise ValueError(f"W_enc must be [F, D] and b_enc [F], none of them empty; got {found}")
    if W_enc_FD.shape[1] > launch.MAX_WIDTH:
        raise ValueError(f"D must lie in 1..{launch.MAX_WIDTH}; got {found}")
    if not 16 <= BN <= 1_024 or BN & (BN - 1):
        raise ValueError(f"BN must be a power of two from 16 to 1024, got {BN}")
    (n_latents, width), device = W_enc_FD.shape, W_enc_FD.device
    padded = launch.cdiv(n_latents, BN) * BN
    W_PD = torch.zeros(padded, width, dtype=dtype, device=device)
    b_P = torch.full((padded,), -math.inf, dtype=torch.float32, device=device)
    prepared = PreparedEncoder(W_PD, b_P, n_latents, BN)
    prepared.refresh(W_enc_FD, b_enc_F)
    return prepared
