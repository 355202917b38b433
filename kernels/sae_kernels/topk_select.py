"""Selection of the K largest pre-activations of a token from the R largest of each tile, with a flag per token.

Shapes: N tokens, F = d_sae latents in T tiles of BN, R candidates per tile, K slots per token. Latent f lies in tile
f mod T at column f div T, so that the latents of any prefix of a dictionary are spread over all tiles.

A candidate is a *key*: the bits of a float32 in an order that int32 comparison respects, whose low log2(BN) bits are
replaced by BN - 1 - column. Keys of a tile are unique, value and latent travel together, and of equal values the lower
latent is larger. At BN = 128 a value loses 7 of its 23 bits of fraction: at most 1.6e-5 of it. The idea of keeping
R per bucket is that of arXiv 2506.04165; that a flag makes it exact is easy to see: a latent that is in no tile's R is
at most its tile's R-th, so where every R-th candidate is below the K-th selected value, nothing was missed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import launch

EXACT, HIDDEN, TIE = 0, 1, 2
"""Flags of a token: the set is exact; a tile may hide a winner; the K-th and next key differ in their column only."""
MAX_SLICE = 8_192
"""Candidates that a program holds in registers; a longer row is read again, from cache, at every step of the search."""
PER_WARP = 512
"""Candidates that a warp holds: twice as many take all registers."""
BLOCK_TILES, BLOCK_ROWS = 16, 4
"""Tiles and rows that a program of the block selection takes."""


@triton.jit
def _keys(h, columns, BN: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # a GPU makes one NaN, the largest pattern; a CPU's NaN is negative and would sort as the smallest
        h = tl.where(h != h, float("nan"), h)
    bits = h.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered & -BN) | (BN - 1 - columns)


@triton.jit
def _store_largest(keys, targets, inside, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """The R largest keys of each row (last axis), in falling order, to ``targets``, ``targets + 1``, ..."""
    for r in tl.static_range(R):
        best = tl.max(keys, axis=1)
        tl.store(targets + r, best, mask=inside)
        keys = tl.where(keys == best[:, None], -2147483648, keys)


@triton.jit
def _block_kernel(  # type: ignore[no-untyped-def]
    h_ptr, b_ptr, out_ptr, n_rows, n_block_tiles, n_tiles,
    BN: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program = TILES tiles of ROWS rows of a stored block of products; the bias is read once for all rows."""
    tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tl.arange(0, BN)
    inside = tiles < n_block_tiles
    offsets = tiles[:, None] * BN + columns[None, :]
    bias = tl.load(b_ptr + offsets, mask=inside[:, None], other=0.0)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, n_rows)):
        start = tl.cast(row, tl.int64)
        h = tl.load(h_ptr + start * (n_block_tiles * BN) + offsets, mask=inside[:, None], other=0.0) + bias
        keys = _keys(h, columns[None, :], BN, INTERPRETED)
        _store_largest(keys, out_ptr + start * (n_tiles * R) + tiles * R, inside, R)


