"""Training through the fused loss: loss, auxiliary loss and figures equal those of the separate operations.

On a CPU the kernels run under Triton's interpreter, in float32; on a GPU (marked) the real thing in bfloat16.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_store import META, PlantedStore, planted_store

from sae import checkpoint, fused_step, losses, ops_fused, stacked_step, train_run
from sae.base import SAE, TrainState
from sae.config import InputNorm, SAEConfig, TrainConfig
from sae.lagged import Lagged
from sae.metric_log import read_log
from sae.plugins import find
from sae.row_adam import RowAdam
from sae.train import TrainingDiverged, train_many

pytest.importorskip("triton")
pytest.importorskip("sae_kernels.topk_encode")

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
interpreted = pytest.mark.skipif(CUDA, reason="compares on the CPU, under Triton's interpreter")
D, F, K, N = 16, 48, 3, 32
CFG = TrainConfig(
    architecture="topk", d_sae=F, k=K, batch_tokens=N, train_tokens=N * 12, lr=5e-3, lr_warmup_steps=2, aux_k=4,
    dead_tokens=2 * N, seed=0, input_norm="none",
)  # fmt: skip


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's way on the CPU: kernels by the interpreter in float32, figures that come late."""
    monkeypatch.setattr(ops_fused, "usable", lambda *_, **__: True)
    monkeypatch.setattr(ops_fused, "COMPUTE_DTYPE", torch.float32)
    monkeypatch.setattr(train_run, "_late", lambda device: Lagged())
    monkeypatch.setattr(stacked_step, "suits", lambda *_: False)  # the CPU's own way


def make(apply_b_dec: bool = True) -> tuple[SAE, TrainState, torch.Tensor]:
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=D, d_out=D, d_sae=F, k=K, apply_b_dec_to_input=apply_b_dec,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id="tiny", meta=None, train_tokens=0,
        train_steps=0, seed=0,
    )  # fmt: skip
    sae: SAE = find("sae.architectures", "topk")(cfg)
    n_ND = planted_store(n=256).x_ND
    sae.initialise(n_ND, 0)
    with torch.no_grad():
        sae.b_enc_F.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    state = TrainState(
        cfg=CFG, v0=float(losses.variance(n_ND)), input_rms_norm=2.0, d_in=D,
        last_fired_tokens_F=torch.zeros(F, dtype=torch.int64),
    )  # fmt: skip
    return sae, state, n_ND[:N]


