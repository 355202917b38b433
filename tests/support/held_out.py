"""Small held-out text with activations: three splits of packed rows as real artefacts on disk. Activations are a
function of a token and the one before it, so that latents follow tokens. N flat tokens, L per row, D channels."""

from pathlib import Path

import numpy as np
import torch

from sae.activations import ActivationStore
from sae.base import SAE
from sae.config import InputNorm, SAEConfig
from sae.manifest import artefact_dir, key_of, writing
from sae.plugins import find
from sae.tokens import TokenSet

L, VOCABULARY, D_IN, PREFIX = 64, 60, 16, 0


def pack(documents: list[list[int]], split: str, root: Path) -> TokenSet:
    """``0 doc 0 doc ...`` in rows that begin with 0; the last, short row is left out."""
    stream: list[int] = []
    starts = []
    for document in documents:
        stream.append(PREFIX)
        row, column = divmod(len(stream), L - 1)
        starts.append(row * L + 1 + column)
        stream += document
    n_rows = len(stream) // (L - 1)
    ids = np.full((n_rows, L), PREFIX, dtype=np.uint16)
    ids[:, 1:] = np.array(stream[: n_rows * (L - 1)]).reshape(n_rows, L - 1)
    starts = [s for s in starts if s < ids.size]
    config = {"split": split, "context_tokens": L, "prefix_id": PREFIX, "documents": documents}
    key = key_of("tokens", 1, config)
    folder = artefact_dir(root, "tokens", key)
    with writing(folder, kind="tokens", key=key, stage_version=1, config=config) as out:
        np.save(out.path / "tokens_BL.npy", ids)
        np.save(out.path / "doc_starts.npy", np.array(starts, dtype=np.int64))
        np.save(out.path / "source_of_doc.npy", np.arange(len(starts), dtype=np.int32) % 3)
        out.counts |= {"sources": ["file0", "file1", "file2"]}
    return TokenSet.open(folder)


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


def store(tokens: TokenSet, root: Path, seed: int = 0, *, keep: str = "most") -> ActivationStore:
    """Prefix and separators dropped; also one token in fifty, as if its norm were too large (``keep="most"``), none
    (``"all"``) or every token (``"none"``)."""
    ids = np.asarray(tokens.tokens_BL)
    share = {"most": 0.02, "all": 0.0, "none": 1.1}[keep]
    codes = np.where(ids == PREFIX, 2, 0) + np.where(np.random.default_rng(seed).random(ids.shape) < share, 3, 0)
    config = {"store_dtype": "float32", "seed": seed, "keep": keep}
    key = key_of("activations", 1, config, {"tokens": tokens.key})
    folder = artefact_dir(root, "activations", key)
    inputs = {"tokens": tokens.key}
    with writing(folder, kind="activations", key=key, stage_version=1, config=config, inputs=inputs) as out:
        (out.path / "acts_ND.bin").write_bytes(activations(ids, seed).numpy().tobytes())
        np.save(out.path / "filter.npy", codes.reshape(-1).clip(0, 3).astype(np.uint8))
        out.counts |= {"d_in": D_IN, "n_tokens": int(ids.size), "norm_median": 1.0, "n_dropped": {}}
    return ActivationStore.open(folder, tokens)


def stores(root: Path, n: int = 150, seed: int = 0, *, keep: str = "most") -> dict[str, ActivationStore]:
    return {s: store(pack(documents(s, n, seed), s, root), root, keep=keep) for s in ("explain", "calibrate", "score")}


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
