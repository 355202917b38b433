"""The TopK loss of one batch as one operation on a GPU, and the passes around the optimiser.

Shapes: N tokens, D = d_in, F = d_sae, K slots per token. Encoder, decode with error and both weight gradients run on
copies of the weights in a compute type (bfloat16 by default, sums in float32); weights and gradients are float32. Of a
training step only the encoder product stays dense (Gao et al., arXiv 2406.04093, appendix D). Nothing here waits for
the device.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import ops_checks, ops_gpu, optim
from sae.ops import Impl, SparseLatents, sparse_decode

if TYPE_CHECKING:
    from sae_kernels.topk_encode import PreparedEncoder

COMPUTE_DTYPE = torch.bfloat16
logger = logging.getLogger(__name__)


class LossParts(NamedTuple):
    """What :func:`topk_loss` returns; only ``sse_N`` is differentiable."""

    sse_N: Tensor
    """float32 ``|y_n - n_n|^2``."""
    latents: SparseLatents
    """Values float32, indices int32, slots in no order."""
    r_ND: Tensor
    """Residual ``y - n`` in the compute type."""
    u_ND: Tensor
    """What the encoder saw, in the compute type."""
    flags_N: Tensor
    """int8: 0 where the set of latents is exactly that of the products (KERNELS 5)."""


@dataclass
class ComputeCopies:
    """Copies of W_enc, b_enc (in tile order) and W_dec for the kernels; to be refreshed when the weights change."""

    encoder: "PreparedEncoder"
    W_dec_FD: Tensor
    encoder_is_current: bool = False
    decoder_is_current: bool = False
    """Set where a step's own pass writes the copy; the next refresh leaves it out, once."""

    @staticmethod
    def of(W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, dtype: torch.dtype | None = None) -> "ComputeCopies":
        """Copies on the device of the weights. ``ValueError`` where Triton is missing or the shapes do not fit."""
        kernels = _kernels()
        dtype = COMPUTE_DTYPE if dtype is None else dtype
        encoder = kernels.topk_encode.prepare(W_enc_FD.detach(), b_enc_F.detach(), dtype=dtype)
        # A copy even where the type is the same: it is written by a later pass.
        return ComputeCopies(encoder, W_dec_FD.detach().to(dtype, copy=True))

    @torch.no_grad()
    def refresh(self, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor) -> None:
        """Take over changed weights."""
        if not self.encoder_is_current:
            self.encoder.refresh(W_enc_FD, b_enc_F)
        if not self.decoder_is_current:
            self.W_dec_FD.copy_(W_dec_FD)
        self.encoder_is_current = self.decoder_is_current = False


@cache
def _kernels() -> Any:
    """The package of kernels with the modules this file uses. ``ValueError`` where Triton is missing."""
    try:
        import sae_kernels
        import sae_kernels.dual_grad
        import sae_kernels.mse
        import sae_kernels.row_steps
        import sae_kernels.topk_encode
    except ImportError as error:
        raise ValueError(f"impl='triton' is not available here ({error}); use impl='auto' or 'torch'") from error
    return sae_kernels


class _TopKLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int,
        pre_bias: bool, copies: ComputeCopies, options: dict[str, Any],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        kernels = _kernels()
        u_ND = torch.empty(n_ND.shape, dtype=copies.W_dec_FD.dtype, device=n_ND.device)
        if pre_bias:  # formed in float32 and rounded once; folded into b_enc it would cancel large numbers
            torch.sub(n_ND, b_dec_D, out=u_ND)
        else:
            u_ND.copy_(n_ND)
        values_NK, indices_NK, flags_N = kernels.topk_encode.encode_topk(u_ND, copies.encoder, k, **options)
        sse_N, r_ND, dot_NK = kernels.mse.decode_error(values_NK, indices_NK, copies.W_dec_FD, b_dec_D, n_ND)
        ctx.pre_bias = pre_bias
        ctx.save_for_backward(u_ND, r_ND, values_NK, indices_NK, dot_NK, W_enc_FD)
        ctx.mark_non_differentiable(values_NK, indices_NK, r_ND, u_ND, flags_N)
        return sse_N, values_NK, indices_NK, r_ND, u_ND, flags_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, r_ND, values_NK, indices_NK, dot_NK, W_enc_FD = ctx.saved_tensors
        kernels = _kernels()
        twice_N = (2.0 * grad_N).contiguous()
        work = kernels.dual_grad.worklist(values_NK, indices_NK, len(W_enc_FD))
        grad_dec_FD, grad_enc_FD, grad_b_F = kernels.dual_grad.dual_gradient(
            work, values_NK * twice_N[:, None], r_ND, dot_NK * twice_N[:, None], u_ND
        )
        grad_b_D = kernels.row_steps.weighted_column_sum(twice_N, r_ND)
        if ctx.pre_bias:  # the encoder sees n - b_dec: one product of a vector instead of N x D
            grad_b_D -= grad_b_F @ W_enc_FD
        return None, grad_enc_FD, grad_b_F, grad_dec_FD, grad_b_D, None, None, None, None


