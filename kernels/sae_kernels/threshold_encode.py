"""Threshold encoder: the entries of ``u W_enc + b_enc`` above a bar per latent, without a matrix of all of them.

Shapes: N tokens, D = d_in, F = d_sae latents in T = F / BN tiles (rounded up), words of 32 latents each, E entries.
JumpReLU, calibrated BatchTopK and ReLU are such codes (KERNELS 6). How many entries a token has is not known before:

1. Pre-activations are compared with their bars in float32 as they leave the product; one bit each says which are above.
   Nothing else is stored: a thirty-second of float32 pre-activations.
2. The bits are counted; a prefix sum over tokens says where the entries of each go, and the host learns E.
3. A program per token walks its bits in order and writes the latents.
4. Values are float32 dot products of the gathered rows, as in the exact mode of :mod:`sae_kernels.topk_encode`.

Nothing is truncated, whatever the density; no atomics, one writer per entry, in the order of (token, latent). Two paths
to the same bits: **A** fuses step 1 with the product (16-bit operands, tensor descriptors, from sm_90 on); **B** takes
the product from cuBLAS in blocks that stay in the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_kernels import launch
from sae_kernels.topk_encode import _product, takes_bulk

WORD = 32
"""Latents per word."""
WORD_BYTES = 256 * 2**20
"""Tokens are taken in slabs whose words fit into this; the host waits once per slab."""
BLOCK_ROWS, BLOCK_LATENTS = 1_024, 16_384
"""A block of path B, as in topk_encode."""
WORDS = 64
"""Words that a program of path B makes."""
CHANNELS = 256
"""Channels per step of the values, one warp: a row of 16-bit numbers is read 16 bytes a lane."""
MAX_WALK = 1_024
"""Words that a program of steps 2 and 3 holds at a time."""


class Fused(NamedTuple):
    """Launch settings of path A."""

    rows: int
    """Tokens per program, BM."""
    latents: int
    """Latents per program, BN, a multiple of a word."""
    channels: int
    """Channels per step, BK."""
    warps: int
    stages: int
    group: int = 8
    """Row blocks that follow one another with the same tile of W, which then comes from L2."""
    programs: int = 2
    """Per multiprocessor; they share all blocks."""
    registers: int = 128
    """Limit per thread that lets ``programs`` run side by side: one multiplies while the other compares."""


FUSED = Fused(128, 128, 64, 8, 3)
TILE = FUSED.latents
"""Words of a token are padded to whole tiles."""


class Sparse(NamedTuple):
    """The entries above their bars; those of token n are ``offsets[n]:offsets[n + 1]``, latents ascending."""

    values_E: Tensor
    """float32 pre-activations, at least the bar."""
    indices_E: Tensor
    """int64 latents."""
    offsets_N1: Tensor
    """int64."""


@triton.jit
def _words(keep, places, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 words [ROWS, COLUMNS / 32] of the bits of ``keep``; ``places``: column modulo 32."""
    bits = tl.where(keep, 1 << places, 0)
    return tl.sum(tl.reshape(bits, (ROWS, COLUMNS // 32, 32)), axis=2)


@triton.jit
def _real_bits(first, n_latents):  # type: ignore[no-untyped-def]
    """Words with ones where ``first`` + place is below ``n_latents``."""
    n = tl.minimum(tl.maximum(n_latents - first, 0), 32)
    return tl.where(n == 32, -1, (1 << (n & 31)) - 1)


@triton.jit
def _bulk_kernel(  # type: ignore[no-untyped-def]
    u_desc, w_desc, b_ptr, bar_ptr, words_ptr, n_tokens, n_tiles, n_latents, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program takes every ``num_programs``-th block of BM tokens x one tile: product, comparison, bits."""
    n_blocks = tl.cdiv(n_tokens, BM)
    per_group = GROUP * n_tiles
    for index in range(tl.program_id(0), n_blocks * n_tiles, tl.num_programs(0)):
        first = (index // per_group) * GROUP
        in_group = tl.minimum(n_blocks - first, GROUP)
        block = first + (index % per_group) % in_group
        tile = (index % per_group) // in_group
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, width, BK):
            u = u_desc.load([block * BM, start])  # past the end of rows, latents and channels: zeros
            w = w_desc.load([tile * BN, start])
            if INTERPRETED:  # 16-bit products are wrong there
                u = u.to(tl.float32)
                w = w.to(tl.float32)
            total = tl.dot(u, w.T, total, input_precision="ieee")
        columns = tl.arange(0, BN)
        bias = tl.load(b_ptr + tile * BN + columns)
        bar = tl.load(bar_ptr + tile * BN + columns)
        keep = ((total + bias[None, :]) <= bar[None, :]) == 0  # NaN counts as above: it must not pass for silence
        words = _words(keep, (columns & 31)[None, :], BM, BN)
        # Latents past the last one: with infinite u their products of zeros are NaN, hence "above".
        ordinals = tl.arange(0, BN // 32)
        words &= _real_bits(tile * BN + ordinals * 32, n_latents)[None, :]
        rows = block * BM + tl.arange(0, BM)
        at = rows.to(tl.int64)[:, None] * (n_tiles * (BN // 32)) + (tile * (BN // 32) + ordinals)[None, :]
        tl.store(words_ptr + at, words, mask=(rows < n_tokens)[:, None])


@triton.jit
def _bits_kernel(  # type: ignore[no-untyped-def]
    h_ptr, b_ptr, bar_ptr, words_ptr, first_word, last_word, n_words, n_block_latents, n_latents, WORDS: tl.constexpr
):
    """One program = WORDS words of one token, from a stored block of products that begins at word ``first_word``."""
    row = tl.program_id(0).to(tl.int64)
    words = first_word + tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    places = tl.arange(0, 32)
    latents = words[:, None] * 32 + places[None, :]
    real = (latents < n_latents) & (latents < first_word * 32 + n_block_latents)
    h = tl.load(h_ptr + row * n_block_latents + latents - first_word * 32, mask=real, other=0.0)
    h += tl.load(b_ptr + latents, mask=real, other=0.0)
    keep = ((h <= tl.load(bar_ptr + latents, mask=real, other=0.0)) == 0) & real
    found = tl.sum(tl.where(keep, (1 << places)[None, :], 0), axis=1)
    tl.store(words_ptr + row * n_words + words, found, mask=words < last_word)


@triton.jit
def _ones(words):  # type: ignore[no-untyped-def]
    """Number of ones of each uint32."""
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words += words >> 8
    return ((words + (words >> 16)) & 63).to(tl.int32)


@triton.jit
def _count_kernel(words_ptr, counts_ptr, n_words, WALK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program = one token: how many bits are set."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WALK,), dtype=tl.int32)
    for start in range(0, n_words, WALK):
        at = start + tl.arange(0, WALK)
        total += _ones(tl.load(words_ptr + row * n_words + at, mask=at < n_words, other=0).to(tl.uint32, bitcast=True))
    tl.store(counts_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _walk_kernel(words_ptr, offsets_ptr, indices_ptr, n_words, WALK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program = one token: the latents of its bits, from the lowest to the highest."""
    row = tl.program_id(0).to(tl.int64)
    done = tl.load(offsets_ptr + row)
    for start in range(0, n_words, WALK):
        at = start + tl.arange(0, WALK)
        words = tl.load(words_ptr + row * n_words + at, mask=at < n_words, other=0).to(tl.uint32, bitcast=True)
        counts = _ones(words)
        place = done + tl.cumsum(counts, axis=0) - counts
        for _ in range(0, tl.max(counts, axis=0)):
            rest = words & (words - 1)
            # The lowest one is a power of two: as a float its exponent is its place.
            column = ((words ^ rest).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(indices_ptr + place, (at * 32 + column).to(tl.int64), mask=words != 0)
            place += 1
            words = rest
        done += tl.sum(counts, axis=0)


@triton.jit
def _values_kernel(  # type: ignore[no-untyped-def]
    u_ptr, w_ptr, b_ptr, bar_ptr, offsets_ptr, indices_ptr, values_ptr, width,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program = one token: <u, W[latent]> + b[latent] of its entries, ROWS at a time, in float32."""
    token = tl.program_id(0).to(tl.int64)
    last = tl.load(offsets_ptr + token + 1)
    for start in range(tl.load(offsets_ptr + token), last, ROWS):
        entries = start + tl.arange(0, ROWS)
        used = entries < last
        latents = tl.load(indices_ptr + entries, mask=used, other=0)
        total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
        for first in range(0, width, CHANNELS):
            channels = first + tl.arange(0, CHANNELS)
            inside = channels < width
            u = tl.load(u_ptr + token * width + channels, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(
                w_ptr + latents[:, None] * width + channels[None, :], mask=used[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            total += w * u[None, :]
        value = tl.sum(total, axis=1) + tl.load(b_ptr + latents, mask=used, other=0.0)
        # Summed in another order than the product: an entry that it found above the bar must not fall below.
        bar = tl.load(bar_ptr + latents, mask=used, other=0.0)
        tl.store(values_ptr + entries, tl.where(value < bar, bar, value), mask=used)


INTERPRETED = not isinstance(_walk_kernel, triton.JITFunction)
"""Whether the kernels of this process run in Triton's interpreter."""


def refusal(u_ND: Tensor, W_FD: Tensor, b_F: Tensor, bar_F: Tensor) -> Exception | None:
    """The error for operands that :func:`encode_threshold` does not take, with what was found; None if it does."""
    operands = (u_ND, W_FD, b_F, bar_F)
    kind: type[Exception] = ValueError
    if u_ND.dtype != W_FD.dtype or u_ND.dtype not in launch.FLOATS:
        kind, rule = TypeError, "u and W_enc must have one type, float32, bfloat16 or float16"
    elif b_F.dtype != torch.float32 or bar_F.dtype != torch.float32:
        kind, rule = TypeError, "b_enc and bar must be float32"
    elif u_ND.dim() != 2 or W_FD.dim() != 2 or u_ND.shape[1] != W_FD.shape[1]:
        rule = "u must be [N, D] and W_enc [F, D]"
    elif b_F.shape != W_FD.shape[:1] or bar_F.shape != W_FD.shape[:1]:
        rule = "b_enc and bar must be [F]"
    elif len({t.device for t in operands}) > 1:
        rule = "u, W_enc, b_enc and bar must lie on one device"
    elif not all(t.is_contiguous() for t in operands):
        rule = "u, W_enc, b_enc and bar must be contiguous"
    elif not 1 <= W_FD.shape[1] <= launch.MAX_WIDTH or not 1 <= len(W_FD) < 2**31 - TILE or len(u_ND) >= 2**31:
        rule = f"N and F must be below 2^31, D must lie in 1..{launch.MAX_WIDTH}, F must not be 0"
    else:
        return None
    return kind(f"{rule}; got {launch.described(u=u_ND, W_enc=W_FD, b_enc=b_F, bar=bar_F)}")


def _words_fused(u_nD: Tensor, W_FD: Tensor, b_P: Tensor, bar_P: Tensor, fused: Fused, out_nW: Tensor) -> None:
    """Path A. ``b_P`` and ``bar_P`` reach to the end of the last tile."""
    (n_tokens, width), n_latents = u_nD.shape, len(W_FD)
    n_tiles = len(b_P) // fused.latents
    programs = launch.cdiv(n_tokens, fused.rows) * n_tiles
    if u_nD.is_cuda:
        n_sms = torch.cuda.get_device_properties(u_nD.device).multi_processor_count
        programs = min(programs, fused.programs * n_sms)
    with torch.cuda.device_of(u_nD):
        _bulk_kernel[(programs,)](
            TensorDescriptor.from_tensor(u_nD, [fused.rows, fused.channels]),
            TensorDescriptor.from_tensor(W_FD, [fused.latents, fused.channels]),
            b_P, bar_P, out_nW, n_tokens, n_tiles, n_latents, width,
            BM=fused.rows, BN=fused.latents, BK=fused.channels, GROUP=fused.group, INTERPRETED=INTERPRETED,
            num_warps=fused.warps, num_stages=fused.stages, maxnreg=fused.registers,
        )  # fmt: skip


def _words_blocks(u_nD: Tensor, W_FD: Tensor, b_P: Tensor, bar_P: Tensor, out_nW: Tensor) -> None:
    """Path B."""
    rows = min(BLOCK_ROWS, len(u_nD))
    buffer = torch.empty(rows * min(BLOCK_LATENTS, len(W_FD)), dtype=torch.float32, device=u_nD.device)
    for first in range(0, len(W_FD), BLOCK_LATENTS):
        W_pD = W_FD[first : first + BLOCK_LATENTS]
        last = first + BLOCK_LATENTS >= len(W_FD)
        # The last block writes the padding of the last tile too.
        n_words = out_nW.shape[1] - first // WORD if last else BLOCK_LATENTS // WORD
        for start in range(0, len(u_nD), rows):
            u = u_nD[start : start + rows]
            h_np = buffer[: len(u) * len(W_pD)].view(len(u), len(W_pD))
            _product(u, W_pD, h_np)
            with torch.cuda.device_of(u_nD):
                _bits_kernel[(len(u), launch.cdiv(n_words, WORDS))](
                    h_np, b_P, bar_P, out_nW[start : start + rows], first // WORD, first // WORD + n_words,
                    out_nW.shape[1], len(W_pD), len(W_FD), WORDS=WORDS, num_warps=4,
                )  # fmt: skip


def _entries(u_nD: Tensor, W_FD: Tensor, b_F: Tensor, bar_F: Tensor, words_nW: Tensor) -> Sparse:
    """Steps 2 to 4. The host waits for the number of entries."""
    n_tokens, n_words = words_nW.shape
    walk = min(MAX_WALK, launch.power_of_2(n_words))
    device, width = u_nD.device, u_nD.shape[1]
    counts_n = torch.empty(n_tokens, dtype=torch.int64, device=device)
    offsets_n1 = torch.zeros(n_tokens + 1, dtype=torch.int64, device=device)
    options = {"WALK": walk, "num_warps": min(4, max(1, walk // 256))}
    with torch.cuda.device_of(u_nD):
        _count_kernel[(n_tokens,)](words_nW, counts_n, n_words, **options)
        torch.cumsum(counts_n, 0, out=offsets_n1[1:])
        n_entries = int(offsets_n1[-1])
        indices_e = torch.empty(n_entries, dtype=torch.int64, device=device)
        values_e = torch.empty(n_entries, dtype=torch.float32, device=device)
        if n_entries:
            _walk_kernel[(n_tokens,)](words_nW, offsets_n1, indices_e, n_words, **options)
            _values_kernel[(n_tokens,)](
                u_nD, W_FD, b_F, bar_F, offsets_n1, indices_e, values_e, width,
                ROWS=launch.ROWS, CHANNELS=min(CHANNELS, max(16, launch.power_of_2(width))), num_warps=1,
            )  # fmt: skip
    return Sparse(values_e, indices_e, offsets_n1)


@torch.no_grad()
def encode_threshold(
    u_ND: Tensor, W_FD: Tensor, b_F: Tensor, bar_F: Tensor, path: str = "auto", fused: Fused | None = None
) -> Sparse:
    """Entries of ``u W_enc + b_enc`` that are not at or below ``bar_F[latent]``, NaN included. No gradient.

    u and W: the same of float32, bfloat16 and float16; b and bar float32, all contiguous. ``path``: ``A``, ``B`` or
    ``auto`` (A where the operands allow it). The comparison is that of the product's float32 sums. ``TypeError`` and
    ``ValueError`` as in :func:`refusal`, ``ValueError`` for a path that is not possible.
    """
    error = refusal(u_ND, W_FD, b_F, bar_F)
    if error is not None:
        raise error
    if path not in ("auto", "A", "B"):
        raise ValueError(f"path must be auto, A or B, got {path!r}")
    row_bytes = u_ND.shape[1] * u_ND.element_size()
    if path == "A" and (row_bytes % 16 or u_ND.data_ptr() % 16 or W_FD.data_ptr() % 16 or u_ND.element_size() != 2):
        raise ValueError(f"path A wants 16-bit rows of a multiple of 16 bytes; got u {tuple(u_ND.shape)} {u_ND.dtype}")
    use_a = path == "A" or (path == "auto" and takes_bulk(u_ND) and W_FD.data_ptr() % 16 == 0)
    n_latents = len(W_FD)
    if fused is None:
        found = launch.tuned("threshold_bulk", u_ND, n_latents) if use_a else None
        fused = FUSED if found is None else FUSED._replace(**found)
    padding = (0, -n_latents % fused.latents)
    b_P, bar_P = (torch.nn.functional.pad(t, padding) for t in (b_F, bar_F))
    n_words = len(b_P) // WORD
    made = []
    for u_nD in u_ND.split(max(1, WORD_BYTES // (4 * n_words))) if len(u_ND) else ():
        words_nW = torch.empty(len(u_nD), n_words, dtype=torch.int32, device=u_ND.device)
        if use_a:
            _words_fused(u_nD, W_FD, b_P, bar_P, fused, words_nW)
        else:
            _words_blocks(u_nD, W_FD, b_P, bar_P, words_nW)
        made.append(_entries(u_nD, W_FD, b_F, bar_F, words_nW))
    if len(made) == 1:
        return made[0]
    return _joined(made, u_ND.device)


def _joined(parts: list[Sparse], device: torch.device) -> Sparse:
    counts = [part.offsets_N1.diff() for part in parts]
    offsets_N1 = torch.zeros(sum(map(len, counts)) + 1, dtype=torch.int64, device=device)
    if not parts:
        return Sparse(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device), offsets_N1)
    torch.cumsum(torch.cat(counts), 0, out=offsets_N1[1:])
    return Sparse(torch.cat([p.values_E for p in parts]), torch.cat([p.indices_E for p in parts]), offsets_N1)
