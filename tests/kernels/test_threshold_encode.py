"""The threshold encoder of sae_kernels against dense float64; on a CPU under Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
te = pytest.importorskip("sae_kernels.threshold_encode")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
BULK = not CUDA or torch.cuda.get_device_capability() >= (9, 0)
SHAPES = {  # N, D, F, type, path
    "float32": (5, 20, 300, torch.float32, "B"), "one latent": (3, 7, 1, torch.float32, "B"),
    "whole tiles": (2, 16, 256, torch.float32, "B"), "one channel": (4, 1, 33, torch.float16, "B"),
    "bfloat16 in blocks": (3, 100, 130, torch.bfloat16, "B"), "bfloat16 fused": (5, 24, 300, torch.bfloat16, "A"),
    "float16 fused": (3, 72, 129, torch.float16, "A"), "float16 in blocks": (3, 72, 129, torch.float16, "B"),
}  # fmt: skip
LIMIT = 1e-5


def operands(n: int, d: int, f: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, W, b, bar; about one latent in six is above its bar."""
    g = torch.Generator().manual_seed(n * 1_000 + d * 10 + f)
    u, W = torch.randn(n, d, generator=g), torch.randn(f, d, generator=g) / d**0.5
    b, bar = torch.randn(f, generator=g) * 0.1, torch.rand(f, generator=g) + 0.5
    return u.to(dtype).to(DEVICE), W.to(dtype).to(DEVICE), b.to(DEVICE), bar.to(DEVICE)


def assert_is_dense(found: "te.Sparse", u: Tensor, W: Tensor, b: Tensor, bar: Tensor) -> None:
    """The entries are those of a dense product in float64, in order. Sums in float32 may differ within LIMIT of a bar:
    an entry there may be on either side."""
    h = u.double() @ W.double().T + b.double()
    scale = max(1.0, float(h[h.isfinite()].abs().max())) if h.numel() else 1.0
    got = torch.zeros_like(h, dtype=torch.bool)
    tokens = torch.repeat_interleave(torch.arange(len(u), device=DEVICE), found.offsets_N1.diff())
    place = tokens * len(W) + found.indices_E
    assert bool((place.diff() > 0).all()), "in the order of (token, latent), each once"
    got.view(-1)[place] = True
    settled = (h - bar).abs() > LIMIT * scale
    assert torch.equal(got[settled], (h > bar)[settled])
    assert found.values_E.dtype == torch.float32 and int(found.offsets_N1[-1]) == len(found.values_E)
    assert torch.allclose(found.values_E.double(), h[got], atol=LIMIT * scale, rtol=0)
    assert bool((found.values_E >= bar[found.indices_E]).all())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_entries_equal_dense_float64(shape: tuple, nan_filled: None) -> None:
    *sizes, dtype, path = shape
    if path == "A" and not BULK:
        pytest.skip("needs tensor descriptors")
    made = operands(*sizes, dtype)
    found = te.encode_threshold(*made, path=path)
    assert len(found.values_E) > 0 or sizes[2] == 1
    assert_is_dense(found, *made)
    assert all(map(torch.equal, te.encode_threshold(*made, path=path), found))


def test_many_blocks_slabs_and_walks(monkeypatch: pytest.MonkeyPatch, nan_filled: None) -> None:
    made = operands(7, 12, 700, torch.float32)
    whole = te.encode_threshold(*made)
    monkeypatch.setattr(te, "BLOCK_ROWS", 2)
    monkeypatch.setattr(te, "BLOCK_LATENTS", 256)
    monkeypatch.setattr(te, "WORD_BYTES", 3 * 4 * 24)  # slabs of three tokens
    monkeypatch.setattr(te, "MAX_WALK", 8)
    monkeypatch.setattr(te, "WORDS", 4)
    found = te.encode_threshold(*made)
    assert_is_dense(found, *made)
    assert torch.equal(found.offsets_N1, whole.offsets_N1) and torch.equal(found.indices_E, whole.indices_E)
    assert torch.equal(found.values_E, whole.values_E)


@pytest.mark.skipif(not BULK, reason="needs tensor descriptors")
def test_many_row_blocks_and_groups_of_the_fused_path(nan_filled: None) -> None:
    made = operands(300 if CUDA else 37, 16, 300, torch.float16)
    small = te.FUSED._replace(rows=64 if CUDA else 16, group=2)
    assert_is_dense(te.encode_threshold(*made, path="A", fused=small), *made)


@pytest.mark.parametrize("path", ["A", "B"])
def test_all_and_none_above(path: str, nan_filled: None) -> None:
    if path == "A" and not BULK:
        pytest.skip("needs tensor descriptors")
    u, W, b, bar = operands(3, 8, 150, torch.bfloat16)
    every = te.encode_threshold(u, W, b, torch.full_like(bar, -torch.inf), path=path)
    assert every.offsets_N1.tolist() == [0, 150, 300, 450]
    assert torch.equal(every.indices_E, torch.arange(150, device=DEVICE).repeat(3))
    none = te.encode_threshold(u, W, b, torch.full_like(bar, torch.inf), path=path)
    assert none.offsets_N1.tolist() == [0] * 4 and len(none.values_E) == len(none.indices_E) == 0


