"""Activations of the tiny LM in memory, with the reading side of sae.activations.ActivationStore; and subjects."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.base import EvalContext, SAESubject
from evals.baselines import Baseline
from evals.results import SubjectInfo


@dataclass
class MemoryTokens:
    """Packed rows; position 0 is the prefix token and belongs to the document that follows."""

    tokens_BL: np.ndarray
    docs_BL: np.ndarray
    key: str = "tokens"
    split: str = "test"

    @property
    def L(self) -> int:
        return self.tokens_BL.shape[1]

    @property
    def n_tokens(self) -> int:
        return self.tokens_BL.size

    def doc_ids_BL(self) -> np.ndarray:
        return self.docs_BL


@dataclass
class MemoryStore:
    """Flat index n = row * L + position."""

    tokens: MemoryTokens
    x_ND: torch.Tensor
    keep_N: np.ndarray
    key: str = "store"
    folder: Path = Path("memory")
    n_dropped: dict[str, int] = field(default_factory=dict)

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
    def doc_of_N(self) -> np.ndarray:
        return self.tokens.docs_BL.ravel()

    def read(self, flat: Any) -> torch.Tensor:
        return self.x_ND[flat] if isinstance(flat, slice) else self.x_ND[torch.as_tensor(np.asarray(flat))]


def memory_store(
    lm: Any, hookpoint: str, *, rows: int = 16, L: int = 64, seed: int = 0, split: str = "test",
) -> MemoryStore:
    """Random bytes in documents of about 40 tokens, captured by the LM itself; position 0 is dropped."""
    r = np.random.default_rng(seed)
    ids = r.integers(3, 259, size=(rows, L))
    ids[:, 0] = 0
    docs = np.cumsum(r.random(rows * L) < 1 / 40).reshape(rows, L)
    docs[:, 0] = docs[:, 1]
    x = lm.capture(torch.from_numpy(ids), [hookpoint])[hookpoint].float().reshape(rows * L, -1).clone()
    keep = np.ones((rows, L), dtype=bool)
    keep[:, 0] = False
    keep[r.random((rows, L)) < 0.02] = False
    tokens = MemoryTokens(ids.astype(np.uint16), docs, f"tokens-{split}-{seed}", split)
    dropped = {"position": rows, "norm": int((~keep).sum()) - rows}
    return MemoryStore(tokens, x, keep.ravel(), f"store-{split}-{seed}", n_dropped=dropped)


def info(lm: Any, hookpoint: str, name: str, *, d_in: int, d_sae: int = 0, k: int | None = None) -> SubjectInfo:
    return SubjectInfo(
        sae_id=name, kind="sae", lm=lm.name, lm_revision=lm.revision, hookpoint=hookpoint, architecture="topk",
        d_in=d_in, d_sae=d_sae, k=k, train_tokens=0, sae_sha256="0" * 64,
    )


class Function(Baseline):
    """A subject whose reconstruction is any function of x."""

    provides = frozenset({"reconstruct"})

    def __init__(self, subject_info: SubjectInfo, f: Any) -> None:
        super().__init__(subject_info)
        self.f = f

    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.f(x_ND)


def topk_subject(lm: Any, hookpoint: str, store: MemoryStore, *, d_sae: int = 64, k: int = 8, seed: int = 0,
                 steps: int = 0) -> SAESubject:
    """A TopK SAE initialised on the store, trained for ``steps`` by plain Adam on all kept tokens."""
    from sae.base import SAE
    from sae.config import InputNorm, SAEConfig
    from sae.plugins import find

    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=store.d_in, d_out=store.d_in, d_sae=d_sae, k=k,
        apply_b_dec_to_input=True, input_norm=InputNorm(kind="layer_norm"), decoder_unit_norm=True,
        sae_id=f"tiny.topk.s{seed}.{steps}", meta=None, train_tokens=0, train_steps=steps, seed=seed,
    )
    sae: SAE = find("sae.architectures", "topk")(cfg)
    x = store.read(store.kept_N)
    sae.initialise(sae.normalise(x)[0], seed)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        (sae(x) - x).square().sum(-1).mean().backward()
        optimiser.step()
    sae.requires_grad_(False)
    return SAESubject(sae, info(lm, hookpoint, cfg.sae_id, d_in=store.d_in, d_sae=d_sae, k=k))


def context(lm: Any, hookpoint: str, store: MemoryStore, subject: Any, root: Path, shared: dict[str, Any] | None = None,
            **more: Any) -> EvalContext:
    return EvalContext(
        root=root, subject=subject, preset="tiny", seed=0, hookpoint=hookpoint, run_key="0" * 16,
        stores={"test": store}, load_lm=lambda: lm, shared={} if shared is None else shared, **more,  # type: ignore[dict-item]
    )
