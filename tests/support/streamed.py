"""Synthetic tokens that are never all in memory, and a synthetic SAE: for measuring memory and time at full width.

N tokens in rows of L, D channels, F latents.
"""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from memory_store import MemoryTokens

from evals.base import EvalContext, SAESubject
from evals.results import SubjectInfo

L = 128


@dataclass
class SyntheticStore:
    """x is a function of the row's number: read where it is asked for, kept nowhere."""

    tokens: MemoryTokens
    d_in: int
    key: str = "synthetic"
    folder: Path = Path("nowhere")
    n_dropped: dict[str, int] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return self.tokens.n_tokens

    @property
    def keep_N(self) -> np.ndarray:
        return np.arange(self.n_tokens) % L > 0

    @property
    def kept_N(self) -> np.ndarray:
        return np.flatnonzero(self.keep_N)

    @property
    def doc_of_N(self) -> np.ndarray:
        return self.tokens.docs_BL.ravel()

    def read(self, flat: Any) -> torch.Tensor:
        """float32 [n, D]; whole rows only."""
        rows = np.unique(np.asarray(flat) // L)
        parts = [torch.randn(L, self.d_in, generator=torch.Generator().manual_seed(int(r))) for r in rows]
        return torch.cat(parts)


def synthetic_store(n_tokens: int, d_in: int) -> SyntheticStore:
    rows = n_tokens // L
    ids = np.full((rows, L), 5, dtype=np.uint16)
    docs = np.repeat(np.arange(rows)[:, None] // 3, L, axis=1)
    return SyntheticStore(MemoryTokens(ids, docs), d_in)


def synthetic_sae(d_sae: int, d_in: int, k: int) -> SAESubject:
    """TopK with random unit decoder rows, the encoder their transpose; weights drawn in place."""
    from sae.config import InputNorm, SAEConfig
    from sae.plugins import find

    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=d_in, d_out=d_in, d_sae=d_sae, k=k, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id="synthetic", meta=None, train_tokens=0,
        train_steps=0, seed=0)
    sae = find("sae.architectures", "topk")(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_dec_FD.normal_(generator=torch.Generator().manual_seed(0))
        sae.W_dec_FD /= sae.W_dec_FD.norm(dim=1, keepdim=True)
        (sae.W_enc_FD if hasattr(sae, "W_enc_FD") else sae.W_enc_DF.T).copy_(sae.W_dec_FD)
    sae.requires_grad_(False)
    info = SubjectInfo(sae_id="synthetic", kind="sae", lm="none", lm_revision="none", hookpoint="none",
                       architecture="topk", d_in=d_in, d_sae=d_sae, k=k, train_tokens=0, sae_sha256="0" * 64)
    return SAESubject(sae, info)


class Streamed(NamedTuple):
    fvu: float
    tokens: int
    processor_s: float
    before_gb: float
    """Peak before the evaluation, the SAE included."""
    peak_gb: float
    sae_gb: float


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def reconstruct_streamed(d_sae: int, n_tokens: int, *, d_in: int = 576, k: int = 32) -> Streamed:
    """The evaluation reconstruction, preset `paper` (all tokens up to two millions), on one synthetic SAE."""
    from evals.suite.reconstruction import PLUGIN

    subject, store = synthetic_sae(d_sae, d_in, k), synthetic_store(n_tokens, d_in)
    ctx = EvalContext(root=Path("nowhere"), subject=subject, preset="paper", seed=0, hookpoint="none", run_key="0" * 16,
                      stores={"test": store})  # type: ignore[dict-item]
    before, begun = peak_gb(), time.process_time()
    result = PLUGIN.run(ctx)
    fvu = next(r.value for r in result.rows if r.metric == "fvu")
    sae_gb = sum(p.numel() * p.element_size() for p in subject.sae.parameters()) / 1e9
    return Streamed(float(fvu), int(result.counts["tokens"]), time.process_time() - begun, before, peak_gb(), sae_gb)


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    print(*reconstruct_streamed(*map(int, sys.argv[1:3]), d_in=int(sys.argv[3])))
