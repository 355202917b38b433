"""Rows that go to wandb too: the same ones, under the SAE's own name; and a service that fails harms nothing."""

import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted_store import META, planted_store

from sae.config import TrainConfig
from sae.errors import MissingExtra
from sae.metric_log import MetricLog, read_log
from sae.mirror import WandbMirror, to_wandb
from sae.train import train_many

CFG = TrainConfig(d_sae=48, k=3, batch_tokens=128, train_tokens=128 * 24, aux_k=8)


class Service:
    """Stands for the package: what ``wandb.init`` returns, and what came in."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.options: list[Mapping[str, Any]] = []
        self.finished: list[str] = []
        self.fail_at = fail_at

    def init(self, **options: Any) -> Any:
        self.options.append(options)
        name, rows = options["name"], self.rows.setdefault(options["name"], [])

        def log(row: dict[str, Any], step: int) -> None:
            if self.fail_at is not None and len(rows) >= self.fail_at:
                raise ConnectionError("the network is gone")
            assert row["step"] == step
            rows.append(row)

        return types.SimpleNamespace(log=log, finish=lambda: self.finished.append(name))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=found.init))
    return found


def test_the_rows_of_the_file_are_sent(service: Service, tmp_path: Path) -> None:
    cfgs = [CFG, replace(CFG, architecture="relu", k=None)]
    folders = train_many(tmp_path, planted_store(n=1_024), cfgs, META, mirror=to_wandb("project"))
    for folder in folders:
        assert service.rows[folder.name] == read_log(folder / "train.jsonl")
    assert sorted(service.finished) == sorted(folder.name for folder in folders)
    assert [(o["project"], o["id"], o["resume"]) for o in service.options] == [
        ("project", folder.name, "allow") for folder in folders
    ]
    assert service.options[0]["config"]["d_sae"] == 48


def test_a_service_that_fails_stops_nothing(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.fail_at = 3
    (folder,) = train_many(tmp_path, planted_store(n=1_024), [CFG], META, mirror=to_wandb("project"))
    assert len(service.rows[folder.name]) == 3 < len(read_log(folder / "train.jsonl"))
    assert caplog.text.count("the network is gone") == 1


def test_numbers_that_are_not_finite_are_left_out(service: Service, tmp_path: Path) -> None:
    with MetricLog(tmp_path / "train.jsonl", WandbMirror("p", "name", {})) as log:
        log.write({"step": 1, "loss": float("nan"), "l0": 2.0})
    assert service.rows["name"] == [{"step": 1, "l0": 2.0}] and service.finished == ["name"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"saescope\[wandb\]"):
        WandbMirror("p", "name", {})