def topk_loss(
    n_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int, *,
    pre_bias: bool = True, copies: ComputeCopies | None = None, exact: bool = False, path: str = "auto",
) -> LossParts:  # fmt: skip
    """Squared error per token of ``y = z @ W_dec + b_dec`` against n, z the K largest of the encoder's latents, ReLU'd.

    ``u = n - b_dec`` with ``pre_bias``, else n; ``h = u @ W_enc.T + b_enc``. Differentiable in the four parameters, for
    any function of ``sse_N``; n gets no gradient. Parameters are float32 [F, D], [F], [F, D], [D]. ``copies``: current
    compute copies of them, by default made here (at a price). ``exact`` and ``path`` go to the encoder. Triton alone
    (CUDA, or its interpreter in tests): ``ValueError`` or ``TypeError`` for what the kernels do not take.
    """
    parameters = (W_enc_FD, b_enc_F, W_dec_FD, b_dec_D)
    shapes = (W_enc_FD.shape, W_enc_FD.shape[:1], W_enc_FD.shape, W_enc_FD.shape[1:])
    found = f"n {tuple(n_ND.shape)} {n_ND.dtype}, parameters {[(tuple(p.shape), p.dtype) for p in parameters]}"
    if n_ND.requires_grad:
        raise ValueError("topk_loss gives no gradient of its input; use ops.encode_topk and ops.sparse_decode")
    if any(p.dtype != torch.float32 for p in (n_ND, *parameters)):
        raise TypeError(f"topk_loss wants float32 input and parameters; got {found}")
    if n_ND.dim() != 2 or n_ND.shape[1:] != b_dec_D.shape or [p.shape for p in parameters] != list(shapes):
        raise ValueError(f"topk_loss wants n [N, D], W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D]; got {found}")
    copies = ComputeCopies.of(W_enc_FD, b_enc_F, W_dec_FD) if copies is None else copies
    try:
        sse_N, values_NK, indices_NK, r_ND, u_ND, flags_N = _TopKLoss.apply(
            n_ND.contiguous(), *parameters, k, pre_bias, copies, {"exact": exact, "path": path}
        )
    except RuntimeError as error:
        if "active driver" not in str(error):
            raise
        raise ValueError(f"topk_loss wants CUDA tensors, got tensors on {n_ND.device}") from error
    return LossParts(sse_N, SparseLatents(values_NK, indices_NK), r_ND, u_ND, flags_N)


_WARNED: set[str] = set()


def usable(n_ND: Tensor, *parameters: Tensor, impl: Impl = "auto") -> bool:
    """Whether the kernels take a batch and float32 parameters; on CUDA a refusal is logged, once per kind of reason."""
    if n_ND.device.type != "cuda" or impl == "torch":
        return False
    reason = ""
    try:
        _kernels()
    except ValueError as error:
        reason = str(error)
    if any(p.dtype != torch.float32 for p in (n_ND, *parameters)):
        reason = "weights and inputs must be float32"
    elif not 1 <= n_ND.shape[1] <= 16_384:
        reason = f"D must lie in 1..16384, got {n_ND.shape[1]}"
    if reason and reason not in _WARNED:
        _WARNED.add(reason)
        logger.warning("the fused TopK loss cannot be used (%s); using separate operations, which are slower", reason)
    return not reason


def weighted_column_sum(weights_N: Tensor, rows_ND: Tensor) -> Tensor:
    """float32 ``sum over n of weights_N * rows_ND[n]`` in one pass over rows of any float type (Triton alone)."""
    return _kernels().row_steps.weighted_column_sum(weights_N, rows_ND)  # type: ignore[no-any-return]


class _DecodeError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, t_ND: Tensor
    ) -> Tensor:
        # The residual stays float32: gradients come from it.
        sse_N, r_ND, dot_NK = _kernels().mse.decode_error(
            values_NK, indices_NK, W_dec_FD, b_dec_D, t_ND.contiguous(), torch.float32
        )
        ctx.save_for_backward(values_NK, indices_NK, W_dec_FD, b_dec_D, t_ND, r_ND, dot_NK)
        return sse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        values_NK, indices_NK, W_dec_FD, b_dec_D, t_ND, r_ND, dot_NK = ctx.saved_tensors
        kernels, twice_N = _kernels(), (2.0 * grad_N).contiguous()
        grad_FD = None
        if ctx.needs_input_grad[2]:
            work = kernels.dual_grad.worklist(values_NK, indices_NK, len(W_dec_FD))
            grad_FD = kernels.dual_grad.single_gradient(work, values_NK * twice_N[:, None], r_ND, W_dec_FD.dtype)
        grad_D = kernels.row_steps.weighted_column_sum(twice_N, r_ND).to(b_dec_D.dtype)
        grad_t_ND = (-twice_N[:, None] * r_ND).to(t_ND.dtype) if ctx.needs_input_grad[4] else None
        return (dot_NK * twice_N[:, None]).to(values_NK.dtype), None, grad_FD, grad_D, grad_t_ND


