"""The way from sae.ops to the Triton kernels: who takes what, errors, and the encoder as an autograd function.

Shapes: N tokens, D = d_in, F = d_sae, K slots per token. ``sae_kernels`` is imported when it is called, for it may be
missing; only sae.ops calls this module.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from sae_kernels.topk_encode import PreparedEncoder

logger = logging.getLogger(__name__)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, k: int,
        prepared: "PreparedEncoder | None", exact: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from sae_kernels import topk_encode

        prepared = topk_encode.prepare(W_enc_FD, b_enc_F) if prepared is None else prepared
        shape = (prepared.n_latents, prepared.W_PD.shape[1])
        if shape != W_enc_FD.shape:
            raise ValueError(f"the prepared encoder is of W_enc {shape}, got W_enc {tuple(W_enc_FD.shape)}")
        u_ND = (n_ND if b_pre_D is None else n_ND - b_pre_D).to(prepared.W_PD.dtype).contiguous()
        values_NK, indices_NK, _ = topk_encode.encode_topk(u_ND, prepared, k, exact=exact)
        ctx.save_for_backward(u_ND, W_enc_FD, values_NK, indices_NK)
        indices_NK = indices_NK.long()
        ctx.mark_non_differentiable(indices_NK)
        return values_NK.to(n_ND.dtype), indices_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from sae_kernels import dual_grad, sparse_decode

        u_ND, W_enc_FD, values_NK, indices_NK = ctx.saved_tensors
        active_NK = torch.where(values_NK > 0, grad_NK, 0.0).contiguous()
        work = dual_grad.worklist(active_NK, indices_NK, len(W_enc_FD))
        grad_W_FD = dual_grad.single_gradient(work, active_NK, u_ND, W_enc_FD.dtype)
        # As a weight gradient of one channel of ones: the order of its sums is fixed, that of index_add_ is not.
        grad_b_F = dual_grad.single_gradient(work, active_NK, u_ND.new_ones(len(u_ND), 1)).squeeze(1)
        grad_n_ND = None
        if ctx.needs_input_grad[0]:
            weights = W_enc_FD.detach().contiguous()
            grad_n_ND = sparse_decode.sparse_decode(active_NK.to(weights.dtype), indices_NK, weights)
        grad_pre_D = -(grad_b_F.to(W_enc_FD.dtype) @ W_enc_FD) if ctx.needs_input_grad[1] else None
        return grad_n_ND, grad_pre_D, grad_W_FD, grad_b_F, None, None, None


def encode_topk(
    n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, k: int,
    prepared: "PreparedEncoder | None", exact: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(values, int64 indices) as :func:`sae.ops.encode_topk` with ``impl="triton"``."""
    arguments = (n_ND, b_pre_D, W_enc_FD, b_enc_F, k, prepared, exact)
    return _by_triton(lambda: _EncodeTopK.apply(*arguments), n_ND.device)  # type: ignore[no-any-return]


def above(
    u_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, bar: Tensor | float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, offsets) as :func:`sae.ops.above` with ``impl="triton"``."""

    def encode() -> tuple[Tensor, Tensor, Tensor]:
        from sae_kernels import threshold_encode

        kind = W_enc_FD.dtype if dtype is None else dtype
        bias_F = b_enc_F.detach().float().contiguous()
        bar_F = bar.float().contiguous() if isinstance(bar, Tensor) else torch.full_like(bias_F, bar)
        u_ND_, W_FD = (t.detach().to(kind).contiguous() for t in (u_ND, W_enc_FD))
        values_E, indices_E, offsets_N1 = threshold_encode.encode_threshold(u_ND_, W_FD, bias_F, bar_F)
        return values_E.to(u_ND.dtype), indices_E, offsets_N1

    return _by_triton(encode, u_ND.device)  # type: ignore[no-any-return]


def sums_by_latent(values_E: Tensor, indices_E: Tensor, n_latents: int) -> Tensor:
    """float32 ``out[f] = sum of values[e]`` over the entries of f, in a fixed order."""
    from sae_kernels import dual_grad

    work = dual_grad.ragged_worklist(indices_E, torch.zeros_like(indices_E, dtype=torch.int32), n_latents)
    return dual_grad.single_gradient(work, values_E.contiguous(), values_E.new_ones(1, 1)).squeeze(1)


def encoder_gradients(
    needs: tuple[bool, ...], grad_E: Tensor, entries: tuple[Tensor, Tensor], u_ND: Tensor, W_enc_FD: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of (n, b_pre, W_enc, b_enc) from those of entries (indices, offsets), as the one of sae.ops."""
    from sae_kernels import dual_grad, sparse_decode

    indices_E, offsets_N1 = entries
    grad_E, u_ND = grad_E.contiguous(), u_ND.contiguous()
    work = dual_grad.ragged_worklist(indices_E, dual_grad.tokens_of(offsets_N1, len(indices_E)), len(W_enc_FD))
    grad_W_FD = dual_grad.single_gradient(work, grad_E, u_ND, W_enc_FD.dtype)
    # As a weight gradient of one channel of ones: the order of its sums is fixed, that of index_add_ is not.
    grad_b_F = dual_grad.single_gradient(work, grad_E, u_ND.new_ones(len(u_ND), 1)).squeeze(1)
    grad_n_ND = None
    if needs[0]:
        weights = W_enc_FD.detach().contiguous()
        grad_n_ND = sparse_decode.decode_entries(grad_E.to(weights.dtype), indices_E, offsets_N1, weights)
    grad_pre_D = -(grad_b_F.to(W_enc_FD.dtype) @ W_enc_FD) if needs[1] else None
    return grad_n_ND, grad_pre_D, grad_W_FD, grad_b_F


