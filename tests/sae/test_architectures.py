"""The contract of every architecture, and of outside ones given by ``--plugin module:object``.

N tokens, D = d_in, F = d_sae.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_reference import dense_loss
from planted import planted
from torch import Tensor

from sae import checkpoint, losses, metrics, optim
from sae.base import SAE, StepLoss, TrainState
from sae.config import InputNorm, SAEConfig, TrainConfig
from sae.plugins import find, names

D, F, K = 12, 24, 3
D_OUT = 10
"""Width of a transcoder's targets."""
PACKAGE = "sae.architectures"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = [*names(PACKAGE), *metafunc.config.getoption("--plugin")]
    if "option" in metafunc.fixturenames:
        cases = [(name, "") for name in found] + [(name, OPTIONS[name]) for name in found if name in OPTIONS]
        metafunc.parametrize(("name", "option"), cases)
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", found)


OPTIONS = {"topk": "multi_topk", "relu": "l1_decoder_norm"}
"""An option that changes the loss of an architecture."""


def config(name: str, options: dict[str, Any] | None = None, **changes: Any) -> SAEConfig:
    train = TrainConfig(architecture=name, d_sae=F, k=K, **(options or {}))
    fields: dict[str, Any] = {
        "architecture": name, "d_in": D, "d_out": D, "d_sae": F, "apply_b_dec_to_input": True,
        "input_norm": InputNorm(kind="layer_norm"), "sae_id": f"tiny.{name}", "meta": None,
        "train_tokens": 0, "train_steps": 0, "seed": 0,
    }  # fmt: skip
    if find(PACKAGE, name).transcodes:
        fields |= {"d_out": D_OUT, "input_norm": InputNorm(kind="dataset_rms", scale_in=1.5, scale_out=0.8)}
    return SAEConfig(**(fields | find(PACKAGE, name).cfg_fields(train) | changes))


X_ND = planted(n=3_000, d=D, g=16, l0=2).x_ND
MAP_DO = torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(9)) / D**0.5


def wanted(sae: SAE, x: Tensor) -> Tensor:
    """What the reconstruction of x should be, in raw units: x, or for a transcoder a function of it."""
    return (x @ MAP_DO.to(x.dtype)).relu() + 0.3 if sae.transcodes else x


def loss_of(sae: SAE, x: Tensor, state: TrainState) -> StepLoss:
    """Loss of one batch of raw inputs."""
    state.target_ND = sae.normalise_target(wanted(sae, x)) if sae.transcodes else None
    return sae.training_loss(sae.normalise(x)[0], state)


def make(name: str, options: dict[str, Any] | None = None, **changes: Any) -> SAE:
    sae: SAE = find(PACKAGE, name)(config(name, options, **changes))
    n = sae.normalise(X_ND)[0]
    if sae.transcodes:
        sae.initialise_pair(n, sae.normalise_target(wanted(sae, X_ND)), 0)
    else:
        sae.initialise(n, 0)
    return sae


def state_of(sae: SAE, **changes: Any) -> TrainState:
    n = sae.normalise(X_ND.to(sae.W_dec_FD.dtype))[0]
    t = sae.normalise_target(wanted(sae, X_ND)) if sae.transcodes else n
    defaults: dict[str, Any] = {"architecture": sae.cfg.architecture, "d_sae": F, "k": K, "aux_k": 4, "lr": 1e-2}
    return TrainState(
        cfg=TrainConfig(**(defaults | changes)), v0=float(losses.variance(t)),
        input_rms_norm=float(n.square().sum(1).mean().sqrt()),
        last_fired_tokens_F=torch.zeros(F, dtype=torch.int64), d_in=D,
    )  # fmt: skip


def test_there_are_architectures() -> None:
    made = {"batchtopk", "gated", "jumprelu", "matryoshka", "relu", "topk"}
    made |= {f"{code}{kind}" for code in ("", "relu_", "jumprelu_") for kind in ("transcoder", "skip_transcoder")}
    assert made <= set(names(PACKAGE))


def test_codes_are_the_same_sparse_and_dense_and_never_negative(name: str) -> None:
    sae = make(name)
    latents, z = sae.encode_sparse(X_ND), sae.encode(X_ND)
    assert latents.indices_NK.dtype == torch.int64 and latents.values_NK.shape == latents.indices_NK.shape
    assert bool((latents.values_NK >= 0).all())
    assert 0 <= int(latents.indices_NK.min()) and int(latents.indices_NK.max()) < F
    assert float((z > 0).sum()) == float((latents.values_NK > 0).sum()) > 0
    torch.testing.assert_close(sae.decode(latents, X_ND), sae.decode(z, X_ND))
    torch.testing.assert_close(sae(X_ND), sae.decode(z, X_ND))
    assert sae.activation != "topk" or latents.values_NK.shape[1] == K


@pytest.mark.parametrize("n", [0, 1])
def test_none_or_one_token(name: str, n: int) -> None:
    sae = make(name)
    assert sae(X_ND[:n]).shape == (n, sae.cfg.d_out) and sae.encode(X_ND[:n]).shape == (n, F)
    found = loss_of(sae, X_ND[:n], state_of(sae))
    assert bool(torch.isfinite(found.total)) and found.y_ND.shape == (n, sae.cfg.d_out)
    found.total.backward()


def test_a_token_does_not_depend_on_its_batch(name: str) -> None:
    sae = make(name)
    whole = sae.encode(X_ND[:40])
    torch.testing.assert_close(torch.cat([sae.encode(X_ND[:7]), sae.encode(X_ND[7:40])]), whole, rtol=1e-5, atol=1e-6)


