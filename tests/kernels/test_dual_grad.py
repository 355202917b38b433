"""Both weight gradients in one pass against dense float64; on a CPU under Triton's interpreter (tests/conftest.py)."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
launch = pytest.importorskip("sae_kernels.launch")
from sae_kernels import dual_grad  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(n: int, k: int, f: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Operands:
    """(indices with repetitions, coef_dec with a third of zeros, r, coef_enc, u); rows rounded to ``dtype``."""
    g = torch.Generator().manual_seed(seed + 1_000 * n + 100 * k + f + d)
    coef_dec = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.33)
    coef_enc = torch.randn(n, k, generator=g) * (coef_dec != 0)
    r, u = (torch.randn(n, d, generator=g).to(dtype) for _ in range(2))
    made = torch.randint(f, (n, k), generator=g, dtype=torch.int32), coef_dec, r, coef_enc, u
    return tuple(t.to(DEVICE) for t in made)  # type: ignore[return-value]


def dense(indices: Tensor, coef_dec: Tensor, r: Tensor, coef_enc: Tensor, u: Tensor, f: int) -> list[Tensor]:
    """The three gradients through N x F matrices, float64."""
    z_dec, z_enc = (
        torch.zeros(len(r), f, dtype=torch.float64, device=r.device).scatter_add(1, indices.long(), c.double())
        for c in (coef_dec, coef_enc)
    )
    return [z_dec.t() @ r.double(), z_enc.t() @ u.double(), z_enc.sum(0)]


def by_triton(made: Operands, f: int, into: dual_grad.DualGradient | None = None) -> dual_grad.DualGradient:
    indices, coef_dec, r, coef_enc, u = made
    return dual_grad.dual_gradient(dual_grad.worklist(coef_dec, indices, f), coef_dec, r, coef_enc, u, into)


def assert_near(got: dual_grad.DualGradient, want: list[Tensor], limit: float) -> None:
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape and bool(torch.isfinite(a).all()), name
        error = float((a.double() - b).abs().max()) / max(float(b.abs().max()), 1e-12)
        assert error <= limit, f"{name} is off by {error:.2g}, at most {limit:g}"


SHAPES = {  # N, K, F, D
    "odd": (3, 5, 17, 23), "one slot": (4, 1, 9, 48), "all latents": (3, 7, 7, 100), "one token": (1, 4, 8, 16),
    "three column blocks": (3, 2, 5, 576), "many latents without entries": (2, 3, 60, 20),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_equal_dense_float64(shape: tuple[int, int, int, int], nan_filled: None) -> None:
    made = operands(*shape)
    assert_near(by_triton(made, shape[2]), dense(*made, shape[2]), LIMIT[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_sum_in_float32(dtype: torch.dtype, nan_filled: None) -> None:
    made = operands(5, 6, 11, 24, dtype)
    assert_near(by_triton(made, 11), dense(*made, 11), 1e-5)  # only the rows are rounded, and both see them rounded


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("pattern", ["one hot latent", "all on one", "borders", "two hot"])
def test_latents_of_several_pieces(
    pattern: str, chunk: int, nan_filled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads and pieces meet at multiples of CHUNK: a latent that begins or ends there, or spans over ten of them."""
    monkeypatch.setattr(launch, "CHUNK", chunk)
    n, k, f, d = 24, 4, 6, 19
    indices, coef_dec, r, coef_enc, u = operands(n, k, f, d)
    if pattern == "one hot latent":
        indices[:, :3] = 2
    elif pattern == "all on one":
        indices[:] = 3
        coef_dec[:], coef_enc[:] = coef_dec + 0.1, coef_enc + 0.1  # no empty slot: the last piece ends the array
    elif pattern == "borders":  # runs of exactly 8 and 16 entries, none empty
        indices.view(-1).copy_(torch.tensor([0] * 8 + [1] * 16 + [3] * 8 + [4] * 64, device=indices.device))
        coef_dec[:], coef_enc[:] = coef_dec + 0.1, coef_enc + 0.1
    else:
        indices[::2], indices[1::2] = 1, 2
    made = (indices, coef_dec, r, coef_enc, u)
    assert_near(by_triton(made, f), dense(*made, f), 1e-5)


def test_accumulation_over_micro_batches_equals_the_whole(nan_filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", 8)
    whole = operands(12, 4, 5, 20)
    first, second = tuple(t[:7].contiguous() for t in whole), tuple(t[7:].contiguous() for t in whole)
    got = by_triton(first, 5)  # type: ignore[arg-type]
    again = by_triton(second, 5, into=got)  # type: ignore[arg-type]
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(got, again, strict=True)), "in place"
    assert_near(again, dense(*whole, 5), 1e-5)


def test_a_latent_without_entries_keeps_what_it_had() -> None:
    made = operands(2, 2, 3, 8)
    made[0].fill_(1)
    earlier = dual_grad.DualGradient(*(torch.ones(s, device=DEVICE) for s in ((3, 8), (3, 8), (3,))))
    got = by_triton(made, 3, into=earlier)
    for tensor in got:
        assert bool((tensor[[0, 2]] == 1).all())


