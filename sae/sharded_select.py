"""The largest of values that lie on several ranks, exactly those a single process would pick (TRAINING 9).

Shapes: N tokens of this rank, k values each, R latent ranks, E entries. Latent f of latent rank r is number
``local * R + r`` of the SAE.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae.calibrate import between
from sae.distributed_mesh import Mesh


class Picked(NamedTuple):
    """Which of this rank's candidates belong to the K largest of their token."""

    keep_Nk: Tensor
    """bool."""
    overflow: Tensor
    """int64 scalar: tokens of which some rank may have held back a latent that belongs to them; the same on all latent
    ranks. 0 where every rank sends K."""


def pick_largest(
    values_Nk: Tensor, latents_Nk: Tensor, ks: Sequence[int], width: int, mesh: Mesh
) -> list[Picked]:
    """The K largest positive values of each token over all latent ranks, for each K of ``ks`` from one exchange.

    ``latents_Nk``: their numbers in the SAE. Candidates of each rank are its k largest of ``width`` latents, in any
    order, at least 0. Of equal values the lower latent wins, as in :func:`sae.ops.topk`; the numbers are only exchanged
    for tokens where that matters. NaN counts as larger than any number, so that it reaches the loss.
    """
    if mesh.shape.latent == 1 and values_Nk.shape[1] <= min(ks):
        none = torch.zeros((), dtype=torch.int64, device=values_Nk.device)
        return [Picked((values_Nk <= 0).logical_not(), none) for _ in ks]
    all_RNk = mesh.gather(values_Nk, "latent")
    return [_pick(values_Nk, latents_Nk, all_RNk, k, width, mesh) for k in ks]


def _pick(
    values_Nk: Tensor, latents_Nk: Tensor, all_RNk: Tensor, k: int, width: int, mesh: Mesh
) -> Picked:
    all_NR = all_RNk.permute(1, 0, 2).reshape(len(values_Nk), -1)
    theta_N1 = torch.topk(all_NR, min(k, all_NR.shape[1]), dim=1).values[:, -1:].clamp_min(0)
    keep_Nk = (values_Nk <= theta_N1).logical_not()
    tied_N = ((all_NR >= theta_N1).sum(1) > k) & (theta_N1[:, 0] > 0)
    keep_Nk |= (values_Nk == theta_N1) & (theta_N1 > 0) & ~tied_N[:, None]
    if bool(tied_N.any()):  # the same on all latent ranks
        keep_Nk[tied_N] |= _first_of_equal(values_Nk[tied_N], latents_Nk[tied_N], all_RNk[:, tied_N],
                                           theta_N1[tied_N], k, mesh)  # fmt: skip
    overflow = torch.zeros((), dtype=torch.int64, device=values_Nk.device)
    if values_Nk.shape[1] < min(k, width):
        overflow = (all_RNk.amin(2) > theta_N1[:, 0]).any(0).sum()
    return Picked(keep_Nk, overflow)


def _first_of_equal(
    values_nk: Tensor, latents_nk: Tensor, all_Rnk: Tensor, theta_n1: Tensor, k: int, mesh: Mesh
) -> Tensor:
    """bool: entries equal to the K-th value that are among the lowest latents which still have room."""
    numbers_Rnk = mesh.gather(latents_nk, "latent")
    equal_Rnk = all_Rnk == theta_n1
    last = torch.iinfo(numbers_Rnk.dtype).max
    numbers_nE = torch.where(equal_Rnk, numbers_Rnk, last).permute(1, 0, 2).flatten(1).sort(dim=1).values
    room_n1 = k - (all_Rnk <= theta_n1).logical_not().sum((0, 2))[:, None]
    bound_n1 = numbers_nE.gather(1, (room_n1 - 1).clamp_min(0))
    return (values_nk == theta_n1) & (latents_nk <= bound_n1) & (room_n1 > 0)


class Cut(NamedTuple):
    """Result of :func:`pick_batch`."""

    keep_E: Tensor
    """bool."""
    theta: float
    """The smallest kept value; 0 where no more than ``count`` are positive."""


def count_all(n: int, mesh: Mesh) -> int:
    """Sum of a number over all ranks."""
    return int(mesh.reduce_(torch.tensor(n, dtype=torch.int64, device=mesh.device), "world"))


def pick_batch(values_E: Tensor, places_E: Tensor, count: int, n_all: int, mesh: Mesh) -> Cut:
    """The ``count`` largest of the positive values of all ranks, ``n_all`` in number; ``places_E`` (int64) decide
    between equal ones, the lower first.

    A radix select finds the exact value: eight bits a round, each one all-reduce of 256 counts, since the order of
    positive floats is that of their bits.
    """
    if n_all <= count:
        return Cut(torch.ones_like(values_E, dtype=torch.bool), 0.0)
    whole = torch.int32 if values_E.dtype == torch.float32 else torch.int64
    bits_E = torch.where(torch.isnan(values_E), torch.iinfo(whole).max, values_E.detach().view(whole)).long()
    rounds = values_E.element_size()
    above, prefix, inside_E = 0, 0, torch.ones_like(values_E, dtype=torch.bool)
    for level in reversed(range(rounds)):
        digit_E = (bits_E >> (8 * level)) & 255
        counts = torch.bincount(digit_E[inside_E], minlength=256)
        mesh.reduce_(counts, "world")
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < count - above).sum())  # digits from the top that are kept whole
        above += int(from_top[place - 1]) if place else 0
        digit = 255 - place
        prefix |= digit << (8 * level)
        inside_E &= digit_E == digit
    theta = torch.tensor(prefix, dtype=whole).view(values_E.dtype)
    larger_E = bits_E > prefix
    room, equal_E = count - above, inside_E
    n_equal = count_all(int(equal_E.sum()), mesh)
    if n_equal > room:
        equal_places = [p for part in mesh.gather_objects(places_E[equal_E].tolist()) for p in part]
        equal_E = equal_E & (places_E <= sorted(equal_places)[room - 1])
    return Cut(larger_E | equal_E, float(theta))


def threshold_between(values_E: Tensor, count: int, mesh: Mesh) -> float:
    """:func:`sae.calibrate.between` of the values of all latent ranks, of which each has as many."""
    n_all = len(values_E) * mesh.shape.latent
    if count >= n_all:
        return 0.0
    wanted = min(count + 1, len(values_E))
    return between(mesh.gather(torch.topk(values_E, wanted).values, "latent").view(-1), count)
