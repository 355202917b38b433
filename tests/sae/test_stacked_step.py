"""TopK SAEs computed together on a CPU: the bits of autograd, and those of each trained alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted_store import META, PlantedStore, planted_store

from sae import stacked_step, train_run
from sae.base import NormStats
from sae.config import TrainConfig
from sae.errors import ConfigError
from sae.metric_log import MetricLog
from sae.train import train_many

BATCH, STEPS = 128, 24
CFG = TrainConfig(
    architecture="topk", d_sae=48, k=3, batch_tokens=BATCH, train_tokens=BATCH * STEPS, lr=5e-3, lr_warmup_steps=2,
    aux_k=8, dead_tokens=512, seed=0, input_norm="none",
)  # fmt: skip
CASES = {
    "dead latents": {}, "none dead": {"dead_tokens": 10**6}, "selection by groups": {"d_sae": 2_048, "k": 8},
    "no auxiliary loss": {"aux_alpha": 0.0}, "bfloat16 product": {"d_sae": 2_048, "k": 8, "encoder_dtype": "bfloat16"},
    "layer norm, clipped": {"input_norm": "layer_norm", "grad_clip": 0.1, "ema_decay": 0.9},
}  # fmt: skip


@pytest.fixture(scope="module")
def store() -> PlantedStore:
    return PlantedStore(planted_store(n=3_048).x_ND[:2_048])


def started(cfgs: Sequence[TrainConfig], store: PlantedStore, folder: Path) -> list[train_run.Run]:
    return [
        train_run.start(cfg, META, "", folder / str(i), store, store.x_ND, MetricLog(folder / f"{i}.jsonl"))
        for i, cfg in enumerate(cfgs)
    ]


def trained(
    cfgs: Sequence[TrainConfig], store: PlantedStore, folder: Path, monkeypatch: pytest.MonkeyPatch, *,
    width: int = 1, autograd: bool = False,
) -> list[train_run.Run]:  # fmt: skip
    """All of one batch order; stacks of at most ``width``, or every SAE by its own ``training_loss``."""
    runs = started(cfgs, store, folder)
    with monkeypatch.context() as patch:
        patch.setattr(stacked_step, "width", lambda *_: width)
        if autograd:
            patch.setattr(stacked_step, "suits", lambda *_: False)
        for step in range(STEPS):
            picked = torch.randint(len(store.x_ND), (BATCH,), generator=torch.Generator().manual_seed(step))
            x_ND = store.x_ND[picked]
            train_run.step_many(runs, x_ND, *runs[0].sae.normalise(x_ND))
    assert all(run.step == STEPS and not run.failure for run in runs)
    return runs


def same_bits(first: train_run.Run, second: train_run.Run) -> bool:
    moments = [
        [state[name] for state in run.optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
        for run in (first, second)
    ]
    weights = zip(first.sae.state_dict().values(), second.sae.state_dict().values(), strict=True)
    equal = all(torch.equal(a, b) for a, b in [*weights, *zip(*moments, strict=True)])
    clock = ("seconds", "tokens_per_s")
    logs = [{k: v for k, v in run.last.items() if k not in clock} for run in (first, second)]
    return equal and logs[0] == logs[1]


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_autograd_alone_and_in_company(
    case: str, store: PlantedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four SAEs of one shape, each with its own seed and learning rate, in stacks of 1, 3 + 1 and 4."""
    base = replace(CFG, **CASES[case])
    cfgs = [replace(base, seed=seed, lr=5e-3 * (1 + seed)) for seed in range(4)]
    want = trained(cfgs, store, tmp_path / "autograd", monkeypatch, autograd=True)
    n_dead = sum(int(run.state.dead_F.sum()) for run in want)
    assert (n_dead > 0) == (base.dead_tokens == 512), "the case is what its name says"
    for width in (1, 3, 4):
        found = trained(cfgs, store, tmp_path / str(width), monkeypatch, width=width)
        assert [len(run.stack.saes) if run.stack else 0 for run in found] == {
            1: [1, 1, 1, 1], 3: [3, 0, 0, 1], 4: [4, 0, 0, 0],
        }[width]  # fmt: skip
        assert all(map(same_bits, want, found)), width


