"""Times the sparse decode, forward and forward + backward, of every implementation that runs here, against dense.

``python kernels/bench.py`` prints p20 / p50 / p80 in ms and appends the rows, with the name of the device, to
results/kernels.csv. A script and no module: ``kernels`` is the name of another package (README, layout).
"""

import argparse
import csv
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from sae import console, ops

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
COLUMNS = (
    "kernel", "provider", "mode", "n_tokens", "k", "d_sae", "d_in", "dtype", "p20_ms", "p50_ms", "p80_ms", "peak_mib",
    "repeats", "device", "threads", "torch", "triton", "utc",
)  # fmt: skip


def dense(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """The same numbers through an N x F matrix and one dense product."""
    return ops.to_dense(ops.SparseLatents(values_NK, indices_NK), len(W_FD)) @ W_FD


def providers(device: torch.device) -> dict[str, Decode]:
    """Implementations by name; Triton only where it runs on a GPU, its interpreter's time means nothing."""
    found: dict[str, Decode] = {
        "dense": dense, "torch": lambda v, i, w: ops.sparse_decode(v, i, w, impl="torch"),
    }  # fmt: skip
    if device.type == "cuda":
        found["triton"] = lambda v, i, w: ops.sparse_decode(v, i, w, impl="triton")
    return found


def operands(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, indices (no repetition within a token, as an encoder gives them), W with unit rows, upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    values = torch.rand(args.n, args.k, generator=generator)
    start, stride = torch.randint(args.f, (args.n, 1), generator=generator), max(1, args.f // args.k)
    indices = (start + stride * torch.arange(args.k)) % args.f
    W = torch.nn.functional.normalize(torch.randn(args.f, args.d, generator=generator), dim=1)
    upstream = torch.randn(args.n, args.d, generator=generator)
    return values.to(device, dtype), indices.to(device), W.to(device, dtype), upstream.to(device, dtype)


def milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> Iterator[float]:
    """Wall time of each of ``repeats`` calls after two that are not counted; on a GPU until it is idle."""
    for number in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            yield 1e3 * (time.perf_counter() - started)


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def triton_version() -> str:
    """Version of Triton, empty where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per provider and mode. ``RuntimeError`` if two providers disagree: a wrong kernel has no time."""
    device = torch.device(args.device)
    values, indices, W, upstream = operands(args, device)
    v, w = values.clone().requires_grad_(), W.clone().requires_grad_()
    reference = dense(values.double(), indices, W.double())
    rows: list[dict[str, object]] = []
    for provider, decode in console.track(list(providers(device).items()), "implementations"):

        def forward(decode: Decode = decode) -> Tensor:
            with torch.no_grad():
                return decode(values, indices, W)

        def both(decode: Decode = decode) -> tuple[Tensor, ...]:
            return torch.autograd.grad(decode(v, indices, w), (v, w), upstream)

        error = float((forward().double() - reference).abs().max() / reference.abs().max())
        if not error <= (1e-4 if args.dtype == "float32" else 3e-2):
            raise RuntimeError(f"{provider} is off by {error:.2g} from dense float64: nothing was written")
        for mode, call in (("forward", forward), ("forward+backward", both)):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times = sorted(milliseconds(call, args.repeats, device))
            p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
            peak = round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.type == "cuda" else ""
            rows.append(dict(zip(COLUMNS, (
                "sparse_decode", provider, mode, args.n, args.k, args.f, args.d, args.dtype, f"{p20:.4g}",
                f"{p50:.4g}", f"{p80:.4g}", peak, args.repeats, device_name(device), torch.get_num_threads(),
                torch.__version__, triton_version(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            ), strict=True)))  # fmt: skip
    return rows


def main() -> None:
    """Command line; sizes default to the quick preset's SAE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4_096, help="tokens")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--f", type=int, default=4_608, help="latents")
    parser.add_argument("--d", type=int, default=576, help="channels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls per row")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results" / "kernels.csv")
    args = parser.parse_args()
    if not 1 <= args.k <= args.f or min(args.n, args.d) < 1 or args.repeats < 2:
        parser.error("sizes must be positive, k at most f, repeats at least 2")
    rows = measure(args)
    for row in rows:
        print(f"{row['provider']:8}{row['mode']:18}p20 {row['p20_ms']}  p50 {row['p50_ms']}  p80 {row['p80_ms']} ms")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = not args.out.exists()
    with open(args.out, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
