"""Times of single operations: ceilings of the device, ``torch.topk``, encoder, decode with error, weight gradients.

Shapes: N tokens, K slots, F = d_sae, D = d_in. Operands are random; a provider that disagrees with float64 has no time.
"""

from collections.abc import Callable

import bench_common
import torch
from torch import Tensor

from sae import ops, optim

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def ceilings(bench: bench_common.Bench) -> None:
    """P = 8192^3 bfloat16 product, W = a copy (read + written); later shares of the floor are taken from them."""
    size = 8_192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    flop = 2.0 * size**3
    p50 = bench.run("ceiling", {"product": lambda: a @ b}, (size, 0, size, size), "bfloat16", flop=flop)["product"]
    bench.product = flop / p50 * 1e3
    source = torch.randn(2**28, device=bench.device)
    target = torch.empty_like(source)
    moved = 8.0 * len(source)
    p50 = bench.run("ceiling", {"copy": lambda: target.copy_(source)}, (2**28, 0, 0, 0), "float32", moved=moved)["copy"]
    bench.copy = moved / p50 * 1e3


def torch_topk(bench: bench_common.Bench, n: int = 8_192) -> None:
    """``torch.topk`` alone, which sets what a fused selection may win; cold cache."""
    for f in (32_768, 131_072):
        for kind in (torch.float32, torch.bfloat16):
            h_NF = torch.randn(n, f, device=bench.device, dtype=kind)
            for k in (32, 64, 512):
                call = {"torch": lambda h_NF=h_NF, k=k: torch.topk(h_NF, k, dim=1, sorted=False)}
                name = str(kind).removeprefix("torch.")
                bench.run("torch_topk", call, (n, k, f, 0), name, moved=float(h_NF.numel() * h_NF.element_size()),
                          cold=True, repeats=min(bench.repeats, 5))  # fmt: skip


