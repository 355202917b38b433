"""Times of the whole TopK training step, forward + backward and with the optimiser, ours against its baselines.

Shapes: N tokens, K slots, F = d_sae, D = d_in. All providers start from the same float32 parameters and batch; before
anything is timed their gradients are compared with those of dense autograd in float32 on bfloat16 operands.
"""

from collections.abc import Callable
from typing import Any

import bench_common
import torch
from torch import Tensor

from sae import ops, ops_fused, optim
from sae.config import TrainConfig
from sae.row_adam import RowAdam

Parameters = list[torch.nn.Parameter]
COMPILE_SECONDS = 45.0
"""Time that compiling the dense step may take; with less left it is not started."""


def parameters(f: int, d: int, device: torch.device) -> Parameters:
    """W_enc, b_enc, W_dec, b_dec: unit decoder rows, encoder = decoder, no bias (the start of training)."""
    generator = torch.Generator(device=device).manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(f, d, generator=generator, device=device), dim=1)
    made = (W.clone(), torch.zeros(f, device=device), W, torch.zeros(d, device=device))
    return [torch.nn.Parameter(t) for t in made]


def dense_loss(n_ND: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """Plain autograd through N x F matrices; on a GPU the products take bfloat16 (the definition of the step)."""
    kind = torch.bfloat16 if n_ND.is_cuda else torch.float32
    h_NF = torch.nn.functional.linear((n_ND - b_dec).to(kind), W_enc.to(kind), b_enc.to(kind))
    values_NK, indices_NK = torch.topk(h_NF, k, dim=1)
    z_NF = torch.zeros_like(h_NF).scatter(1, indices_NK, values_NK.relu())
    return (z_NF @ W_dec.to(kind) + b_dec - n_ND).square().sum()


class Provider:
    """One implementation with parameters and an optimiser of its own.

    ``fused-A`` and ``fused-B``: our step with that path of the encoder, the optimiser in one pass a matrix;
    ``fused-separate``: the encoder's default path, torch's Adam and separate passes around it.
    """

    def __init__(self, name: str, n_ND: Tensor, k: int, f: int, compiled: Callable[..., Tensor] | None = None) -> None:
        self.name, self.n_ND, self.k = name, n_ND, k
        self.p = parameters(f, n_ND.shape[1], n_ND.device)
        self.cfg = TrainConfig(lr=1e-4)
        self.optimiser: torch.optim.Adam | RowAdam = optim.adam(self.p, self.cfg)
        self.compiled = compiled
        self.copies: Any = None
        if name.startswith("fused"):
            self.copies = ops_fused.ComputeCopies.of(*self.p[:3])
            if name != "fused-separate":
                self.optimiser = RowAdam(*self.p, self.copies, self.cfg)
        elif name == "published":
            self.copies = tuple(W.detach().bfloat16() for W in (self.p[0], self.p[2]))

    def loss(self) -> Tensor:
        """Sum of squared errors over the batch; compute copies are made anew, for the weights change at every step."""
        if self.name.startswith("fused"):
            self.copies.refresh(*self.p[:3])
            path = self.name[-1] if self.name in ("fused-A", "fused-B") else "auto"
            return ops_fused.topk_loss(self.n_ND, *self.p, self.k, copies=self.copies, path=path).sse_N.sum()
        if self.name == "published":
            from bench_published import PublishedLoss

            with torch.no_grad():
                for copy, W in zip(self.copies, (self.p[0], self.p[2]), strict=True):
                    copy.copy_(W)
            return PublishedLoss.apply(self.n_ND, *self.p, self.k, self.copies)  # type: ignore[no-any-return]
        if self.name == "torch":
            W_enc, b_enc, W_dec, b_dec = self.p
            latents = ops.encode_topk(self.n_ND, b_dec, W_enc, b_enc, self.k)
            return (ops.sparse_decode(*latents, W_dec) + b_dec - self.n_ND).square().sum()
        return (self.compiled or dense_loss)(self.n_ND, *self.p, self.k)

    def forward_backward(self) -> None:
        """Loss and gradients of all four parameters."""
        for p in self.p:
            p.grad = None
        (self.loss() / len(self.n_ND)).backward()

    def step(self) -> None:
        """The same and what follows: gradient projection, Adam, unit rows (TRAINING 6)."""
        self.forward_backward()
        W_dec = self.p[2]
        assert W_dec.grad is not None
        if isinstance(self.optimiser, RowAdam):
            self.optimiser.step()
            return
        ours = self.name.startswith("fused")
        (ops_fused.project_gradient_ if ours else optim.project_gradient_)(W_dec.grad, W_dec)
        self.optimiser.step()
        if ours:
            ops_fused.unit_rows_(W_dec, self.copies)
        else:
            optim.normalise_rows_(W_dec)


def reference(provider: Provider) -> list[Tensor]:
    """Gradients of the definition: operands rounded as all providers round them, everything else in float32."""
    made = [torch.nn.Parameter(p.detach().clone()) for p in provider.p]
    W_enc, b_enc, W_dec, b_dec = made
    n_ND, kind = provider.n_ND, torch.bfloat16 if provider.n_ND.is_cuda else torch.float32
    h_NF = torch.nn.functional.linear((n_ND - b_dec).to(kind).float(), W_enc.to(kind).float(), b_enc)
    values_NK, indices_NK = torch.topk(h_NF, provider.k, dim=1)
    z_NF = torch.zeros_like(h_NF).scatter(1, indices_NK, values_NK.relu())
    loss = (z_NF @ W_dec.to(kind).float() + b_dec - n_ND).square().sum() / len(n_ND)
    return list(torch.autograd.grad(loss, made))


LIMITS = {"torch": 1e-3, "fused-A": 0.05, "fused-B": 0.05, "fused-separate": 0.05}
"""Relative norm of the difference of gradients; 1e-3 for dense on a CPU. Where pre-activations are rounded to bfloat16
(the other baselines) two or three in a hundred of the selected latents change, each of them a term of about equal size
(KERNELS 1, fact 5)."""


def providers(bench: bench_common.Bench, n_ND: Tensor, k: int, f: int) -> list[Provider]:
    """Those that run here and agree with dense autograd; the others are named in the run's failures."""
    names = ["dense", "fused-A", "fused-B", "fused-separate", "published"] if bench.cuda else ["dense", "torch"]
    found = [Provider(name, n_ND, k, f) for name in names]
    if bench.cuda and bench.left > COMPILE_SECONDS:
        found.append(Provider("dense-compiled", n_ND, k, f, torch.compile(dense_loss, dynamic=False)))
    elif bench.cuda:
        print(f"dense-compiled is left out at N = {len(n_ND)}: {bench.left:.0f} s are left")
    want = reference(found[0])
    agreeing = []
    for provider in found:
        with bench.guard(f"step of {provider.name} at N = {len(n_ND)}"):
            provider.forward_backward()
            limit = LIMITS.get(provider.name, 0.4 if bench.cuda else 1e-3)
            for name, p, grad in zip(("W_enc", "b_enc", "W_dec", "b_dec"), provider.p, want, strict=True):
                assert p.grad is not None
                bench_common.near(f"{provider.name}: gradient of {name}", p.grad, grad, limit)
            agreeing.append(provider)
    return agreeing


def product_and_topk(n_ND: Tensor, p: Parameters, k: int) -> None:
    """What no step can do without: the product as ours computes it, in blocks of one buffer, and ``torch.topk``."""
    with torch.no_grad():
        for h_nF, _ in ops._blocks(n_ND - p[3], p[0].detach(), p[1].detach()):
            torch.topk(h_nF, k, dim=1)


def run(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> None:
    """Rows ``topk_step`` at (N, K, F, D), modes forward+backward and step."""
    n, k, f, d = shape
    generator = torch.Generator(device=bench.device).manual_seed(1)
    n_ND = torch.randn(n, d, generator=generator, device=bench.device)
    made = providers(bench, n_ND, k, f)
    flop, gathered, written = 2.0 * n * f * d, 6.0 * n * k * d + 6.0 * n * d + 8.0 * f * d, 56.0 * f * d
    dtype = "bfloat16" if bench.cuda else "float32"
    for mode, extra in (("forward+backward", 0.0), ("step", written)):
        floor_ms = bench.floor_ms(flop, gathered + extra, 20.6 * n * f)
        calls = {p.name: p.forward_backward if mode == "forward+backward" else p.step for p in made}
        if not bench.cuda:
            calls["product+topk"] = lambda: product_and_topk(n_ND, made[0].p, k)
        bench.run(
            "topk_step", calls, shape, dtype, mode=mode, flop=flop + 8.0 * n * k * d, floor_ms=floor_ms,
            repeats=min(bench.repeats, 10),
        )  # fmt: skip


def host(bench: bench_common.Bench, shape: tuple[int, int, int, int]) -> None:
    """Our step as it comes and with the host ahead ("queued"): a graph of the step could win the difference at most."""
    n, k, f, _ = shape
    n_ND = torch.randn(n, shape[3], generator=torch.Generator(device=bench.device).manual_seed(1), device=bench.device)
    ours = Provider("fused-A", n_ND, k, f)
    for mode, queued in (("step", False), ("step queued", True)):
        bench.run("host", {"fused-A": ours.step}, shape, "bfloat16", mode=mode, queued=queued)
