"""Selection by groups and the quicker product: equal to torch.topk bit for bit, and float32 in truth."""

import pytest
import torch

from sae import ops, ops_cpu


def numbers(rows: int, latents: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, latents, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "latents", "k"), [(70, 4_608, 33), (1, 2_048, 32), (9, 64, 1), (300, 1_024, 16)])
def test_selection_by_groups_equals_topk(
    rows: int, latents: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = numbers(rows, latents).to(dtype)
    want = torch.topk(h, k, dim=1)
    used = []
    real = torch.topk
    monkeypatch.setattr(torch, "topk", lambda t, *a, **o: used.append(t.shape) or real(t, *a, **o))
    values, indices = ops_cpu.largest(h, k)
    assert used == [(rows, latents // ops_cpu.GROUP)], "it has looked at the maxima of groups only"
    assert torch.equal(values, want.values) and torch.equal(h.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("k", [1, 5, 16])
def test_of_equal_values_the_lower_latent_wins(k: int) -> None:
    """Whole numbers: ties inside groups, between groups and at the boundary; some rows constant."""
    h = torch.randint(-3, 4, (200, 1_088), generator=torch.Generator().manual_seed(0)).float()
    h[:3], h[3:6] = 2.0, 0.0
    h[6:12] = torch.where(numbers(6, 1_088) > 2.5, 1.0, -1.0)  # fewer than k positive ones in some rows
    found = ops.topk(h, k)
    order = torch.sort(h, dim=1, descending=True, stable=True)
    kept = torch.zeros_like(h).scatter_(1, order.indices[:, :k], 1.0)
    assert torch.equal(ops.to_dense(found, 1_088), (h * kept).relu())
    assert torch.equal(found.values_NK, order.values[:, :k].relu())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    h = numbers(5, 1_024)
    h[2, 77] = value
    h[3, 32:64] = value
    values, indices = ops_cpu.largest(h, 4)
    want = torch.topk(h, 4, dim=1)
    assert torch.equal(values.nan_to_num(9e9), want.values.nan_to_num(9e9))


def test_other_shapes_take_topk() -> None:
    for h, k in ((numbers(3, 1_000), 4), (numbers(3, 1_024), 17), (numbers(0, 1_024), 4), (numbers(3, 2_048).half(), 4),
                 (numbers(3, 4_096)[:, ::2], 4)):  # fmt: skip
        found, want = ops_cpu.largest(h, k), torch.topk(h, k, dim=1)
        assert torch.equal(found[0], want.values) and torch.equal(found[1], want.indices)


def test_the_quick_product_is_float32_and_leaves_no_trace() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    u, W = numbers(64, 300), numbers(1_024, 300, seed=1) / 300**0.5
    with ops_cpu.quick_product(u, W):
        chosen = torch.get_float32_matmul_precision()
        found = u @ W.T
    assert torch.get_float32_matmul_precision() == "highest"
    assert chosen == ("medium" if ops_cpu._medium_is_float32(300) else "highest")
    assert float((found.double() - u.double() @ W.double().T).square().mean().sqrt()) < ops_cpu.PROBE_RMS
    with pytest.raises(RuntimeError, match="boom"), ops_cpu.quick_product(u, W):
        raise RuntimeError("boom")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_processor_that_rounds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AMX "medium" means bfloat16 operands: that must fail the probe."""
    real = torch.Tensor.__matmul__

    def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if torch.get_float32_matmul_precision() == "medium":
            a, b = a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype)
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    ops_cpu._medium_is_float32.cache_clear()
    try:
        assert not ops_cpu._medium_is_float32(300)
        with ops_cpu.quick_product(numbers(2, 300), numbers(1_024, 300)):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        ops_cpu._medium_is_float32.cache_clear()


def test_double_and_small_products_stay_as_they_are() -> None:
    for u, W in ((numbers(4, 300).double(), numbers(1_024, 300).double()), (numbers(4, 8), numbers(16, 8))):
        with ops_cpu.quick_product(u, W):
            assert torch.get_float32_matmul_precision() == "highest"


def test_a_bfloat16_product_changes_few_latents_and_little_of_their_values() -> None:
    u, W, b = numbers(300, 576), numbers(2_304, 576, seed=1) / 24, numbers(1, 2_304, seed=2)[0] / 10
    exact, found = ops.encode_topk(u, None, W, b, 32), ops.encode_topk(u, None, W, b, 32, dtype=torch.bfloat16)
    assert found.values_NK.dtype == torch.float32
    dense = [ops.to_dense(codes, 2_304) for codes in (exact, found)]
    common = (dense[0] > 0) & (dense[1] > 0)
    share = float(common.sum()) / (300 * 32)
    assert 0.95 < share < 0.999, "other latents are picked where values nearly tie, and only there"
    assert float(((dense[1] - dense[0]) / dense[0])[common].abs().max()) < 2**-6
    assert all(len(set(row)) == 32 for row in found.indices_NK.tolist())


def test_gradients_of_a_bfloat16_product_are_those_of_the_latents_it_picked() -> None:
    drawn = numbers(40, 96), numbers(1, 96)[0], numbers(512, 96, 1) / 10, numbers(1, 512)[0]
    leaves = [t.clone().requires_grad_() for t in drawn]
    found = ops.encode_topk(*leaves, 8, dtype=torch.bfloat16)
    weights = numbers(40, 8, seed=3)
    got = torch.autograd.grad((found.values_NK * weights).sum(), leaves)
    n, b_pre, W, b = leaves
    dense = ((n - b_pre) @ W.T + b).gather(1, found.indices_NK)
    want = torch.autograd.grad((torch.where(found.values_NK > 0, dense, 0.0) * weights).sum(), leaves)
    for a, z in zip(got, want, strict=True):
        torch.testing.assert_close(a, z, rtol=1e-4, atol=1e-5)
