"""Text that a tiny model says itself, and an SAE of its tokens: what is known to be lost, and what patterns explain."""

from typing import Any

import numpy as np
import torch
from memory_cache import MemoryCache
from memory_store import MemoryStore, MemoryTokens, context, info

from evals.base import SAESubject
from sae.config import InputNorm, SAEConfig
from sae.plugins import find

EMBEDDED = "layers.0:in"
"""Where an activation is a function of its token alone, so that one-token patterns tell all."""


def spoken(lm: Any, rows: int, L: int, seed: int) -> np.ndarray:
    """Text that the model itself says: what disturbs its activations then adds KL to the loss, on the average."""
    r, ids = np.random.default_rng(seed), np.zeros((rows, L), dtype=np.int64)
    ids[:, 1] = r.integers(3, 259, size=rows)
    for t in range(2, L):
        logits = lm.logits(torch.from_numpy(ids[:, :t]))[:, -1]
        logits[:, :3] = -torch.inf
        p = logits.double().softmax(-1).numpy().cumsum(1)
        ids[:, t] = (p > r.random((rows, 1)) * p[:, -1:]).argmax(1)
    return ids


def stored(lm: Any, hookpoint: str, ids: np.ndarray, split: str) -> MemoryStore:
    """Every row is a document; position 0 is dropped."""
    B, L = ids.shape
    x = lm.capture(torch.from_numpy(ids), [hookpoint])[hookpoint].float().reshape(B * L, -1).clone()
    docs = np.repeat(np.arange(B)[:, None], L, axis=1)
    keep = np.tile(np.arange(L) > 0, B)
    return MemoryStore(MemoryTokens(ids.astype(np.uint16), docs, f"spoken-{split}", split), x, keep, f"spoken-{split}")


def token_sae(lm: Any) -> SAESubject:
    """K = 1, latent v = token v: its row is the token's embedding of length 1, so that x_hat = x (Cauchy-Schwarz)."""
    table = lm.model.get_input_embeddings().weight.detach().float()
    # the row of the pad token is 0
    unit, (F, D) = table / table.norm(dim=1, keepdim=True).clamp_min(1e-6), table.shape
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=D, d_out=D, d_sae=F, k=1, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id="planted.tokens", meta=None, train_tokens=0,
        train_steps=0, seed=0)
    sae = find("sae.architectures", "topk")(cfg)
    with torch.no_grad():
        sae.W_dec_FD.copy_(unit)
        sae.W_enc_FD.copy_(unit)
        sae.b_enc_F.zero_()
        sae.b_dec_D.zero_()
    sae.requires_grad_(False)
    return SAESubject(sae, info(lm, EMBEDDED, cfg.sae_id, d_in=D, d_sae=F, k=1))


class Planted:
    """The model's own text, the SAE of its tokens, and contexts on them."""

    def __init__(self, lm: Any, root: Any) -> None:
        self.lm, self.root, self.subject = lm, root, token_sae(lm)
        self.stores = {
            split: stored(lm, EMBEDDED, spoken(lm, rows, 48, seed), split)
            for seed, (split, rows) in enumerate({"explain": 96, "score": 48, "test": 24, "train": 48}.items())
        }
        self.cache = MemoryCache(self.subject.sae, {s: self.stores[s] for s in ("explain", "score")})

    def context(self, shared: Any = None, **more: Any) -> Any:
        return context(self.lm, EMBEDDED, self.stores["test"], self.subject, self.root, shared, latents=self.cache,
                       train_text=self.stores["train"].tokens, **more)