@pytest.mark.parametrize(("n", "k"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_sum_gives_zeros(n: int, k: int, nan_filled: None) -> None:
    got = by_triton(operands(n, k, 5, 6), 5)
    assert [t.tolist() for t in got] == [[[0.0] * 6] * 5, [[0.0] * 6] * 5, [0.0] * 5]


@pytest.mark.parametrize("f", [2**16 - 1, 2**16])
def test_both_key_types_find_the_first_and_the_last_latent(f: int) -> None:
    indices = torch.tensor([[0, f - 1], [f - 1, 40_000], [77, 0]], dtype=torch.int32, device=DEVICE)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 5.0]], device=DEVICE)
    work = dual_grad.worklist(values, indices, f)
    bounds = work.bounds_F1
    assert work.entries_E[: int(bounds[1])].tolist() == [0, 5], "latent 0, in the order of tokens"
    assert work.entries_E[int(bounds[40_000]) : int(bounds[40_001])].tolist() == [3]
    assert work.entries_E[int(bounds[f - 1]) : int(bounds[f])].tolist() == [1, 2]
    assert int(bounds[f]) == 5 and int(bounds[77]) == int(bounds[78]), "the empty slot is in no latent"


def test_single_gradient_and_equal_bits() -> None:
    indices, coef, r, coef_enc, u = made = operands(6, 4, 9, 40)
    work = dual_grad.worklist(coef, indices, 9)
    first = dual_grad.dual_gradient(work, coef, r, coef_enc, u)
    assert torch.equal(dual_grad.single_gradient(work, coef, r), first.W_dec_FD)
    assert all(map(torch.equal, by_triton(made, 9), first))
    longer = dual_grad.worklist(coef != 0, indices.long(), 9)
    assert torch.equal(dual_grad.single_gradient(longer, coef, r), first.W_dec_FD)


def test_unsupported_operands_are_named() -> None:
    indices, coef_dec, r, coef_enc, u = operands(4, 3, 5, 6)
    work = dual_grad.worklist(coef_dec, indices, 5)
    with pytest.raises(TypeError, match="float64"):
        dual_grad.dual_gradient(work, coef_dec, r.double(), coef_enc, u)
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        dual_grad.dual_gradient(work, coef_dec[:, :2].contiguous(), r, coef_enc, u)
    with pytest.raises(ValueError, match="contiguous"):
        dual_grad.dual_gradient(work, coef_dec, r.t().contiguous().t(), coef_enc, u)
    with pytest.raises(ValueError, match="12 slots"):
        dual_grad.dual_gradient(work, coef_dec[:2], r[:2], coef_enc[:2], u[:2])
    with pytest.raises(ValueError, match="16384"):
        dual_grad.single_gradient(work, coef_dec, torch.zeros(4, 20_000, device=DEVICE))
    with pytest.raises(ValueError, match="add to"):
        dual_grad.dual_gradient(
            work, coef_dec, r, coef_enc, u, dual_grad.DualGradient(*(torch.ones(2, device=DEVICE),) * 3)
        )
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        dual_grad.worklist(coef_dec[:3], indices, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_result_of_16_bits_is_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", 4)  # a latent on every token: a head and pieces
    g = torch.Generator().manual_seed(3)
    indices = torch.randint(4, (13, 3), generator=g).to(DEVICE)
    indices[:, 0] = 2
    coef, rows = torch.rand(13, 3, generator=g).to(DEVICE), torch.randn(13, 20, generator=g).to(DEVICE)
    work = dual_grad.worklist(coef, indices, 5)
    wide, narrow = dual_grad.single_gradient(work, coef, rows), dual_grad.single_gradient(work, coef, rows, dtype)
    assert narrow.dtype == dtype
    # The interpreter cuts float32 to bfloat16 where a GPU rounds.
    assert torch.allclose(narrow.float(), wide.to(dtype).float(), rtol=0 if CUDA else 2**-7, atol=0)


@pytest.mark.parametrize("offsets", [[0, 2, 3, 7], [0, 0, 0, 7], [0, 9, -4, 30]])
def test_tokens_of_entries_are_tokens_whatever_the_offsets_are(offsets: list[int]) -> None:
    given = torch.tensor(offsets, device=DEVICE)
    tokens = dual_grad.tokens_of(given, 7)
    assert tokens.dtype == torch.int32 and bool(((tokens >= 0) & (tokens < 3)).all())
    if offsets[-1] == 7:
        assert torch.equal(tokens.long(), torch.repeat_interleave(torch.arange(3, device=DEVICE), given.diff()))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize(("d", "f", "dtype"), [
    (768, 32_768, torch.bfloat16), (2_304, 16_384, torch.float32), (576, 32_768, torch.float16),
])  # fmt: skip
def test_real_sizes_hot_latents_and_twenty_equal_runs(d: int, f: int, dtype: torch.dtype) -> None:
    """The interpreter runs one program after another and cannot show a race."""
    g = torch.Generator(device="cuda").manual_seed(0)
    n, k = 8_192, 32
    indices = torch.randint(f, (n, k), generator=g, device="cuda", dtype=torch.int32)
    indices[: n // 3, 0] = 7  # fires on a third of the tokens
    coef_dec, coef_enc = (torch.rand(n, k, generator=g, device="cuda") for _ in range(2))
    r, u = (torch.randn(n, d, generator=g, device="cuda").to(dtype) for _ in range(2))
    made = (indices, coef_dec, r, coef_enc, u)
    first = by_triton(made, f)
    want = [
        torch.zeros(f, d, dtype=torch.float64, device="cuda") for _ in range(2)
    ]
    tokens = torch.arange(n, device="cuda").repeat_interleave(k)
    for out, c, rows in ((want[0], coef_dec, r), (want[1], coef_enc, u)):
        for at in torch.arange(n * k, device="cuda").split(2**16):  # [E, D] of float64 in parts
            out.index_add_(0, indices.view(-1)[at].long(), c.view(-1)[at, None].double() * rows[tokens[at]].double())
    bias = torch.zeros(f, dtype=torch.float64, device="cuda")
    bias.index_add_(0, indices.view(-1).long(), coef_enc.view(-1).double())
    assert_near(first, [*want, bias], 1e-5)
    for _ in range(20):
        assert all(map(torch.equal, by_triton(made, f), first))
