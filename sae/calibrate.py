"""The threshold for which an SAE has a wanted mean number of active latents, by counting (TRAINING 3).

Shapes: N tokens, D = d_in, F = d_sae. The threshold depends on the weights and the tokens alone, so it is valid however
early training stops. Averages over batches, as other libraries keep them, are not: after 30 steps they give L0 294 and
2,138 for K = 32 (measured on two of them, TRAINING 3).
"""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae import ops
from sae.base import SAE, TokenSource
from sae.errors import DataError

MAX_TOKENS = 2**20
"""Tokens counted at most."""
CHECK_EVERY = 8
"""Each so many-th token is left out of the count and checks it."""
CHECK_TOKENS = 2**17
CHUNK_TOKENS = 8_192
SAMPLE_ENTRIES = 2**24
"""Pre-activations that are held at once to guess a threshold."""
WINDOW = 0.1
"""First guess: the threshold lies within this share of that of the sample; if not, the window grows."""
TOLERANCE = 0.02
"""Relative difference of L0 on the second sample that is accepted, or four standard errors of it if that is more."""
logger = logging.getLogger(__name__)


class Calibration(NamedTuple):
    """A threshold and what it does on tokens that did not fix it."""

    threshold: float
    """A float32 number, at least 0."""
    tokens: int
    """Tokens counted."""
    l0: float
    """Mean active latents per token of the second sample."""
    check_tokens: int

    def source(self) -> dict[str, Any]:
        """For ``cfg.threshold_source``."""
        return {"kind": "calibrated", "tokens": self.tokens, "l0": self.l0}


def sample_pre_activations(sae: SAE, n_ND: Tensor) -> Tensor:
    """h_nF of the first normalised tokens, as many as :data:`SAMPLE_ENTRIES` allows (1,024 at most)."""
    rows = min(1_024, max(1, SAMPLE_ENTRIES // sae.d_sae))
    return ops.encode_dense(n_ND[:rows], sae.b_pre_D, sae.W_enc_FD, sae.b_enc_F).detach()


def between(values_E: Tensor, count: int) -> float:
    """A float32 number t >= 0 such that ``values > t`` holds for the ``count`` largest and no others (but for ties).

    0 where no more than ``count`` are positive. t is the middle of the two neighbours: sums in another order, on
    another machine, then move no entry across.
    """
    if count >= len(values_E):
        return 0.0
    top = torch.topk(values_E, count + 1).values[-2:] if count > 0 else values_E.max().expand(2)
    inside, outside = top.clamp_min(0).double().tolist()
    middle = float(torch.tensor((inside + outside) / 2, dtype=torch.float32))
    return middle if outside <= middle < inside else float(torch.tensor(outside, dtype=torch.float32))


def _chunks(sae: SAE, source: TokenSource, flat_N: np.ndarray) -> Iterator[Tensor]:
    """h_nF blocks of the tokens ``flat_N``; each is only valid until the next."""
    for start in range(0, len(flat_N), CHUNK_TOKENS):
        x_ND = source.read(flat_N[start : start + CHUNK_TOKENS]).to(sae.W_dec_FD.device)
        n_ND = sae.normalise(x_ND)[0]
        u_ND = n_ND if sae.b_pre_D is None else n_ND - sae.b_pre_D
        for h_nF, _ in ops._blocks(u_ND, sae.W_enc_FD, sae.b_enc_F):
            yield h_nF


@torch.no_grad()
def threshold_for(sae: SAE, source: TokenSource, flat_N: np.ndarray, l0: float) -> float:
    """The threshold, one number for all latents, for which the tokens ``flat_N`` have ``l0`` active ones in the mean.

    Exact: pre-activations above a window are counted, those inside are kept and sorted. 0 where fewer are positive.
    """
    if len(flat_N) == 0:
        raise DataError(f"{sae.sae_id}: a threshold needs at least one token")
    count = round(l0 * len(flat_N))
    rows = min(1_024, max(1, SAMPLE_ENTRIES // sae.d_sae))
    sample = flat_N[np.linspace(0, len(flat_N) - 1, min(rows, len(flat_N))).astype(np.int64)]
    h_nF = sample_pre_activations(sae, sae.normalise(source.read(sample).to(sae.W_dec_FD.device))[0])
    guess = between(h_nF.view(-1), round(l0 * len(h_nF)))
    low, high = guess * (1 - WINDOW), guess * (1 + WINDOW)
    while True:
        over, inside = 0, [h_nF.new_empty(0)]
        for block_nF in _chunks(sae, source, flat_N):
            over += int((block_nF > high).sum())
            inside.append(block_nF[(block_nF > low) & (block_nF <= high)])
        values_E = torch.cat(inside)
        if over > count:
            low, high = high, math.inf
        elif over + len(values_E) <= count and low > 0:
            low, high = (low / 4 if low > guess / 16 else 0.0), low
        else:
            return between(values_E, count - over)


@torch.no_grad()
def measured_l0(sae: SAE, source: TokenSource, flat_N: np.ndarray, threshold: float) -> tuple[float, float]:
    """(mean active latents per token at one threshold for all latents, its standard error)."""
    counts_N = torch.cat([(h_nF > threshold).sum(1) for h_nF in _chunks(sae, source, flat_N)]).double()
    error = float(counts_N.std()) / len(counts_N) ** 0.5 if len(counts_N) > 1 else math.inf
    return float(counts_N.mean()), error


def calibrate(sae: SAE, source: TokenSource, l0: float, *, max_tokens: int = MAX_TOKENS) -> Calibration:
    """Threshold of ``sae`` for a mean of ``l0`` active latents, for any architecture with one encoder bias.

    Counted over kept tokens of ``source`` (evenly spread, at most ``max_tokens``); every eighth kept token is left out
    and checks the result. ``DataError``: L0 there is off by more than 2 % and by more than four standard errors.
    """
    kept_N = np.asarray(source.kept_N)
    is_check_N = np.arange(len(kept_N)) % CHECK_EVERY == CHECK_EVERY - 1
    fixing, checking = (_spread(kept_N[mask], most) for mask, most in
                        ((~is_check_N, max_tokens), (is_check_N, CHECK_TOKENS)))  # fmt: skip
    threshold = threshold_for(sae, source, fixing, l0)
    if len(checking) == 0:
        return Calibration(threshold, len(fixing), l0, 0)
    found, error = measured_l0(sae, source, checking, threshold)
    allowed = max(TOLERANCE * l0, 4 * error)
    if abs(found - l0) > allowed and not (threshold == 0 and found < l0):
        raise DataError(
            f"{sae.sae_id}: the threshold {threshold:.4g}, counted over {len(fixing):,} tokens, gives L0 {found:.4g} "
            f"on {len(checking):,} others, expected {l0:g} within {allowed:.2g}. Train on more, better mixed text"
        )
    if threshold == 0:
        few = "%s has fewer than %g positive latents per token (%.4g): its threshold is 0"
        logger.warning(few, sae.sae_id, l0, found)
    return Calibration(threshold, len(fixing), found, len(checking))


def _spread(flat_N: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spread."""
    if len(flat_N) <= most:
        return flat_N
    return flat_N[np.linspace(0, len(flat_N) - 1, most).astype(np.int64)]
