"""The top-K encoder of sae_kernels against dense float64; on a CPU under Triton's interpreter (tests/conftest.py)."""

import math
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
te = pytest.importorskip("sae_kernels.topk_encode")
ts = pytest.importorskip("sae_kernels.topk_select")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
SMALL = te.Fused(16, 16, 1, 1)
TRUNCATED, GATHERED = 3e-5, 2e-6
"""Limits on values relative to the largest of the row: of keys, and of float32 dot products."""
SHAPES = {  # N, D, F, K, BN
    "F not whole tiles": (5, 48, 250, 3, 32), "D not whole steps": (3, 100, 128, 4, 16), "one slot": (1, 20, 70, 1, 16),
    "odd": (17, 33, 129, 2, 16), "one channel": (2, 1, 64, 2, 16), "K not a power of two": (4, 16, 256, 12, 16),
    "wide tile": (2, 16, 512, 4, 128), "one tile of padding": (2, 8, 17, 1, 32),
}  # fmt: skip


def operands(n: int, d: int, f: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """u, W_enc, b_enc; u and W rounded to ``dtype``."""
    g = torch.Generator().manual_seed(n * 10_000 + d * 100 + f)
    u, W = torch.randn(n, d, generator=g), torch.randn(f, d, generator=g) / d**0.5
    return u.to(dtype).to(DEVICE), W.to(dtype).to(DEVICE), (torch.randn(f, generator=g) * 0.1).to(DEVICE)


def whole(n: int, d: int, f: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of small whole numbers: every product is exact, and many pre-activations are equal."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randint(-2, 3, shape, generator=g).float().to(DEVICE) for shape in ((n, d), (f, d), (f,))]
    return made[0], made[1], made[2]


def pre_activations(u: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return u.double() @ W.double().T + b.double()


def encode(u: Tensor, W: Tensor, b: Tensor, k: int, bn: int = 16, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    return te.encode_topk(u, te.prepare(W, b, BN=bn), k, fused=None if CUDA else SMALL, **options)


def assert_largest(
    found: tuple[Tensor, Tensor, Tensor], h: Tensor, k: int, limit: float, rank: float = GATHERED
) -> None:
    """Values are those of the K largest of each row (within ``rank``), after ReLU, at the latents that are named."""
    values, indices, flags = found
    assert values.shape == indices.shape == (len(h), k) and flags.shape == (len(h),)
    assert (values.dtype, indices.dtype, flags.dtype) == (torch.float32, torch.int32, torch.int8)
    assert bool(((indices >= 0) & (indices < h.shape[1])).all())
    size = h.abs().amax(1, keepdim=True).clamp_min(1e-30)
    assert all(len(set(row)) == k for row in indices.tolist())
    at = h.gather(1, indices.long()).relu()
    assert float(((values - at).abs() / size).max()) <= limit
    want = torch.topk(h, k, dim=1).values.relu()
    assert float(((at.sort(1, descending=True).values - want).abs() / size).max()) <= rank


def dense_code(h: Tensor, k: int) -> Tensor:
    """z_NF by a stable sort: of equal values the lower latent wins."""
    kept = torch.sort(h, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(h).scatter_(1, kept, h.gather(1, kept).relu())


def code(values: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    return values.new_zeros(len(values), n_latents).scatter_add_(1, indices.long(), values).double()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN and impossible indices, so an element that no program wrote is seen."""
    real = torch.empty

    def empty(*size: object, **options: object) -> Tensor:
        made = real(*size, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-7)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("path", ["A", "B"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_largest_are_found(shape: tuple[int, ...], path: str, poisoned: None) -> None:
    n, d, f, k, bn = shape
    u, W, b = operands(n, d, f)
    h = pre_activations(u, W, b)
    exact = encode(u, W, b, k, bn, path=path, exact=True)
    assert_largest(exact, h, k, GATHERED)
    values, indices, flags = encode(u, W, b, k, bn, path=path)
    clear = flags == 0
    assert_largest((values[clear], indices[clear], flags[clear]), h[clear], k, TRUNCATED)


@pytest.mark.parametrize("path", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_sum_in_float32(dtype: torch.dtype, path: str, poisoned: None) -> None:
    u, W, b = operands(5, 48, 300, dtype)
    found = encode(u, W, b, 6, path=path, exact=True)
    assert_largest(found, pre_activations(u, W, b), 6, GATHERED)
    # 256 + 300 * 1: in bfloat16 each addition of 1 would be rounded away.
    u, W = torch.ones(1, 301, dtype=torch.bfloat16, device=DEVICE), torch.ones(64, 301, device=DEVICE).bfloat16()
    u[0, 0] = 256.0
    values, _, _ = encode(u, W, torch.zeros(64, device=DEVICE), 1, path=path, R=4)
    assert values.tolist() == [[556.0]]


@pytest.mark.parametrize("programs", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bulk_loads_give_what_pointers_give(dtype: torch.dtype, programs: int, poisoned: None) -> None:
    if CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    u, W, b = operands(37, 40, 250, dtype)  # neither whole blocks of rows nor whole steps of channels
    prepared = te.prepare(W, b, BN=16)
    fused = te.Fused(64, 32, 4, 2, 2) if CUDA else te.Fused(16, 16, 1, 1, 2)
    want = te.encode_topk(u, prepared, 5, path="A", fused=fused)
    found = te.encode_topk(u, prepared, 5, path="A", fused=fused._replace(bulk=True, programs=programs))
    assert all(map(torch.equal, found, want))
    with pytest.raises(ValueError, match="16 bytes"):
        te.encode_topk(u[:, :33].contiguous(), te.prepare(W[:, :33], b), 1, path="A", fused=fused._replace(bulk=True))


@pytest.mark.parametrize("path", ["A", "B", "C"])
def test_of_equal_values_the_lower_latent_wins_in_exact_mode(path: str, poisoned: None) -> None:
    u, W, b = whole(24, 6, 200)
    h = pre_activations(u, W, b)
    values, indices, flags = encode(u, W, b, 5, path=path, exact=True)
    assert torch.equal(code(values, indices, 200), dense_code(h, 5))
    if path != "C":
        assert int((flags != 0).sum()) > 12, "the case has boundary ties"


@pytest.mark.parametrize("path", ["A", "B"])
def test_without_a_flag_the_set_is_exact(path: str) -> None:
    """Products are exact here and keys too (few bits), so 0 tokens with flag 0 may differ, and flags are not idle."""
    seen = set()
    for seed, r in ((1, 1), (2, 2), (3, 4), (4, 8)):
        u, W, b = whole(40, 5, 320, seed)
        b = b * torch.arange(320, device=DEVICE).remainder(7)
        values, indices, flags = encode(u, W, b, 4, path=path, R=max(r, 1), bn=16)
        h, clear = pre_activations(u, W, b), flags == 0
        assert torch.equal(code(values, indices, 320)[clear], dense_code(h, 4)[clear])
        seen |= set(flags.tolist())
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("path", ["A", "B"])
def test_winners_of_one_tile_are_flagged_and_settled(path: str) -> None:
    u, W, b = operands(4, 16, 320)  # 20 tiles of 16: latents 3, 23, 43, ... share tile 3
    b[3::20] += 50.0
    values, indices, flags = encode(u, W, b, 10, path=path)
    assert flags.tolist() == [ts.HIDDEN] * 4
    assert_largest(encode(u, W, b, 10, path=path, exact=True), pre_activations(u, W, b), 10, GATHERED)


@pytest.mark.parametrize("path", ["A", "B"])
def test_a_dictionary_whose_prefix_is_heavy_needs_no_second_look(path: str) -> None:
    u, W, b = operands(6, 16, 512)
    b[:32] += 50.0  # all winners among the first 32 latents; tiles of neighbours would hold them in two
    found = encode(u, W, b, 16, path=path, R=4)
    assert found[2].tolist() == [0] * 6
    assert_largest(found, pre_activations(u, W, b), 16, TRUNCATED)


@pytest.mark.parametrize("path", ["A", "B", "C"])
def test_fewer_positive_values_than_slots(path: str, poisoned: None) -> None:
    u, W, b = operands(4, 16, 256)
    b[:] = -50.0
    values, indices, flags = encode(u, W, b, 4, path=path)
    assert float(values.abs().max()) == 0.0 and flags.tolist() == [0] * 4
    b[[3, 40, 200]] = 50.0
    values, indices, flags = encode(u, W, b, 4, path=path)
    assert [sorted(i for v, i in zip(*row, strict=True) if v > 0) for row in zip(values.tolist(), indices.tolist(),
            strict=True)] == [[3, 40, 200]] * 4  # fmt: skip
    assert flags.tolist() == [0] * 4


@pytest.mark.parametrize("path", ["A", "B", "C"])
def test_constant_rows_and_empty_inputs(path: str, poisoned: None) -> None:
    W, b = torch.ones(256, 8, device=DEVICE), torch.zeros(256, device=DEVICE)
    u = torch.tensor([[1.0], [0.0], [-1.0]], device=DEVICE).expand(3, 8).contiguous()
    values, indices, flags = encode(u, W, b, 4, path=path, exact=True)
    assert values.tolist() == [[8.0] * 4, [0.0] * 4, [0.0] * 4]
    assert sorted(indices[0].tolist()) == [0, 1, 2, 3]
    values, indices, flags = encode(u[:0], W, b, 4, path=path)
    assert values.shape == indices.shape == (0, 4) and flags.shape == (0,)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("path", ["A", "B", "C"])
def test_nan_and_infinity_reach_the_loss(path: str, exact: bool, poisoned: None) -> None:
    u, W, b = operands(4, 16, 250)
    u[1, 3] = math.nan
    u[2, 5] = math.inf
    values, indices, flags = encode(u, W, b, 4, path=path, exact=exact)
    assert bool(values[1].isnan().all()) and int(flags[1]) == ts.HIDDEN
    assert not bool(values[2].isfinite().all())
    assert bool(((indices >= 0) & (indices < 250)).all())
    fine = torch.tensor([0, 3], device=DEVICE)
    assert_largest((values[fine], indices[fine], flags[fine]), pre_activations(u, W, b)[fine], 4, TRUNCATED)
    if exact:
        assert bool((values[2] == math.inf).all())
        assert indices[2].sort().values.tolist() == (W[:, 5] > 0).nonzero()[:4, 0].tolist()


@pytest.mark.parametrize("k", [1, 60, 77])
def test_many_slots_go_through_torch_topk(k: int, poisoned: None) -> None:
    u, W, b = operands(5, 12, 77)
    assert te.plan(77, 12, k, bn=64).path == ("B" if k == 1 else "C")
    assert_largest(encode(u, W, b, k, bn=64, exact=True), pre_activations(u, W, b), k, GATHERED)


@pytest.mark.parametrize("path", ["B", "C"])
def test_more_than_512_slots(path: str, poisoned: None) -> None:
    n, k, f = 2, 600, 4_864
    u, W, b = operands(n, 6, f)
    h = pre_activations(u, W, b)
    found = encode(u, W, b, k, path=path, exact=True)
    assert_largest(found, h, k, 1e-5, rank=1e-5)
    quick = encode(u, W, b, k, path=path)  # what is not exact is flagged
    exact = code(found[0], found[1], f)
    for token in range(n):
        same = (code(quick[0], quick[1], f)[token] - exact[token]).abs().max() <= 2e-5 * float(h.abs().max())
        assert bool(same) or int(quick[2][token]) != te.topk_select.EXACT


@pytest.mark.parametrize("path", ["A", "B"])
def test_slabs_blocks_and_slices_of_any_size_give_the_same(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    u, W, b = operands(7, 20, 330)
    one = encode(u, W, b, 5, path=path)
    monkeypatch.setattr(te, "CANDIDATE_BYTES", 3 * 4 * 21 * 4)  # three tokens
    monkeypatch.setattr(te, "BLOCK_ROWS", 2)
    monkeypatch.setattr(te, "BLOCK_LATENTS", 160)
    monkeypatch.setattr(ts, "MAX_SLICE", 64)  # 84 candidates in slices of 32
    many = encode(u, W, b, 5, path=path)
    near = torch.allclose(one[0], many[0], rtol=2e-5, atol=0) if path == "B" else torch.equal(one[0], many[0])
    assert near and torch.equal(one[1], many[1]) and torch.equal(one[2], many[2])


def test_prepared_weights_are_refreshed_in_place() -> None:
    _, W, b = operands(1, 8, 77)
    prepared = te.prepare(torch.zeros_like(W), torch.zeros_like(b), BN=16, dtype=torch.bfloat16)
    prepared.refresh(W, b)
    fresh = te.prepare(W, b, BN=16, dtype=torch.bfloat16)
    assert torch.equal(prepared.W_PD, fresh.W_PD) and torch.equal(prepared.b_P, fresh.b_P)
    n_tiles = prepared.n_tiles
    rows = torch.tensor([(f % n_tiles) * 16 + f // n_tiles for f in range(77)], device=DEVICE)
    assert n_tiles == 5 and torch.equal(prepared.W_PD[rows], W.bfloat16()) and torch.equal(prepared.b_P[rows], b)
    padding = torch.ones(80, dtype=torch.bool, device=DEVICE)
    padding[rows] = False
    assert float(prepared.W_PD[padding].abs().max()) == 0.0 and bool((prepared.b_P[padding] == -math.inf).all())
    with pytest.raises(ValueError, match=r"\(77, 8\)"):
        prepared.refresh(W[:5], b[:5])


def test_the_plan_names_path_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "FUSED_MAX_WIDTH", 0)
    assert te.plan(32_768, 768, 32) == te.Plan("B", 4, "256 tiles of 4 candidates, product by cuBLAS in blocks")
    assert te.plan(32_768, 768, 32, exact=True).candidates == 8
    assert te.plan(4_608, 576, 32).candidates == 8, "few tiles: four candidates would miss too often"
    few = te.plan(4_608, 576, 128)
    assert few.path == "C" and "4 K = 512" in few.reason
    assert te.plan(32_768, 768, 32, path="A").path == "A"
    monkeypatch.setattr(te, "FUSED_MAX_WIDTH", 1_024)
    assert te.plan(32_768, 768, 32, bulk=True).path == "A" and te.plan(32_768, 1_025, 32, bulk=True).path == "B"
    assert te.plan(32_768, 768, 32).path == "B", "float32 and older GPUs: not measured to be faster"
    for arguments, match in (((64, 8, 0), "1..64"), ((64, 8, 65), "1..64")):
        with pytest.raises(ValueError, match=match):
            te.plan(*arguments)
    for options, match in (({"path": "D"}, "'D'"), ({"R": 3}, "power of two"), ({"path": "A", "R": 1}, "path C")):
        with pytest.raises(ValueError, match=match):
            te.plan(128, 8, 4, **options)


def test_missed_share_agrees_with_a_count() -> None:
    """A union bound: at least the simulated share, and close to it where the share is small."""
    tiles = torch.rand(20_000, 2_048, generator=torch.Generator().manual_seed(0)).topk(16, dim=1).indices % 16
    counts = torch.zeros(20_000, 16).scatter_add_(1, tiles, torch.ones(20_000, 16))
    for r in (4, 5):
        share = float((counts.amax(1) > r).double().mean())
        assert share * 0.9 <= te.missed_share(16, 16, r) <= share * 1.3
    assert te.missed_share(1, 5, 4) == 1.0 and te.missed_share(1, 4, 4) == 0.0


def test_unsupported_operands_are_named() -> None:
    u, W, b = operands(3, 8, 64)
    prepared = te.prepare(W, b, BN=16)
    for call, kind, match in (
        (lambda: te.prepare(W.double(), b), TypeError, "float64"),
        (lambda: te.prepare(W, b[:5]), ValueError, r"\(5,\)"),
        (lambda: te.prepare(W, b, BN=48), ValueError, "48"),
        (lambda: te.prepare(torch.zeros(2, 20_000, device=DEVICE), b[:2]), ValueError, "16384"),
        (lambda: te.encode_topk(u.bfloat16(), prepared, 2), TypeError, "bfloat16"),
        (lambda: te.encode_topk(u[:, :5], prepared, 2), ValueError, r"\(3, 5\)"),
        (lambda: te.encode_topk(u.t().contiguous().t(), prepared, 2), ValueError, "contiguous"),
        (lambda: te.encode_topk(u, prepared, 65), ValueError, r"1\.\.64"),
        (lambda: te.encode_topk(u, prepared, 0), ValueError, r"1\.\.64"),
        (lambda: te.encode_topk(torch.empty(2**28, 8, device="meta"), prepared, 8), ValueError, "2\\^31|one device"),
    ):
        with pytest.raises(kind, match=match):
            call()


def big(dtype: torch.dtype, n: int = 8_192, f: int = 32_768, d: int = 768) -> tuple[Tensor, object]:
    g = torch.Generator(DEVICE).manual_seed(0)
    u = torch.randn(n, d, generator=g, device=DEVICE).to(dtype)
    W = torch.randn(f, d, generator=g, device=DEVICE) / d**0.5
    return u, te.prepare(W, torch.randn(f, generator=g, device=DEVICE) * 0.1, dtype=dtype)


def natural(prepared: object) -> tuple[Tensor, Tensor]:
    """W_enc and b_enc in the order of latents."""
    n_tiles, f = prepared.n_tiles, prepared.n_latents  # type: ignore[attr-defined]
    latents = torch.arange(f, device=DEVICE)
    rows = (latents % n_tiles) * prepared.tile + latents // n_tiles  # type: ignore[attr-defined]
    return prepared.W_PD[rows], prepared.b_P[rows]  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("path", ["A", "B", "C"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_sizes_against_float64(dtype: torch.dtype, path: str) -> None:
    u, prepared = big(dtype)
    values, indices, flags = te.encode_topk(u, prepared, 32, path=path)
    exact = te.encode_topk(u, prepared, 32, path=path, exact=True)
    assert float((flags != 0).double().mean()) < 0.02 and float((exact[2] != 0).double().mean()) < 0.02
    W, b = natural(prepared)
    wrong, inexact = 0, 0
    for start in range(0, len(u), 512):
        rows = slice(start, start + 512)
        h = pre_activations(u[rows], W, b)
        size, want = h.abs().amax(1, keepdim=True), torch.topk(h, 32, dim=1).values
        for (v, i), limit, clear in (
            ((values[rows], indices[rows]), TRUNCATED, flags[rows] == 0),
            ((exact[0][rows], exact[1][rows]), 5e-6, torch.ones_like(flags[rows], dtype=torch.bool)),
        ):
            at = h.gather(1, i.long())
            assert float(((v - at.relu()).abs() / size).max()) <= limit
            off = ((at.sort(1, descending=True).values - want).abs() / size).amax(1) > 1e-5
            inexact += int(off.sum())
            wrong += int((off & clear).sum())
    assert wrong == 0 and inexact < 0.01 * len(u)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("path", ["A", "B", "C"])
def test_twenty_runs_give_the_same_bits(path: str) -> None:
    """The interpreter runs one program after another and cannot show a race."""
    u, prepared = big(torch.bfloat16, n=4_100)
    first = te.encode_topk(u, prepared, 32, path=path)
    for _ in range(20):
        assert all(map(torch.equal, te.encode_topk(u, prepared, 32, path=path), first))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_the_fused_encoder_never_holds_the_pre_activations() -> None:
    u, prepared = big(torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    te.encode_topk(u, prepared, 32, path="A")
    assert torch.cuda.max_memory_allocated() - before < 8_192 * 32_768 * 4 / 10


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize(("d", "f", "k"), [(576, 4_608, 32), (2_304, 16_384, 64), (4_096, 131_072, 64),
                                           (64, 1_048_576, 32), (100, 5_000, 12)])  # fmt: skip
def test_other_widths(d: int, f: int, k: int) -> None:
    u, prepared = big(torch.bfloat16, n=513, f=f, d=d)
    W, b = natural(prepared)
    h = pre_activations(u[:65], W, b)
    for path in ("A", "B"):
        values, indices, flags = te.encode_topk(u, prepared, k, path=path, exact=True)
        assert_largest((values[:65], indices[:65], flags[:65]), h, k, 1e-5, rank=1e-5)
