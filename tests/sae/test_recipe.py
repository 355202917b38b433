"""Averaged weights, clipping and the learning-rate law: formulas, and what they do inside training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_store import META, PlantedStore, planted_store

from sae import checkpoint, metrics, optim, train_run
from sae.config import TrainConfig
from sae.errors import ConfigError
from sae.metric_log import MetricLog, read_log
from sae.train import train_many

CFG = TrainConfig(
    architecture="topk", d_sae=48, k=3, batch_tokens=128, train_tokens=128 * 40, lr=5e-3, lr_warmup_steps=2, aux_k=8,
    dead_tokens=512,
)  # fmt: skip
ARCHITECTURES = ["topk", "relu", "batchtopk", "jumprelu", "gated", "matryoshka"]


@pytest.fixture(scope="module")
def store() -> PlantedStore:
    return planted_store(n=2_048)


def test_the_average_is_the_weighted_mean_of_all_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(7)]
    parameter = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    average = optim.Average({"w": parameter}, 0.8)
    with pytest.raises(ValueError, match="no step"):
        average.corrected()
    for value in steps:
        parameter.data.copy_(value)
        average.update({"w": parameter})
    weights = torch.tensor([0.2 * 0.8 ** (6 - i) for i in range(7)], dtype=torch.float64)
    expected = (weights[:, None, None] * torch.stack(steps)).sum(0) / weights.sum()
    torch.testing.assert_close(average.corrected()["w"], expected, rtol=1e-12, atol=1e-14)
    constant = optim.Average({"w": parameter}, 0.999)
    constant.update({"w": parameter})
    torch.testing.assert_close(constant.corrected()["w"], parameter.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_averaged_sae_is_saved_whole(architecture: str, store: PlantedStore, tmp_path: Path) -> None:
    cfg = replace(CFG, architecture=architecture, l1=0.05, ema_decay=0.9)
    (folder,) = train_many(tmp_path, store, [cfg], META)
    sae = checkpoint.load(folder)
    made = json.loads((folder / "manifest.json").read_text())["counts"]
    assert sae.cfg.weights == "ema"
    lengths_F = torch.linalg.vector_norm(sae.W_dec_FD, dim=1)
    torch.testing.assert_close(lengths_F, torch.ones_like(lengths_F), rtol=0, atol=1e-5)
    fvu = metrics.fvu(store.x_ND, sae(store.x_ND))
    assert fvu == pytest.approx(made["fvu_ema"], rel=1e-4) and made["fvu_raw"] > 0
    assert made["fvu_ema"] < 1.5 * made["fvu_raw"], "an average over ten steps is not far from the last"
    l0 = float((sae.encode(store.x_ND) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(made["l0_ema"], rel=1e-4)


def test_averaging_changes_what_is_saved_not_what_is_trained(store: PlantedStore, tmp_path: Path) -> None:
    plain, averaged = train_many(tmp_path, store, [CFG, replace(CFG, ema_decay=0.9)], META)
    clock, logs = ("seconds", "tokens_per_s"), []
    for folder in (plain, averaged):
        logs.append([{k: v for k, v in row.items() if k not in clock} for row in read_log(folder / "train.jsonl")])
    assert logs[0] == logs[1]
    assert not torch.equal(checkpoint.load(plain).W_enc_FD, checkpoint.load(averaged).W_enc_FD)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "topk"])
def test_taking_the_average_of_one_step_changes_no_output(
    architecture: str, store: PlantedStore, tmp_path: Path
) -> None:
    """With one step the average is the weights; rows shortened on purpose must come out with equal contributions."""
    cfg = replace(CFG, architecture=architecture, ema_decay=0.9)
    log = MetricLog(tmp_path / "x.run" / "train.jsonl")
    run = train_run.start(cfg, META, "0" * 16, tmp_path / "x", store, store.x_ND, log)
    run.sae.finish(store)
    before = run.sae(store.x_ND).detach()
    with torch.no_grad():
        factor_F = torch.linspace(0.5, 0.9, run.sae.d_sae)
        run.sae.W_dec_FD.mul_(factor_F[:, None])
        run.sae.scale_codes_(1 / factor_F)
    assert run.average is not None
    run.average.update(dict(run.sae.named_parameters()))
    train_run._take_average(run)
    torch.testing.assert_close(run.sae(store.x_ND).detach(), before, rtol=1e-4, atol=1e-5)


def test_clipping_is_global_and_exact() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 2), (1,))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.full((2, 2), 2.0)
    assert float(optim.clip_gradients_(parameters, 10.0)) == 5.0
    assert parameters[0].grad.tolist() == [3.0, 0.0, 0.0], "below the limit nothing changes"
    assert float(optim.clip_gradients_(parameters, 2.5)) == 5.0
    assert parameters[0].grad.tolist() == [1.5, 0.0, 0.0] and parameters[1].grad.tolist() == [[1.0, 1.0]] * 2


def test_the_optimiser_sees_clipped_gradients(
    store: PlantedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def step(adam: torch.optim.Adam, *rest: object, real: Any = torch.optim.Adam.step) -> Any:
        norms = [p.grad.norm() for group in adam.param_groups for p in group["params"]]
        seen.append(float(torch.stack(norms).norm()))
        return real(adam, *rest)

    (plain,) = train_many(tmp_path, store, [CFG], META)
    norms = [row["grad_norm"] for row in read_log(plain / "train.jsonl")]
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    limit = sorted(norms)[len(norms) // 2]
    never, always, some = train_many(
        tmp_path, store, [replace(CFG, grad_clip=clip) for clip in (1e9, 1e-3, limit)], META
    )
    by_run = [seen[i::3] for i in range(3)]
    assert torch.equal(checkpoint.load(plain).W_enc_FD, checkpoint.load(never).W_enc_FD)
    assert by_run[1] == pytest.approx([1e-3] * 40, rel=1e-5)
    assert max(by_run[2]) == pytest.approx(limit, rel=1e-5) and min(by_run[2]) < 0.99 * limit
    first = [read_log(folder / "train.jsonl")[0]["grad_norm"] for folder in (plain, always, some)]
    assert first[0] == first[1] == first[2] > 1e-3, "the log has the norm before clipping"


def test_the_learning_rate_law(store: PlantedStore, tmp_path: Path) -> None:
    """The paper's constants (TRAINING 7), and one over the root of the width."""
    law = TrainConfig(lr=2e-4, lr_law="sqrt_width")
    for width, rate in ((4_608, 3.8e-4), (32_768, 1.41e-4), (131_072, 7.1e-5)):
        assert optim.full_rate(replace(law, d_sae=width)) == pytest.approx(rate, rel=0.01)
    assert optim.full_rate(replace(law, lr_law="fixed")) == 2e-4
    equal = replace(CFG, lr=CFG.lr / (2**14 / CFG.d_sae) ** 0.5, lr_law="sqrt_width")
    plain, scaled = train_many(tmp_path, store, [CFG, equal], META)
    rates = [[row["lr"] for row in read_log(folder / "train.jsonl")] for folder in (plain, scaled)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_options_out_of_range() -> None:
    for values, message in (({"grad_clip": 0.0}, "grad_clip"), ({"ema_decay": 1.0}, "ema_decay")):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**values)


def test_new_options_leave_the_names_of_existing_saes_alone() -> None:
    plain = train_run.identity(TrainConfig())
    assert set(plain) == train_run.FIRST_FIELDS
    assert set(train_run.identity(TrainConfig(ema_decay=0.5))) == train_run.FIRST_FIELDS | {"ema_decay"}
