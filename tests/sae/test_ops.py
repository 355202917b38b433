"""Selection, sparse encoders and decoders: values and gradients against plain dense autograd (TRAINING 5)."""

import pytest
import torch
from torch import Tensor

from sae import ops
from sae.ops import Entries, SparseLatents

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(n: int, d: int, f: int, dtype: torch.dtype, *, shift: float = 0.0) -> list[Tensor]:
    """n_ND, b_pre_D, W_enc_FD, b_enc_F, leaves with gradients; ``shift`` moves all pre-activations."""
    made = [draw(n, d, seed=1), draw(d, seed=2) * 0.3, draw(f, d, seed=3) / d**0.5, draw(f, seed=4) * 0.1 + shift]
    return [t.to(dtype).requires_grad_() for t in made]


def near(got: Tensor | None, want: Tensor | None, limit: float) -> None:
    assert got is not None and want is not None and got.shape == want.shape
    difference, size = (got - want).detach().abs(), want.detach().abs()
    assert not want.numel() or float(difference.max()) <= limit * max(1.0, float(size.max()))


def dense_topk(h_NF: Tensor, k: int) -> Tensor:
    """z_NF by a stable sort: K largest, of equal values the lower index, then ReLU."""
    kept = torch.sort(h_NF.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    return (h_NF * torch.zeros_like(h_NF).scatter_(1, kept, 1.0)).relu()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_topk_keeps_the_largest_and_of_equal_values_the_lower_index(k: int) -> None:
    h = torch.randint(-2, 3, (200, 8), generator=torch.Generator().manual_seed(0)).double()
    found = ops.topk(h, k)
    assert torch.equal(ops.to_dense(found, 8), dense_topk(h, k))
    assert bool((found.values_NK[:, :-1] >= found.values_NK[:, 1:]).all()) and bool((found.values_NK >= 0).all())
    assert all(len(set(row)) == k for row in found.indices_NK.tolist())


def test_topk_by_hand() -> None:
    h = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [-1.0, -2.0, 0.5, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0, -5.0]])
    found = ops.topk(h, 2)
    assert found.values_NK.tolist() == [[3.0, 3.0], [0.5, 0.0], [0.0, 0.0]]
    assert sorted(found.indices_NK[0].tolist()) == [1, 2]


@pytest.mark.parametrize("k", [0, -1, 6])
def test_topk_refuses_an_impossible_k(k: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.5"):
        ops.topk(torch.zeros(2, 5), k)


def test_topk_lets_nan_through_to_the_loss() -> None:
    assert bool(ops.topk(torch.tensor([[1.0, float("nan"), 2.0]]), 1).values_NK.isnan().all())


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("k", "shift"), [(3, 0.0), (1, 0.0), (9, 0.0), (4, -1.5), (3, -50.0)],
                         ids=["generic", "one", "all", "fewer than K positive", "none positive"])  # fmt: skip
def test_encode_topk_gradients_equal_dense_autograd(k: int, shift: float, dtype: torch.dtype) -> None:
    parameters = weights(7, 5, 9, dtype, shift=shift)
    n, b_pre, W, b = parameters
    upstream = draw(7, 9, seed=9, dtype=dtype)
    want_z = dense_topk((n - b_pre) @ W.T + b, k)
    want = torch.autograd.grad((want_z * upstream).sum(), parameters)
    found = ops.encode_topk(n, b_pre, W, b, k)
    got_z = ops.to_dense(found, 9)
    near(got_z, want_z, LIMIT[dtype])
    for g, w in zip(torch.autograd.grad((got_z * upstream).sum(), parameters), want, strict=True):
        near(g, w, LIMIT[dtype])
    if shift == 0.0:
        assert all(float(w.abs().max()) > 0 for w in want)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shift", [0.0, 50.0, -50.0], ids=["generic", "all positive", "none positive"])
def test_encode_relu_gradients_equal_dense_autograd(shift: float, dtype: torch.dtype) -> None:
    parameters = weights(7, 5, 9, dtype, shift=shift)
    n, b_pre, W, b = parameters
    upstream = draw(7, 9, seed=9, dtype=dtype)
    want_z = ((n - b_pre) @ W.T + b).relu()
    want = torch.autograd.grad((want_z * upstream).sum(), parameters)
    entries = ops.encode_relu(n, b_pre, W, b)
    assert bool((entries.values_E > 0).all()) and int(entries.offsets_N1[-1]) == len(entries.values_E)
    got_z = ops.to_dense(entries.padded(), 9)
    near(got_z, want_z, LIMIT[dtype])
    for g, w in zip(torch.autograd.grad((got_z * upstream).sum(), parameters), want, strict=True):
        near(g, w, LIMIT[dtype])


def test_encode_dense_gradients_equal_dense_autograd() -> None:
    parameters = weights(7, 5, 9, torch.float64)
    n, b_pre, W, b = parameters
    upstream = draw(7, 9, seed=9)
    want = torch.autograd.grad((((n - b_pre) @ W.T + b) * upstream).sum(), parameters)
    got = torch.autograd.grad((ops.encode_dense(n, b_pre, W, b) * upstream).sum(), parameters)
    for g, w in zip(got, want, strict=True):
        near(g, w, 1e-10)


