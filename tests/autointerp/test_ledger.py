"""The ledger adds up, does not invent prices, and writes sorted lines."""

import json
from pathlib import Path

import pandas as pd
import pytest

from autointerp.client import Origin, Reply, Usage
from autointerp.ledger import Ledger, Price, load_prices
from autointerp.records import Failure
from sae.errors import ConfigError

REPLY = Reply(text="x", usage=Usage(prompt_tokens=100, cached_tokens=40, output_tokens=10))


def filled(prices=None) -> Ledger:
    ledger = Ledger(prices)
    ledger.add("m", Origin(stage="score", sae_id="b", latent=2), REPLY, sent=True)
    ledger.add("m", Origin(stage="score", sae_id="b", latent=2), REPLY, sent=False)
    ledger.add("m", Origin(stage="explain", sae_id="a", latent=7), Failure(code="timeout", stage="x"), sent=True)
    ledger.add("m", Origin(stage="judge_check"), REPLY, sent=True)
    return ledger


def test_sums() -> None:
    totals = filled().totals()
    assert totals["requests"] == 4 and totals["failed"] == 1 and totals["sent"] == 3
    assert totals["prompt_tokens"] == 300 and totals["output_tokens"] == 30 and totals["sent_tokens"] == 220
    assert totals["cost_usd"] is None  # no price is built in


def test_cost_by_hand() -> None:
    ledger = filled({"m": Price(prompt=1.0, cached=0.5, output=4.0)})
    # three replies: 60 fresh, 40 cached and 10 output tokens each
    assert ledger.cost_usd() == pytest.approx(3 * (60 * 1.0 + 40 * 0.5 + 10 * 4.0) / 1e6)


def test_lines_are_sorted_and_written(tmp_path: Path) -> None:
    filled().write(tmp_path / "ledger.parquet")
    frame = pd.read_parquet(tmp_path / "ledger.parquet")
    assert list(frame.sae_id) == ["", "a", "b"] and list(frame.latent) == [-1, 7, 2]
    assert list(frame.requests) == [1, 1, 2]


def test_an_empty_ledger_has_columns_and_no_cost() -> None:
    assert "prompt_tokens" in Ledger().frame().columns and Ledger().totals()["cost_usd"] is None


def test_prices_are_read_strictly(tmp_path: Path) -> None:
    assert load_prices() == {}
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"m": {"prompt": 1, "cached": 0.5, "output": 2}}))
    assert load_prices(good) == {"m": Price(1.0, 0.5, 2.0)}
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"m": {"prompt": 1}}))
    with pytest.raises(ConfigError, match="bad.json"):
        load_prices(bad)