@triton.jit
def _load_slice(  # type: ignore[no-untyped-def]
    row_ptr, start, n_candidates, n_tiles, n_latents, BN: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    """(offsets, keys, whether a padding latent is NaN): keys of padding and past the end are the smallest int32."""
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < n_candidates
    keys = tl.load(row_ptr + offsets, mask=inside, other=-2147483648)
    latents = (BN - 1 - (keys & (BN - 1))) * n_tiles + offsets // R
    padding = inside & (latents >= n_latents)
    poisoned = tl.max((padding & (keys >= 0)).to(tl.int32), axis=0)
    return offsets, tl.where(padding, -2147483648, keys), poisoned


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    keys, row_ptr, n_candidates, n_tiles, n_latents, k,
    BN: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """(bar, keys that reach it): the K-th largest key by bisection on its bits; ``keys`` is the first slice."""
    # bar: a multiple of BN that the K largest keys and, but for equal ones, no others reach; the smallest int32 where
    # fewer than K keys exist.
    bar = tl.full((), -2147483648, tl.int32)
    step = tl.full((), -2147483648, tl.int32)  # the sign bit first: by XOR it is set in the order of int32
    reached = 0
    # As soon as exactly K keys reach a trial, they are the set: lower bits change neither it nor the flag.
    while (step != BN // 2) & (reached != k):
        trial = bar ^ step
        count = tl.sum((keys >= trial).to(tl.int32), axis=0)
        for s in range(1, SLICES):
            _, others, _ = _load_slice(row_ptr, s * BLOCK, n_candidates, n_tiles, n_latents, BN, R, BLOCK)
            count += tl.sum((others >= trial).to(tl.int32), axis=0)
        reached = tl.where(count >= k, count, reached)
        bar = tl.where(count >= k, trial, bar)
        step = (step >> 1) & 0x7FFFFFFF
    return bar, reached


@triton.jit
def _select_kernel(  # type: ignore[no-untyped-def]
    candidates_ptr, values_ptr, indices_ptr, flags_ptr, n_candidates, n_tiles, n_latents, k,
    BN: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """One program = one token: what lies above the K-th largest key, equal keys in order as there is room, the flag."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = candidates_ptr + token * n_candidates
    values_row = values_ptr + token * k
    indices_row = indices_ptr + token * k
    offsets, keys, poisoned = _load_slice(row_ptr, 0, n_candidates, n_tiles, n_latents, BN, R, BLOCK)
    for s in range(1, SLICES):
        _, _, more = _load_slice(row_ptr, s * BLOCK, n_candidates, n_tiles, n_latents, BN, R, BLOCK)
        poisoned = tl.maximum(poisoned, more)

    bar, reached = _search(keys, row_ptr, n_candidates, n_tiles, n_latents, k, BN, R, BLOCK, SLICES)
    greater = tl.sum((keys > (bar | (BN - 1))).to(tl.int32), axis=0)
    for s in range(1, SLICES):
        _, others, _ = _load_slice(row_ptr, s * BLOCK, n_candidates, n_tiles, n_latents, BN, R, BLOCK)
        greater += tl.sum((others > (bar | (BN - 1))).to(tl.int32), axis=0)
    room = k - greater
    hidden = poisoned
    n_above = 0
    n_equal = 0
    for s in range(0, SLICES):
        if SLICES > 1:
            offsets, keys, _ = _load_slice(row_ptr, s * BLOCK, n_candidates, n_tiles, n_latents, BN, R, BLOCK)
        above = keys > (bar | (BN - 1))
        equal = (keys >= bar) & (keys > -2147483648) & (above == 0)
        # Both ranks by one prefix sum: a slice has fewer than 2^16 entries.
        ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
        rank_above = n_above + (ranks & 0xFFFF)
        rank_equal = n_equal + (ranks >> 16)
        taken = above | (equal & (rank_equal <= room))
        position = rank_above + tl.minimum(rank_equal, room) - 1
        value = tl.where(keys >= 0, (keys & -BN).to(tl.float32, bitcast=True), 0.0)
        latents = (BN - 1 - (keys & (BN - 1))) * n_tiles + offsets // R
        tl.store(values_row + position, value, mask=taken)
        tl.store(indices_row + position, latents, mask=taken)
        # A tile hides nothing that matters if its R-th key is negative: values below 0 make empty slots.
        last = (offsets % R == R - 1) & (keys >= tl.maximum(bar, 0))
        hidden = tl.maximum(hidden, tl.max(last.to(tl.int32), axis=0))
        n_above += tl.sum(above.to(tl.int32), axis=0)
        n_equal += tl.sum(equal.to(tl.int32), axis=0)
    tied = ((reached > k) & (bar >= 0)).to(tl.int32)
    tl.store(flags_ptr + token, tl.where(hidden != 0, 1, tied * 2).to(tl.int8))
    # Slots that no candidate took: empty, or NaN where NaN padding may have pushed real candidates out of their tiles.
    n_taken = n_above + tl.minimum(n_equal, room)
    empty = tl.where(poisoned != 0, float("nan"), 0.0)
    for start in range(0, k, FILL):
        slots = start + tl.arange(0, FILL)
        unused = (slots >= n_taken) & (slots < k)
        tl.store(values_row + slots, tl.zeros((FILL,), tl.float32) + empty, mask=unused)
        tl.store(indices_row + slots, tl.zeros((FILL,), tl.int32), mask=unused)


@triton.jit
def _values_kernel(  # type: ignore[no-untyped-def]
    u_ptr, w_ptr, b_ptr, indices_ptr, values_ptr, n_slots, n_tiles, width,
    BN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program = ROWS slots of one token: relu(<u, W[latent]> + b[latent]) in float32; NaN stays NaN."""
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    used = slots < n_slots
    latents = tl.load(indices_ptr + token * n_slots + slots, mask=used, other=0)
    rows = ((latents % n_tiles) * BN + latents // n_tiles).to(tl.int64)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for start in range(0, width, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        inside = channels < width
        u = tl.load(u_ptr + token * width + channels, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(
            w_ptr + rows[:, None] * width + channels[None, :], mask=used[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += w * u[None, :]
    value = tl.sum(total, axis=1) + tl.load(b_ptr + rows, mask=used, other=0.0)
    tl.store(values_ptr + token * n_slots + slots, tl.where(value <= 0.0, 0.0, value), mask=used)


INTERPRETED = not isinstance(_select_kernel, triton.JITFunction)
"""Whether the kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1 at the import of this module)."""


def select_block(h_nP: Tensor, b_P: Tensor, candidates_NC: Tensor, first_tile: int, bn: int, r: int) -> None:
    """Write the R largest keys of every tile of a stored block of products without bias.

    ``h_nP`` and ``b_P``: float32, contiguous, whole tiles of ``bn`` latents in tile order from tile ``first_tile`` on.
    ``candidates_NC``: int32, contiguous, [n, T * R]; its entries of other tiles are left alone.
    """
    n_rows, block_tiles = len(h_nP), h_nP.shape[1] // bn
    grid = (launch.cdiv(n_rows, BLOCK_ROWS), launch.cdiv(block_tiles, BLOCK_TILES))
    with torch.cuda.device_of(h_nP):
        _block_kernel[grid](
            h_nP, b_P, candidates_NC[:, first_tile * r :], n_rows, block_tiles, candidates_NC.shape[1] // r,
            BN=bn, R=r, TILES=BLOCK_TILES, ROWS=BLOCK_ROWS, INTERPRETED=INTERPRETED, num_warps=4,
        )  # fmt: skip


def slices(n_candidates: int) -> tuple[int, int, int]:
    """(candidates per slice, slices, warps) of the row selection."""
    block = max(32, launch.power_of_2(n_candidates))
    if block > MAX_SLICE:  # the loops over slices need registers of their own
        block = max(32, MAX_SLICE // 2)
    return block, launch.cdiv(n_candidates, block), max(1, block // PER_WARP)


def select_rows(
    candidates_NC: Tensor, n_latents: int, bn: int, r: int, values_NK: Tensor, indices_NK: Tensor, flags_N: Tensor
) -> None:
    """The K largest candidates of each token, in candidate order; K is the width of ``values_NK``.

    Writes values (float32, truncated as keys are, 0 where negative), indices (int32 latents) and flags (int8:
    :data:`EXACT`, :data:`HIDDEN`, :data:`TIE`). A token with NaN has NaN values and flag 1. All tensors contiguous.
    """
    (n_tokens, k), n_candidates = values_NK.shape, candidates_NC.shape[1]
    block, n_slices, warps = slices(n_candidates)
    with torch.cuda.device_of(candidates_NC):
        _select_kernel[(n_tokens,)](
            candidates_NC, values_NK, indices_NK, flags_N, n_candidates, n_candidates // r, n_latents, k,
            BN=bn, R=r, BLOCK=block, SLICES=n_slices, FILL=min(256, launch.power_of_2(k)), num_warps=warps,
        )  # fmt: skip


def gathered_values(
    u_ND: Tensor, W_PD: Tensor, b_P: Tensor, indices_NK: Tensor, bn: int, values_NK: Tensor
) -> None:
    """``values_NK = relu(<u_ND[n], W[indices_NK]> + b)`` in float32, W and b in tile order; NaN stays NaN."""
    (n_tokens, n_slots), width = indices_NK.shape, u_ND.shape[1]
    size = launch.blocks(width)
    with torch.cuda.device_of(u_ND):
        _values_kernel[(n_tokens, launch.cdiv(n_slots, launch.ROWS))](
            u_ND, W_PD, b_P, indices_NK, values_NK, n_slots, len(W_PD) // bn, width,
            BN=bn, ROWS=launch.ROWS, CHANNELS=size.channels, num_warps=size.warps,
        )  # fmt: skip