def test_sixteen_bit_inputs_are_computed_in_the_type_of_the_weights(name: str) -> None:
    sae, x = make(name), X_ND[:20].bfloat16()
    assert sae(x).dtype == torch.float32
    assert torch.equal(sae(x), sae(x.float()))


def test_the_start_is_a_function_of_the_seed(name: str) -> None:
    a, b = make(name), make(name)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    fvu = metrics.fvu(wanted(a, X_ND), a(X_ND))
    limit = 1.05 if a.transcodes else 1.0  # a transcoder starts with a short sum of random rows
    assert fvu is not None and fvu < limit, "the scaled start is better than the mean"


@pytest.mark.parametrize("shift", [0.0, -1.5], ids=["generic", "few positive"])
@pytest.mark.parametrize("dead_share", [0.0, 0.3, 1.0])
def test_the_gradient_of_the_loss_equals_dense_autograd(
    name: str, option: str, dead_share: float, shift: float
) -> None:
    """float64, every parameter, with the auxiliary loss where the architecture has one."""
    options = {option: True} if option else {}
    sae = make(name, options).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key.endswith("_F"):  # biases, scales and thresholds differ from latent to latent
                parameter.add_(0.02 * torch.randn(F, generator=generator, dtype=torch.float64))
        sae.b_enc_F.add_(shift)
        if option == "l1_decoder_norm":
            sae.W_dec_FD.mul_(torch.rand(F, 1, generator=generator, dtype=torch.float64) + 0.5)
        if name.startswith("jumprelu"):
            sae.bandwidth.fill_(0.8)  # or too few entries lie in the window
    state = state_of(sae, architecture=name, aux_alpha=0.5, l1=0.3, **options)
    state.tokens, state.v_e, state.sparsity_ramp = 10**9, 0.7, 0.4
    state.last_fired_tokens_F[round(dead_share * F) :] = state.tokens
    reference, n = copy.deepcopy(sae), sae.normalise(X_ND[:50].double())[0]
    found = loss_of(sae, X_ND[:50].double(), state)
    has_aux = float(found.aux) > 0
    assert has_aux == (not name.startswith("relu") and dead_share > 0)
    want, z = dense_loss(reference, n, state, state.dead_F if has_aux else None)
    assert float(found.total.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    assert float(found.mse + found.aux + found.sparsity) == pytest.approx(float(found.total.detach()), rel=1e-12)
    assert found.l0 == pytest.approx(float((z > 0).sum()) / len(n))
    found.total.backward()
    want.backward()
    for (key, p), q in zip(sae.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 1e-10 * max(1.0, float(q.grad.abs().max())), key
        assert float(q.grad.abs().max()) > 0 or shift != 0, f"the case says nothing about {key}"


def test_the_auxiliary_loss_teaches_the_encoder_of_the_dead(name: str) -> None:
    sae = make(name)
    if name.startswith("relu"):
        pytest.skip("no auxiliary loss")
    state = state_of(sae, aux_alpha=1.0)
    state.tokens, state.v_e = 10**9, 0.5
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:6] = True
    if name == "groupmax":  # one of each group, beside one that always fires
        dead = torch.arange(F) % (F // K) == 0
        with torch.no_grad():
            sae.b_enc_F[1 :: F // K] = 10.0
    state.last_fired_tokens_F[~dead] = state.tokens
    with torch.no_grad():
        sae.b_enc_F[dead] = -1e-5
        sae.W_enc_FD[dead] *= 0.01  # too weak to be selected, positive on some token
        if name == "gated":
            sae.b_mag_F[dead] = -1.0  # open gates that let nothing through
    latents = sae.encode_sparse(X_ND[:64])
    assert not bool(dead[latents.indices_NK[latents.values_NK > 0]].any()), "the main loss does not reach them"
    found = loss_of(sae, X_ND[:64], state)
    found.total.backward()
    assert found.aux_active > 0
    for parameter in (sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD):
        assert parameter.grad is not None and float(parameter.grad[dead].abs().max()) > 0


def test_training_lowers_the_error_and_keeps_rows_unit(name: str) -> None:
    sae = make(name)
    state = state_of(sae, l1=0.003)
    adam = optim.adam(list(sae.parameters()), state.cfg)
    before = metrics.fvu(wanted(sae, X_ND), sae(X_ND))
    for start in [*range(0, 3_000, 250)] * 3:
        found = loss_of(sae, X_ND[start : start + 250], state)
        found.total.backward()
        assert sae.W_dec_FD.grad is not None
        optim.project_gradient_(sae.W_dec_FD.grad, sae.W_dec_FD)
        adam.step()
        adam.zero_grad()
        optim.normalise_rows_(sae.W_dec_FD)
        state.after_step(250, found)
    after = metrics.fvu(wanted(sae, X_ND), sae(X_ND))
    assert before is not None and after is not None and after < 0.75 * before
    assert float((sae.W_dec_FD.norm(dim=1) - 1).abs().max()) <= 1e-5


def test_a_saved_sae_gives_the_same_codes(name: str, tmp_path: Path) -> None:
    sae = make(name)
    checkpoint.save(sae, tmp_path / "sae", X_ND)
    back = checkpoint.load(tmp_path / "sae")
    assert type(back) is type(sae) and back.cfg == sae.cfg
    assert torch.equal(back.encode(X_ND), sae.encode(X_ND)) and torch.equal(back(X_ND), sae(X_ND))


def test_nan_in_the_input_reaches_the_loss(name: str) -> None:
    sae = make(name)
    x = X_ND[:8].clone()
    x[3, 1] = torch.nan
    assert not bool(torch.isfinite(loss_of(sae, x, state_of(sae)).total))
