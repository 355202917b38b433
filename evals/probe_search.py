"""Which single feature best carries a label: the search that probe evaluations share (METRICS C.3).

N prompts of the store, F features, M features of one block. Features are computed in blocks of columns and never all
kept; of each task only the best feature so far is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evals.probe_activations import ProbeActivations, TaskSplit
from evals.probes import DenseProbe, ProbeScores, apply_probe, dense_probe, fit_probes
from sae.console import progress, track
from sae.manifest import seed_of
from sae.ops import SparseLatents

_BLOCK_NUMBERS = 1 << 24
"""At most this many feature values at a time (64 MiB)."""

FeatureBlock = Callable[[int, int], Tensor]
"""(start, stop) -> float32 [stop - start, N], feature-major."""


class Choice(NamedTuple):
    """The best feature of one (task, seed) and how its probe does."""

    feature: int
    train: ProbeScores
    test: ProbeScores


@dataclass
class Search:
    """Result over all task splits."""

    choices: list[Choice | None]
    """In the order of the splits; None where no feature is finite."""
    n_constant: int = 0
    n_nonfinite: int = 0
    n_unconverged: int = 0
    """Counted over features and splits."""


def search(
    block: FeatureBlock, n_features: int, n_rows: int, y_N: Tensor, splits: Sequence[TaskSplit], title: str
) -> Search:
    """For each split the feature of least train cross-entropy (lowest index on ties), and how its probe does."""
    found = Search([None] * len(splits))
    best = [float("inf")] * len(splits)
    width = max(32, min(n_features, _BLOCK_NUMBERS // max(n_rows, 1)))
    with progress(title, n_features * len(splits), "probe") as bar:
        for start in range(0, n_features, width):
            h_MN = block(start, min(start + width, n_features))
            for s, split in enumerate(splits):
                train = torch.from_numpy(split.train)
                fits = fit_probes(h_MN[:, train], y_N[train])
                found.n_constant += fits.n_constant
                found.n_nonfinite += fits.n_nonfinite
                found.n_unconverged += fits.n_unconverged
                i = fits.best()
                if i >= 0 and float(fits.ce_F[i]) < best[s]:  # strict: the lower index keeps a tie
                    best[s] = float(fits.ce_F[i])
                    sides = [torch.from_numpy(side) for side in (split.train, split.test)]
                    scores = [apply_probe(fits, i, h_MN[i, side], y_N[side]) for side in sides]
                    found.choices[s] = Choice(start + i, *scores)
                bar.advance(len(h_MN))
    return found


def dense_block(features: Callable[[Tensor, Tensor], Tensor], x_ND: Tensor) -> FeatureBlock:
    """Blocks of ``features(x_ND, columns)``, transposed."""

    def block(start: int, stop: int) -> Tensor:
        with torch.inference_mode():
            columns = torch.arange(start, stop, device=x_ND.device)
            return features(x_ND, columns).float().T.contiguous().cpu()

    return block


def sparse_block(latents: SparseLatents, n_rows: int) -> FeatureBlock:
    """Blocks of a sparse code."""
    values, indices = latents.values_NK.float().cpu(), latents.indices_NK.cpu()
    rows = torch.arange(n_rows)[:, None].expand_as(indices)
    active = values != 0
    values, indices, rows = values[active], indices[active], rows[active]
    order = torch.argsort(indices, stable=True)
    values, indices, rows = values[order], indices[order], rows[order]

    def block(start: int, stop: int) -> Tensor:
        edges = torch.searchsorted(indices, torch.tensor([start, stop]))
        part = slice(int(edges[0]), int(edges[1]))
        out = torch.zeros(stop - start, n_rows)
        out[indices[part] - start, rows[part]] = values[part]
        return out

    return block


def random_directions_block(x_ND: Tensor, train_rows: np.ndarray, n_features: int, seed: int) -> FeatureBlock:
    """Projections on ``n_features`` Gaussian unit directions of the channel-standardised ``x_ND``: as many lottery
    tickets as the SAE has. Standardised by the prompts of the train sides."""
    x = x_ND.double()
    base = x[torch.from_numpy(train_rows)]
    std, mean = torch.std_mean(base, dim=0, correction=0)
    s_ND = ((x - mean) / std.clamp_min(1e-12)).float()
    generator = torch.Generator().manual_seed(seed_of(seed, "probe_random_directions", x.shape[1], n_features))
    directions = torch.randn(n_features, x.shape[1], generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return lambda start, stop: directions[start:stop] @ s_ND.T


def dense_probes(probes: ProbeActivations) -> list[DenseProbe]:
    """The ceiling for every split of the store."""
    label_N, group_N = probes.rows.label.to_numpy(), probes.rows.group.to_numpy()
    return [
        dense_probe(probes.x_ND[s.train], label_N[s.train], group_N[s.train], probes.x_ND[s.test], label_N[s.test])
        for s in track(probes.splits, "dense probes", unit="task")
    ]
