"""Decode, residual, squared error and value dot products in one pass over the gathered rows.

Shapes: N tokens, K slots per token, F = d_sae, D = d_in, S slices of a row. With y = sum over k of v_k W[i_k] + b and
r = y - t this writes everything that the gradient of any f(|r_n|^2) needs (Gao et al., arXiv 2406.04093, section 2.1
for the loss, appendix D for the sparse products), so the backward pass reads no row of W again.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import launch

SLICE = 4_096
"""Channels of a program: a wider row is cut into slices, whose sums are added in the order of the slices."""


class DecodeError(NamedTuple):
    """What :func:`decode_error` returns."""

    sse_N: Tensor
    """float32 ``|y_n - t_n|^2``."""
    r_ND: Tensor
    """Residual ``y - t``, in the type asked for."""
    dot_NK: Tensor
    """float32 ``<r_n, W[i_nk]>``, from the unrounded residual; 0 where the slot is empty."""


@triton.jit
def _decode_error_kernel(  # type: ignore[no-untyped-def]
    values_ptr, indices_ptr, w_ptr, b_ptr, t_ptr, sse_ptr, r_ptr, dot_ptr,
    n_slots, n_latents, width, n_tokens, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program = one slice of one token; ROWS gathered rows at a time, sums in float32."""
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    channels = piece * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < width
    r = tl.load(b_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    r -= tl.load(t_ptr + token * width + channels, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, n_slots, ROWS):
        slots = start + tl.arange(0, ROWS)
        used = slots < n_slots
        values = tl.load(values_ptr + token * n_slots + slots, mask=used, other=0.0).to(tl.float32)
        latents = tl.load(indices_ptr + token * n_slots + slots, mask=used, other=0).to(tl.int64)
        valid = (latents >= 0) & (latents < n_latents)
        rows = tl.load(
            w_ptr + latents[:, None] * width + channels[None, :],
            mask=((values != 0.0) & valid)[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        # An index that names no row must not be read, nor pass unnoticed: NaN.
        values = tl.where((values != 0.0) & (valid == 0), float("nan"), values)
        r += tl.sum(rows * values[:, None], axis=0)
    # Lanes past the row hold values * 0: they add nothing, unless the token is NaN anyway.
    tl.store(sse_ptr + piece * n_tokens + token, tl.sum(r * r, axis=0))
    tl.store(r_ptr + token * width + channels, r.to(r_ptr.dtype.element_ty), mask=inside)
    for start in range(0, n_slots, ROWS):
        slots = start + tl.arange(0, ROWS)
        used = slots < n_slots
        values = tl.load(values_ptr + token * n_slots + slots, mask=used, other=0.0).to(tl.float32)
        latents = tl.load(indices_ptr + token * n_slots + slots, mask=used, other=0).to(tl.int64)
        valid = (values != 0.0) & (latents >= 0) & (latents < n_latents)
        rows = tl.load(
            w_ptr + latents[:, None] * width + channels[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        dots = tl.where(valid, tl.sum(rows * r[None, :], axis=1), 0.0)
        tl.store(dot_ptr + (piece * n_tokens + token) * n_slots + slots, dots, mask=used)


@cache
def blocks(width: int) -> launch.Blocks:
    """Settings for rows of ``width`` channels (at least 1) where no table has any."""
    channels = min(SLICE, max(16, launch.power_of_2(width)))
    warps = 1 if channels <= 256 else 2 if channels <= 1_024 else 4 if channels <= 2_048 else 8
    return launch.Blocks(channels, launch.cdiv(width, channels), warps)


def check(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, b_D: Tensor, t_ND: Tensor) -> None:
    """``TypeError`` or ``ValueError`` for operands that :func:`decode_error` does not take, with what was found.

    Values, bias and target may have another type than W (float32 beside bfloat16 rows is the usual case).
    """
    error = launch.refusal(values_NK, indices_NK, W_FD, mixed=True)
    if error is not None:
        raise error
    kind: type[Exception] = ValueError
    if b_D.dtype not in launch.FLOATS or t_ND.dtype not in launch.FLOATS:
        kind, rule = TypeError, "b and t must be float32, bfloat16 or float16"
    elif b_D.shape != W_FD.shape[1:] or t_ND.shape != (len(values_NK), W_FD.shape[1]):
        rule = "b must be [D] and t [N, D]"
    elif not t_ND.is_contiguous() or not b_D.device == t_ND.device == W_FD.device:
        rule = f"t must be contiguous, b and t on {W_FD.device}"
    else:
        return
    raise kind(f"{rule}; got {launch.described(values=values_NK, W=W_FD, b=b_D, t=t_ND)}")


@torch.no_grad()
def decode_error(
    values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, b_D: Tensor, t_ND: Tensor, r_dtype: torch.dtype | None = None,
    *, size: launch.Blocks | None = None, gathered: int | None = None,
) -> DecodeError:  # fmt: skip
    """Error of the reconstruction ``y = sum of values * W[indices] + b`` of the target t; not differentiable itself.

    ``r_dtype``: type of the stored residual, by default that of W. ``size``, ``gathered`` (rows per step): settings to
    be tried by the bench. A slot of value 0 adds nothing and has dot product
    0; another slot whose index lies outside 0..F - 1 makes its token NaN. Errors as in :func:`check`.
    """
    check(values_NK, indices_NK, W_FD, b_D, t_ND)
    (n_tokens, n_slots), (n_latents, width), device = values_NK.shape, W_FD.shape, W_FD.device
    chosen = launch.gather("decode_error", W_FD, blocks(width)) if size is None else launch.Gather(*size, launch.ROWS)
    sse_SN = torch.empty(chosen.programs, n_tokens, dtype=torch.float32, device=device)
    dot_SNK = torch.empty(chosen.programs, n_tokens, n_slots, dtype=torch.float32, device=device)
    r_ND = torch.empty(n_tokens, width, dtype=r_dtype or W_FD.dtype, device=device)
    if n_tokens > 0:
        with torch.cuda.device_of(W_FD):
            _decode_error_kernel[(n_tokens, chosen.programs)](
                values_NK.contiguous(), indices_NK.contiguous(), W_FD, b_D.contiguous(), t_ND, sse_SN, r_ND, dot_SNK,
                n_slots, n_latents, width, n_tokens,
                ROWS=gathered or chosen.rows, CHANNELS=chosen.channels, num_warps=chosen.warps,
            )  # fmt: skip
    if chosen.programs == 1:
        return DecodeError(sse_SN[0], r_ND, dot_SNK[0])
    return DecodeError(sse_SN.sum(0), r_ND, dot_SNK.sum(0))
