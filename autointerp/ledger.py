"""What the language model was asked and what it cost, per model, SAE, latent and stage. Torch-free.

Tokens are counted for every request, whether its reply came from the cache or not, so that a resumed run writes the
same ledger as an uninterrupted one; what was really sent this time is counted apart. Money is None unless the model
has a price in ``prices.json`` ({"model": {"prompt": usd, "cached": usd, "output": usd} per million tokens}); none is
shipped.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from autointerp.records import Failure
from sae.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from autointerp.client import AnyReply, Origin, Usage

TOKENS_PER_PRICE = 1_000_000


class LedgerKey(NamedTuple):
    """One line of the ledger."""

    model: str
    sae_id: str
    latent: int
    """-1: not made for one latent."""
    stage: str


@dataclass
class LedgerEntry:
    """Sums of one line. The first five do not depend on what was cached."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    sent: int = 0
    """Requests sent to the model in this run; the others were answered from the reply cache."""
    sent_tokens: int = 0
    """Prompt + output tokens of those."""


class Price(NamedTuple):
    """US dollars per million tokens."""

    prompt: float
    cached: float
    output: float

    def of(self, usage: "Usage") -> float:
        """US dollars for so many tokens."""
        fresh = usage.prompt_tokens - usage.cached_tokens
        sums = fresh * self.prompt + usage.cached_tokens * self.cached + usage.output_tokens * self.output
        return sums / TOKENS_PER_PRICE


def load_prices(path: Path | None = None) -> dict[str, Price]:
    """The price table ``path``, or the shipped (empty) one. :class:`ConfigError` names a wrong entry."""
    file = path if path is not None else resources.files("autointerp") / "prices.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return {model: Price(*(float(entry[f]) for f in Price._fields)) for model, entry in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: not a price table ({type(error).__name__}: {error}); expected "
            '{"model": {"prompt": 1.0, "cached": 0.5, "output": 4.0}} in US dollars per million tokens'
        ) from error


class Ledger:
    """Adds up requests; see the module's head."""

    def __init__(self, prices: Mapping[str, Price] | None = None) -> None:
        self.entries: dict[LedgerKey, LedgerEntry] = {}
        self.prices = dict(prices) if prices is not None else load_prices()

    def add(self, model: str, origin: "Origin", answer: "AnyReply | Failure", *, sent: bool) -> None:
        """Count one answered request; ``sent`` = it was not in the reply cache."""
        key = LedgerKey(model, origin.sae_id, -1 if origin.latent is None else origin.latent, origin.stage)
        entry = self.entries.setdefault(key, LedgerEntry())
        entry.requests += 1
        entry.sent += sent
        if isinstance(answer, Failure):
            entry.failed += 1
            return
        entry.prompt_tokens += answer.usage.prompt_tokens
        entry.cached_tokens += answer.usage.cached_tokens
        entry.output_tokens += answer.usage.output_tokens
        entry.sent_tokens += answer.usage.total_tokens if sent else 0

    def cost_usd(self, keys: Iterable[LedgerKey] | None = None) -> float | None:
        """Price of the requests (as if none had been cached); None if a model among them has no price."""
        total = 0.0
        for key in self.entries if keys is None else keys:
            price, entry = self.prices.get(key.model), self.entries[key]
            if price is None:
                return None
            fresh = entry.prompt_tokens - entry.cached_tokens
            total += fresh * price.prompt + entry.cached_tokens * price.cached + entry.output_tokens * price.output
        return total / TOKENS_PER_PRICE

    def totals(self) -> dict[str, Any]:
        """Sums over all lines, for a manifest or a summary."""
        names = LedgerEntry.__dataclass_fields__
        sums: dict[str, Any] = {name: sum(getattr(e, name) for e in self.entries.values()) for name in names}
        return {**sums, "cost_usd": self.cost_usd() if self.entries else None}

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per line, sorted by its key."""
        return [
            {**key._asdict(), **vars(self.entries[key]), "cost_usd": self.cost_usd([key])}
            for key in sorted(self.entries)
        ]

    def frame(self) -> "pd.DataFrame":
        """The lines as a table."""
        import pandas as pd

        columns = [*LedgerKey._fields, *LedgerEntry.__dataclass_fields__, "cost_usd"]
        return pd.DataFrame(self.rows(), columns=columns)

    def write(self, path: Path) -> None:
        """Write ``ledger.parquet``."""
        self.frame().to_parquet(path, index=False)
