"""Operations of the sparse autoencoder in plain torch: the reference of every kernel, and the fast path on CPU.

Shapes: N tokens, D = d_in, F = d_sae, K slots per token, E entries (active latents of all tokens, one after another).
Only the encoder product is dense. Codes are lists of entries, and every gradient visits active entries only
(Gao et al., arXiv 2406.04093, appendix D.2). Measured on 2 AVX2 cores at N 4,096, D 576, F 4,608, K 32: encoder product
150 ms, selection 40 ms, decode 5 ms, value gradient 22 ms, each weight gradient 5 ms; a dense product costs 150 ms.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as nn_functional
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae import ops_checks, ops_cpu, ops_gpu

if TYPE_CHECKING:
    from sae_kernels.topk_encode import PreparedEncoder

Impl = Literal["auto", "torch", "triton"]
BLOCK_BYTES = 16 * 2**20
"""Pre-activations are made in row blocks of about this size and never stored for all tokens."""


class SparseLatents(NamedTuple):
    """Codes of N tokens in K slots each; a slot of value 0 is empty whatever its index."""

    values_NK: Tensor
    """Activations, at least 0."""
    indices_NK: Tensor
    """int64 latent of each slot."""


class Entries(NamedTuple):
    """Codes of N tokens of any width: the active latents of token n are entries ``offsets[n]:offsets[n + 1]``."""

    values_E: Tensor
    """Activations, at least 0."""
    indices_E: Tensor
    """int64 latent of each entry."""
    offsets_N1: Tensor
    """int64, N + 1 numbers from 0 to E."""

    def padded(self) -> SparseLatents:
        """The same codes as slots; the width is the largest number of entries of a token (0 where none is active)."""
        counts_N = self.offsets_N1.diff()
        width = int(counts_N.max()) if counts_N.numel() else 0
        slots_NK = torch.arange(width, device=counts_N.device).expand(len(counts_N), width)
        filled_NK = slots_NK < counts_N[:, None]
        values_NK = self.values_E.new_zeros(filled_NK.shape)
        indices_NK = self.indices_E.new_zeros(filled_NK.shape)
        values_NK[filled_NK] = self.values_E
        indices_NK[filled_NK] = self.indices_E
        return SparseLatents(values_NK, indices_NK)


def entries_of(latents: SparseLatents) -> Entries:
    """Slots as entries, empty slots included (value 0)."""
    n_tokens, width = latents.values_NK.shape
    offsets_N1 = torch.arange(n_tokens + 1, device=latents.values_NK.device) * width
    return Entries(latents.values_NK.reshape(-1), latents.indices_NK.reshape(-1), offsets_N1)


def to_dense(latents: SparseLatents, d_sae: int) -> Tensor:
    """``z_NF`` of the slots. Differentiable in the values. ``ValueError`` for an active slot outside 0..F - 1."""
    values_NK, indices_NK = ops_checks.in_range(*latents, d_sae)
    return values_NK.new_zeros(len(values_NK), d_sae).scatter_add(1, indices_NK, values_NK)


def topk(h_NF: Tensor, k: int, *, exact: bool = True) -> SparseLatents:
    """The K largest of each row, then ReLU; of equal values the lower index wins (FORMATS 1).

    Slots are in falling order of value. ``ValueError`` unless 1 <= k <= F. ``torch.topk`` picks any of several equal
    values, so one value more is asked for: rows whose K-th and next value are equal are sorted stably instead.
    ``exact=False`` leaves that out: any of the values equal to the K-th may be taken.
    """
    n_latents = h_NF.shape[1]
    if not 1 <= k <= n_latents:
        raise ValueError(f"k must lie in 1..{n_latents}, got {k}")
    if not exact:
        values, indices = ops_cpu.largest(h_NF, k)
        return SparseLatents(values.relu(), indices)
    values, indices = ops_cpu.largest(h_NF, min(k + 1, n_latents))
    tied_N = (values[:, k - 1] == values[:, -1]) & (values[:, -1] > 0) if k < n_latents else None
    values, indices = values[:, :k], indices[:, :k]
    if tied_N is not None and bool(tied_N.any()):
        ordered = torch.sort(h_NF[tied_N], dim=1, descending=True, stable=True)
        values, indices = values.clone(), indices.clone()
        values[tied_N], indices[tied_N] = ordered.values[:, :k], ordered.indices[:, :k]
    return SparseLatents(values.relu(), indices)


def block_rows(n_latents: int, element_bytes: int = 4) -> int:
    """Tokens per block such that its pre-activations take about :data:`BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // (element_bytes * n_latents))


def _centred(n_ND: Tensor, b_pre_D: Tensor | None) -> Tensor:
    return n_ND if b_pre_D is None else n_ND - b_pre_D


def _sum_entries(values_E: Tensor, indices_E: Tensor, offsets_N1: Tensor, rows_FD: Tensor) -> Tensor:
    """``out[n] = sum of values[e] * rows[indices[e]]`` over the entries of n."""
    return nn_functional.embedding_bag(
        indices_E, rows_FD, offsets_N1, mode="sum", per_sample_weights=values_E, include_last_offset=True
    )


def _sum_by_latent(values_E: Tensor, indices_E: Tensor, tokens_E: Tensor, source_ND: Tensor, n_latents: int) -> Tensor:
    """``out[f] = sum of values[e] * source[tokens[e]]`` over the entries of latent f: a weight gradient [F, D].

    Sorting first makes one bag per latent: 7 ms where ``index_add_`` of the N*K products takes 180 ms, and the order
    of every sum is fixed, so results repeat bit for bit.
    """
    small = torch.int16 if n_latents <= 2**15 else torch.int32
    order_E = torch.sort(indices_E.to(small), stable=True).indices
    offsets_F1 = indices_E.new_zeros(n_latents + 1)
    torch.cumsum(torch.bincount(indices_E, minlength=n_latents), 0, out=offsets_F1[1:])
    return _sum_entries(values_E[order_E], tokens_E[order_E], offsets_F1, source_ND)


def sums_by_latent(values_E: Tensor, indices_E: Tensor, n_latents: int) -> Tensor:
    """``out[f] = sum of values[e]`` over the entries of latent f, in the same order on every run."""
    if values_E.is_cuda and ops_gpu.takes_decode(values_E, indices_E, values_E.new_empty(1, 1)):
        return ops_gpu.sums_by_latent(values_E, indices_E, n_latents).to(values_E.dtype)
    return values_E.new_zeros(n_latents).index_add_(0, indices_E, values_E)


def _tokens_of(offsets_N1: Tensor) -> Tensor:
    counts_N = offsets_N1.diff()
    return torch.repeat_interleave(torch.arange(len(counts_N), device=counts_N.device), counts_N)


def _encoder_gradients(
    needs: tuple[bool, ...], grad_E: Tensor, entries: tuple[Tensor, Tensor], u_ND: Tensor, W_enc_FD: Tensor,
    impl: Impl = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of (n, b_pre, W_enc, b_enc) from those of the active pre-activations.

    The pre-bias sees only the sum over tokens, which is one product of a vector: db_pre = -db_enc @ W_enc.
    """
    indices_E, offsets_N1 = entries
    if impl == "triton" or (impl == "auto" and ops_gpu.takes_encoder(u_ND, W_enc_FD)):
        return ops_gpu.encoder_gradients(needs, grad_E, entries, u_ND, W_enc_FD)
    grad_b_F = sums_by_latent(grad_E, indices_E, len(W_enc_FD))
    grad_W_FD = _sum_by_latent(grad_E, indices_E, _tokens_of(offsets_N1), u_ND, len(W_enc_FD))
    grad_n_ND = _sum_entries(grad_E, indices_E, offsets_N1, W_enc_FD) if needs[0] else None
    grad_pre_D = -(grad_b_F @ W_enc_FD) if needs[1] else None
    return grad_n_ND, grad_pre_D, grad_W_FD, grad_b_F


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, k: int,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        u_ND = _centred(n_ND, b_pre_D)
        values_NK = u_ND.new_empty(len(u_ND), k)
        indices_NK = torch.empty(len(u_ND), k, dtype=torch.int64, device=u_ND.device)
        for h_nF, rows in _blocks(u_ND, W_enc_FD, b_enc_F, dtype):
            values_NK[rows], indices_NK[rows] = topk(h_nF, k, exact=dtype is None)
        ctx.save_for_backward(u_ND, W_enc_FD, values_NK, indices_NK)
        ctx.mark_non_differentiable(indices_NK)
        return values_NK, indices_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, W_enc_FD, values_NK, indices_NK = ctx.saved_tensors
        active = SparseLatents(torch.where(values_NK > 0, grad_NK, 0.0), indices_NK)
        grad_E, indices_E, offsets_N1 = entries_of(active)
        entries = (indices_E, offsets_N1)
        return *_encoder_gradients(ctx.needs_input_grad, grad_E, entries, u_ND, W_enc_FD, "torch"), None, None


def above(
    u_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, bar: Tensor | float, impl: Impl = "auto",
    dtype: torch.dtype | None = None,
) -> Entries:  # fmt: skip
    """Entries of ``u @ W_enc.T + b_enc`` above ``bar`` (a number, or [F]), in the order (token, latent); no gradient.

    NaN counts as above: it must not pass for a latent that is silent. ``impl`` and ``dtype`` as in
    :func:`encode_threshold`. ``ValueError`` for a bar of another shape.
    """
    ops_checks.encoder(u_ND, None, W_enc_FD, b_enc_F)
    ops_checks.implementation(impl)
    if isinstance(bar, Tensor) and bar.shape != W_enc_FD.shape[:1]:
        raise ValueError(f"bar must be a number or [F] like W_enc {tuple(W_enc_FD.shape)}, got {tuple(bar.shape)}")
    if impl == "triton" or (impl == "auto" and ops_gpu.takes_encoder(u_ND, W_enc_FD)):
        return Entries(*ops_gpu.above(u_ND, W_enc_FD, b_enc_F, bar, dtype))
    n_latents = len(W_enc_FD)
    values, indices, counts = [u_ND.new_empty(0)], [torch.empty(0, dtype=torch.int64, device=u_ND.device)], []
    for h_nF, _ in _blocks(u_ND, W_enc_FD, b_enc_F):
        flat_e = (h_nF <= bar).logical_not_().view(-1).nonzero().squeeze(1)
        starts = torch.arange(len(h_nF) + 1, device=u_ND.device) * n_latents
        counts.append(torch.searchsorted(flat_e, starts).diff())
        values.append(h_nF.view(-1)[flat_e])
        indices.append(flat_e % n_latents)
    offsets_N1 = torch.zeros(len(u_ND) + 1, dtype=torch.int64, device=u_ND.device)
    if counts:
        torch.cumsum(torch.cat(counts), 0, out=offsets_N1[1:])
    return Entries(torch.cat(values), torch.cat(indices), offsets_N1)


class _EncodeThreshold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, bar: Tensor | float,
        impl: Impl, dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        u_ND = _centred(n_ND, b_pre_D)
        found = above(u_ND, W_enc_FD, b_enc_F, bar, impl, dtype)
        ctx.save_for_backward(u_ND, W_enc_FD, found.indices_E, found.offsets_N1)
        ctx.mark_non_differentiable(found.indices_E, found.offsets_N1)
        ctx.impl = impl
        return found.values_E, found.indices_E, found.offsets_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, W_enc_FD, indices_E, offsets_N1 = ctx.saved_tensors
        entries = (indices_E, offsets_N1)
        found = _encoder_gradients(ctx.needs_input_grad, grad_E, entries, u_ND, W_enc_FD, ctx.impl)
        return *found, None, None, None


def _blocks(u_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, dtype: torch.dtype | None = None) -> Any:
    """(pre-activations, slice of rows) block by block in one buffer: fresh pages cost as much as the selection.

    ``dtype``: operands of the product where they are not to be those given; what comes out has the type of ``u``.
    """
    rows = min(len(u_ND), block_rows(len(W_enc_FD), u_ND.element_size()))
    buffer_nF = u_ND.new_empty(rows, len(W_enc_FD))
    if dtype is not None:
        u_ND, W_enc_FD, b_enc_F = u_ND.to(dtype), W_enc_FD.to(dtype), b_enc_F.to(dtype)
    narrow_nF = None if dtype is None else u_ND.new_empty(buffer_nF.shape)
    for start in range(0, len(u_ND), max(rows, 1)):
        u_nD = u_ND[start : start + rows]
        h_nF = buffer_nF[: len(u_nD)]
        ops_cpu.product(u_nD, W_enc_FD, b_enc_F, h_nF, None if narrow_nF is None else narrow_nF[: len(u_nD)])
        yield h_nF, slice(start, start + len(u_nD))


def encode_topk(
    n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, impl: Impl = "auto", *,
    prepared: "PreparedEncoder | None" = None, exact: bool = True, dtype: torch.dtype | None = None,
) -> SparseLatents:  # fmt: skip
    """``topk((n - b_pre) @ W_enc.T + b_enc)``, differentiable in all tensors, N x F never stored.

    ``impl`` as in :func:`sparse_decode`. Triton alone looks at the rest: ``prepared``, a current compute copy of W_enc
    and b_enc (made here otherwise), whose type is that of the product; ``exact=False`` saves the second look at tokens
    whose set of latents may be off by one (about 0.5 % of them) and gives values of 16 bits of fraction. Torch alone
    looks at ``dtype``, the type that operands and product are rounded to (bfloat16 in training): about 1 % of the
    latents are then others. Slots are in falling order of value by torch, in no order by Triton.
    """
    ops_checks.encoder(n_ND, b_pre_D, W_enc_FD, b_enc_F)
    ops_checks.implementation(impl)
    if not 1 <= k <= len(W_enc_FD):
        raise ValueError(f"k must lie in 1..{len(W_enc_FD)}, got {k} for W_enc {tuple(W_enc_FD.shape)}")
    if impl == "triton" or (impl == "auto" and ops_gpu.takes_encoder(n_ND, W_enc_FD)):
        return SparseLatents(*ops_gpu.encode_topk(n_ND, b_pre_D, W_enc_FD, b_enc_F, k, prepared, exact))
    return SparseLatents(*_EncodeTopK.apply(n_ND, b_pre_D, W_enc_FD, b_enc_F, k, dtype))


def encode_threshold(
    n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, bar_F: Tensor | float,
    impl: Impl = "auto", *, dtype: torch.dtype | None = None,
) -> Entries:  # fmt: skip
    """The entries of ``h = (n - b_pre) @ W_enc.T + b_enc`` with ``h > bar_F[latent]``, N x F never stored.

    JumpReLU and calibrated BatchTopK have their thresholds as bars, ReLU has 0 (a number is the bar of every latent).
    Values are those of h. Differentiable in all tensors but the bar, whose gradient is the architecture's affair.
    Entries of one token are in ascending order of latent. A NaN in h is kept, so that it reaches the loss.
    ``impl`` as in :func:`sparse_decode`; ``dtype``: type of Triton's operands, that of W_enc by default. ``ValueError``
    for a bar of another shape.
    """
    ops_checks.encoder(n_ND, b_pre_D, W_enc_FD, b_enc_F)
    bar = bar_F.detach() if isinstance(bar_F, Tensor) else float(bar_F)
    return Entries(*_EncodeThreshold.apply(n_ND, b_pre_D, W_enc_FD, b_enc_F, bar, impl, dtype))


def encode_relu(
    n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor, impl: Impl = "auto"
) -> Entries:
    """The positive entries of ``(n - b_pre) @ W_enc.T + b_enc``: :func:`encode_threshold` with bar 0."""
    return encode_threshold(n_ND, b_pre_D, W_enc_FD, b_enc_F, 0.0, impl)


class _EncodeDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
        u_ND = _centred(n_ND, b_pre_D)
        ctx.save_for_backward(u_ND, W_enc_FD)
        return torch.addmm(b_enc_F, u_ND, W_enc_FD.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        u_ND, W_enc_FD = ctx.saved_tensors
        grad_b_F = grad_NF.sum(0)
        grad_n_ND = grad_NF @ W_enc_FD if ctx.needs_input_grad[0] else None
        grad_pre_D = -(grad_b_F @ W_enc_FD) if ctx.needs_input_grad[1] else None
        return grad_n_ND, grad_pre_D, grad_NF.t() @ u_ND, grad_b_F


def encode_dense(n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
    """``h_NF = (n - b_pre) @ W_enc.T + b_enc``; its backward has one dense product less than autograd's."""
    ops_checks.encoder(n_ND, b_pre_D, W_enc_FD, b_enc_F)
    return _EncodeDense.apply(n_ND, b_pre_D, W_enc_FD, b_enc_F)  # type: ignore[no-any-return]


class _DecodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_E: Tensor, indices_E: Tensor, offsets_N1: Tensor, W_dec_FD: Tensor) -> Tensor:
        ctx.save_for_backward(values_E, indices_E, offsets_N1, W_dec_FD)
        if not ctx.needs_input_grad[0]:
            return _sum_entries(values_E, indices_E, offsets_N1, W_dec_FD)
        # torch's own gradient of the weights of a bag is the fastest sampled product on CPU (22 ms; gathering the rows
        # takes 260 ms), so the bag keeps its small graph for it.
        with torch.enable_grad():
            ctx.leaf_E = values_E.detach().requires_grad_()
            ctx.y_ND = _sum_entries(ctx.leaf_E, indices_E, offsets_N1, W_dec_FD.detach())
        return ctx.y_ND.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        values_E, indices_E, offsets_N1, W_dec_FD = ctx.saved_tensors
        grad_E = grad_W_FD = None
        grad_ND = grad_ND.contiguous()
        if ctx.needs_input_grad[0]:
            with torch.enable_grad():
                (grad_E,) = torch.autograd.grad(ctx.y_ND, ctx.leaf_E, grad_ND, retain_graph=True)
        if ctx.needs_input_grad[3]:
            grad_W_FD = _sum_by_latent(values_E, indices_E, _tokens_of(offsets_N1), grad_ND, len(W_dec_FD))
        return grad_E, None, None, grad_W_FD


def decode_entries(entries: Entries, W_dec_FD: Tensor, impl: Impl = "auto") -> Tensor:
    """``y_ND = sum over the entries of n of value * W_dec[index]``, no bias; differentiable in values and W_dec.

    ``impl`` as in :func:`sparse_decode`, errors too.
    """
    ops_checks.decoder(*entries[:2], W_dec_FD)
    ops_checks.offsets(entries.offsets_N1, len(entries.values_E))
    ops_checks.implementation(impl)
    if impl == "triton" or (impl == "auto" and ops_gpu.takes_decode(*entries[:2], W_dec_FD)):
        return ops_gpu.decode_entries(*entries, W_dec_FD)
    values_E, indices_E = ops_checks.in_range(*entries[:2], len(W_dec_FD))
    entries = Entries(values_E, indices_E, entries.offsets_N1)
    if W_dec_FD.is_cuda and W_dec_FD.dtype in (torch.bfloat16, torch.float16):
        # On CUDA torch has no gradient of a bag's weights in 16 bits (pytorch #185808).
        wide = entries._replace(values_E=entries.values_E.float())
        return _DecodeEntries.apply(*wide, W_dec_FD.float()).to(W_dec_FD.dtype)  # type: ignore[no-any-return]
    return _DecodeEntries.apply(*entries, W_dec_FD)  # type: ignore[no-any-return]


def sparse_decode(values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor, impl: Impl = "auto") -> Tensor:
    """``y_ND = sum over k of values_NK * W_dec_FD[indices_NK]``, differentiable in values and W_dec.

    ``impl``: ``triton`` (CUDA, or the interpreter in tests; never falls back: ``ValueError`` or ``TypeError``),
    ``torch``, or ``auto`` = Triton for CUDA tensors it takes, with one warning where it does not. Empty
    slots (value 0) add nothing and get the gradient of the latent they name, 0 if they name none. An active index
    outside 0..F - 1: ``ValueError`` by torch, NaN in its token by Triton, which waits for nothing. ``ValueError`` and
    ``TypeError`` for other shapes and types.
    """
    ops_checks.decoder(values_NK, indices_NK, W_dec_FD)
    ops_checks.implementation(impl)
    if values_NK.dim() != 2:
        shapes = f"{tuple(values_NK.shape)} for W_dec {tuple(W_dec_FD.shape)}"
        raise ValueError(f"sparse_decode wants values and indices [N, K], got {shapes}")
    if impl == "triton" or (impl == "auto" and ops_gpu.takes_decode(values_NK, indices_NK, W_dec_FD)):
        return ops_gpu.sparse_decode(values_NK, indices_NK, W_dec_FD)
    return decode_entries(entries_of(SparseLatents(values_NK, indices_NK)), W_dec_FD, "torch")