def encoder(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> None:
    """Paths of the encoder against a bfloat16 product with ``torch.topk``; CUDA alone."""
    from sae_kernels import topk_encode

    n, k, f, d = shape
    u_ND = torch.randn(n, d, device=bench.device).bfloat16()
    W_FD = torch.nn.functional.normalize(torch.randn(f, d, device=bench.device), dim=1)
    b_F = torch.zeros(f, device=bench.device)
    prepared, W16_FD = topk_encode.prepare(W_FD, b_F, dtype=torch.bfloat16), W_FD.bfloat16()
    some = u_ND[:256]
    want = torch.topk(some.double() @ W16_FD.double().t(), k, dim=1).values.relu().sum(1)
    calls: dict[str, Callable[[], object]] = {}
    for path in ("A", "B"):
        with bench.guard(f"encoder path {path}"):
            values_NK, _, _ = topk_encode.encode_topk(some.contiguous(), prepared, k, path=path)
            bench_common.near(f"encoder path {path}", values_NK.sum(1), want, 1e-3)
            calls[f"path-{path}"] = lambda path=path: topk_encode.encode_topk(u_ND, prepared, k, path=path)
    calls["linear+topk"] = lambda: torch.topk(torch.nn.functional.linear(u_ND, W16_FD), k, dim=1)
    calls["linear"] = lambda: torch.nn.functional.linear(u_ND, W16_FD)
    floor = bench.floor_ms(2.0 * n * f * d, 0.0, 20.6 * n * f)
    bench.run("encode_topk", calls, shape, "bfloat16", cold=True, flop=2.0 * n * f * d, floor_ms=floor,
              repeats=min(bench.repeats, 10))  # fmt: skip


def codes(n: int, k: int, f: int, device: torch.device, hot: float = 0.0) -> tuple[Tensor, Tensor]:
    """Values float32 and int32 indices without repetition within a token; one latent fires on a share ``hot``."""
    values_NK = torch.rand(n, k, device=device) + 0.1
    start_N1 = torch.randint(f, (n, 1), device=device)
    indices_NK = (start_N1 + max(1, f // k) * torch.arange(k, device=device)) % f
    if hot:
        indices_NK[: int(hot * n), 0] = 0
    return values_NK, indices_NK.int()


def decode_error(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> None:
    """Decode with error by settings; CUDA alone."""
    from sae_kernels import launch, mse

    n, k, f, d = shape
    values_NK, indices_NK = codes(n, k, f, bench.device)
    W_FD, b_D = torch.randn(f, d, device=bench.device).bfloat16(), torch.randn(d, device=bench.device)
    t_ND = torch.randn(n, d, device=bench.device)
    rows = W_FD[indices_NK[:64].long()].double()
    r = (values_NK[:64, :, None].double() * rows).sum(1) + b_D.double() - t_ND[:64].double()
    calls: dict[str, Callable[[], object]] = {}
    used = mse.blocks(d)
    tried: list[tuple[int | None, launch.Blocks | None]] = [(None, None)]  # as the training step launches it
    tried += [(gathered, used._replace(warps=warps)) for gathered, warps in ((4, 1), (4, 4), (8, 2), (8, 4))]
    for gathered, size in tried:

        def call(gathered: int | None = gathered, size: launch.Blocks | None = size) -> mse.DecodeError:
            return mse.decode_error(values_NK, indices_NK, W_FD, b_D, t_ND, size=size, gathered=gathered)

        bench_common.near("decode_error", call().sse_N[:64], r.square().sum(1), 1e-4)
        calls["triton" if size is None else f"triton-{gathered}x{size.warps}"] = call
    moved = 2.0 * n * k * d + 6.0 * n * d
    bench.run("decode_error", calls, shape, "bfloat16", cold=True, flop=4.0 * n * k * d, moved=moved,
              floor_ms=bench.floor_ms(moved=moved))  # fmt: skip


def weight_gradients(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> None:
    """Both weight gradients: uniform codes, one latent on 30 % of the tokens, and ``index_add_`` of one; CUDA alone."""
    from sae_kernels import dual_grad

    n, k, f, d = shape
    r_ND, u_ND = (torch.randn(n, d, device=bench.device).bfloat16() for _ in range(2))
    calls: dict[str, Callable[[], object]] = {}
    for name, hot in (("uniform", 0.0), ("hot-30%", 0.3)):
        values_NK, indices_NK = codes(n, k, f, bench.device, hot)
        work = dual_grad.worklist(values_NK, indices_NK, f)
        calls[name] = lambda v=values_NK, w=work: dual_grad.dual_gradient(w, v, r_ND, v, u_ND)
    sort = {"triton": lambda: dual_grad.worklist(values_NK, indices_NK, f)}
    bench.run("worklist", sort, shape, "int16", cold=True)
    made = dual_grad.dual_gradient(work, values_NK, r_ND, values_NK, u_ND)
    flat_E, tokens_E = indices_NK.view(-1).long(), torch.arange(n, device=bench.device).repeat_interleave(k)
    want = torch.zeros(f, d, device=bench.device)

    def index_add() -> None:
        want.zero_()
        for at in range(0, n * k, 2**18):  # one [E, D] float32 of all entries would take 25 GB at N = 262,144
            part = slice(at, at + 2**18)
            rows_eD = r_ND[tokens_E[part]].float()
            want.index_add_(0, flat_E[part], values_NK.view(-1)[part, None] * rows_eD)

    index_add()
    bench_common.near("dual gradient", made.W_dec_FD, want, 1e-4)
    calls["index_add (one)"] = index_add
    moved = 4.0 * n * k * d + 8.0 * f * d
    bench.run("dual_gradient", calls, shape, "bfloat16", cold=True, flop=4.0 * n * k * d, moved=moved,
              floor_ms=bench.floor_ms(moved=moved))  # fmt: skip


def row_steps(bench: bench_common.Bench, f: int, d: int) -> None:
    """Gradient projection and unit rows against torch; CUDA alone."""
    from sae_kernels import row_steps as kernels

    W_FD = torch.nn.functional.normalize(torch.randn(f, d, device=bench.device), dim=1)
    grad_FD, copy_FD = torch.randn(f, d, device=bench.device), W_FD.bfloat16()
    shape, size = (0, 0, f, d), 4.0 * f * d
    bench.run(
        "project", {"triton": lambda: kernels.project_rows_(grad_FD, W_FD),
                    "torch": lambda: optim.project_gradient_(grad_FD, W_FD)},
        shape, "float32", cold=True, moved=3 * size, floor_ms=bench.floor_ms(moved=3 * size),
    )  # fmt: skip
    bench.run(
        "unit_rows", {"triton": lambda: kernels.renorm_rows_(W_FD, copy_FD),
                      "torch": lambda: copy_FD.copy_(optim.normalise_rows_(W_FD))},
        shape, "float32", cold=True, moved=2.5 * size, floor_ms=bench.floor_ms(moved=2.5 * size),
    )  # fmt: skip


def dense_decode(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """The same numbers through an N x F matrix and one dense product."""
    return ops.to_dense(ops.SparseLatents(values_NK, indices_NK), len(W_FD)) @ W_FD


def decode(bench: bench_common.Bench, shape: tuple[int, int, int, int], dtype: str) -> None:
    """Sparse decode, forward and forward + backward, of every implementation that runs here."""
    n, k, f, d = shape
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    values_NK, indices_NK = codes(n, k, f, bench.device)
    values_NK, indices_NK = values_NK.to(kind), indices_NK.long()
    W_FD = torch.nn.functional.normalize(torch.randn(f, d, device=bench.device), dim=1).to(kind)
    upstream_ND = torch.randn(n, d, device=bench.device).to(kind)
    found: dict[str, Decode] = {
        "dense": dense_decode, "torch": lambda v, i, w: ops.sparse_decode(v, i, w, impl="torch")
    }  # fmt: skip
    if bench.cuda:  # the time of Triton's interpreter means nothing
        found["triton"] = lambda v, i, w: ops.sparse_decode(v, i, w, impl="triton")
    reference = dense_decode(values_NK.double(), indices_NK, W_FD.double())
    v, w = values_NK.clone().requires_grad_(), W_FD.clone().requires_grad_()
    forward, both = {}, {}
    for name, call in found.items():
        near = call(values_NK, indices_NK, W_FD)
        bench_common.near(name, near, reference, 1e-4 if kind == torch.float32 else 3e-2)
        forward[name] = torch.no_grad()(lambda call=call: call(values_NK, indices_NK, W_FD))
        both[name] = lambda call=call: torch.autograd.grad(call(v, indices_NK, w), (v, w), upstream_ND)
    size = values_NK.element_size()
    moved = float(size) * n * d * (k + 1)
    bench.run("sparse_decode", forward, shape, dtype, cold=True, moved=moved, floor_ms=bench.floor_ms(moved=moved))
    bench.run("sparse_decode", both, shape, dtype, mode="forward+backward", cold=True)
    if bench.cuda:
        bench.run("sparse_decode", both, shape, dtype, mode="forward+backward queued", cold=True, queued=True)
        decode_parts(bench, shape, (values_NK, indices_NK, W_FD, upstream_ND))


def decode_parts(bench: bench_common.Bench, shape: tuple[int, int, int, int], operands: tuple[Tensor, ...]) -> None:
    """What the backward pass of a sparse decode consists of; CUDA alone."""
    from sae_kernels import dual_grad, sparse_grad

    values_NK, indices_NK, W_FD, upstream_ND = operands
    work = dual_grad.worklist(values_NK, indices_NK, len(W_FD))
    calls: dict[str, Callable[[], object]] = {
        "values": lambda: sparse_grad.values_gradient(upstream_ND, indices_NK, W_FD),
        "worklist": lambda: dual_grad.worklist(values_NK, indices_NK, len(W_FD)),
        "weights": lambda: dual_grad.single_gradient(work, values_NK, upstream_ND, W_FD.dtype),
    }
    bench.run("decode_parts", calls, shape, str(W_FD.dtype).removeprefix("torch."), mode="queued", cold=True,
              queued=True)  # fmt: skip


def threshold(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> None:
    """Threshold encoder at K and at 2.7 K entries a token (BatchTopK's candidates, KERNELS 6), and what comes after."""
    from sae_kernels import threshold_encode

    n, k, f, d = shape
    u_ND = torch.randn(n, d, device=bench.device).bfloat16()
    W_FD = torch.nn.functional.normalize(torch.randn(f, d, device=bench.device), dim=1).bfloat16()
    b_F = torch.zeros(f, device=bench.device)
    for active in (k, round(2.7 * k)):
        bar_F = torch.full_like(b_F, float(torch.special.ndtri(torch.tensor(1.0 - active / f))))
        want = (u_ND[:256].double() @ W_FD.double().t() > bar_F).sum(1).double()
        calls: dict[str, Callable[[], object]] = {}
        for path in ("A", "B"):
            with bench.guard(f"threshold encoder path {path}"):
                found = threshold_encode.encode_threshold(u_ND, W_FD, b_F, bar_F, path=path)
                bench_common.near(f"threshold path {path}", found.offsets_N1.diff()[:256].double(), want, 1e-3)
                calls[f"path-{path}"] = lambda p=path, bar=bar_F: threshold_encode.encode_threshold(
                    u_ND, W_FD, b_F, bar, path=p
                )

        def dense(bar_F: Tensor = bar_F) -> tuple[Tensor, Tensor]:
            h_NF = torch.nn.functional.linear(u_ND, W_FD)
            flat_E = (h_NF > bar_F).view(-1).nonzero().squeeze(1)
            return h_NF.view(-1)[flat_E], flat_E

        calls["linear+nonzero"] = dense
        floor = bench.floor_ms(2.0 * n * f * d, n * f / 4 + 2.0 * n * active * d, 7.7 * n * f)
        bench.run("encode_threshold", calls, (n, active, f, d), "bfloat16", cold=True, flop=2.0 * n * f * d,
                  floor_ms=floor, repeats=min(bench.repeats, 10))  # fmt: skip
    entries = ops.Entries(*found)._replace(values_E=found.values_E.bfloat16())
    v_E, w_FD = entries.values_E.requires_grad_(), W_FD.clone().requires_grad_()
    both = {
        name: lambda name=name: torch.autograd.grad(
            ops.decode_entries(entries._replace(values_E=v_E), w_FD, name), (v_E, w_FD), u_ND
        )
        for name in ("torch", "triton")
    }
    bench.run("decode_entries", both, (n, active, f, d), "bfloat16", mode="forward+backward queued", cold=True,
              queued=True)  # fmt: skip
