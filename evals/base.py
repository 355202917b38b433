"""What an evaluation is, what it is given, and what it measures.

N tokens, D = d_in, F = d_sae.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from evals.results import Estimate, Metric, Row, SubjectInfo, make_row

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from autointerp.latent_cache import LatentCache
    from sae.activations import ActivationStore
    from sae.base import SAE, SparseLatents
    from sae.language_model import LanguageModel
    from sae.tokens import TokenSet

PRESETS = ("quick", "paper", "tiny")

NEEDS = frozenset(
    {
        "lm",  # the subject language model
        "test",  # stores["test"]: float32 activations of the split test
        "interp",  # stores explain, calibrate, score and the subject's latent cache
        "probes",  # activations at the last token of labelled prompts
        "train_text",  # tokens of the split train, without activations
        "scores",  # finished autointerp scores of the subject
        "peers",  # SAEs of the same run trained alike but for the seed; without one the evaluation does not apply
        "truth",  # a known dictionary and data made from it; without one the evaluation does not apply
    }
)

PROVIDES = frozenset(
    {
        "reconstruct",  # x_ND -> x_hat_ND
        "sparse",  # x_ND -> SparseLatents, decoder rows: an SAE or something with latents and directions
        "features",  # x_ND -> h_NF real-valued features (pre-activations for an SAE), by blocks of columns
        "directions",  # decoder rows lie in the space of x: what a latent adds can be added to it, or taken from it
        "transcode",  # x_ND -> a prediction of another activation (transcoders)
    }
)


class Contributions(NamedTuple):
    """Of the A active latents (z > 0) of one token, in rising order of their index."""

    indices_A: "torch.Tensor"
    values_A: "torch.Tensor"
    """z, float32."""
    vectors_AD: "torch.Tensor"
    """z_i d_i in the LM's units, the per-token output factor included (METRICS 1)."""


class Normalisation(NamedTuple):
    """Per-token statistics of the input norm; both constant for a subject that has none."""

    shift_N: "torch.Tensor"
    """Subtracted from each channel."""
    scale_N: "torch.Tensor"


@runtime_checkable
class Subject(Protocol):
    """Something that can be measured: an SAE, or a baseline that answers some of the same questions."""

    info: SubjectInfo
    provides: frozenset[str]

    def reconstruct(self, x_ND: "torch.Tensor") -> "torch.Tensor": ...

    def encode_sparse(self, x_ND: "torch.Tensor") -> "SparseLatents": ...

    def codes_and_reconstruction(self, x_ND: "torch.Tensor") -> "tuple[SparseLatents | None, torch.Tensor]":
        """Both from one encoding; codes are None where "sparse" is not provided."""
        ...

    def contributions(self, x_D: "torch.Tensor") -> "Contributions":
        """What each active latent adds to the reconstruction of one token."""
        ...

    def normalisation(self, x_ND: "torch.Tensor") -> "Normalisation":
        """Shift and scale of the space in which the subject computes: it sees about (x - shift) / scale."""
        ...

    def features(self, x_ND: "torch.Tensor", columns: "torch.Tensor | None" = None) -> "torch.Tensor": ...


def provided(transcodes: bool) -> frozenset[str]:
    """What an SAE gives, or a transcoder, whose output lies elsewhere: it reconstructs nothing of what it reads."""
    return PROVIDES - ({"reconstruct", "directions"} if transcodes else {"transcode"})


class SAESubject:
    """An SAE or a transcoder as a subject. Input may lie on another device; answers come back to it."""

    def __init__(self, sae: "SAE", info: SubjectInfo) -> None:
        self.sae, self.info = sae, info
        self.provides = provided(sae.transcodes)

    def _here(self, x: "torch.Tensor") -> "torch.Tensor":
        return x.to(self.sae.W_dec_FD.device)

    def reconstruct(self, x_ND: "torch.Tensor") -> "torch.Tensor":
        return self.sae(self._here(x_ND)).to(x_ND.device)

    def encode_sparse(self, x_ND: "torch.Tensor") -> "SparseLatents":
        latents = self.sae.encode_sparse(self._here(x_ND))
        return type(latents)(*(part.to(x_ND.device) for part in latents))

    def codes_and_reconstruction(self, x_ND: "torch.Tensor") -> "tuple[SparseLatents | None, torch.Tensor]":
        x = self._here(x_ND)
        latents = self.sae.encode_sparse(x)
        x_hat = self.sae.decode(latents, x).to(x_ND.device)
        return type(latents)(*(part.to(x_ND.device) for part in latents)), x_hat

    def decode(self, codes: "SparseLatents", x_ND: "torch.Tensor") -> "torch.Tensor":
        """Reconstruction from any codes [N, K], with the input statistics of x."""
        x = self._here(x_ND)
        return self.sae.decode(type(codes)(*(self._here(part) for part in codes)), x).to(x_ND.device)

    def contributions(self, x_D: "torch.Tensor") -> Contributions:
        x = self._here(x_D[None])
        latents = self.sae.encode_sparse(x)
        active = latents.values_NK[0] > 0
        indices, order = latents.indices_NK[0][active].long().sort()
        values = latents.values_NK[0][active][order]
        vectors = (values * self.sae.output_scale(x)[0])[:, None] * self.sae.W_dec_FD[indices]
        return Contributions(*(part.to(x_D.device) for part in (indices, values, vectors)))

    def normalisation(self, x_ND: "torch.Tensor") -> Normalisation:
        stats = self.sae.normalise(self._here(x_ND))[1]
        shift = x_ND.new_zeros(len(x_ND)) if stats.mean_N1 is None else stats.mean_N1[:, 0].to(x_ND.device)
        return Normalisation(shift, stats.scale_N.to(x_ND.device))

    def features(self, x_ND: "torch.Tensor", columns: "torch.Tensor | None" = None) -> "torch.Tensor":
        return self.sae.pre_activations(self._here(x_ND), columns).to(x_ND.device)