@pytest.mark.parametrize("path", ["A", "B"])
def test_a_value_at_the_bar_is_not_above_it(path: str) -> None:
    if path == "A" and not BULK:
        pytest.skip("needs tensor descriptors")
    u = torch.ones(2, 8, dtype=torch.float16, device=DEVICE)
    W = torch.ones(40, 8, dtype=torch.float16, device=DEVICE)
    b = torch.arange(40, dtype=torch.float32, device=DEVICE)  # h = 8 + latent, exact
    found = te.encode_threshold(u, W, b, torch.full((40,), 8.0 + 31, device=DEVICE), path=path)
    assert found.indices_E.tolist() == list(range(32, 40)) * 2
    assert found.values_E.tolist() == [40.0 + i for i in range(8)] * 2


@pytest.mark.parametrize("path", ["A", "B"])
def test_nan_and_infinity_stay_in_their_token(path: str) -> None:
    if path == "A" and not BULK:
        pytest.skip("needs tensor descriptors")
    u, W, b, bar = operands(4, 8, 140, torch.bfloat16)
    clean = te.encode_threshold(u, W, b, bar, path=path)
    u[1, 3], u[2, 0] = torch.nan, torch.inf
    found = te.encode_threshold(u, W, b, bar, path=path)
    counts = found.offsets_N1.diff().tolist()
    assert counts[1] == 140 and bool(found.values_E[counts[0] : counts[0] + 140].isnan().all())
    assert counts[2] == int((W[:, 0] > 0).sum()), "latents past the last one do not count"
    for token in (0, 3):
        a, b_ = (s.values_E[s.offsets_N1[token] : s.offsets_N1[token + 1]] for s in (clean, found))
        assert torch.equal(a, b_)


def test_no_tokens() -> None:
    u, W, b, bar = operands(0, 8, 40, torch.float32)
    found = te.encode_threshold(u, W, b, bar)
    assert found.offsets_N1.tolist() == [0] and found.values_E.shape == found.indices_E.shape == (0,)


def test_unsupported_operands_are_named() -> None:
    u, W, b, bar = operands(3, 8, 40, torch.float32)
    with pytest.raises(TypeError, match="float64"):
        te.encode_threshold(u.double(), W.double(), b, bar)
    with pytest.raises(TypeError, match="bfloat16"):
        te.encode_threshold(u.bfloat16(), W, b, bar)
    with pytest.raises(TypeError, match="bar must be float32"):
        te.encode_threshold(u, W, b, bar.half())
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        te.encode_threshold(u[:, :7].contiguous(), W, b, bar)
    with pytest.raises(ValueError, match=r"bar \(39,\)"):
        te.encode_threshold(u, W, b, bar[:39].contiguous())
    with pytest.raises(ValueError, match="contiguous"):
        te.encode_threshold(u, W.t().contiguous().t(), b, bar)
    with pytest.raises(ValueError, match="16384"):
        te.encode_threshold(*(torch.zeros(5, 20_000, device=DEVICE) for _ in range(2)), b[:5], bar[:5])
    with pytest.raises(ValueError, match="path A wants 16-bit"):
        te.encode_threshold(u, W, b, bar, path="A")
    with pytest.raises(ValueError, match="path must be"):
        te.encode_threshold(u, W, b, bar, path="C")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize(("d", "f", "dtype"), [
    (576, 4_608, torch.float32), (768, 32_768, torch.bfloat16), (768, 33_000, torch.float16),
    (2_304, 32_768, torch.bfloat16), (4_096, 131_072, torch.bfloat16), (100, 5_000, torch.bfloat16),
])  # fmt: skip
def test_entries_at_full_size_and_twenty_runs(d: int, f: int, dtype: torch.dtype) -> None:
    u, W, b, bar = operands(1_000, d, f, dtype)
    bar = bar + 2.0
    found = te.encode_threshold(u, W, b, bar)
    assert_is_dense(found, u, W, b, bar)
    for _ in range(20):
        assert all(map(torch.equal, te.encode_threshold(u, W, b, bar), found))
    if d % 8 == 0 and dtype != torch.float32:
        assert_is_dense(te.encode_threshold(u, W, b, bar, path="B"), u, W, b, bar)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_memory_is_a_small_part_of_the_pre_activations() -> None:
    u, W, b, bar = operands(16_384, 256, 32_768, torch.bfloat16)
    bar = bar + 2.5
    te.encode_threshold(u, W, b, bar)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    te.encode_threshold(u, W, b, bar)
    assert torch.cuda.max_memory_allocated() - before < 4 * 16_384 * 32_768 / 10
