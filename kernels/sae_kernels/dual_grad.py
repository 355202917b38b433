"""Both weight gradients of a sparse autoencoder in one pass over the active entries, sorted by latent.

Shapes: N tokens, K slots per token, E = N K entries, F = d_sae, D = d_in, C = ``launch.CHUNK`` entries per block.
dW_dec[f] = sum of coef_dec * r[token], dW_enc[f] = sum of coef_enc * u[token], db_enc[f] = sum of coef_enc over the
entries of f (Gao et al., arXiv 2406.04093, appendix D.2). No atomics: every row has one writer, every sum one order.

The sorted entries are cut where a latent ends and at every multiple of C, for a latent may fire on every token. Thus
a latent has a head, which begins where the latent begins, and one more piece for each multiple of C inside it; both
follow from the position alone, so no table of pieces is built. A head without further pieces is the result; otherwise
head and pieces go to a workspace of 2 E / C rows, from which one program per latent adds them in the order of their
positions. So a result in 16 bits is rounded once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import launch

CHANNELS = 256
"""Channels per program: one warp, eight a lane, so that a row of 16-bit numbers is read 16 bytes a lane."""


class Worklist(NamedTuple):
    """The active entries of a set of codes, sorted by latent; made once and used by every gradient of these codes."""

    entries_E: Tensor
    """int64 slot number n K + k of each entry, in the order of latents, then of tokens; inactive slots last."""
    keys_E: Tensor
    """Latent of each of these entries minus ``shift``; F for inactive slots."""
    bounds_F1: Tensor
    """int64: the entries of latent f are ``entries_E[bounds[f]:bounds[f + 1]]``."""
    shift: int
    n_slots: int
    """K."""
    tokens_E: Tensor | None = None
    """int32 token of each entry where codes have no fixed K (ragged); coefficients are then [E] like the entries."""

    @property
    def n_latents(self) -> int:
        return len(self.bounds_F1) - 1


class DualGradient(NamedTuple):
    """Gradients in float32."""

    W_dec_FD: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor


@triton.jit
def _store_sum(  # type: ignore[no-untyped-def]
    sums, result_ptr, out, part_ptr, part, inside, whole, is_head, ADD: tl.constexpr
):
    """Sums of a head or piece to the result where they are ``whole``, else to the workspace."""
    if ADD:
        sums += tl.load(result_ptr + out, mask=inside & is_head, other=0.0)
    tl.store(result_ptr + out, sums.to(result_ptr.dtype.element_ty), mask=inside & whole)
    tl.store(part_ptr + part, sums, mask=inside & (whole == 0))


@triton.jit
def _segments_kernel(  # type: ignore[no-untyped-def]
    entries_ptr, keys_ptr, bounds_ptr, tokens_ptr, coef_dec_ptr, r_ptr, coef_enc_ptr, u_ptr, w_dec_ptr, w_enc_ptr,
    b_ptr, part_dec_ptr, part_enc_ptr, part_b_ptr, shift, n_latents, n_slots, width, n_pieces,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DUAL: tl.constexpr, ADD: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Programs 0..F - 1: the head of a latent. Program F + j: the piece that begins at entry (j + 1) CHUNK, if any.

    An entry at a multiple of CHUNK begins a piece if the entry before it has the same latent, else it is a head.
    """
    program = tl.program_id(0)
    piece = (program - n_latents).to(tl.int64)
    is_head = program < n_latents
    first = (piece + 1) * CHUNK
    latent = program.to(tl.int64)
    before = latent
    if is_head:
        first = tl.load(bounds_ptr + latent)
    else:
        latent = tl.load(keys_ptr + first).to(tl.int64) + shift
        before = tl.load(keys_ptr + first - 1).to(tl.int64) + shift
    if (latent == before) & (latent < n_latents):
        last = tl.minimum(tl.load(bounds_ptr + latent + 1), (first // CHUNK + 1) * CHUNK)
        channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channels < width
        dec = tl.zeros((CHANNELS,), dtype=tl.float32)
        enc = tl.zeros((CHANNELS,), dtype=tl.float32)
        bias = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(first, last, ROWS):
            positions = start + tl.arange(0, ROWS)
            used = positions < last
            entries = tl.load(entries_ptr + positions, mask=used, other=0).to(tl.int32)
            if RAGGED:
                tokens = tl.load(tokens_ptr + entries, mask=used, other=0)
            else:
                tokens = entries // n_slots
            at = tokens.to(tl.int64)[:, None] * width + channels[None, :]
            mask = used[:, None] & inside[None, :]
            coef = tl.load(coef_dec_ptr + entries, mask=used, other=0.0).to(tl.float32)
            dec += tl.sum(tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32) * coef[:, None], axis=0)
            if DUAL:
                coef = tl.load(coef_enc_ptr + entries, mask=used, other=0.0).to(tl.float32)
                enc += tl.sum(tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32) * coef[:, None], axis=0)
                bias += coef
        if is_head:
            piece = n_pieces + first // CHUNK
        # A head without further pieces is the result; every other sum is one of those that are still to be added.
        whole = is_head & (last == tl.load(bounds_ptr + latent + 1))
        out, part = latent * width + channels, piece * width + channels
        _store_sum(dec, w_dec_ptr, out, part_dec_ptr, part, inside, whole, is_head, ADD)
        if DUAL:
            _store_sum(enc, w_enc_ptr, out, part_enc_ptr, part, inside, whole, is_head, ADD)
            if tl.program_id(1) == 0:
                _store_sum(tl.sum(bias, axis=0), b_ptr, latent, part_b_ptr, piece, True, whole, is_head, ADD)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    keys_ptr, bounds_ptr, w_dec_ptr, w_enc_ptr, b_ptr, part_dec_ptr, part_enc_ptr, part_b_ptr,
    shift, n_latents, width, n_pieces,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Program j, where piece j is the first after its latent's head: adds that piece and the next ones, in order."""
    piece = tl.program_id(0).to(tl.int64)
    first = (piece + 1) * CHUNK
    latent = tl.load(keys_ptr + first).to(tl.int64) + shift
    if latent < n_latents:
        begins = tl.load(bounds_ptr + latent)
        if (begins < first) & (begins >= first - CHUNK):
            last = (tl.load(bounds_ptr + latent + 1) - 1) // CHUNK  # one past the number of the latent's last piece
            channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
            inside = channels < width
            out = latent * width + channels
            head = (n_pieces + piece) * width + channels
            dec = tl.load(part_dec_ptr + head, mask=inside, other=0.0)
            enc = tl.zeros((CHANNELS,), dtype=tl.float32)
            bias = tl.zeros((ROWS,), dtype=tl.float32)
            if DUAL:
                enc = tl.load(part_enc_ptr + head, mask=inside, other=0.0)
            for start in range(piece, last, ROWS):
                pieces = start + tl.arange(0, ROWS)
                at = pieces[:, None] * width + channels[None, :]
                mask = (pieces < last)[:, None] & inside[None, :]
                dec += tl.sum(tl.load(part_dec_ptr + at, mask=mask, other=0.0), axis=0)
                if DUAL:
                    enc += tl.sum(tl.load(part_enc_ptr + at, mask=mask, other=0.0), axis=0)
                    bias += tl.load(part_b_ptr + pieces, mask=pieces < last, other=0.0)
            tl.store(w_dec_ptr + out, dec.to(w_dec_ptr.dtype.element_ty), mask=inside)
            if DUAL:
                tl.store(w_enc_ptr + out, enc.to(w_enc_ptr.dtype.element_ty), mask=inside)
                if tl.program_id(1) == 0:
                    tl.store(b_ptr + latent, tl.load(part_b_ptr + n_pieces + piece) + tl.sum(bias, axis=0))


