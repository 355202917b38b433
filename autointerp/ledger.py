"""What the language model was asked and what it cost, per model, SAE, latent and stage. Torch-free.

Tokens are counted for every request, whether its reply came from the cache or not, so that a resumed run writes the
same ledger as an uninterrupted one; what was really sent this time is counted apart. Money is None unless the model
has a price in ``prices.json`` ({"model": {"prompt": usd, "cached": usd, "output": usd} per million tokens}); none is
shipped.
"""

import json
from collections.abc import Callable, Iterable, Mapping
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
    sent_cached_tokens: int = 0
    sent_output_tokens: int = 0


class Price(NamedTuple):
    """US dollars per million tokens."""

    prompt: float
    cached: float
    output: float

    def of(self, usage: "Usage") -> float:
        """US dollars for so many tokens."""
        return self.of_tokens(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)

    def of_tokens(self, prompt: int, cached: int, output: int) -> float:
        """US dollars for prompt tokens, the cached ones among them, and output tokens."""
        return ((prompt - cached) * self.prompt + cached * self.cached + output * self.output) / TOKENS_PER_PRICE


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
        entry.failed += isinstance(answer, Failure)
        usage: Usage | None = getattr(answer, "usage", None)
        if usage is None:
            return
        entry.prompt_tokens += usage.prompt_tokens
        entry.cached_tokens += usage.cached_tokens
        entry.output_tokens += usage.output_tokens
        if sent:
            entry.sent_tokens += usage.total_tokens
            entry.sent_cached_tokens += usage.cached_tokens
            entry.sent_output_tokens += usage.output_tokens

    def cost_usd(self, keys: Iterable[LedgerKey] | None = None) -> float | None:
        """Price of the requests (as if none had been cached); None if a model among them has no price."""
        return self._cost(keys, lambda e: (e.prompt_tokens, e.cached_tokens, e.output_tokens))

    def sent_usd(self, keys: Iterable[LedgerKey] | None = None) -> float | None:
        """Price of what was sent in this run; None if a model among them has no price."""
        return self._cost(
            keys, lambda e: (e.sent_tokens - e.sent_output_tokens, e.sent_cached_tokens, e.sent_output_tokens)
        )

    def _cost(
        self, keys: Iterable[LedgerKey] | None, tokens: Callable[[LedgerEntry], tuple[int, int, int]]
    ) -> float | None:
        total = 0.0
        for key in self.entries if keys is None else keys:
            price = self.prices.get(key.model)
            if price is None:
                return None
            total += price.of_tokens(*tokens(self.entries[key]))
        return total

    def totals(self) -> dict[str, Any]:
        """Sums over all lines, for a manifest or a summary."""
        names = LedgerEntry.__dataclass_fields__
        sums: dict[str, Any] = {name: sum(getattr(e, name) for e in self.entries.values()) for name in names}
        known = bool(self.entries)
        return {
            **sums, "cost_usd": self.cost_usd() if known else None, "sent_usd": self.sent_usd() if known else None
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per line, sorted by its key."""
        return [
            {
                **key._asdict(), **vars(self.entries[key]), "cost_usd": self.cost_usd([key]),
                "sent_usd": self.sent_usd([key]),
            }
            for key in sorted(self.entries)
        ]  # fmt: skip

    def frame(self) -> "pd.DataFrame":
        """The lines as a table."""
        import pandas as pd

        columns = [*LedgerKey._fields, *LedgerEntry.__dataclass_fields__, "cost_usd", "sent_usd"]
        return pd.DataFrame(self.rows(), columns=columns)

    def write(self, path: Path) -> None:
        """Write ``ledger.parquet``."""
        self.frame().to_parquet(path, index=False)