def test_without_a_pre_bias_the_input_is_seen_as_it_is() -> None:
    n, _, W, b = weights(4, 5, 9, torch.float64)
    near(ops.encode_dense(n, None, W, b), n @ W.T + b, 1e-12)
    near(ops.to_dense(ops.encode_topk(n, None, W, b, 2), 9), dense_topk(n @ W.T + b, 2), 1e-12)
    near(ops.to_dense(ops.encode_relu(n, None, W, b).padded(), 9), (n @ W.T + b).relu(), 1e-12)
    ops.encode_topk(n, None, W, b, 2).values_NK.sum().backward()
    assert W.grad is not None and n.grad is not None


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_blocks_of_any_size_give_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, b_pre, W, b = (t.detach() for t in weights(7, 5, 9, torch.float64))
    whole, entries = ops.encode_topk(n, b_pre, W, b, 3), ops.encode_relu(n, b_pre, W, b)
    monkeypatch.setattr(ops, "BLOCK_BYTES", rows * 9 * 8)
    assert ops.block_rows(9, 8) == rows
    near(ops.to_dense(ops.encode_topk(n, b_pre, W, b, 3), 9), ops.to_dense(whole, 9), 1e-12)
    found = ops.encode_relu(n, b_pre, W, b)
    assert torch.equal(found.indices_E, entries.indices_E) and torch.equal(found.offsets_N1, entries.offsets_N1)
    near(found.values_E, entries.values_E, 1e-12)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("n", "k", "f", "d"), [(7, 3, 9, 5), (1, 1, 1, 1), (4, 9, 9, 6), (33, 5, 3, 17)])
def test_sparse_decode_gradients_equal_dense_autograd(n: int, k: int, f: int, d: int, dtype: torch.dtype) -> None:
    values = (draw(n, k, seed=1).relu()).to(dtype).requires_grad_()
    indices = torch.randint(f, (n, k), generator=torch.Generator().manual_seed(2))  # repeated ones add up
    W, upstream = draw(f, d, seed=3, dtype=dtype).requires_grad_(), draw(n, d, seed=4, dtype=dtype)
    want_y = ops.to_dense(SparseLatents(values, indices), f) @ W
    want = torch.autograd.grad((want_y * upstream).sum(), (values, W))
    y = ops.sparse_decode(values, indices, W, impl="torch")
    near(y, want_y, LIMIT[dtype])
    for g, w in zip(torch.autograd.grad((y * upstream).sum(), (values, W)), want, strict=True):
        near(g, w, LIMIT[dtype])


def test_the_gradient_of_one_side_alone_and_twice() -> None:
    values, indices = draw(4, 2, seed=1).abs(), torch.tensor([[0, 1], [2, 2], [1, 0], [3, 4]])
    W = draw(5, 3, seed=3)
    want = (draw(4, 3, seed=5)[:, None] * W[indices]).sum(2)
    v = values.clone().requires_grad_()
    y = ops.sparse_decode(v, indices, W)
    for _ in range(2):  # the inner graph of the bag survives a second backward
        near(torch.autograd.grad(y, v, draw(4, 3, seed=5), retain_graph=True)[0], want, 1e-12)
    w = W.clone().requires_grad_()
    ops.sparse_decode(values, indices, w).sum().backward()
    near(w.grad, ops.to_dense(SparseLatents(values, indices), 5).sum(0)[:, None].expand(5, 3), 1e-12)


def test_decode_entries_of_uneven_width() -> None:
    entries = Entries(torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1, 0, 1]), torch.tensor([0, 0, 2, 3]))
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert ops.decode_entries(entries, W).tolist() == [[0.0, 0.0], [3.0, 2.0], [0.0, 5.0]]
    padded = entries.padded()
    assert padded.values_NK.tolist() == [[0.0, 0.0], [2.0, 3.0], [5.0, 0.0]]
    assert ops.to_dense(padded, 2).tolist() == [[0.0, 0.0], [3.0, 2.0], [0.0, 5.0]]


def test_entries_of_slots_round_trip() -> None:
    latents = SparseLatents(torch.tensor([[1.0, 0.0], [2.0, 4.0]]), torch.tensor([[3, 0], [1, 2]]))
    assert torch.equal(ops.to_dense(ops.entries_of(latents).padded(), 5), ops.to_dense(latents, 5))


@pytest.mark.parametrize("n", [0, 1])
def test_none_or_one_token(n: int) -> None:
    parameters = weights(n, 5, 9, torch.float64)
    x, b_pre, W, b = parameters
    latents = ops.encode_topk(x, b_pre, W, b, 3)
    entries = ops.encode_relu(x, b_pre, W, b)
    assert latents.values_NK.shape == (n, 3) and entries.offsets_N1.shape == (n + 1,)
    assert entries.padded().values_NK.shape[0] == n
    y = ops.sparse_decode(*latents, W) + ops.decode_entries(entries, W)
    assert y.shape == (n, 5)
    y.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in parameters)


def test_every_sum_repeats_bit_for_bit() -> None:
    def once() -> list[Tensor]:
        parameters = weights(64, 16, 40, torch.float32)
        x, b_pre, W, b = parameters
        ops.sparse_decode(*ops.encode_topk(x, b_pre, W, b, 5), W).square().sum().backward()
        return [p.grad for p in parameters if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize(
    ("values", "indices", "W"), [((2, 3), (2, 2), (4, 5)), ((6,), (6,), (4, 5)), ((2, 3), (2, 3), (4,))]
)
def test_shapes_that_do_not_fit_are_named(values: tuple, indices: tuple, W: tuple) -> None:
    with pytest.raises(ValueError, match=r"wants values and indices.*\(4"):
        ops.sparse_decode(torch.zeros(values), torch.zeros(indices, dtype=torch.int64), torch.zeros(W))
