"""One forward pass for every SAE: input norms, units, dead latents, starting weights, the random floor."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import planted
from torch import Tensor

from sae import metrics, ops
from sae.base import SAE, TrainState, normalise, random_like, step_loss
from sae.config import InputNorm, SAEConfig, TrainConfig
from sae.errors import ConfigError, DataError
from sae.ops import SparseLatents
from sae.plugins import find

D, F, K = 12, 20, 3
NORMS = [
    InputNorm(kind="none"), InputNorm(kind="layer_norm"), InputNorm(kind="layer_norm", ddof=0),
    InputNorm(kind="unit_norm"), InputNorm(kind="unit_norm", center=False),
    InputNorm(kind="unit_norm", target="sqrt_d"), InputNorm(kind="dataset_rms", scale_in=0.5, scale_out=0.5),
]  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**changes: Any) -> SAEConfig:
    fields: dict[str, Any] = {
        "architecture": "topk", "activation": "topk", "d_in": D, "d_out": D, "d_sae": F, "k": K,
        "apply_b_dec_to_input": True, "input_norm": InputNorm(kind="layer_norm"), "decoder_unit_norm": True,
        "sae_id": "tiny", "meta": None, "train_tokens": None, "train_steps": None, "seed": None,
    }  # fmt: skip
    return SAEConfig(**(fields | changes))


def make(*, dtype: torch.dtype = torch.float64, **changes: Any) -> SAE:
    cfg = config(**changes)
    sae: SAE = find("sae.architectures", cfg.architecture)(cfg).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p.copy_(draw(*p.shape, seed=i) * 0.5)
    return sae


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_norm_is_undone(norm: InputNorm) -> None:
    x = draw(9, D) * 7 + 3
    n, stats = normalise(x, norm)
    back = SAE.denormalise(n, stats)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)  # eps is added on the way in alone


def test_layer_norm_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    n, stats = normalise(x, InputNorm(kind="layer_norm", eps=0.5))
    torch.testing.assert_close(n, torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64) / 1.5)
    assert stats.mean_N1 is not None and stats.mean_N1.tolist() == [[2.0]] and stats.scale_N.tolist() == [1.0]


def test_unit_norm_is_layer_norm_over_the_root_of_d_minus_one() -> None:
    """FORMATS E1, to the relative 2e-6 of its eps."""
    x = draw(50, D) * 30
    layer, unit = (normalise(x, InputNorm(kind=k, eps=0.0))[0] for k in ("layer_norm", "unit_norm"))
    torch.testing.assert_close(layer, unit * (D - 1) ** 0.5, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(50, dtype=torch.float64))


def test_a_constant_token_stays_finite() -> None:
    sae = make()
    x = torch.full((2, D), 4.0)
    assert bool(torch.isfinite(sae(x)).all())
    torch.testing.assert_close(sae(x), x.double())  # no deviation to model: x_hat is the token's mean


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
def test_the_forward_pass_is_the_formula(norm: InputNorm, centred: bool) -> None:
    sae, x = make(input_norm=norm, apply_b_dec_to_input=centred), draw(30, D, seed=9) * 2 + 1
    n, stats = normalise(x, norm)
    h = (n - sae.b_dec_D if centred else n) @ sae.W_enc_DF + sae.b_enc_F
    kept = torch.topk(h, K, dim=1).indices
    z = (h * torch.zeros_like(h).scatter_(1, kept, 1.0)).relu()
    x_hat = SAE.denormalise(z @ sae.W_dec_FD + sae.b_dec_D, stats)
    for got, want in (
        (sae.pre_activations(x), h), (sae.encode(x), z), (sae(x), x_hat), (sae.decode(z, x), x_hat),
        (sae.decode(sae.encode_sparse(x), x), x_hat), (sae.pre_activations(x, torch.tensor([4, 1])), h[:, [4, 1]]),
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_output_scale_makes_contributions_add_up(norm: InputNorm) -> None:
    """x_hat = sum over f of z_f * s * W_dec[f] + what the bias and the token's mean give (METRICS 1)."""
    sae, x = make(input_norm=norm), draw(20, D, seed=9) * 3
    z, s = sae.encode(x), sae.output_scale(x)
    contributions = (z * s[:, None]) @ sae.W_dec_FD
    torch.testing.assert_close(sae(x) - sae.decode(torch.zeros_like(z), x), contributions, rtol=1e-10, atol=1e-10)


def test_dead_latents_are_counted_in_tokens() -> None:
    state = TrainState(
        cfg=TrainConfig(d_sae=4, k=2, dead_tokens=10), v0=1.0, input_rms_norm=4.0,
        last_fired_tokens_F=torch.zeros(4, dtype=torch.int64), d_in=16,
    )  # fmt: skip
    assert state.fire_eps == pytest.approx(1e-3)
    fired = torch.tensor([True, False, False, False])
    step = type("Step", (), {"fired_F": fired, "v_e": 0.5, "l0": 1.5})()
    state.after_step(10, step)
    assert not bool(state.dead_F.any()), "silent for exactly dead_tokens is not yet dead"
    state.after_step(1, step)
    assert state.dead_F.tolist() == [False, True, True, True] and (state.v_e, state.l0) == (0.5, 1.5)
    assert state.last_fired_tokens_F.tolist() == [11, 0, 0, 0] and state.tokens == 11


