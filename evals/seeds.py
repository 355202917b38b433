"""Do two SAEs hold the same latents? Matching by direction, and by where they fire (METRICS H). Torch.

F latents of one SAE, G of the other, both alive ones only; D = d_in, N tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.config import to_dict

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix

    from evals.base import EvalContext, SAESubject, Subject
    from sae.activations import ActivationStore

SHARED = 0.7
"""Cosine from which two latents are called the same (criterion of arXiv 2501.16615)."""
MAX_HUNGARIAN = 16_384
"""More latents than this are matched by mutual nearest neighbours only."""
_BLOCK = 1_024


def peers_of(subject: "Subject", subjects: "Sequence[Subject]") -> "list[SAESubject]":
    """Those of ``subjects`` that were trained here like ``subject`` but for the seed; none where that is unknown."""
    mine = _recipe(subject)
    if mine is None:
        return []
    return [s for s in subjects if s is not subject and _recipe(s) == mine]  # type: ignore[misc]


def _recipe(subject: "Subject") -> dict[str, Any] | None:
    cfg = getattr(getattr(subject, "sae", None), "cfg", None)
    if cfg is None or not cfg.train:
        return None
    train = {k: v for k, v in to_dict(cfg)["train"].items() if k != "seed"}
    place = (cfg.meta.lm_revision, cfg.meta.hookpoint, cfg.meta.activations_key) if cfg.meta else None
    return {"train": train, "d_in": cfg.d_in, "place": place}


class Match(NamedTuple):
    """What the F latents of one SAE find in the other."""

    partner_F: np.ndarray | None
    """Hungarian partner, -1 for the surplus of a larger side; None if there are too many latents."""
    cos_F: np.ndarray | None
    """Decoder cosine with the partner, 0 without."""
    cos_enc_F: np.ndarray | None
    best_F: np.ndarray
    """Largest decoder cosine with any latent of the other."""
    best_back_G: np.ndarray
    nearest_F: np.ndarray
    """Where best_F is reached."""
    mutual_F: np.ndarray
    """Are they each other's nearest neighbours, with a cosine of SHARED at least?"""

    def reversed(self) -> "Match":
        """The same match seen from the other SAE; spares a second assignment of F latents."""
        n_back = len(self.best_back_G)
        mutual = np.zeros(n_back, dtype=bool)
        mutual[self.nearest_F[self.mutual_F]] = True
        nearest = np.zeros(n_back, dtype=np.int64)
        nearest[self.nearest_F[self.mutual_F]] = np.flatnonzero(self.mutual_F)  # of the others nothing reads it
        if self.partner_F is None or self.cos_F is None or self.cos_enc_F is None:
            return Match(None, None, None, self.best_back_G, self.best_F, nearest, mutual)
        found = self.partner_F >= 0
        partner, cos, cos_enc = np.full(n_back, -1, dtype=np.int64), np.zeros(n_back), np.zeros(n_back)
        partner[self.partner_F[found]] = np.flatnonzero(found)
        cos[self.partner_F[found]], cos_enc[self.partner_F[found]] = self.cos_F[found], self.cos_enc_F[found]
        return Match(partner, cos, cos_enc, self.best_back_G, self.best_F, nearest, mutual)


def match(dec_FD: Tensor, enc_FD: Tensor, dec_GD: Tensor, enc_GD: Tensor) -> Match:
    """Match by decoder directions, one to one for the largest total cosine. Lengths do not count, signs do."""
    a, b = normalize(dec_FD.double(), dim=1), normalize(dec_GD.double(), dim=1)
    best = torch.full((len(a),), -torch.inf, dtype=torch.float64)
    nearest = torch.zeros(len(a), dtype=torch.long)
    back = torch.full((len(b),), -torch.inf, dtype=torch.float64)
    nearest_back = torch.zeros(len(b), dtype=torch.long)
    for start in range(0, len(a), _BLOCK):
        cos = a[start : start + _BLOCK] @ b.T
        best[start : start + _BLOCK], nearest[start : start + _BLOCK] = cos.max(dim=1)
        top, where = cos.max(dim=0)
        better = top > back
        back, nearest_back = torch.where(better, top, back), torch.where(better, where + start, nearest_back)
    mutual = (nearest_back[nearest] == torch.arange(len(a))) & (best >= SHARED)
    if max(len(a), len(b)) > MAX_HUNGARIAN:
        return Match(None, None, None, best.numpy(), back.numpy(), nearest.numpy(), mutual.numpy())
    partner = _hungarian((a @ b.T).numpy())
    decoder, encoder = (_pair_cosine(u, v, partner) for u, v in ((dec_FD, dec_GD), (enc_FD, enc_GD)))
    return Match(partner, decoder, encoder, best.numpy(), back.numpy(), nearest.numpy(), mutual.numpy())


def _hungarian(cos_FG: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    partner = np.full(len(cos_FG), -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(cos_FG, maximize=True)
    partner[rows] = columns
    return partner


def _pair_cosine(a_FD: Tensor, b_GD: Tensor, partner_F: np.ndarray) -> np.ndarray:
    found = torch.from_numpy(partner_F >= 0)
    a, b = normalize(a_FD.double(), dim=1), normalize(b_GD.double(), dim=1)
    cos = torch.zeros(len(a), dtype=torch.float64)
    cos[found] = (a[found] * b[torch.from_numpy(partner_F)[found]]).sum(dim=1)
    return cos.numpy()


def firing(ctx: "EvalContext", subject: "SAESubject", store: "ActivationStore", rows: np.ndarray) -> "csc_matrix":
    """[N kept tokens of the rows, F] of True where a latent is active; made once per run and SAE."""
    from evals.units import BLOCK_TOKENS, blocks

    def build() -> "csc_matrix":
        from scipy.sparse import csc_matrix

        tokens, latents, n = [], [], 0
        for block in blocks(store, rows, BLOCK_TOKENS, "where latents fire"):
            x_ND = block.x_BLD[torch.from_numpy(block.keep_BL)]
            with torch.inference_mode():
                codes = subject.encode_sparse(x_ND)
            active = (codes.values_NK != 0).cpu().numpy()
            where = np.broadcast_to(np.arange(len(x_ND))[:, None], active.shape)[active]
            tokens.append(where + n)
            latents.append(codes.indices_NK.cpu().numpy()[active])
            n += len(x_ND)
        index = (np.concatenate(tokens), np.concatenate(latents)) if tokens else (np.zeros(0, int), np.zeros(0, int))
        return csc_matrix((np.ones(len(index[0]), dtype=np.int32), index), shape=(n, subject.sae.d_sae))

    found: csc_matrix = ctx.memo(f"firing.{store.key}.{len(rows)}.{ctx.seed}.{subject.info.sae_id}", build)
    return found


def jaccard(a_NF: "csc_matrix", b_NG: "csc_matrix", partner_F: np.ndarray) -> np.ndarray:
    """[F] tokens where a latent and its partner both fire over those where either does; NaN without partner."""
    found = partner_F >= 0
    a, b = a_NF[:, np.flatnonzero(found)], b_NG[:, partner_F[found]]
    both = np.asarray(a.multiply(b).sum(axis=0), dtype=np.float64).ravel()
    either = np.asarray(a.sum(axis=0) + b.sum(axis=0), dtype=np.float64).ravel() - both
    out = np.full(len(partner_F), np.nan)
    out[found] = both / np.maximum(either, 1)
    return out
