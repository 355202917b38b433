"""Losses against plain dense autograd, and the properties of the auxiliary loss (TRAINING 5)."""

import pytest
import torch
from torch import Tensor

from sae import losses

N, D, F = 6, 5, 9
DEAD = {"none": [], "fewer than k_aux": [1, 7], "more than k_aux": [0, 2, 3, 5, 8], "all": list(range(F))}
K_AUX = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(shift: float = 0.0) -> dict[str, Tensor]:
    made = {"n": draw(N, D, seed=1), "b_pre": draw(D, seed=2), "W_enc": draw(F, D, seed=3),
            "b_enc": draw(F, seed=4) + shift, "W_dec": draw(F, D, seed=5), "y": draw(N, D, seed=6)}  # fmt: skip
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def mask(name: str) -> Tensor:
    dead = torch.zeros(F, dtype=torch.bool)
    dead[DEAD[name]] = True
    return dead


def ours(p: dict[str, Tensor], dead: Tensor, v_e: float = 2.5) -> losses.AuxLoss:
    return losses.aux_k(p["n"] - p["y"], p["n"], p["b_pre"], p["W_enc"], p["b_enc"], p["W_dec"], dead, K_AUX, v_e)


def formula(p: dict[str, Tensor], dead: Tensor, v_e: float = 2.5) -> Tensor:
    """Gao et al. A.2, densely: candidates -inf outside the dead, the k_aux largest, ReLU, decode without bias."""
    h = (p["n"] - p["b_pre"]) @ p["W_enc"].T + p["b_enc"]
    h = torch.where(dead, h, -torch.inf)
    top = torch.topk(h, min(K_AUX, int(dead.sum())), dim=1)
    z = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
    error = (p["n"] - p["y"]).detach()
    return (z @ p["W_dec"] - error).square().sum(1).mean() / v_e


@pytest.mark.parametrize("shift", [0.0, -3.0, -100.0], ids=["generic", "few positive", "all negative"])
@pytest.mark.parametrize("name", [n for n in DEAD if n != "none"])
def test_aux_k_equals_dense_autograd(name: str, shift: float) -> None:
    p, q, dead = leaves(shift), leaves(shift), mask(name)
    got, want = ours(p, dead).loss, formula(q, dead)
    assert float(got) == pytest.approx(float(want), rel=1e-12)
    got.backward()
    want.backward()
    for key in ("W_enc", "b_enc", "W_dec", "b_pre"):
        a, b = p[key].grad, q[key].grad
        assert a is not None and b is not None
        assert float((a - b).abs().max()) <= 1e-10 * max(1.0, float(b.abs().max())), key
    assert p["y"].grad is None or float(p["y"].grad.abs().max()) == 0.0, "the error is detached"


def test_aux_gradient_reaches_the_encoder_of_the_dead_and_nothing_of_the_living() -> None:
    p, dead = leaves(), mask("more than k_aux")
    ours(p, dead).loss.backward()
    for key in ("W_enc", "b_enc", "W_dec"):
        grad = p[key].grad
        assert grad is not None and float(grad[dead].abs().max()) > 0, key
        assert float(grad[~dead].abs().max()) == 0.0, key
    assert p["b_pre"].grad is not None and float(p["b_pre"].grad.abs().max()) > 0


def test_negative_dead_pre_activations_give_no_gradient() -> None:
    p, dead = leaves(-100.0), mask("all")
    found = ours(p, dead)
    found.loss.backward()
    assert found.active == 0.0
    for key in ("W_enc", "b_enc", "W_dec", "b_pre"):
        grad = p[key].grad
        assert grad is not None and float(grad.abs().max()) == 0.0


def test_aux_is_zero_without_dead_tokens_or_error() -> None:
    p = leaves()
    assert (float(ours(p, mask("none")).loss), ours(p, mask("none")).active) == (0.0, 0.0)
    assert float(ours(p, mask("all"), v_e=0.0).loss) == 0.0
    empty = {k: (v[:0] if k in ("n", "y") else v) for k, v in p.items()}
    assert float(ours(empty, mask("all")).loss) == 0.0


def test_aux_that_is_not_finite_counts_nothing() -> None:
    p = leaves()
    with torch.no_grad():
        p["W_dec"][0] = torch.inf
    assert float(ours(p, mask("all")).loss) == 0.0


def test_aux_is_unchanged_by_a_common_shift_of_target_and_bias() -> None:
    """``n`` and y move by the same vector as b_dec: the error, and so the loss, stays."""
    p = leaves()
    shift = draw(D, seed=11)
    moved = p | {"n": p["n"] + shift, "y": p["y"] + shift, "b_pre": p["b_pre"] + shift}
    assert float(ours(moved, mask("all")).loss) == pytest.approx(float(ours(p, mask("all")).loss), rel=1e-12)


def test_aux_is_unchanged_by_the_scale_of_the_data() -> None:
    p, s = leaves(), 7.0
    scaled = p | {name: p[name] * s for name in ("n", "y", "b_pre", "b_enc")}
    assert float(ours(scaled, mask("all"), 2.5 * s * s).loss) == pytest.approx(
        float(ours(p, mask("all"), 2.5).loss), rel=1e-12
    )


def test_active_counts_positive_slots() -> None:
    p, dead = leaves(), mask("more than k_aux")
    h = ((p["n"] - p["b_pre"]) @ p["W_enc"].T + p["b_enc"])[:, dead]
    expected = float((torch.topk(h, K_AUX, dim=1).values > 0).sum()) / N
    assert ours(p, dead).active == pytest.approx(expected)


def test_variance_by_hand() -> None:
    e = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    assert float(losses.variance(e)) == pytest.approx(((1 + 1) + (1 + 1) + 4) / 3)
    assert float(losses.variance(e + 100)) == pytest.approx(float(losses.variance(e)), rel=1e-5)
    assert losses.variance(e).dtype == torch.float64
    assert float(losses.variance(e[:1])) == 0.0 and float(losses.variance(e[:0])) == 0.0


def test_normalised_mse_of_the_mean_is_one() -> None:
    x = draw(500, D)
    assert float(losses.normalised_mse(x - x.mean(0), float(losses.variance(x)))) == pytest.approx(1.0)
    assert float(losses.normalised_mse(torch.zeros(4, D), 3.0)) == 0.0
    assert float(losses.normalised_mse(x[:0], 3.0)) == 0.0


def test_l1_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    found = losses.l1(values, 2, 4.0)
    assert float(found.detach()) == pytest.approx(6 / 8)
    found.backward()
    assert values.grad is not None and values.grad.tolist() == [0.125] * 3
    assert float(losses.l1(values[:0], 0, 4.0)) == 0.0
