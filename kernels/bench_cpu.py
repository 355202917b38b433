"""The ways to decode sparse codes on a CPU, forward and backward, beside the one that sae.ops takes.

``python kernels/bench_cpu.py`` (two minutes on 2 cores) prints p20 / p50 / p80 in ms: a dense product, embedding_bag
(ours), gathered rows with index_add_, segments of a sorted sparse matrix (CSR), torch.compile of the dense and of the
gathered way, a C++ extension; then a training step beside one encoder product with torch.topk. Ways run by turns in one
process, after each has agreed with float64. Shapes: N tokens, K slots, F = d_sae, D = d_in.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_common
import bench_ops
import bench_step
import torch
from torch import Tensor

from sae import ops

Gradients = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Gradients]
"""(y_ND, dvalues_NK, dW_FD) of values [N, K], indices [N, K], W [F, D] and the gradient of y."""
CPP = r"""
#include <torch/extension.h>
#include <ATen/Parallel.h>

// y[n] = sum of v * W[i]; dv = <g[n], W[i]>; both in one pass over the gathered rows of a token where g is given.
std::vector<torch::Tensor> rows(torch::Tensor v, torch::Tensor i, torch::Tensor W, torch::Tensor g) {
  const int64_t N = v.size(0), K = v.size(1), D = W.size(1);
  auto out = g.numel() ? torch::empty_like(v) : torch::zeros({N, D}, W.options());
  const float *vp = v.data_ptr<float>(), *wp = W.data_ptr<float>(), *gp = g.data_ptr<float>();
  const int64_t *ip = i.data_ptr<int64_t>();
  float *op = out.data_ptr<float>();
  const bool backward = g.numel() > 0;
  at::parallel_for(0, N, 16, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const float *w = wp + ip[n * K + k] * D;
        if (backward) {
          float sums[16] = {0};
          int64_t d = 0;
          for (; d + 16 <= D; d += 16)
            for (int j = 0; j < 16; ++j) sums[j] += w[d + j] * gp[n * D + d + j];
          float total = 0;
          for (int j = 0; j < 16; ++j) total += sums[j];
          for (; d < D; ++d) total += w[d] * gp[n * D + d];
          op[n * K + k] = total;
        } else {
          const float value = vp[n * K + k];
          float *y = op + n * D;
          for (int64_t d = 0; d < D; ++d) y[d] += value * w[d];
        }
      }
  });
  return {out};
}

