"""Which numbers the leaderboard asks for, in which order. Torch-free."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """A headline number that the board asks for."""

    key: str
    """Name in leaderboard.csv."""
    title: str
    eval: str
    metric: str
    better: Literal["higher", "lower", "neither"]
    description: str
    unit: str = ""
    digits: int = 3
    slice: tuple[tuple[str, str], ...] = ()
    """Parts that the row's slice must hold; () = the aggregate, slice ""."""
    scorers: tuple[str, ...] = ()
    """Of several scorers the first of these whose judge is believed, else the first that was used."""
    floor: str | None = None
    """Key of the column that is this one's floor on the same subject."""
    against_random: bool = True
    """Is a random SAE a floor for it? Not for the share of dead latents, which training can only raise."""


_SELECTED = (("explainer", "selected"),)
JUDGES = ("detection", "late_interaction", "embedding", "surprisal")
"""A prompted judge before the embedded ones; of these, the one that separates known features best (decision 003)."""
HEADLINE = (
    ColumnSpec(
        key="l0",
        title="L0",
        eval="reconstruction",
        metric="l0",
        better="neither",
        unit="latents",
        digits=1,
        description="Active latents per token, mean over test tokens.",
    ),
    ColumnSpec(
        key="fvu",
        title="FVU",
        eval="reconstruction",
        metric="fvu",
        better="lower",
        description="Fraction of variance unexplained: squared error over variance; the mean scores 1.",
    ),
    ColumnSpec(
        key="delta_ce",
        title="ΔCE",
        eval="downstream_loss",
        metric="delta_ce",
        better="lower",
        unit="nats/token",
        description="Rise of next-token loss when the reconstruction replaces the activation.",
    ),
    ColumnSpec(
        key="kl",
        title="KL",
        eval="downstream_loss",
        metric="kl",
        better="lower",
        unit="nats/token",
        description="KL divergence from the clean to the patched next-token distribution.",
    ),
    ColumnSpec(
        key="probe_loss",
        title="Probe loss",
        eval="probe_loss",
        metric="probe_loss",
        better="lower",
        unit="nats",
        description="Held-out cross-entropy of the best one-latent probe, mean over tasks; chance is ln 2 = 0.693.",
    ),
    ColumnSpec(
        key="sparse_auc_k1",
        title="1-sparse AUC",
        eval="sparse_probing",
        metric="auc_k1",
        better="higher",
        description="Held-out AUC of a probe on the one latent of most distant class means, over tasks; 0.5 is chance.",
    ),
    ColumnSpec(
        key="sparse_auc_k5",
        title="5-sparse AUC",
        eval="sparse_probing",
        metric="auc_k5",
        better="higher",
        description="The same with five latents.",
    ),
    ColumnSpec(
        key="sparse_auc_k16",
        title="16-sparse AUC",
        eval="sparse_probing",
        metric="auc_k16",
        better="higher",
        description="The same with 16 latents; the dense probe is the ceiling.",
    ),
    ColumnSpec(
        key="n2g_f1",
        title="N2G F1",
        eval="n2g",
        metric="n2g_f1",
        better="higher",
        description="F1 of n-gram patterns against the true activations, mean over latents.",
    ),
    ColumnSpec(
        key="n2g_precision",
        title="N2G precision",
        eval="n2g",
        metric="n2g_precision",
        better="higher",
        description="Share of pattern firings on which the latent is active.",
    ),
    ColumnSpec(
        key="n2g_recall",
        title="N2G recall",
        eval="n2g",
        metric="n2g_recall",
        better="higher",
        description="Share of the latent's activations on which its pattern fires.",
    ),
    ColumnSpec(
        key="n2g_loss_recovered",
        title="Loss recovered by patterns",
        eval="n2g_loss",
        metric="loss_recovered_subset",
        better="higher",
        description="Share of the loss of taking sampled latents out that their n-gram patterns save, while all others "
        "are true; 1 = as good as the true activations.",
    ),
    ColumnSpec(
        key="n2g_delta_ce",
        title="ΔCE by patterns",
        eval="n2g_loss",
        metric="delta_ce",
        better="lower",
        unit="nats/token",
        description="Rise of next-token loss when all alive latents are simulated by their n-gram patterns.",
    ),
    ColumnSpec(
        key="gain_vs_random",
        title="Ablation gain",
        eval="ablation_sparsity",
        metric="gain_vs_random",
        better="higher",
        description="How much sparser a latent's effect is than a random direction's (mean log ratio); 0 = no better.",
    ),
    ColumnSpec(
        key="detection_auc",
        title="Detection AUC",
        eval="explanation",
        metric="auc",
        better="higher",
        slice=_SELECTED,
        scorers=JUDGES,
        floor="detection_floor",
        description="Can a judge tell from the explanation on which windows the latent is active? 0.5 is chance.",
    ),
    ColumnSpec(
        key="detection_floor",
        title="Shuffled floor of AUC",
        eval="explanation",
        metric="floor_auc",
        better="neither",
        slice=_SELECTED,
        scorers=JUDGES,
        description="The same judge with another latent's explanation on the same windows.",
    ),
    ColumnSpec(
        key="detection_gain",
        title="AUC − floor",
        eval="explanation",
        metric="gain_auc",
        better="higher",
        slice=_SELECTED,
        scorers=JUDGES,
        description="Detection AUC minus its shuffled floor, paired by latent.",
    ),
    ColumnSpec(
        key="detection_precision",
        title="Precision at true rate",
        eval="explanation",
        metric="precision",
        better="neither",  # it rises with the rate: latents that fire twice as often look more precise (decision 033)
        slice=_SELECTED,
        scorers=JUDGES,
        description="Pooled precision of the judge at the rate at which the latents really fire; higher for latents "
        "that fire more often, so not ranked.",
    ),
    ColumnSpec(
        key="detection_precision_half",
        title="Precision at one half",
        eval="explanation",
        metric="precision_at_half",
        better="higher",
        slice=_SELECTED,
        scorers=JUDGES,
        description="Precision of the judge as if half of all windows were active: SAEs whose latents fire at "
        "different rates can be compared.",
    ),
    ColumnSpec(
        key="simulation_pearson",
        title="Simulation r",
        eval="explanation",
        metric="pearson",
        better="higher",
        slice=(*_SELECTED, ("scorer", "simulation")),
        description="Correlation of simulated and true activations, mean over latents.",
    ),
    ColumnSpec(
        key="absorption",
        title="Absorption",
        eval="absorption",
        metric="absorption_fraction",
        better="lower",
        description="Share of a word's first letter that other latents bring where the letter's own fall short; a "
        "number only where the letter's latents know it (their F1 is at least 0.5), else the gate failed.",
    ),
    ColumnSpec(
        key="absorption_main_f1",
        title="First-letter F1",
        eval="absorption",
        metric="main_f1",
        better="higher",
        description="F1 of the first letter from a letter's main latents, mean over letters: the gate of absorption.",
    ),
    ColumnSpec(
        key="dead_frac",
        title="Dead",
        eval="reconstruction",
        metric="dead_frac",
        better="lower",
        against_random=False,
        description="Share of latents that never fire on the test tokens.",
    ),
)