@interpreted
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("dead", [[], [2, 7], list(range(0, F, 2)), list(range(F))], ids=len)
def test_a_step_equals_that_of_the_separate_operations(
    dead: list[int], apply_b_dec: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, state, n_ND = make(apply_b_dec)
    state.tokens, state.v_e, state.n_dead_late = 10_000, 0.7, len(dead)
    state.last_fired_tokens_F.fill_(state.tokens)
    state.last_fired_tokens_F[dead] = 0
    want = sae.training_loss(n_ND, state)
    grads_want = torch.autograd.grad(want.total, list(sae.parameters()))
    copies = ops_fused.ComputeCopies.of(sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, dtype=torch.float32)
    # Values from keys are cut to 16 bits (KERNELS 5); the exact mode has all of them.
    real = ops_fused.topk_loss
    monkeypatch.setattr(ops_fused, "topk_loss", lambda *a, **k: real(*a, **k, exact=True))
    got = fused_step.training_loss(sae, K, n_ND, state, copies)
    grads_got = torch.autograd.grad(got.total, list(sae.parameters()))
    assert got.y_ND is not None and want.y_ND is not None
    assert (float(want.aux) > 0) == bool(dead)
    for name in ("total", "mse", "aux", "sparsity", "l0", "v_e", "aux_active", "y_ND"):
        a, b = (torch.as_tensor(getattr(step, name), dtype=torch.float64) for step in (got, want))
        assert torch.allclose(a, b, rtol=2e-5, atol=1e-5), name
    assert torch.equal(got.fired_F, want.fired_F)
    for (name, _), a, b in zip(sae.named_parameters(), grads_got, grads_want, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1e-3, float(b.abs().max())), name


@interpreted
def test_candidates_hold_all_dead_that_fit_and_none_that_live() -> None:
    _, state, _ = make()
    state.tokens = 1_000
    state.last_fired_tokens_F.copy_(torch.arange(F) * 20)  # silent for more than 64 tokens: up to latent 46
    latents, is_dead = fused_step.candidates(state, F)
    assert sorted(latents[is_dead].tolist()) == [f for f in range(F) if 1_000 - 20 * f > 64]
    state.last_fired_tokens_F = torch.arange(2_000)
    state.tokens, state.n_dead_late = 2_000, 100
    latents, is_dead = fused_step.candidates(state, 2_000)
    assert sorted(latents.tolist()) == list(range(512)) and bool(is_dead.all()), "the longest silent first"


@interpreted
def test_what_only_the_log_reads_is_left_out_between_logs(fused: None) -> None:
    sae, state, n_ND = make()
    state.logged = False
    found = sae.training_loss(n_ND, state)
    assert found.y_ND is None and found.v_e == 0.0
    state.tokens = CFG.dead_tokens  # from now on a latent may be dead in the next step
    assert float(sae.training_loss(n_ND, state).v_e) > 0


@interpreted
def test_training_gives_the_curve_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PlantedStore(planted_store(n=512).x_ND)
    cfg = replace(CFG, aux_alpha=0.0)
    (plain,) = train_many(tmp_path / "plain", store, [cfg], META)
    with monkeypatch.context() as patch:
        patch.setattr(ops_fused, "usable", lambda *_, **__: True)
        patch.setattr(ops_fused, "COMPUTE_DTYPE", torch.float32)
        patch.setattr(train_run, "_late", lambda device: Lagged())
        patch.setattr(stacked_step, "suits", lambda *_: False)
        (fused,) = train_many(tmp_path / "fused", store, [cfg], META)
    rows = [read_log(folder / "train.jsonl") for folder in (plain, fused)]
    assert len(rows[0]) == len(rows[1]) == 12
    for a, b in zip(*rows, strict=True):
        for name in ("loss", "fvu", "grad_norm", "n_dead", "l0"):
            assert b[name] == pytest.approx(a[name], rel=2e-3), (a["step"], name)
        assert "flagged_rows" not in a and 0 <= b["flagged_rows"] <= N
    weights = [checkpoint.load(folder).W_dec_FD for folder in (plain, fused)]
    assert float((weights[0] - weights[1]).abs().max()) < 1e-2


@interpreted
def test_dead_latents_are_heard_of_late_and_then_take_part(tmp_path: Path, fused: None) -> None:
    (folder,) = train_many(tmp_path, PlantedStore(planted_store(n=512).x_ND), [CFG], META)
    rows = read_log(folder / "train.jsonl")
    first_dead = next(i for i, row in enumerate(rows) if row["n_dead"] > 0)
    took_part = [i for i, row in enumerate(rows) if row["aux_active"] > 0]
    assert took_part and first_dead < min(took_part) <= first_dead + 3


@interpreted
def test_a_loss_that_is_not_finite_is_named_by_its_step(tmp_path: Path, fused: None) -> None:
    class Broken(PlantedStore):
        def batches(self, *args: Any, **options: Any) -> Any:
            for number, (x_ND, flat) in enumerate(super().batches(*args, **options)):
                yield (x_ND * 1e30 if number == 4 else x_ND), flat

    for steps in (5, 12):  # in the last step and in the middle
        with pytest.raises(TrainingDiverged, match=rf"the loss is (inf|nan) at step 5 of {steps}"):
            cfg = replace(CFG, train_tokens=N * steps)
            train_many(tmp_path, Broken(planted_store(n=512).x_ND), [cfg], META)


def test_lagged_figures_come_in_order_and_exactly_as_late_as_said() -> None:
    late = Lagged(2)
    late.push(1, torch.tensor([1.0]))
    assert late.take() == []
    late.push(2, torch.tensor([2.0]))
    assert late.take() == [(1, [1.0])]
    late.push(3, torch.tensor([3.0]))
    assert late.take(everything=True) == [(2, [2.0]), (3, [3.0])]
    assert late.take(everything=True) == []


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_training_on_a_gpu_follows_the_cpu_without_waiting_for_the_device(tmp_path: Path) -> None:
    store = planted_store(n=8_192, d=64, g=96)
    cfg = replace(CFG, d_sae=256, batch_tokens=1_024, train_tokens=1_024 * 60, dead_tokens=4_096, aux_k=32)
    (on_cpu,) = train_many(tmp_path / "cpu", store, [cfg], META)
    (on_gpu,) = train_many(tmp_path / "gpu", store, [cfg], META, device="cuda")
    (again,) = train_many(tmp_path / "again", store, [cfg], META, device="cuda")
    rows = [read_log(folder / "train.jsonl") for folder in (on_cpu, on_gpu)]
    for a, b in zip(*rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.1, abs=0.05), a["step"]
    assert rows[1][-1]["loss"] < 0.5 * rows[1][0]["loss"]
    weights = [checkpoint.load(folder).W_dec_FD for folder in (on_gpu, again)]
    assert weights[0].device.type == "cpu" and torch.equal(*weights), "equal bits on every run"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_step_between_logs_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, state, n_ND = make()
    sae.to("cuda")
    n_ND, state.last_fired_tokens_F = n_ND.cuda(), state.last_fired_tokens_F.cuda()
    state.logged, state.tokens, state.n_dead_late = False, 10_000, 5
    optimiser = RowAdam(sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, sae.compute_copies(), CFG)  # type: ignore

    def step() -> None:
        found = sae.training_loss(n_ND, state)
        found.total.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        state.after_step(len(n_ND), found)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