def test_being_selected_with_value_zero_is_not_firing() -> None:
    sae = make(k=2)
    with torch.no_grad():
        sae.b_dec_D.zero_()
    state = TrainState(
        cfg=TrainConfig(d_sae=F, k=2), v0=1.0, input_rms_norm=D**0.5,
        last_fired_tokens_F=torch.zeros(F, dtype=torch.int64), d_in=D,
    )  # fmt: skip
    values = torch.tensor([[1.0, 0.0], [1e-4, 0.0]], dtype=torch.float64)
    entries = ops.entries_of(SparseLatents(values, torch.tensor([[3, 4], [5, 6]])))
    found = step_loss(sae, draw(2, D), entries, state, torch.zeros((), dtype=torch.float64), with_aux=True)
    assert found.fired_F.nonzero().flatten().tolist() == [3], "5 lies below fire_eps, 4 and 6 are empty slots"
    assert found.l0 == 1.0 and float(found.aux) == 0.0


def test_initialise_is_a_function_of_sample_and_seed() -> None:
    n = draw(400, D, seed=1).float()
    a, b, c = (make(dtype=torch.float32) for _ in range(3))
    for sae, seed in ((a, 0), (b, 0), (c, 1)):
        sae.initialise(n, seed)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.W_dec_FD, c.W_dec_FD)
    torch.testing.assert_close(a.W_dec_FD.norm(dim=1), torch.ones(F))
    ratio = (a.W_enc_FD / a.W_dec_FD).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert not bool(a.b_enc_F.any())


def test_the_starting_scale_is_the_best_one() -> None:
    n = draw(400, D, seed=1).float()
    sae = make(dtype=torch.float32)
    sae.initialise(n, 0)

    def cost(factor: float) -> float:
        y = sae.decode_normalised(sae.encode_entries(n)).detach() - sae.b_dec_D.detach()
        return float((n - sae.b_dec_D.detach() - factor * y).square().sum())

    assert cost(1.0) < cost(0.97) and cost(1.0) < cost(1.03)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_random_like_has_the_size_and_l0_and_none_of_the_skill(architecture: str) -> None:
    x = planted(n=2_000, d=D, g=16, l0=3).x_ND
    made: dict[str, Any] = {"architecture": architecture, "activation": architecture}
    sae = make(dtype=torch.float32, k=K if architecture == "topk" else None, **made)
    with torch.no_grad():
        sae.b_enc_F.fill_(-0.5)
    found, again, other = random_like(sae, 0, x), random_like(sae, 0, x), random_like(sae, 1, x)
    assert found.sae_id.startswith("baseline.random_sae.") and found.sae_id != other.sae_id == other.cfg.sae_id
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), again.parameters(), strict=True))
    assert (found.d_in, found.d_sae, found.cfg.input_norm) == (sae.d_in, sae.d_sae, sae.cfg.input_norm)
    want = metrics.l0(sae.encode_sparse(x))
    assert want is not None and found.cfg.k == (K if architecture == "topk" else round(want))
    torch.testing.assert_close(found.W_dec_FD.norm(dim=1), torch.ones(F))
    fvu = metrics.fvu(x, found(x))
    assert fvu is not None and 0.05 < fvu < 1.0, "fitted scale: better than the mean, far from trained"
    assert not any(p.requires_grad for p in found.parameters())


def test_a_random_sae_scaled_on_other_text_is_another() -> None:
    """A run with --sae found the floor that an earlier run below the same root had fitted to other texts."""
    sae, x = make(dtype=torch.float32, k=K), planted(n=200, d=D, g=16, l0=3).x_ND
    own, here, there = random_like(sae, 0, x), random_like(sae, 0, x, "a"), random_like(sae, 0, 2 * x, "b")
    assert len({own.sae_id, here.sae_id, there.sae_id}) == 3
    assert torch.equal(own.W_enc_FD if hasattr(own, "W_enc_FD") else own.W_enc_DF,
                       here.W_enc_FD if hasattr(here, "W_enc_FD") else here.W_enc_DF)  # fmt: skip


def test_random_like_without_a_sample() -> None:
    with pytest.raises(DataError, match="sample"):
        random_like(make(dtype=torch.float32), 0, torch.zeros(0, D))


@pytest.mark.parametrize("shape", [(3, D + 1), (D,), (2, 3, D)])
def test_activations_of_a_wrong_width_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=rf"\[N, {D}\]"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "relu"}, "runs activation"),
        ({"d_out": D + 1}, "transcoders"),
        ({"d_in": 1, "d_out": 1, "d_sae": 4}, "layer_norm needs more than 1"),
    ],
)
def test_configurations_that_cannot_run(changes: dict[str, Any], says: str) -> None:
    cfg = replace(config(), **changes)
    with pytest.raises(ConfigError, match=says):
        find("sae.architectures", "topk")(cfg)


def test_the_encoder_view_shares_memory() -> None:
    sae = make()
    assert sae.W_enc_DF.shape == (D, F) and sae.W_enc_DF.data_ptr() == sae.W_enc_FD.data_ptr()