def subject_info(sae: "SAE", sha256: str, *, kind: str = "sae") -> SubjectInfo:
    """Row fields of an SAE, from its own cfg.json."""
    cfg, meta = sae.cfg, sae.cfg.meta
    return SubjectInfo(
        sae_id=cfg.sae_id,
        kind=kind,  # type: ignore[arg-type]
        lm=meta.lm if meta else "unknown",
        lm_revision=meta.lm_revision if meta else "unknown",
        hookpoint=meta.hookpoint if meta else "unknown",
        architecture=cfg.architecture,
        d_in=cfg.d_in,
        d_sae=cfg.d_sae,
        k=cfg.k,
        train_tokens=cfg.train_tokens,
        sae_sha256=sha256,
    )


@dataclass
class EvalContext:
    """All that an evaluation may read. Heavy parts are made on first use and shared by all subjects of a run."""

    root: Path
    subject: Subject
    preset: str
    seed: int
    hookpoint: str
    run_key: str = ""
    stores: Mapping[str, "ActivationStore"] = field(default_factory=dict)
    """By split: explain, calibrate, score, test."""
    load_lm: Callable[[], "LanguageModel"] | None = None
    """The float32 subject LM, loaded on the first call and kept."""
    latents: "LatentCache | None" = None
    probes: Any = None
    """evals.probe_activations.ProbeActivations."""
    scores: "Path | None" = None
    """Folder of finished scores (autointerp.pipeline.open_scores)."""
    train_text: "TokenSet | None" = None
    """The split train."""
    peers: "Sequence[Subject]" = ()
    """Other seeds of the subject among those measured together."""
    truth: Any = None
    """evals.truth.Truth."""
    pretraining: Any = None
    """evals.pretraining.Pretraining: what the user says of the model's pretraining."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Results that do not depend on the subject (clean losses, dense probes, ...), kept for the whole run."""

    @property
    def lm(self) -> "LanguageModel":
        if self.load_lm is None:
            raise RuntimeError("this evaluation asked for an LM without declaring it in `needs`")
        return self.load_lm()

    def memo(self, key: str, build: Callable[[], Any]) -> Any:
        """``build()`` once per run, for all subjects. The key must name all that the result depends on."""
        if key not in self.shared:
            self.shared[key] = build()
        return self.shared[key]


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What an evaluation hands back."""

    rows: list[Row]
    details: "pd.DataFrame | None" = None
    """Per task, latent or document; written beside the rows as parquet."""
    counts: Mapping[str, Any] = field(default_factory=dict)
    """Sample sizes and the like, for the manifest; `dtype` and `device` belong here."""
    draws: "Mapping[str, np.ndarray]" = field(default_factory=dict)
    """:attr:`RowMaker.draws`, from an evaluation whose units and resampling weights are the same for every subject on
    the same inputs: only then may two subjects be compared draw by draw (METRICS 3.2)."""


class Eval(Protocol):
    """One file in evals/suite, ending in ``PLUGIN = TheEval()``. The file name is its name."""

    name: str
    title: str
    version: int
    metrics: tuple[Metric, ...]
    needs: frozenset[str]
    """Subset of NEEDS."""
    uses: frozenset[str]
    """Subset of PROVIDES: what a subject must offer to be measured."""

    def config(self, preset: str) -> dict[str, Any]:
        """Sizes of the preset; part of the key of the rows."""
        ...

    def inputs(self, ctx: EvalContext) -> dict[str, str]:
        """Keys of the artefacts it reads; part of the key of the rows."""
        ...

    def run(self, ctx: EvalContext) -> EvalResult: ...


class RowMaker:
    """Turns estimates into rows of one evaluation and one context."""

    def __init__(self, evaluation: Eval, ctx: EvalContext) -> None:
        self._eval, self._ctx = evaluation, ctx
        self._declared = {m.name: m for m in evaluation.metrics}
        self.rows: list[Row] = []
        self.draws: dict[str, np.ndarray] = {}
        """Resampled values of the aggregates, by "metric|split"."""

    def add(self, metric: str, estimate: Estimate, *, slice: str = "", split: str = "") -> None:
        """Append one row; KeyError for an undeclared metric."""
        if slice == "" and estimate.draws is not None:
            self.draws[f"{metric}|{split}"] = estimate.draws
        self.rows.append(
            make_row(
                self._ctx.subject.info,
                self._eval.name,
                self._eval.version,
                self._declared[metric],
                estimate,
                seed=self._ctx.seed,
                run_key=self._ctx.run_key,
                preset=self._ctx.preset,
                slice=slice,
                split=split,
            )
        )
