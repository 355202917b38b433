"""Datapoint initialisation: latents start at tokens of the training text instead of at random (decision 014).

Proposed by P. Peigné and by Anthropic's interpretability team (transformer-circuits.pub), who blend tokens with random
rows (0.8 to 0.2); here tokens alone, and one bias per latent.
Shapes: N tokens of the start sample, M of them drawn, n of them measured, D = d_in, F = d_sae.
"""

import torch
from torch import Tensor

from sae import ops
from sae.base import SAE
from sae.manifest import seed_of

DENSITY = 0.01
"""Share of tokens on which each latent is active at the start."""
SAMPLE_TOKENS = 2_048
"""Tokens on which biases are measured,"""
SAMPLE_ENTRIES = 2**24
"""fewer where their pre-activations would be more than this."""


@torch.no_grad()
def start_at_tokens_(sae: SAE, n_ND: Tensor, seed: int) -> None:
    """Give ``sae``, whose random start is made, other encoder and decoder rows: unit vectors from b_dec to normalised
    tokens ``n_ND``, drawn without replacement, times the factor with which the sample is best reconstructed; and one
    bias per latent, at most 0, with which it is active on :data:`DENSITY` of the tokens.

    A token that lies at b_dec has no direction, and a sample smaller than F does not serve all latents: those keep
    their random rows. A function of the sample and the seed.
    """
    generator = torch.Generator().manual_seed(seed_of("data-start", seed))
    drawn = torch.randperm(len(n_ND), generator=generator)[: sae.d_sae].to(n_ND.device)
    u_MD = n_ND[drawn] - sae.b_dec_D
    length_M1 = torch.linalg.vector_norm(u_MD, dim=1, keepdim=True)
    rows_MD = sae.W_dec_FD[: len(drawn)]
    rows_MD.copy_(torch.where(length_M1 > 0, u_MD / length_M1.clamp_min(1e-30), rows_MD))
    sae.W_enc_FD.copy_(sae.W_dec_FD)
    sae.b_enc_F.zero_()
    sample_nD = n_ND[: max(1, SAMPLE_ENTRIES // sae.d_sae)][:SAMPLE_TOKENS]
    h_nF = ops.encode_dense(sample_nD, sae.b_pre_D, sae.W_enc_FD, sae.b_enc_F)
    kept = max(1, round(DENSITY * len(h_nF)))
    sae.b_enc_F.sub_(torch.topk(h_nF, kept, dim=0).values[-1].clamp_min(0))
    sae._scale_encoder(n_ND[:4096])
