"""Times the launch settings of the top-K encoder on a GPU, path by path, and the parts that they are made of.

``python kernels/bench_encoder.py --d 768`` prints p20 / p50 / p80 in ms; with ``--out`` the rows go to that file.
It is what FUSED, BULK, FUSED_MAX_WIDTH, BLOCK_ROWS and BLOCK_LATENTS of topk_encode are chosen by. A selection that
disagrees with float64 has no time.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import bench_common
import bench_ops
import torch
from torch import Tensor

from sae_kernels import topk_encode, topk_select
from sae_kernels.topk_encode import Fused, PreparedEncoder

FUSED = {
    "pointers s3": Fused(128, 64, 8, 3), "pointers s4": Fused(128, 64, 8, 4), "pointers w4": Fused(64, 64, 4, 4),
    "bulk s3": Fused(128, 64, 8, 3, bulk=True), "bulk s4": Fused(128, 64, 8, 4, bulk=True),
    "bulk w4": Fused(64, 64, 4, 4, bulk=True), "bulk 264": Fused(128, 64, 8, 3, bulk=True, programs=264),
    "bulk 132": Fused(128, 64, 8, 4, bulk=True, programs=132), "bulk k128": Fused(128, 128, 8, 2, bulk=True),
    "bulk g16": Fused(128, 64, 8, 3, group=16, bulk=True),
    "bulk 264 g16": Fused(128, 64, 8, 3, group=16, bulk=True, programs=264),
    "bulk 264 g32": Fused(128, 64, 8, 3, group=32, bulk=True, programs=264),
    "bulk 264 s2": Fused(128, 64, 8, 2, bulk=True, programs=264),
}  # fmt: skip
BLOCKS = ((256, 16_384), (512, 8_192), (512, 16_384), (512, 32_768), (1_024, 16_384), (2_048, 16_384), (2_048, 32_768))


@contextmanager
def block_size(rows: int, latents: int) -> Iterator[None]:
    """Blocks of path B of this size, for a while."""
    before = topk_encode.BLOCK_ROWS, topk_encode.BLOCK_LATENTS
    topk_encode.BLOCK_ROWS, topk_encode.BLOCK_LATENTS = rows, latents
    try:
        yield
    finally:
        topk_encode.BLOCK_ROWS, topk_encode.BLOCK_LATENTS = before


def settings(u_ND: Tensor, encoders: dict[int, PreparedEncoder], k: int) -> dict[str, Callable[[Tensor], tuple]]:
    """Encoders by name, as functions of u."""
    prepared = encoders[128]
    found: dict[str, Callable[[Tensor], tuple]] = {}
    for name, fused in FUSED.items():
        found[f"A {name}"] = lambda u, f=fused: topk_encode.encode_topk(u, prepared, k, path="A", fused=f)
    wide = FUSED["bulk s3"]
    found["A bulk BN256 R8"] = lambda u: topk_encode.encode_topk(u, encoders[256], k, path="A", R=8, fused=wide)
    for name in ("bulk s3", "bulk 132"):
        found[f"A {name} BN256 R4"] = lambda u, f=FUSED[name]: topk_encode.encode_topk(
            u, encoders[256], k, path="A", R=4, fused=f
        )
    found["A bulk s3 R8"] = lambda u: topk_encode.encode_topk(u, prepared, k, path="A", R=8, fused=wide)
    for rows, latents in BLOCKS:

        def blocks(u: Tensor, rows: int = rows, latents: int = latents) -> tuple:
            with block_size(rows, latents):
                return topk_encode.encode_topk(u, prepared, k, path="B")

        found[f"B {rows}x{latents}"] = blocks
    found["B exact"] = lambda u: topk_encode.encode_topk(u, prepared, k, path="B", exact=True)
    return found


def parts(bench: bench_common.Bench, u_ND: Tensor, prepared: PreparedEncoder, k: int) -> None:
    """Product alone, selection of a stored block alone, selection of rows alone, refresh of the compute copy."""
    n, (f, d) = len(u_ND), prepared.W_PD.shape
    out_NP = torch.empty(n, f, device=u_ND.device)
    h_nP = torch.randn(min(n, 512), min(f, 16_384), device=u_ND.device)
    r = topk_encode.plan(prepared.n_latents, d, k).candidates
    candidates_NC = torch.empty(n, prepared.n_tiles * r, dtype=torch.int32, device=u_ND.device)
    topk_encode._candidates_blocks(u_ND, prepared, r, candidates_NC)
    values_NK = torch.empty(n, k, device=u_ND.device)
    indices_NK = torch.empty(n, k, dtype=torch.int32, device=u_ND.device)
    flags_N = torch.empty(n, dtype=torch.int8, device=u_ND.device)
    W_FD = torch.randn(prepared.n_latents, d, device=u_ND.device)
    half = topk_encode.prepare(W_FD, W_FD[:, 0], dtype=u_ND.dtype)
    calls: dict[str, Callable[[], object]] = {
        "product fp32 out": lambda: topk_encode._product(u_ND, prepared.W_PD, out_NP),
        "product bf16 out": lambda: u_ND @ prepared.W_PD.t(),
        "select_rows": lambda: topk_select.select_rows(
            candidates_NC, prepared.n_latents, prepared.tile, r, values_NK, indices_NK, flags_N
        ),
        "select_block 512": lambda: topk_select.select_block(
            h_nP, prepared.b_P[: h_nP.shape[1]], candidates_NC[:512], 0, prepared.tile, r
        ),
        "refresh": lambda: half.refresh(W_FD, W_FD[:, 0]),
    }
    shape, dtype = (n, k, f, d), str(u_ND.dtype).removeprefix("torch.")
    products = {name: call for name, call in calls.items() if name.startswith("product")}
    bench.run("encoder_parts", products, shape, dtype, flop=2.0 * n * f * d)
    # the other parts multiply nothing: by the product's work a selection ran at 131,500 TFLOP/s
    bench.run("encoder_parts", {name: call for name, call in calls.items() if name not in products}, shape, dtype)


def measure(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> None:
    """All settings at one size."""
    n, k, f, d = shape
    torch.manual_seed(0)
    u_ND = torch.randn(n, d, device=bench.device).bfloat16()
    W_FD = torch.randn(f, d, device=bench.device) / d**0.5
    b_F = torch.randn(f, device=bench.device) * 0.1
    encoders = {bn: topk_encode.prepare(W_FD, b_F, BN=bn, dtype=torch.bfloat16) for bn in (128, 256)}
    some = u_ND[:512].contiguous()
    h = some.double() @ W_FD.bfloat16().double().t() + b_F.double()
    want = torch.topk(h, k, dim=1).values.relu().sum(1)
    calls: dict[str, Callable[[], object]] = {}
    for name, encode in settings(u_ND, encoders, k).items():
        with bench.guard(name):
            bench_common.near(name, encode(some)[0].sum(1), want, 1e-3)
            calls[name] = lambda encode=encode: encode(u_ND)
    flagged = {name: float((call()[2] != 0).double().mean()) for name, call in calls.items()}  # type: ignore[index]
    print("share of flagged tokens:", {name: round(share, 5) for name, share in flagged.items()})
    floor = bench.floor_ms(2.0 * n * f * d, 0.0, 20.6 * n * f)
    bench.run("encode_setting", calls, shape, "bfloat16", flop=2.0 * n * f * d, floor_ms=floor)
    parts(bench, u_ND, encoders[128], k)


def main() -> None:
    """Command line; a GPU is needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8_192, help="tokens")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--f", type=int, default=32_768, help="latents")
    parser.add_argument("--d", type=int, nargs="+", default=[768], help="channels, one or several sizes")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls per row")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the encoder's settings can be timed on a GPU only")
    bench = bench_common.Bench(torch.device("cuda"), args.repeats, 600.0)
    bench_ops.ceilings(bench)
    for d in args.d:
        with bench.guard(f"D = {d}"):
            measure(bench, (args.n, args.k, args.f, d))
        torch.cuda.empty_cache()
    if args.out is not None:
        bench_common.append(args.out, bench.rows)
    if bench.failures:
        raise SystemExit("not measured:\n" + "\n".join(bench.failures))


if __name__ == "__main__":
    main()
