"""What a latent's decoder row promotes and suppresses: the logit lens, (gamma * d_f) W_U (AUTOINTERP 3)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae.base import SAE
    from sae.language_model import LanguageModel

OUTPUT_TOKENS = 10


def output_tokens(lm: "LanguageModel", sae: "SAE", latents: Iterable[int]) -> dict[int, tuple[list[str], list[str]]]:
    """Latent -> (promoted, suppressed) tokens, ten each; {} for an SAE that does not write the residual stream."""
    unembed = lm.model.get_output_embeddings().weight
    norm = next((m for n, m in lm.decoder.named_children() if n in ("norm", "ln_f", "final_layernorm")), None)
    gamma = getattr(norm, "weight", None)
    if sae.W_dec_FD.shape[1] != unembed.shape[1]:
        return {}
    found = {}
    with torch.no_grad():
        for latent in latents:
            d = sae.W_dec_FD[latent].to(unembed.dtype)
            d = d / d.norm().clamp_min(1e-12) * (gamma if gamma is not None else 1.0)
            logits = (unembed @ d).float()
            logits[list(lm.tokenizer.all_special_ids)] = 0.0
            order = torch.argsort(logits, stable=True)[: len(lm.tokenizer)]
            name = [lm.tokenizer.decode([int(i)]) for i in (*order[-OUTPUT_TOKENS:].flip(0), *order[:OUTPUT_TOKENS])]
            found[latent] = (name[:OUTPUT_TOKENS], name[OUTPUT_TOKENS:])
    return found
