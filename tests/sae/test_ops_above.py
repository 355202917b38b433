"""Codes of free width against sorting the whole batch, and the errors of bad input."""

import pytest
import torch
from dense_reference import Jump, Step, batch_topk
from torch import Tensor

from sae import ops_above

N, D, F, K = 20, 6, 32, 3


def tensors(seed: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n_ND, b_pre_D, W_enc_FD, b_enc_F."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(N, D), draw(D), draw(F, D), draw(F) + shift


def dense(n: Tensor, b_pre: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return (n - b_pre) @ W.T + b


def as_dense(entries: ops_above.Entries) -> Tensor:
    z = torch.zeros(len(entries.offsets_N1) - 1, F, dtype=entries.values_E.dtype)
    for token in range(len(z)):
        part = slice(int(entries.offsets_N1[token]), int(entries.offsets_N1[token + 1]))
        z[token, entries.indices_E[part]] = entries.values_E[part]
    return z


def largest_of_batch(h: Tensor, count: int) -> Tensor:
    order = torch.sort(h.reshape(-1), descending=True, stable=True).indices[:count]
    return (h * torch.zeros(h.numel(), dtype=h.dtype).scatter(0, order, 1.0).view_as(h)).relu()


@pytest.mark.parametrize("bar", [0.0, 1.0, 100.0], ids=["none", "some", "too high"])
@pytest.mark.parametrize("scales", [False, True])
def test_batchtopk_is_the_largest_of_the_whole_batch_whatever_the_bar(bar: float, scales: bool) -> None:
    n, b_pre, W, b = tensors()
    if scales:  # tokens of very different size: some have all F latents, some none
        n = n * torch.logspace(-2, 2, N, dtype=torch.float64)[:, None]
    code = ops_above.encode_batchtopk(n, b_pre, W, b, K, bar=bar)
    want = largest_of_batch(dense(n, b_pre, W, b), K * N)
    torch.testing.assert_close(as_dense(code.entries), want, rtol=1e-12, atol=1e-12)
    assert len(code.entries.values_E) == K * N and code.theta == pytest.approx(float(want[want > 0].min()))


def test_batchtopk_settles_ties_by_token_and_latent() -> None:
    W = torch.zeros(F, D, dtype=torch.float64)
    n = torch.zeros(N, D, dtype=torch.float64)
    b = torch.ones(F, dtype=torch.float64)
    b[5] = 2.0
    entries = ops_above.encode_batchtopk(n, None, W, b, K, bar=0.5).entries
    want = largest_of_batch(b.expand(N, F).contiguous(), K * N)
    assert torch.equal(as_dense(entries), want)
    assert int((want[:, 5] == 2).sum()) == N and int((want == 1).sum()) == (K - 1) * N


def test_batchtopk_takes_positive_values_alone() -> None:
    n, b_pre, W, b = tensors(shift=-9.0)
    h = dense(n, b_pre, W, b)
    assert 0 < int((h > 0).sum()) < K * N
    code = ops_above.encode_batchtopk(n, b_pre, W, b, K, bar=2.0)
    torch.testing.assert_close(as_dense(code.entries), h.relu())
    assert code.theta == 0


def test_an_empty_batch() -> None:
    n, b_pre, W, b = tensors()
    found = [
        ops_above.encode_batchtopk(n[:0], b_pre, W, b, K).entries,
        ops_above.encode_above(n[:0], b_pre, W, b, torch.zeros(F, dtype=torch.float64)),
        ops_above.encode_jump(n[:0], b_pre, W, b, torch.zeros(F, dtype=torch.float64), 0.1).entries,
    ]
    for entries in found:
        assert entries.values_E.shape == (0,) and entries.offsets_N1.tolist() == [0]


def test_above_is_the_dense_code_and_never_negative() -> None:
    n, b_pre, W, b = tensors()
    theta = torch.linspace(-2, 3, F, dtype=torch.float64)
    h = dense(n, b_pre, W, b)
    entries = ops_above.encode_above(n, b_pre, W, b, theta)
    torch.testing.assert_close(as_dense(entries), torch.where((h > theta) & (h > 0), h, 0.0))


def test_jump_reports_the_l0_of_its_code_and_lists_what_lies_just_below() -> None:
    n, b_pre, W, b = tensors()
    theta = torch.full((F,), 1.0, dtype=torch.float64)
    h, code = dense(n, b_pre, W, b), ops_above.encode_jump(n, b_pre, W, b, theta, 0.6)
    assert float(code.l0) == int((h > 1.0).sum()) / N
    assert len(code.entries.values_E) == int((h > 0.7).sum()) > int((h > 1.0).sum())
    torch.testing.assert_close(as_dense(code.entries), torch.where(h > 1.0, h, 0.0))


@pytest.mark.parametrize("kind", ["above", "batchtopk", "jump"])
@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["generic", "few positive"])
def test_gradients_equal_dense_autograd_in_every_tensor(kind: str, shift: float) -> None:
    """Of a function of the code (and of L0) that weights every entry differently; the input's gradient included."""
    ours, dense_leaves = ([t.requires_grad_() for t in tensors(seed=4, shift=shift)] for _ in range(2))
    theta = [torch.linspace(0.1, 2.0, F, dtype=torch.float64).requires_grad_() for _ in range(2)]
    weights = torch.randn(N, F, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    h, l0 = dense(*dense_leaves), torch.zeros((), dtype=torch.float64)
    if kind == "above":
        entries, z = ops_above.encode_above(*ours, theta[0]), h * (h > theta[1].detach())
    elif kind == "batchtopk":
        entries, z = ops_above.encode_batchtopk(*ours, K, bar=0.3).entries, batch_topk(h, K)
    else:
        code = ops_above.encode_jump(*ours, theta[0], 0.7)
        entries, z = code.entries, Jump.apply(h, theta[1], 0.7)
        l0 = (code.l0 - 2.5).square()
        (Step.apply(h, theta[1], 0.7).sum(1).mean() - 2.5).square().backward(retain_graph=True)
    tokens = torch.repeat_interleave(torch.arange(N), entries.offsets_N1.diff())
    (l0 + (entries.values_E * weights[tokens, entries.indices_E]).sum()).backward()
    (z * weights).sum().backward()
    pairs = list(zip(ours, dense_leaves, strict=True)) + ([(theta[0], theta[1])] if kind == "jump" else [])
    for a, b in pairs:
        assert a.grad is not None and b.grad is not None and float(b.grad.abs().max()) > 0
        assert float((a.grad - b.grad).abs().max()) <= 1e-10 * max(1.0, float(b.grad.abs().max()))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_largest_mask_counts_exactly(count: int) -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
    keep, last = ops_above.largest_mask(values, count)
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    assert keep.nonzero().squeeze(1).tolist() == sorted(order.tolist())
    assert last == (0.0 if count >= 5 else float(values[order[-1]]))


def test_bad_numbers_are_named() -> None:
    n, b_pre, W, b = tensors()
    with pytest.raises(ValueError, match=r"1\.\.32, got 33"):
        ops_above.encode_batchtopk(n, b_pre, W, b, F + 1)
    with pytest.raises(ValueError, match="positive, got 0"):
        ops_above.encode_jump(n, b_pre, W, b, torch.zeros(F), 0.0)
