"""One TopK training step of ours beside sparsify's on a GPU: forward, backward, projection, Adam, unit rows.

``PYTHONPATH=.:kernels python scripts/bench_sparsify_gpu.py`` where ``sparsify`` (PyPI: eai-sparsify) can be imported.
Its modules are loaded one by one, since its package pulls in data sets and distributed training, which no step needs.
Both start from the same weights and batch and run by turns; float32 parameters, bfloat16 products, no dead latents.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
import bench_step  # noqa: E402

SIZES = ((32_768, 32, 32_768, 768), (8_192, 64, 131_072, 4_096))
"""N tokens, K, F = d_sae, D = d_in."""


def sparse_coder(k: int, f: int, d: int) -> torch.nn.Module:
    """sparsify's SAE on the GPU."""
    if "sparsify" not in sys.modules:
        spec = importlib.util.find_spec("sparsify")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("sparsify is not installed: pip install eai-sparsify")
        package = types.ModuleType("sparsify")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["sparsify"] = package
    config, coder = (importlib.import_module(f"sparsify.{name}") for name in ("config", "sparse_coder"))
    return coder.SparseCoder(d, config.SparseCoderConfig(num_latents=f, k=k), device="cuda")


class Theirs:
    """Their step as their trainer takes it, with Adam as ours."""

    def __init__(self, n_ND: torch.Tensor, k: int, f: int) -> None:
        self.n_ND, self.sae = n_ND, sparse_coder(k, f, n_ND.shape[1])
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        self.sae(self.n_ND).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.sae.set_decoder_norm_to_unit_norm()


def milliseconds(call: Callable[[], None]) -> float:
    """Time of one call on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(size: tuple[int, int, int, int], repeats: int) -> str:
    """Tokens per second of both at one size, and the ratio of the medians."""
    n, k, f, d = size
    n_ND = torch.randn(n, d, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    steps = {"saescope": bench_step.Provider("fused-A", n_ND, k, f), "sparsify": Theirs(n_ND, k, f)}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 3):
        for name, provider in steps.items():
            time = milliseconds(provider.step)
            if turn >= 3:
                found[name].append(time)
    parts = []
    for name, times in found.items():
        p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
        parts.append(f"{name} {p50:.2f} ms ({p20:.2f} to {p80:.2f}), {n / p50 * 1e3:,.0f} tokens/s")
    ratio = statistics.median(found["sparsify"]) / statistics.median(found["saescope"])
    return f"N {n}, K {k}, F {f}, D {d}: {'; '.join(parts)}; ratio {ratio:.2f}"


def main() -> None:
    """Print a line for each size; a size that does not fit into memory is named and fails the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed")
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
    where += f"sparsify {importlib.metadata.version('eai-sparsify')}"
    failed = False
    for size in SIZES:
        try:
            print(f"{measure(size, args.repeats)} ({where})", flush=True)
        except torch.OutOfMemoryError as error:
            failed = True
            print(f"{size}: {error}", flush=True)
        gc.collect()  # both SAEs of one size go before those of the next come
        torch.cuda.empty_cache()
    if failed:
        raise SystemExit("not all sizes were measured")


if __name__ == "__main__":
    main()
