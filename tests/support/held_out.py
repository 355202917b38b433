"""Small held-out text with activations: three splits of packed rows, with the reading side of sae.tokens and
sae.activations. Activations are a function of a token and the one before it, so that latents follow tokens."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sae.base import SAE
from sae.config import InputNorm, SAEConfig
from sae.plugins import find

L, VOCABULARY, D_IN, PREFIX = 64, 60, 16, 0


@dataclass
class HeldOutTokens:
    tokens_BL: np.ndarray
    docs_BL: np.ndarray
    sources: list[str]
    key: str
    folder: Path
    split: str
    prefix_id: int = PREFIX
    L: int = L

    @property
    def n_docs(self) -> int:
        return len(self.sources)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens_BL.size)

    def doc_ids_BL(self) -> np.ndarray:
        return self.docs_BL


@dataclass
class HeldOutStore:
    tokens: HeldOutTokens
    x_ND: torch.Tensor
    keep_N: np.ndarray
    key: str
    reads: list[int] = field(default_factory=list)
    """Tokens per call of ``read``."""

    @property
    def d_in(self) -> int:
        return self.x_ND.shape[1]

    @property
    def n_tokens(self) -> int:
        return len(self.x_ND)

    @property
    def kept_N(self) -> np.ndarray:
        return np.flatnonzero(self.keep_N)

    @property
    def n_kept(self) -> int:
        return int(self.keep_N.sum())

    @property
    def doc_of_N(self) -> np.ndarray:
        return self.tokens.docs_BL.reshape(-1)

    def read(self, flat: np.ndarray) -> torch.Tensor:
        self.reads.append(len(flat))
        return self.x_ND[torch.as_tensor(np.asarray(flat))]


def pack(documents: list[list[int]], split: str, folder: Path) -> HeldOutTokens:
    """``0 doc 0 doc ...`` in rows that begin with 0; the last, short row is left out."""
    stream, docs = [], []
    for i, document in enumerate(documents):
        stream += [PREFIX, *document]
        docs += [i] * (len(document) + 1)
    n_rows = len(stream) // (L - 1)
    ids = np.full((n_rows, L), PREFIX, dtype=np.uint16)
    owner = np.zeros((n_rows, L), dtype=np.int32)
    ids[:, 1:] = np.array(stream[: n_rows * (L - 1)]).reshape(n_rows, L - 1)
    owner[:, 1:] = np.array(docs[: n_rows * (L - 1)]).reshape(n_rows, L - 1)
    owner[:, 0] = owner[:, 1]
    sources = [f"file{i % 3}" for i in range(int(owner.max()) + 1)]
    return HeldOutTokens(ids, owner, sources, f"tokens-{split}", folder / f"tokens-{split}", split)


def documents(split: str, n: int = 150, seed: int = 0) -> list[list[int]]:
    """Documents of 10 to 90 tokens; rare tokens at the end of the vocabulary."""
    rng = np.random.default_rng([seed, sum(map(ord, split))])
    weights = 1.0 / (np.arange(1, VOCABULARY) + 5)
    return [
        rng.choice(np.arange(1, VOCABULARY), size=rng.integers(10, 90), p=weights / weights.sum()).tolist()
        for _ in range(n)
    ]


def activations(tokens_BL: np.ndarray, seed: int = 0) -> torch.Tensor:
    """x = embedding(token) + 0.5 embedding(token before), [N, D]."""
    table = torch.randn(VOCABULARY, D_IN, generator=torch.Generator().manual_seed(seed))
    ids = torch.from_numpy(tokens_BL.astype(np.int64))
    before = torch.roll(ids, 1, dims=1)
    return (table[ids] + 0.5 * table[before]).reshape(-1, D_IN)


def store(tokens: HeldOutTokens, seed: int = 0) -> HeldOutStore:
    """Prefix and separators dropped, and one token in fifty as if its norm were too large."""
    ids = tokens.tokens_BL
    keep = (ids != PREFIX) & (np.random.default_rng(seed).random(ids.shape) > 0.02)
    return HeldOutStore(tokens, activations(ids, seed), keep.reshape(-1), f"store-{tokens.split}")


def stores(folder: Path, n: int = 150, seed: int = 0) -> dict[str, HeldOutStore]:
    return {s: store(pack(documents(s, n, seed), s, folder)) for s in ("explain", "calibrate", "score")}


def random_sae(kind: str = "topk", *, d_sae: int = 64, k: int = 4, seed: int = 0, d_in: int = D_IN) -> SAE:
    """An SAE with random weights; the last latent of a relu SAE is dead."""
    cfg = SAEConfig(
        architecture=kind, activation=kind, d_in=d_in, d_out=d_in, d_sae=d_sae, k=k if kind == "topk" else None,
        apply_b_dec_to_input=True, input_norm=InputNorm(kind="layer_norm"), decoder_unit_norm=True,
        sae_id=f"tiny.{kind}.s{seed}-{d_sae}", meta=None, train_tokens=0, train_steps=0, seed=seed,
    )  # fmt: skip
    sae: SAE = find("sae.architectures", kind)(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec_FD.copy_(torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1))
        sae.W_enc_FD.copy_(sae.W_dec_FD)
        sae.b_enc_F.fill_(-0.3)
        if kind == "relu":
            sae.b_enc_F[-1] = -100.0
    return sae.requires_grad_(False)
