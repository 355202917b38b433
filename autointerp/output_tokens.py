"""What a latent's decoder row promotes and suppresses: the logit lens, (gamma * d_f) W_U (AUTOINTERP 3).

The final norm is asked itself what it makes of a direction. Once the direction outgrows all else in the residual
stream, both kinds of norm are linear in it but for its length: an RMSNorm multiplies it by its gain (in Gemma's form by
1 + weight), a LayerNorm centres it first. F latents, V rows of the unembedding, D its width.
"""

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sae.tokens import drop_ids

if TYPE_CHECKING:
    from sae.base import SAE
    from sae.language_model import LanguageModel

OUTPUT_TOKENS = 15
"""On each side."""
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm", "layer_norm")
"""Names of the last norm in the models of transformers: a child of the decoder, or of its owner, beside the blocks."""
LARGE = 1e4
"""Length of a direction before the norm, so that the norm's epsilon (at most 1e-5) does not count."""
LATENTS, ROWS = 64, 16_384
"""Latents, and rows of the unembedding, that are multiplied at a time."""
UNUSED = re.compile(r"^[<\[]\|?(?:unused|reserved)[^<>\[\]]*\|?[>\]]$", re.I)
"""Places kept free in a vocabulary, such as <unused12>, [unused3], <|reserved_special_token_5|>."""


def output_tokens(lm: "LanguageModel", sae: "SAE", latents: Iterable[int]) -> dict[int, tuple[list[str], list[str]]]:
    """Latent -> (promoted, suppressed) tokens, fifteen each (or half of a smaller vocabulary), the strongest first; {}
    for an SAE that does not write the residual stream. Special and unused ids are left out."""
    unembed_VD = lm.model.get_output_embeddings().weight
    wanted = list(latents)
    if sae.W_dec_FD.shape[1] != unembed_VD.shape[1]:
        return {}
    usable_V = torch.from_numpy(_usable(lm, unembed_VD.shape[0])).to(unembed_VD.device)
    n = min(OUTPUT_TOKENS, int(usable_V.sum()) // 2)
    found: dict[int, tuple[list[str], list[str]]] = {}
    with torch.no_grad():
        norm = _final_norm(lm)
        for low in range(0, len(wanted), LATENTS):
            block = wanted[low : low + LATENTS]
            d_nD = sae.W_dec_FD[block].to(unembed_VD.device).float()
            logits_nV = _logits(_through(norm, d_nD), unembed_VD)
            for latent, logits_V in zip(block, logits_nV, strict=True):
                # A stable sort: of equal logits the lower id comes first, whatever the device.
                up = torch.argsort(logits_V.masked_fill(~usable_V, -torch.inf), descending=True, stable=True)[:n]
                down = torch.argsort(logits_V.masked_fill(~usable_V, torch.inf), stable=True)[:n]
                found[latent] = (_names(lm, up), _names(lm, down))
    return found


def _names(lm: "LanguageModel", ids: Tensor) -> list[str]:
    return [str(lm.tokenizer.decode([i])) for i in ids.tolist()]


def _usable(lm: "LanguageModel", n_rows: int) -> NDArray[np.bool_]:
    """[V]: rows that stand for a token a text can hold. Models pad their unembedding beyond the tokenizer."""
    usable = np.zeros(n_rows, dtype=bool)
    usable[[i for text, i in lm.tokenizer.get_vocab().items() if i < n_rows and not UNUSED.match(text)]] = True
    usable[[i for i in drop_ids(lm.tokenizer) if i < n_rows]] = False
    return usable


def _final_norm(lm: "LanguageModel") -> nn.Module | None:
    """A float32 copy of the norm between the last block and the unembedding; None for a model without one."""
    found = [m for n, m in lm.decoder.named_children() if n in FINAL_NORMS and not isinstance(m, nn.ModuleList)]
    return copy.deepcopy(found[-1]).float() if found else None


def _through(norm: nn.Module | None, d_nD: Tensor) -> Tensor:
    """What the norm makes of unit directions, up to one positive factor each."""
    unit_nD = d_nD / d_nD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if norm is None:
        return unit_nD
    seen_nD: Tensor = norm(unit_nD * LARGE) - norm(torch.zeros_like(unit_nD))  # the second: a LayerNorm's bias
    return seen_nD / seen_nD.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _logits(directions_nD: Tensor, unembed_VD: Tensor) -> Tensor:
    """float32 [n, V], whatever the type of the unembedding."""
    return torch.cat([directions_nD @ rows.float().T for rows in unembed_VD.split(ROWS)], dim=1)
