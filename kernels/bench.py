"""Times the operations and the TopK training step of every implementation that runs here, against dense autograd.

``python kernels/bench.py`` prints p20 / p50 / p80 in ms and appends the rows, with the name of the device, to
results/kernels.csv. On a GPU it first measures the ceilings P (8192^3 bfloat16 product) and W (copy); "share" is the
floor that they set, over the time. A script and no module: ``kernels`` is the name of another package (README, layout).
"""

import argparse
import time
from pathlib import Path

import bench_common
import bench_ops
import bench_step
import bench_summary
import torch

SUITES = ("ceilings", "topk", "ops", "decode", "step", "host")
HOST_TOKENS = (1_024, 2_048, 4_096, 8_192)
"""Sizes of a batch at which the host may be what takes the time."""
CPU_LATENTS = (4_608, 9_216)
"""The quick preset's SAE, and the size of the figures to reach on a CPU."""


def gpu(bench: bench_common.Bench, suites: list[str], sizes: list[tuple[int, int, int, int]], dtype: str) -> None:
    """Everything at the sizes of the design; ceilings always, since all shares are taken from them."""
    bench_ops.ceilings(bench)
    if "topk" in suites:
        with bench.guard("torch.topk"):
            bench_ops.torch_topk(bench)
    for shape in sizes if "step" in suites else []:
        with bench.guard(f"step at N = {shape[0]}"):
            bench_step.run(bench, shape)
        torch.cuda.empty_cache()
    for n in HOST_TOKENS if "host" in suites else ():
        with bench.guard(f"host at N = {n}"):
            bench_step.host(bench, (n, *sizes[0][1:]))
    for number, shape in enumerate(sizes):
        parts = (bench_ops.encoder, bench_ops.threshold, bench_ops.decode_error, bench_ops.weight_gradients)
        for part in parts if "ops" in suites else ():
            with bench.guard(f"{part.__name__} at N = {shape[0]}"):
                part(bench, shape)
            torch.cuda.empty_cache()
        if "ops" in suites and number == 0:
            with bench.guard("row_steps"):
                bench_ops.row_steps(bench, *shape[2:])
        if "decode" in suites and number == 0:
            with bench.guard("sparse_decode"):
                bench_ops.decode(bench, shape, dtype)
        torch.cuda.empty_cache()


def cpu(bench: bench_common.Bench, suites: list[str], sizes: list[tuple[int, int, int, int]], dtype: str) -> None:
    """Sparse decode, and the training step in float32."""
    for shape in sizes:
        if "decode" in suites:
            with bench.guard("sparse_decode"):
                bench_ops.decode(bench, shape, dtype)
        if "step" in suites and dtype == "float32":
            with bench.guard("step"):
                bench_step.run(bench, shape)


def arguments(on_gpu: bool) -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", help="tokens; on a GPU two sizes by default")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--f", type=int, nargs="+", help="latents; on a CPU two sizes by default")
    parser.add_argument("--d", type=int, help="channels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the sparse decode, or to be tuned")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=list(SUITES), help="parts to run")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls per row (long ones fewer)")
    parser.add_argument("--busy", action="store_true", help="CPU: one thread, processor time, for a shared machine")
    parser.add_argument("--seconds", type=float, default=150.0, help="slow baselines are left out when this runs short")
    parser.add_argument("--tune", action="store_true", help="time launch settings instead and write this GPU's table")
    parser.add_argument("--table", type=Path, help="with --tune: the table's file, by default in the user's cache")
    parser.add_argument("--commit", default="", help="of the code, where this folder is a copy without its history")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results" / "kernels.csv")
    return parser


def main() -> None:
    """Command line; sizes default to the quick preset's SAE on a CPU, to D 768, F 32,768 on a GPU."""
    parser = arguments(torch.cuda.is_available())
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    tokens = args.n or ([8_192, 32_768] if on_gpu and not args.tune else [8_192] if on_gpu else [4_096])
    latents = args.f or ([32_768] if on_gpu else CPU_LATENTS)
    d = args.d or (768 if on_gpu else 576)
    if not 1 <= args.k <= min(latents) or min(*tokens, d) < 1 or args.repeats < 2:
        parser.error("sizes must be positive, k at most f, repeats at least 2")
    if args.tune and not on_gpu:
        parser.error("launch settings can be tuned on a GPU only")
    if args.busy:
        torch.set_num_threads(1)
    bench_common.check_file(args.out)
    clock = time.process_time if args.busy else time.perf_counter
    bench = bench_common.Bench(device, args.repeats, args.seconds, clock=clock, commit=args.commit)
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    sizes = [(n, args.k, f, d) for f in latents for n in tokens]
    if args.tune:
        import bench_tune

        asked = args.dtype or any((args.n, args.f, args.d))
        bench_tune.run(bench, [(size, dtype) for size in sizes] if asked else bench_tune.SHAPES, args.table)
    else:
        (gpu if on_gpu else cpu)(bench, args.suite, sizes, dtype)
    bench_common.append(args.out, bench.rows)
    print("\n".join(bench_summary.ratios(bench.rows)))
    print(f"{len(bench.rows)} rows -> {args.out}, {bench.seconds - bench.left:.0f} s")
    if bench.failures:
        raise SystemExit("not measured:\n" + "\n".join(bench.failures))


if __name__ == "__main__":
    main()
