"""Floors that are measured like an SAE: PCA, random directions, the raw channels (METRICS 2, A, C).

The random SAE is made by ``sae.base.random_like`` and wrapped as an SAESubject of kind "baseline".
N tokens, D = d_in, F = number of features, K = components kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from evals.base import Contributions, Normalisation, Subject
from evals.results import SubjectInfo
from evals.units import BLOCK_TOKENS
from sae.console import track
from sae.errors import ConfigError, DataError, Unsupported
from sae.manifest import canonical_json, seed_of, sha256_text

if TYPE_CHECKING:
    from sae.activations import ActivationStore
    from sae.ops import SparseLatents

FIT_TOKENS = 65_536
VERSION = 1
"""Part of each baseline's hash: raise it when a baseline changes meaning."""


class Moments(NamedTuple):
    """First and second moments of the activations on which baselines are fitted, float64."""

    mean_D: Tensor
    covariance_DD: Tensor
    """Population covariance."""
    n_tokens: int
    source: str
    """Key of the store and the number of tokens read: part of the identity of what is fitted."""


def fit_moments(store: "ActivationStore", max_tokens: int = FIT_TOKENS) -> Moments:
    """Moments of kept tokens, evenly spread over the store. DataError if no token passed the filter."""
    kept = store.kept_N
    if not len(kept):
        raise DataError(f"the activation store {store.folder} holds no token that passes the filter; use more text")
    chosen = kept[:: max(1, -(-len(kept) // max_tokens))]
    blocks = [chosen[i : i + BLOCK_TOKENS] for i in range(0, len(chosen), BLOCK_TOKENS)]
    total = torch.zeros(store.d_in, dtype=torch.float64)
    square = torch.zeros(store.d_in, store.d_in, dtype=torch.float64)
    # second moments about the first block's mean: about 0 they lose digits where the mean is large
    origin = store.read(blocks[0]).double().mean(dim=0)
    for flat in track(blocks, "fit baselines", unit="blocks"):
        x = store.read(flat).double() - origin
        total += x.sum(dim=0)
        square += x.T @ x
    mean = total / len(chosen)
    covariance = square / len(chosen) - torch.outer(mean, mean)
    return Moments(mean + origin, covariance, len(chosen), f"{store.key}/{len(chosen)}")


def baseline_info(reference: SubjectInfo, name: str, identity: dict[str, Any], **changed: Any) -> SubjectInfo:
    """Row fields of a baseline that stands beside ``reference``; ``identity`` is what it was made from."""
    digest = sha256_text(canonical_json([name, VERSION, reference.lm, reference.lm_revision, identity]))
    # the readable name holds [a-z0-9._-] only, whatever the hookpoint is called
    place = "".join(c if c in "abcdefghijklmnopqrstuvwxyz0123456789._-" else "-" for c in reference.hookpoint.lower())
    suffix = "".join(f"-{k}{v}" for k, v in identity.items() if k in ("f", "k", "s"))
    return replace(
        reference, sae_id=f"baseline.{name}.{place}{suffix and '.' + suffix[1:]}-{digest[:8]}", kind="baseline",
        architecture=name, sae_sha256=digest, **changed,
    )


class Baseline:
    """What baselines share: every question they cannot answer is an Unsupported that names them."""

    provides: frozenset[str] = frozenset()

    def __init__(self, info: SubjectInfo) -> None:
        self.info = info

    def _no(self, what: str) -> Unsupported:
        return Unsupported(f"{self.info.sae_id} has no {what}; it provides {', '.join(sorted(self.provides))}")

    def reconstruct(self, x_ND: Tensor) -> Tensor:
        raise self._no("reconstruction")

    def encode_sparse(self, x_ND: Tensor) -> "SparseLatents":
        raise self._no("sparse codes")

    def codes_and_reconstruction(self, x_ND: Tensor) -> "tuple[SparseLatents | None, Tensor]":
        return None, self.reconstruct(x_ND)

    def contributions(self, x_D: Tensor) -> Contributions:
        raise self._no("latents")

    def normalisation(self, x_ND: Tensor) -> Normalisation:
        return Normalisation(x_ND.new_zeros(len(x_ND)), x_ND.new_ones(len(x_ND)))

    def features(self, x_ND: Tensor, columns: Tensor | None = None) -> Tensor:
        raise self._no("features")


class PCA(Baseline):
    """x_hat = m + (x - m) V V^T with the K leading principal components V of the fitting tokens."""

    provides = frozenset({"reconstruct"})

    def __init__(self, moments: Moments, k: int, reference: SubjectInfo) -> None:
        """ConfigError unless 1 <= k."""
        if k < 1:
            raise ConfigError(f"PCA needs at least one component, got {k}")
        width = len(moments.mean_D)
        k = min(k, width)
        super().__init__(baseline_info(
            reference, "pca", {"k": k, "source": moments.source}, d_sae=width, k=k, train_tokens=moments.n_tokens))
        _, vectors = torch.linalg.eigh(moments.covariance_DD)
        self._mean_D, self._basis_DK = moments.mean_D, vectors[:, -k:]

    def reconstruct(self, x_ND: Tensor) -> Tensor:
        # float64 inside: with K = D the reconstruction is then exact to float32
        centred = x_ND.double() - self._mean_D
        return (self._mean_D + (centred @ self._basis_DK) @ self._basis_DK.T).to(x_ND.dtype)


class RandomDirections(Baseline):
    """F Gaussian unit directions on channel-standardised x: as many lottery tickets as an SAE has (METRICS C.3).

    The constants of the standardisation come from the fitting store: a probe standardises each feature again, so they
    only fix how much each channel weighs in a direction.
    """

    provides = frozenset({"features"})

    def __init__(self, moments: Moments, n_features: int, seed: int, reference: SubjectInfo) -> None:
        super().__init__(baseline_info(
            reference, "random_directions", {"f": n_features, "s": seed, "source": moments.source},
            d_sae=n_features, k=None, train_tokens=None))
        generator = torch.Generator().manual_seed(seed_of(seed, "random_directions", n_features))
        directions = torch.randn(n_features, len(moments.mean_D), generator=generator)
        self._directions_FD = directions / directions.norm(dim=1, keepdim=True)
        std = moments.covariance_DD.diagonal().clamp_min(0).sqrt()
        # a constant channel carries nothing; dividing by its zero would make every feature NaN
        self._scale_D = torch.where(std > 0, 1 / std.clamp_min(1e-300), 0.0).float()
        self._mean_D = moments.mean_D.float()

    def features(self, x_ND: Tensor, columns: Tensor | None = None) -> Tensor:
        directions = self._directions_FD if columns is None else self._directions_FD[columns]
        return ((x_ND.float() - self._mean_D) * self._scale_D) @ directions.T


class Channels(Baseline):
    """The D raw channels of the hookpoint as features."""

    provides = frozenset({"features"})

    def __init__(self, reference: SubjectInfo) -> None:
        super().__init__(baseline_info(reference, "channels", {}, d_sae=reference.d_in, k=None, train_tokens=None))

    def features(self, x_ND: Tensor, columns: Tensor | None = None) -> Tensor:
        return x_ND.float() if columns is None else x_ND.float()[:, columns]


def baseline_subjects(
    store: "ActivationStore", reference: SubjectInfo, seed: int, *, l0s: Sequence[float] = (),
    n_features: int | None = None,
) -> list[Subject]:
    """PCA at each L0 of ``l0s`` (rounded, duplicates dropped), random directions, channels.

    ``store``: where they are fitted (split train, or explain when no SAE was trained). ``reference``: the SubjectInfo
    of the SAE they stand beside (LM, hookpoint, width). ``l0s`` defaults to the reference's k; without either there is
    no PCA. ``n_features`` defaults to the reference's d_sae.
    """
    wanted = list(l0s) or ([float(reference.k)] if reference.k is not None else [])
    moments = fit_moments(store)
    components = sorted({min(max(1, round(l0)), reference.d_in) for l0 in wanted})
    return [
        *(PCA(moments, k, reference) for k in components),
        RandomDirections(moments, n_features or reference.d_sae, seed, reference),
        Channels(reference),
    ]