def worklist(active_NK: Tensor, indices_NK: Tensor, n_latents: int) -> Worklist:
    """Sorted entries of the slots for which ``active_NK`` is not 0 (a bool mask or the values). No host sync.

    Indices of active slots lie in 0..F - 1. ``ValueError`` if N K does not fit 32 bits.
    """
    if indices_NK.dim() != 2 or active_NK.shape != indices_NK.shape or indices_NK.numel() >= 2**31 - launch.CHUNK:
        raise ValueError(
            f"active and indices must be [N, K] with N * K below 2^31; got {tuple(active_NK.shape)}, "
            f"{tuple(indices_NK.shape)}"
        )
    return _sorted(torch.where(active_NK != 0, indices_NK, n_latents).reshape(-1), n_latents, indices_NK.shape[1], None)


def ragged_worklist(indices_E: Tensor, tokens_E: Tensor, n_latents: int) -> Worklist:
    """The same for codes of any width: entry e is latent ``indices_E[e]`` of token ``tokens_E[e]``. No host sync.

    ``ValueError`` for other shapes or too many entries.
    """
    if indices_E.dim() != 1 or tokens_E.shape != indices_E.shape or len(indices_E) >= 2**31 - launch.CHUNK:
        raise ValueError(
            f"indices and tokens must be [E] with E below 2^31; got {tuple(indices_E.shape)}, {tuple(tokens_E.shape)}"
        )
    return _sorted(indices_E.clone(), n_latents, 1, tokens_E.to(torch.int32).contiguous())