def decode_error(
    values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, t_ND: Tensor, impl: Impl = "auto"
) -> Tensor:
    """``sse_N = |y_n - t_n|^2`` with ``y = sum over k of values * W_dec[indices] + b_dec``; differentiable in all four.

    Sums, and the result, are float32 for operands of 16 or 32 bits. A normalised error is a function of it: divide by a
    number per token or batch. An empty slot (value 0) adds nothing and gets no gradient. ``impl`` and errors as in
    :func:`sae.ops.sparse_decode`.
    """
    ops_checks.decoder(values_NK, indices_NK, W_dec_FD)
    ops_checks.implementation(impl)
    if values_NK.dim() != 2 or b_dec_D.shape != W_dec_FD.shape[1:] or t_ND.shape != (len(values_NK), len(b_dec_D)):
        found = ops_checks.found(values=values_NK, W_dec=W_dec_FD, b_dec=b_dec_D, t=t_ND)
        raise ValueError(f"decode_error wants values [N, K], W_dec [F, D], b_dec [D], t [N, D]; got {found}")
    if impl == "triton" or (impl == "auto" and ops_gpu.takes_decode(values_NK, indices_NK, W_dec_FD)):
        operands = (values_NK, indices_NK, W_dec_FD, b_dec_D, t_ND)
        return ops_gpu._by_triton(lambda: _DecodeError.apply(*operands), t_ND.device)  # type: ignore[no-any-return]
    wide = torch.promote_types(W_dec_FD.dtype, torch.float32)
    used_NK = torch.where(values_NK != 0, values_NK, 0.0).to(wide)
    y_ND = sparse_decode(used_NK, indices_NK, W_dec_FD.to(wide), "torch") + b_dec_D
    return (y_ND - t_ND).square().sum(1)


def project_gradient_(grad_FD: Tensor, W_FD: Tensor, impl: Impl = "auto") -> Tensor:
    """:func:`sae.optim.project_gradient_`, on CUDA in one pass (TRAINING 6, step 5).

    ``impl="triton"`` never falls back: ``TypeError`` or ``ValueError`` for what the kernel does not take.
    """
    ops_checks.implementation(impl)
    if impl == "triton" or (usable(grad_FD, W_FD, impl=impl) and grad_FD.is_contiguous()):
        rows = _kernels().row_steps
        return ops_gpu._by_triton(  # type: ignore[no-any-return]
            lambda: rows.project_rows_(grad_FD, W_FD.detach()), W_FD.device
        )
    return optim.project_gradient_(grad_FD, W_FD)


def unit_rows_(W_FD: Tensor, copies: ComputeCopies | None = None, impl: Impl = "auto") -> Tensor:
    """:func:`sae.optim.normalise_rows_`, on CUDA in one pass that also writes the compute copy (step 8). ``impl`` as in
    :func:`project_gradient_`."""
    ops_checks.implementation(impl)
    if impl != "triton" and not usable(W_FD, impl=impl):
        return optim.normalise_rows_(W_FD)
    copy_FD, rows = None if copies is None else copies.W_dec_FD, _kernels().row_steps
    ops_gpu._by_triton(lambda: rows.renorm_rows_(W_FD.detach(), copy_FD), W_FD.device)
    if copies is not None:
        copies.decoder_is_current = True
    return W_FD


def adam_step_(
    copies: ComputeCopies, encoder: tuple[Tensor, ...], b_enc_F: Tensor, decoder: tuple[Tensor, ...], *,
    rate: float, step: int, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Adam on both matrices, each (W, gradient, first moment, second moment), in one pass each, and their copies.

    The decoder's gradient is projected before, its rows are made unit after (TRAINING 6, steps 5, 7, 8). Triton alone.
    """
    rows = _kernels().row_steps
    made = copies.encoder
    tiles = rows.Tiles(made.n_tiles, made.tile, b_enc_F.detach(), made.b_P)
    settings = {"rate": rate, "step": step, "betas": betas, "eps": eps}
    rows.adam_rows_(encoder[0].detach(), *encoder[1:], made.W_PD, unit=False, tiles=tiles, **settings)
    rows.adam_rows_(decoder[0].detach(), *decoder[1:], copies.W_dec_FD, unit=True, **settings)
    copies.encoder_is_current = copies.decoder_is_current = True