def decode_entries(values_E: Tensor, indices_E: Tensor, offsets_N1: Tensor, W_dec_FD: Tensor) -> Tensor:
    """``y_ND`` as :func:`sae.ops.decode_entries` with ``impl="triton"``."""

    def decode() -> Tensor:
        from sae_kernels.sparse_decode import decode_entries as kernel

        return kernel(values_E, indices_E, offsets_N1, W_dec_FD)

    return _by_triton(decode, values_E.device)  # type: ignore[no-any-return]


def sparse_decode(values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """``y_ND`` as :func:`sae.ops.sparse_decode` with ``impl="triton"``."""

    def decode() -> Tensor:
        from sae_kernels.sparse_decode import sparse_decode as kernel

        return kernel(values_NK, indices_NK, W_dec_FD)

    return _by_triton(decode, values_NK.device)  # type: ignore[no-any-return]


def _by_triton(call: Callable[[], Any], device: torch.device) -> Any:
    """The result of a kernel; ``ValueError`` where Triton is missing or there is no GPU (and no interpreter)."""
    try:
        return call()
    except ImportError as error:
        raise ValueError(f"impl='triton' is not available here ({error}); use impl='auto' or 'torch'") from error
    except RuntimeError as error:
        if "active driver" not in str(error):
            raise
        raise ValueError(
            f"impl='triton' wants CUDA tensors, got tensors on {device}; use impl='auto' or 'torch'"
        ) from error


_WARNED: set[str] = set()


def _usable(device: torch.device, refusal: Callable[[], Exception | None]) -> bool:
    """Whether a kernel takes its operands; on CUDA a refusal is logged, once per kind of error."""
    if device.type != "cuda":
        return False
    reason: Exception | None
    try:
        reason = refusal()
    except ImportError as error:
        reason = error
    if reason is not None and type(reason).__name__ not in _WARNED:
        _WARNED.add(type(reason).__name__)
        logger.warning("the Triton kernel cannot be used (%s); using torch, which is slower", reason)
    return reason is None


def takes_decode(values: Tensor, indices: Tensor, W_dec_FD: Tensor) -> bool:
    """Whether the kernel decodes these slots [N, K] or entries [E]; on CUDA a refusal is logged."""

    def refusal() -> Exception | None:
        import sae_kernels.sparse_decode  # noqa: F401
        from sae_kernels import launch

        return launch.refusal(torch.atleast_2d(values), torch.atleast_2d(indices), W_dec_FD)

    return _usable(values.device, refusal)


def takes_encoder(n_ND: Tensor, W_enc_FD: Tensor) -> bool:
    """Whether the kernels encode these; on CUDA a refusal is logged."""

    def refusal() -> Exception | None:
        from sae_kernels import launch, topk_encode  # noqa: F401

        found = f"input {tuple(n_ND.shape)} {n_ND.dtype}, W_enc {tuple(W_enc_FD.shape)} {W_enc_FD.dtype}"
        if n_ND.dtype not in launch.FLOATS or W_enc_FD.dtype not in launch.FLOATS:
            return TypeError(f"input and W_enc must be float32, bfloat16 or float16; got {found}")
        if not 1 <= W_enc_FD.shape[1] <= launch.MAX_WIDTH:
            return ValueError(f"D must lie in 1..{launch.MAX_WIDTH}; got {found}")
        return None

    return _usable(n_ND.device, refusal)