def test_only_plain_topk_of_one_shape_goes_together(store: PlantedStore, tmp_path: Path) -> None:
    cfgs = [CFG, replace(CFG, seed=1), replace(CFG, k=4), replace(CFG, architecture="relu"), replace(CFG, seed=2),
            replace(CFG, multi_topk=True), replace(CFG, architecture="batchtopk")]  # fmt: skip
    pairs = [(run.sae, run.state) for run in started(cfgs, store, tmp_path)]
    assert stacked_step.groups(pairs, BATCH) == [[0, 1, 4], [2], [3], [5], [6]]
    assert stacked_step.width(4_096, 576) == 1, "large ones go one by one"
    assert [len(group) for group in stacked_step.groups(pairs[:1] * 5, 4_096)] == [
        min(5, stacked_step.width(4_096, store.d_in))
    ]


def test_a_run_that_fails_or_ends_early_leaves_the_others_as_they_were(store: PlantedStore, tmp_path: Path) -> None:
    """A stack of three, one of which ends after 10 steps: files equal those of single trainings."""
    cfgs = [CFG, replace(CFG, seed=1, train_tokens=BATCH * 10), replace(CFG, seed=2)]
    together = train_many(tmp_path / "together", store, cfgs, META)
    alone = [train_many(tmp_path / "alone", store, [cfg], META)[0] for cfg in cfgs]
    for a, b in zip(together, alone, strict=True):
        for name in ("sae.safetensors", "cfg.json", "reference.safetensors"):
            assert (a / name).read_bytes() == (b / name).read_bytes()


def test_a_loss_that_is_not_finite_stops_its_own_run_alone(
    store: PlantedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = started([CFG, replace(CFG, seed=1)], store, tmp_path)
    with torch.no_grad():
        runs[0].sae.W_enc_FD[5] = torch.inf
    x_ND = store.x_ND[:BATCH]
    n_ND, stats = runs[0].sae.normalise(x_ND)
    train_run.step_many(runs, x_ND, n_ND, stats)
    assert "loss is" in runs[0].failure and runs[0].step == 0
    assert not runs[1].failure and runs[1].step == 1
    assert all(bool(torch.isfinite(p).all()) for p in runs[1].sae.parameters())


def test_weights_that_were_moved_are_stacked_anew(store: PlantedStore, tmp_path: Path) -> None:
    runs = started([CFG, replace(CFG, seed=1)], store, tmp_path)
    saes = [run.sae for run in runs]
    stack = stacked_step.Stack(saes, [run.state for run in runs])
    assert stack.holds(saes) and not stack.holds(saes[:1]) and not stack.holds(saes[::-1])
    saes[1].W_dec_FD.data = saes[1].W_dec_FD.data.clone()
    assert not stack.holds(saes)


def test_no_token_and_one_token(store: PlantedStore, tmp_path: Path) -> None:
    for n_tokens in (0, 1):
        run = started([CFG], store, tmp_path / str(n_tokens))[0]
        n_ND = store.x_ND[:n_tokens]
        (found,) = stacked_step.Stack([run.sae], [run.state]).step_losses(n_ND)
        want = run.sae.training_loss(n_ND, run.state)
        assert float(found.total) == float(want.total.detach()) and found.l0 == want.l0
    assert isinstance(run.sae.normalise(n_ND)[1], NormStats)


def test_a_bfloat16_product_trains_as_well_and_for_topk_alone(
    store: PlantedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfgs = [replace(CFG, d_sae=256, k=8, dead_tokens=10**6, encoder_dtype=kind) for kind in ("float32", "bfloat16")]
    full, narrow = trained(cfgs, store, tmp_path, monkeypatch)
    assert not torch.equal(full.sae.W_enc_FD, narrow.sae.W_enc_FD)
    assert all(p.dtype == torch.float32 for p in narrow.sae.parameters())
    assert narrow.last["fvu"] == pytest.approx(full.last["fvu"], rel=0.02)
    with pytest.raises(ConfigError, match="encoder_dtype is not for 'relu'"):
        replace(CFG, architecture="relu", encoder_dtype="bfloat16")


def test_the_starting_encoder_takes_its_factor_and_nothing_else(store: PlantedStore, tmp_path: Path) -> None:
    plain, halved = (run.sae for run in started([CFG, replace(CFG, encoder_scale=0.5)], store, tmp_path))
    assert torch.equal(halved.W_enc_FD, 0.5 * plain.W_enc_FD) and torch.equal(halved.W_dec_FD, plain.W_dec_FD)
    x_ND = store.x_ND[:50]
    torch.testing.assert_close(halved.encode(x_ND), 0.5 * plain.encode(x_ND))
    assert set(train_run.identity(CFG)) == train_run.FIRST_FIELDS, "the names of existing SAEs stay"
    with pytest.raises(ConfigError, match="encoder_scale"):
        replace(CFG, encoder_scale=0.0)