def tokens_of(offsets_N1: Tensor, n_entries: int) -> Tensor:
    """int32 token of each of E entries; those of token n are ``offsets[n]:offsets[n + 1]``. No host sync.

    Whatever the offsets are, tokens lie in 0..N - 1: nothing can be read that is not there.
    """
    at_E = torch.arange(n_entries, device=offsets_N1.device)
    tokens_E = torch.searchsorted(offsets_N1[1:], at_E, right=True, out_int32=True)
    return tokens_E.clamp_(max=max(len(offsets_N1) - 2, 0))


def _sorted(latents_E: Tensor, n_latents: int, n_slots: int, tokens_E: Tensor | None) -> Worklist:
    """Worklist of latents, F for inactive entries; writes to its operand."""
    # A radix sort takes one pass per 8 bits of the key: two bytes cost half of four.
    small, shift = (torch.int16, 2**15) if n_latents < 2**16 else (torch.int32, 0)
    keys_E, entries_E = torch.sort(latents_E.sub_(shift).to(small), stable=True)
    wanted_F1 = torch.arange(-shift, n_latents + 1 - shift, dtype=small, device=latents_E.device)
    return Worklist(entries_E, keys_E, torch.searchsorted(keys_E, wanted_F1), shift, n_slots, tokens_E)