// out[f] = sum of v[e] * g[e / K] over the entries e of latent f, entries sorted by latent.
torch::Tensor segments(torch::Tensor v, torch::Tensor order, torch::Tensor bounds, torch::Tensor g, int64_t K) {
  const int64_t F = bounds.numel() - 1, D = g.size(1);
  auto out = torch::zeros({F, D}, g.options());
  const float *vp = v.data_ptr<float>(), *gp = g.data_ptr<float>();
  const int64_t *o = order.data_ptr<int64_t>(), *b = bounds.data_ptr<int64_t>();
  float *op = out.data_ptr<float>();
  at::parallel_for(0, F, 16, [&](int64_t first, int64_t last) {
    for (int64_t f = first; f < last; ++f)
      for (int64_t e = b[f]; e < b[f + 1]; ++e) {
        const float value = vp[o[e]], *row = gp + o[e] / K * D;
        for (int64_t d = 0; d < D; ++d) op[f * D + d] += value * row[d];
      }
  });
  return out;
}
"""


def by_autograd(decode: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Way:
    """The way of a differentiable decode."""

    def way(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, grad_ND: Tensor) -> Gradients:
        v, w = values_NK.detach().requires_grad_(), W_FD.detach().requires_grad_()
        y_ND = decode(v, indices_NK, w)
        return y_ND.detach(), *torch.autograd.grad(y_ND, (v, w), grad_ND)

    return way


def dense(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """One product of an N x F matrix."""
    return values_NK.new_zeros(len(values_NK), len(W_FD)).scatter_add(1, indices_NK, values_NK) @ W_FD


def gathered(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """Rows gathered, multiplied and added; the gradient of the gather is ``index_add_``."""
    return torch.einsum("nk,nkd->nd", values_NK, torch.nn.functional.embedding(indices_NK, W_FD))


def index_add(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, grad_ND: Tensor) -> Gradients:
    """The same without autograd: two batched products, ``index_add_`` of all N K rows."""
    (n, k), rows_NKD = values_NK.shape, W_FD[indices_NK]
    y_ND = torch.bmm(values_NK[:, None], rows_NKD).squeeze(1)
    dvalues_NK = torch.bmm(rows_NKD, grad_ND[:, :, None]).squeeze(2)
    dW_FD = torch.zeros_like(W_FD)
    dW_FD.index_add_(0, indices_NK.view(-1), (values_NK[:, :, None] * grad_ND[:, None]).view(n * k, -1))
    return y_ND, dvalues_NK, dW_FD


def csr(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, grad_ND: Tensor) -> Gradients:
    """Products of sparse matrices: rows are tokens forward, and sorted segments of latents for the weights."""
    (n, k), f = values_NK.shape, len(W_FD)
    code = torch.sparse_csr_tensor(torch.arange(n + 1) * k, indices_NK.view(-1), values_NK.view(-1), (n, f))
    order_E = torch.sort(indices_NK.view(-1), stable=True).indices
    bounds_F1 = torch.nn.functional.pad(torch.bincount(indices_NK.view(-1), minlength=f).cumsum(0), (1, 0))
    turned = torch.sparse_csr_tensor(bounds_F1, order_E // k, values_NK.view(-1)[order_E], (f, n))
    dvalues_NK = torch.bmm(W_FD[indices_NK], grad_ND[:, :, None]).squeeze(2)
    return code @ W_FD, dvalues_NK, turned @ grad_ND


def extension() -> Way:
    """A C++ extension made here: compiler and ninja are needed."""
    from torch.utils.cpp_extension import load_inline

    with tempfile.TemporaryDirectory() as folder:
        made = load_inline(
            "sparse_rows", CPP, functions=["rows", "segments"], build_directory=folder,
            extra_cflags=["-O3", "-march=native", "-ffast-math", "-fopenmp"],
        )  # fmt: skip

    def way(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, grad_ND: Tensor) -> Gradients:
        flat_E, k = indices_NK.view(-1), indices_NK.shape[1]
        order_E = torch.sort(flat_E.to(torch.int32), stable=True).indices
        bounds_F1 = torch.nn.functional.pad(torch.bincount(flat_E, minlength=len(W_FD)).cumsum(0), (1, 0))
        (y_ND,) = made.rows(values_NK, indices_NK, W_FD, W_FD.new_empty(0))
        (dvalues_NK,) = made.rows(values_NK, indices_NK, W_FD, grad_ND)
        return y_ND, dvalues_NK, made.segments(values_NK.view(-1), order_E, bounds_F1, grad_ND, k)

    return way


def ways() -> dict[str, Callable[[], Way]]:
    """All ways by name; each is made when it is measured, for some need a compiler."""
    return {
        "dense": lambda: by_autograd(dense),
        "embedding_bag": lambda: by_autograd(lambda v, i, w: ops.sparse_decode(v, i, w, impl="torch")),
        "gather": lambda: by_autograd(gathered),
        "index_add": lambda: index_add,
        "csr": lambda: csr,
        "dense-compiled": lambda: by_autograd(torch.compile(dense, dynamic=False)),
        "gather-compiled": lambda: by_autograd(torch.compile(gathered, dynamic=False)),
        "cpp": extension,
    }


def decode(bench: bench_common.Bench, shape: tuple[int, int, int, int], wanted: list[str]) -> dict[str, float]:
    """p50 in ms of every way that runs here and agrees; the others are said to be left out."""
    n, k, f, d = shape
    torch.manual_seed(0)
    values_NK, indices_NK = bench_ops.codes(n, k, f, bench.device)
    indices_NK = indices_NK.long()
    W_FD, grad_ND = torch.randn(f, d), torch.randn(n, d)
    exact = by_autograd(dense)(values_NK.double(), indices_NK, W_FD.double(), grad_ND.double())
    calls: dict[str, Callable[[], object]] = {}
    for name, make in ((name, make) for name, make in ways().items() if name in wanted):
        try:
            way = make()
            found = way(values_NK, indices_NK, W_FD, grad_ND)
            for part, got, want in zip(("y", "dvalues", "dW"), found, exact, strict=True):
                bench_common.near(f"{name}: {part}", got, want, 1e-5)
            calls[name] = lambda way=way: way(values_NK, indices_NK, W_FD, grad_ND)
        except Exception as error:
            print(f"{name}: left out, {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", flush=True)
    return bench.run("cpu_decode", calls, shape, "float32", mode="forward+backward")


def step(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> dict[str, float]:
    """p50 in ms of a training step and of what none can do without."""
    n, k, f, d = shape
    n_ND = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    ours = bench_step.Provider("torch", n_ND, k, f)
    calls: dict[str, Callable[[], object]] = {
        "torch": ours.forward_backward, "product+topk": lambda: bench_step.product_and_topk(n_ND, ours.p, k)
    }  # fmt: skip
    return bench.run("cpu_step", calls, shape, "float32", mode="forward+backward")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4_096, help="tokens")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--f", type=int, default=9_216, help="latents")
    parser.add_argument("--d", type=int, default=576, help="channels")
    parser.add_argument("--ways", choices=list(ways()), nargs="+", default=list(ways()), help="those to be measured")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each way")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time, for a shared machine")
    parser.add_argument("--out", type=Path, help="append the rows to this file, e.g. results/kernels.csv")
    args = parser.parse_args()
    args.ways = list(dict.fromkeys(["embedding_bag", *args.ways]))
    if min(args.n, args.d, args.k) < 1 or args.k > args.f or args.repeats < 2:
        parser.error("sizes must be positive, k at most f, repeats at least 2")
    if args.busy:
        torch.set_num_threads(1)
    clock = time.process_time if args.busy else time.perf_counter
    bench = bench_common.Bench(torch.device("cpu"), args.repeats, 600.0, clock=clock)
    shape = (args.n, args.k, args.f, args.d)
    found = decode(bench, shape, args.ways)
    ours = found["embedding_bag"]
    for name, ms in sorted(found.items(), key=lambda item: item[1]):
        print(f"{name:28} {ms:9.1f} ms  {ms / ours:6.2f} x ours")
    if "dense" in found:
        print(f"decode forward+backward: dense / ours = {found['dense'] / ours:.1f} (at least 8)")
    times = step(bench, shape)
    print(f"training step / (product + top-k) = {times['torch'] / times['product+topk']:.2f} (at most 1.3)")
    if args.out:
        bench_common.check_file(args.out)
        bench_common.append(args.out, bench.rows)


if __name__ == "__main__":
    main()
