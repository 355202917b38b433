"""What :mod:`evals.effects` leaves of each latent, and its reader. Torch-free."""

from dataclasses import dataclass, field
from pathlib import Path

from autointerp.records import Failure, Record
from autointerp.tables import read_jsonl

FILE = "effects.jsonl"


@dataclass(frozen=True, kw_only=True)
class LatentEffect(Record):
    """Means over the windows on which a latent was taken out; every difference is clean minus ablated."""

    sae_id: str
    latent: int
    n_windows: int
    n_tokens: int = 0
    """Next tokens behind ``loss_rise``."""
    loss_rise: float | None = None
    """nats per token by which the loss of the next tokens (the peak's own first) rises without the latent."""
    kl: float | None = None
    """KL(clean || ablated) of the next token at the peak, nats."""
    raised: tuple[tuple[str, float], ...] = ()
    """Tokens that the latent makes likelier at its peak, with the change of probability; largest first."""
    lowered: tuple[tuple[str, float], ...] = ()
    failures: dict[str, int] = field(default_factory=dict)
    """Windows left out, by failure code."""
    failure: Failure | None = None
    """Why there is no effect at all to report."""

    def __post_init__(self) -> None:
        for name in ("raised", "lowered"):  # JSON has no tuples
            pairs = tuple((str(token), float(change)) for token, change in getattr(self, name))
            object.__setattr__(self, name, pairs)


def read_effects(folder: Path) -> dict[int, LatentEffect]:
    """Effects by latent."""
    return {e.latent: e for e in read_jsonl(Path(folder) / FILE, LatentEffect)}