def _check(work: Worklist, coefs: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> None:
    """TypeError or ValueError for coefficients that are not [N, K] ([E]) or rows that are not contiguous [N, D]."""
    n_tokens, width = rows[0].shape if rows[0].dim() == 2 else (-1, 0)
    coef_shape = (n_tokens, work.n_slots) if work.tokens_E is None else (len(work.entries_E),)
    device = work.entries_E.device
    kind: type[Exception] = ValueError
    if any(t.dtype not in launch.FLOATS for t in (*coefs, *rows)):
        kind, rule = TypeError, "operands must be float32, bfloat16 or float16"
    elif any(t.shape != (n_tokens, width) for t in rows) or any(t.shape != coef_shape for t in coefs):
        rule = f"rows must be [N, D], coefficients {list(coef_shape)}"
    elif coefs[0].numel() != len(work.entries_E) or not 1 <= width <= launch.MAX_WIDTH:
        rule = f"the codes have {len(work.entries_E)} slots, D lies in 1..{launch.MAX_WIDTH}"
    elif not all(t.is_contiguous() and t.device == device for t in (*coefs, *rows)):
        rule = f"operands must be contiguous and on {device}"
    else:
        return
    names = {f"coefficients_{i}": t for i, t in enumerate(coefs)} | {f"rows_{i}": t for i, t in enumerate(rows)}
    raise kind(f"{rule}; got {launch.described(**names)}")


def _launch(work: Worklist, dec: tuple[Tensor, Tensor], enc: tuple[Tensor, Tensor] | None, out: list[Tensor],
            accumulate: bool) -> None:  # fmt: skip
    """Both kernels; ``dec`` and ``enc`` are (coefficients, rows), ``out`` the results."""
    width, device = dec[1].shape[1], dec[1].device
    n_pieces = max(0, (len(work.entries_E) - 1) // launch.CHUNK)
    # First the pieces, then the heads of latents that have pieces.
    parts = [torch.empty(2 * n_pieces, width, dtype=torch.float32, device=device) for _ in out[:2]]
    part_b_P = torch.empty(2 * n_pieces, dtype=torch.float32, device=device) if enc else parts[0]
    # Without the encoder's half its pointers are never followed; any tensor may stand there.
    coef_enc, u, w_enc, part_enc, b = (*enc, out[1], parts[1], out[2]) if enc else (*dec, out[0], parts[0], part_b_P)
    # Triton takes no pointer of an empty tensor for granted: without slots there is nothing to load either.
    size = launch.gather("weight_gradients", dec[1], launch.Blocks(CHANNELS, launch.cdiv(width, CHANNELS), 1))
    tokens_E = work.entries_E if work.tokens_E is None else work.tokens_E
    common: dict[str, Any] = {
        "CHUNK": launch.CHUNK, "CHANNELS": size.channels, "DUAL": enc is not None, "num_warps": size.warps
    }  # fmt: skip
    with torch.cuda.device_of(dec[1]):
        _segments_kernel[(work.n_latents + n_pieces, size.programs)](
            work.entries_E, work.keys_E, work.bounds_F1, tokens_E, dec[0], dec[1], coef_enc, u, out[0], w_enc, b,
            parts[0], part_enc, part_b_P, work.shift, work.n_latents, max(work.n_slots, 1), width, n_pieces,
            ROWS=size.rows, ADD=accumulate, RAGGED=work.tokens_E is not None, **common,
        )  # fmt: skip
        if n_pieces:
            _combine_kernel[(n_pieces, size.programs)](
                work.keys_E, work.bounds_F1, out[0], w_enc, b, parts[0], part_enc, part_b_P,
                work.shift, work.n_latents, width, n_pieces, ROWS=2 * size.rows, **common,
            )  # fmt: skip


@torch.no_grad()
def dual_gradient(
    work: Worklist, coef_dec_NK: Tensor, r_ND: Tensor, coef_enc_NK: Tensor, u_ND: Tensor,
    into: DualGradient | None = None,
) -> DualGradient:  # fmt: skip
    """``dW_dec[f] = sum coef_dec r[n]``, ``dW_enc[f] = sum coef_enc u[n]``, ``db_enc[f] = sum coef_enc``, float32.

    The sums go over the entries of the worklist; a latent without entries gets zeros. ``into``: earlier gradients
    (contiguous float32) that are added to in place and returned, as micro-batches want. ``TypeError``, ``ValueError``
    for operands of another type or shape.
    """
    _check(work, (coef_dec_NK, coef_enc_NK), (r_ND, u_ND))
    shapes = ((work.n_latents, r_ND.shape[1]), (work.n_latents, r_ND.shape[1]), (work.n_latents,))
    for t, shape in zip(into or (), shapes, strict=False):
        if t.shape != shape or t.dtype != torch.float32 or not t.is_contiguous():
            raise ValueError(f"a gradient to add to must be contiguous float32 {shape}; got {tuple(t.shape)} {t.dtype}")
    found = into or DualGradient(*(torch.empty(s, dtype=torch.float32, device=r_ND.device) for s in shapes))
    _launch(work, (coef_dec_NK, r_ND), (coef_enc_NK, u_ND), list(found), into is not None)
    return found


@torch.no_grad()
def single_gradient(
    work: Worklist, coef_NK: Tensor, rows_ND: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``out_FD[f] = sum over the entries of f of coef_NK * rows_ND[n]``; sums in float32, rounded once to ``dtype``.

    Errors as :func:`dual_gradient`.
    """
    _check(work, (coef_NK,), (rows_ND,))
    out_FD = torch.empty(work.n_latents, rows_ND.shape[1], dtype=dtype, device=rows_ND.device)
    _launch(work, (coef_NK, rows_ND), None, [out_FD], False)
    return out_FD
