"""Top-K encoder: the K largest of ``u W_enc + b_enc`` per token, without a matrix of all pre-activations.

Shapes: N tokens, D = d_in, F = d_sae, K slots per token; T tiles of BN latents, P = T BN, R candidates kept per tile.
Three paths to the same numbers:

- **A**: one kernel; the product of a tile is reduced to its R largest keys before it leaves the registers.
- **B**: cuBLAS in blocks that stay in the L2 cache, each reduced to the R largest keys of its tiles.
- **C**: cuBLAS and ``torch.topk`` on blocks of rows: large K or few latents, where tiles would hide too much.

A and B then select K of the T R candidates (:mod:`sae_kernels.topk_select`). Sparse encoding as in Gao et al.
(arXiv 2406.04093), appendix D.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_kernels import launch, topk_select
from sae_kernels.prepared import TILE, PreparedEncoder, prepare
from sae_kernels.topk_select import INTERPRETED, _keys, _store_largest

__all__ = ["TILE", "PreparedEncoder", "prepare", "plan", "encode_topk", "refusal"]
MISSED = 2e-3
"""R is 4 if at most this share of tokens is expected to have more than 4 winners in a tile, else 8."""
CANDIDATE_BYTES = 256 * 2**20
"""Tokens are taken in slabs whose candidates fit into this."""
BLOCK_ROWS, BLOCK_LATENTS = 1_024, 16_384
"""A block of path B, 67 MB of float32: 3 to 6 % faster on an H200 than half of it, which its L2 cache would hold."""
FUSED_MAX_WIDTH = 4_096
"""Largest D for which path A was measured faster than B (:data:`BULK` on an H200, results/kernels.csv); the device's
table of launch settings may say otherwise (:func:`launch.tuned`)."""


class Fused(NamedTuple):
    """Launch settings of path A."""

    rows: int
    """Tokens per program, BM."""
    channels: int
    """Channels per step, BK."""
    warps: int
    stages: int
    group: int = 8
    """Row blocks that follow one another with the same tile of W, which then comes from L2."""
    bulk: bool = False
    """Loads by tensor descriptors (TMA, from sm_90 on); wants rows of a multiple of 16 bytes."""
    programs: int = 0
    """With ``bulk``: programs that share all blocks (a multiple of the number of SMs); 0 = one program per block."""


FUSED = {2: Fused(128, 64, 8, 3), 4: Fused(64, 32, 8, 2)}
"""Settings by bytes of an operand."""
BULK = Fused(128, 64, 8, 3, bulk=True, programs=2)
"""Settings where :func:`takes_bulk`; here ``programs`` counts per SM."""


class Plan(NamedTuple):
    """How a call is done: path A, B or C, candidates per tile, and why."""

    path: str
    candidates: int
    reason: str


def missed_share(n_tiles: int, k: int, r: int) -> float:
    """Expected share of tokens with more than R of their K winners in one tile, bounded by the sum over tiles.

    Each winner falls into any of the T tiles with equal chance (tile order is made for that), so a tile's count is
    binomial. Compare the recall formula of arXiv 2506.04165.
    """
    if n_tiles == 1:
        return float(k > r)
    inside, outside = -math.log(n_tiles), math.log1p(-1 / n_tiles)
    tail = 0.0
    for count in range(r + 1, min(k, r + 200) + 1):
        ways = math.lgamma(k + 1) - math.lgamma(count + 1) - math.lgamma(k - count + 1)
        tail += math.exp(ways + count * inside + (k - count) * outside)
    return min(1.0, n_tiles * tail)


def takes_bulk(u_ND: Tensor) -> bool:
    """Whether path A may load by descriptors: 16-bit operands in rows of whole 16 bytes, on a GPU from sm_90 on."""
    if not u_ND.is_cuda or u_ND.element_size() != 2 or u_ND.shape[1] % 8 or u_ND.data_ptr() % 16:
        return False
    return torch.cuda.get_device_capability(u_ND.device) >= (9, 0)


def _settings(u_ND: Tensor, n_latents: int, k: int) -> Fused:
    if not takes_bulk(u_ND):
        found = launch.tuned("topk_pointers", u_ND, n_latents, k)
        return FUSED[u_ND.element_size()] if found is None else Fused(**found)
    found = launch.tuned("topk_bulk", u_ND, n_latents, k)
    if found is not None:
        return _whole_device(Fused(**found, bulk=True), u_ND.device)
    return _whole_device(BULK, u_ND.device)


def _whole_device(fused: Fused, device: torch.device) -> Fused:
    """``programs`` per SM to programs in all."""
    n_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return fused._replace(programs=fused.programs * n_sms)


def plan(
    n_latents: int, width: int, k: int, bn: int = TILE, exact: bool = False, path: str = "auto", R: int | None = None,
    bulk: bool = False, tuned: str | None = None,
) -> Plan:  # fmt: skip
    """Path, R and the reason for an encoder of F latents and D channels. ``ValueError`` for values that cannot be.

    ``bulk``: what :func:`takes_bulk` says of the operands; without it path A was not measured to be faster.
    ``tuned``: the path, A or B, that the device's table of launch settings names.
    """
    if not 1 <= k <= n_latents:
        raise ValueError(f"k must lie in 1..{n_latents}, got {k}")
    if path not in ("auto", "A", "B", "C"):
        raise ValueError(f"path must be auto, A, B or C, got {path!r}")
    if R is not None and not (1 <= R <= min(bn, 32) and R & (R - 1) == 0):
        raise ValueError(f"R must be a power of two from 1 to {min(bn, 32)}, got {R}")
    n_tiles = launch.cdiv(n_latents, bn)
    r = R or (8 if exact or missed_share(n_tiles, k, 4) > MISSED else 4)
    if n_tiles * r < 4 * k:
        reason = f"{n_tiles} tiles of {r} candidates are fewer than 4 K = {4 * k}"
        if path in ("A", "B"):
            raise ValueError(f"path {path} is not possible: {reason}; use path C")
        return Plan("C", r, reason)
    if path != "auto":
        return Plan(path, r, "asked for")
    if tuned is not None:
        return Plan(tuned, r, f"measured faster on this device for D up to {launch.power_of_2(width)}")
    if bulk and width <= FUSED_MAX_WIDTH:
        return Plan("A", r, f"the fused encoder was measured faster at D = {width}")
    return Plan("B", r, f"{n_tiles} tiles of {r} candidates, product by cuBLAS in blocks")


@triton.jit
def _fused_kernel(  # type: ignore[no-untyped-def]
    u_ptr, w_ptr, b_ptr, out_ptr, n_tokens, n_tiles, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program = BM tokens x one tile: product over D, bias, keys, the R largest of each token to ``out``."""
    pid = tl.program_id(0)
    per_group = GROUP * n_tiles
    first = (pid // per_group) * GROUP
    in_group = tl.minimum(tl.cdiv(n_tokens, BM) - first, GROUP)
    block = first + (pid % per_group) % in_group
    tile = (pid % per_group) // in_group
    rows = block * BM + tl.arange(0, BM)
    columns = tl.arange(0, BN)
    channels = tl.arange(0, BK)
    # Rows past the end repeat the last one: loads without a mask stay asynchronous and wide.
    tokens = tl.minimum(rows, n_tokens - 1).to(tl.int64)
    u_ptrs = u_ptr + tokens[:, None] * width + channels[None, :]
    w_ptrs = w_ptr + tile.to(tl.int64) * BN * width + columns[None, :] * width + channels[:, None]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, width, BK):
        if WHOLE:
            u = tl.load(u_ptrs)
            w = tl.load(w_ptrs)
        else:
            u = tl.load(u_ptrs, mask=(start + channels < width)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(start + channels < width)[:, None], other=0.0)
        if INTERPRETED:  # 16-bit products are wrong there
            u = u.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(u, w, total, input_precision="ieee")
        u_ptrs += BK
        w_ptrs += BK
    h = total + tl.load(b_ptr + tile * BN + columns)[None, :]
    keys = _keys(h, columns[None, :], BN, INTERPRETED)
    _store_largest(keys, out_ptr + (rows.to(tl.int64) * n_tiles + tile) * R, rows < n_tokens, R)


@triton.jit
def _bulk_kernel(  # type: ignore[no-untyped-def]
    u_desc, w_desc, b_ptr, out_ptr, n_tokens, n_tiles, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As :func:`_fused_kernel`, loads by descriptors; one program takes every ``num_programs``-th block."""
    n_blocks = tl.cdiv(n_tokens, BM)
    per_group = GROUP * n_tiles
    columns = tl.arange(0, BN)
    for index in range(tl.program_id(0), n_blocks * n_tiles, tl.num_programs(0)):
        first = (index // per_group) * GROUP
        in_group = tl.minimum(n_blocks - first, GROUP)
        block = first + (index % per_group) % in_group
        tile = (index % per_group) // in_group
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, width, BK):
            u = u_desc.load([block * BM, start])  # past the end of rows and channels: zeros
            w = w_desc.load([tile * BN, start])
            if INTERPRETED:
                u = u.to(tl.float32)
                w = w.to(tl.float32)
            total = tl.dot(u, w.T, total, input_precision="ieee")
        h = total + tl.load(b_ptr + tile * BN + columns)[None, :]
        keys = _keys(h, columns[None, :], BN, INTERPRETED)
        rows = block * BM + tl.arange(0, BM)
        _store_largest(keys, out_ptr + (rows.to(tl.int64) * n_tiles + tile) * R, rows < n_tokens, R)


def _candidates_bulk(u_nD: Tensor, prepared: PreparedEncoder, r: int, fused: Fused, out_nC: Tensor) -> None:
    (n_tokens, width), n_tiles = u_nD.shape, prepared.n_tiles
    if width * u_nD.element_size() % 16 or u_nD.data_ptr() % 16:
        raise ValueError(f"bulk loads want rows of a multiple of 16 bytes; got u {tuple(u_nD.shape)} {u_nD.dtype}")
    total = launch.cdiv(n_tokens, fused.rows) * n_tiles
    with torch.cuda.device_of(u_nD):
        _bulk_kernel[(min(total, fused.programs or total),)](
            TensorDescriptor.from_tensor(u_nD, [fused.rows, fused.channels]),
            TensorDescriptor.from_tensor(prepared.W_PD, [prepared.tile, fused.channels]),
            prepared.b_P, out_nC, n_tokens, n_tiles, width,
            BM=fused.rows, BN=prepared.tile, BK=fused.channels, R=r, GROUP=fused.group,
            INTERPRETED=INTERPRETED, num_warps=fused.warps, num_stages=fused.stages,
        )  # fmt: skip


def _candidates_fused(u_nD: Tensor, prepared: PreparedEncoder, r: int, fused: Fused, out_nC: Tensor) -> None:
    if fused.bulk:
        return _candidates_bulk(u_nD, prepared, r, fused, out_nC)
    (n_tokens, width), n_tiles = u_nD.shape, prepared.n_tiles
    with torch.cuda.device_of(u_nD):
        _fused_kernel[(launch.cdiv(n_tokens, fused.rows) * n_tiles,)](
            u_nD, prepared.W_PD, prepared.b_P, out_nC, n_tokens, n_tiles, width,
            BM=fused.rows, BN=prepared.tile, BK=fused.channels, R=r, GROUP=fused.group,
            WHOLE=width % fused.channels == 0, INTERPRETED=INTERPRETED, num_warps=fused.warps, num_stages=fused.stages,
        )  # fmt: skip


def _product(u_nD: Tensor, W_PD: Tensor, out_nP: Tensor) -> None:
    """``out = u @ W.T`` in float32 whatever the operands' type: never rounded to 16 bits on the way."""
    if u_nD.dtype == torch.float32:
        torch.mm(u_nD, W_PD.t(), out=out_nP)
    elif u_nD.is_cuda:
        torch.mm(u_nD, W_PD.t(), out_dtype=torch.float32, out=out_nP)
    else:
        torch.mm(u_nD.float(), W_PD.float().t(), out=out_nP)


def _candidates_blocks(u_nD: Tensor, prepared: PreparedEncoder, r: int, out_nC: Tensor) -> None:
    found = launch.tuned("topk_blocks", u_nD)
    block_rows, block_latents = (BLOCK_ROWS, BLOCK_LATENTS) if found is None else (found["rows"], found["latents"])
    tiles = max(1, block_latents // prepared.tile)
    rows, bn = min(block_rows, len(u_nD)), prepared.tile
    buffer = torch.empty(rows * min(tiles, prepared.n_tiles) * bn, dtype=torch.float32, device=u_nD.device)
    for tile in range(0, prepared.n_tiles, tiles):
        part = slice(tile * bn, min(tile + tiles, prepared.n_tiles) * bn)
        W_pD, b_p = prepared.W_PD[part], prepared.b_P[part]
        for start in range(0, len(u_nD), rows):
            u = u_nD[start : start + rows]
            h_np = buffer[: len(u) * len(b_p)].view(len(u), len(b_p))
            _product(u, W_pD, h_np)
            topk_select.select_block(h_np, b_p, out_nC[start : start + rows], tile, bn, r)


def _dense_topk(
    u_nD: Tensor, prepared: PreparedEncoder, k: int, settle_ties: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, flags) by ``torch.topk`` on blocks of rows; NaN is the largest value.

    With ``settle_ties`` the lower of equal latents wins, and the device is waited for once per block.
    """
    rows = max(1, BLOCK_ROWS * BLOCK_LATENTS // len(prepared.b_P))
    made = []
    for u in u_nD.split(rows):
        h_nP = torch.empty(len(u), len(prepared.b_P), dtype=torch.float32, device=u.device)
        _product(u, prepared.W_PD, h_nP)
        h_nP += prepared.b_P
        natural = h_nP.view(len(u), prepared.n_tiles, prepared.tile).transpose(1, 2).reshape(len(u), -1)
        h_nF = natural[:, : prepared.n_latents]
        values, indices = torch.topk(h_nF, min(k + 1, prepared.n_latents), dim=1)
        kth, following = values[:, k - 1], values[:, -1]
        tied = (kth == following) | kth.isnan()
        tied &= ~(following <= 0) & (values.shape[1] > k)
        values, indices = values[:, :k], indices[:, :k]
        if settle_ties and bool(tied.any()):
            ordered = torch.sort(h_nF[tied], dim=1, descending=True, stable=True)
            values, indices = values.clone(), indices.clone()
            values[tied], indices[tied] = ordered.values[:, :k], ordered.indices[:, :k]
            tied = torch.zeros_like(tied)
        flags = torch.where(values.isnan().any(1), topk_select.HIDDEN, tied * topk_select.TIE)
        made.append((values.relu(), indices.to(torch.int32), flags.to(torch.int8)))
    values, indices, flags = (torch.cat(parts) for parts in zip(*made, strict=True))
    return values, indices, flags


def refusal(u_ND: Tensor, prepared: PreparedEncoder, k: int) -> Exception | None:
    """The error for operands that :func:`encode_topk` does not take, with what was found; None if it takes them."""
    W_PD = prepared.W_PD
    kind: type[Exception] = ValueError
    if u_ND.dtype != W_PD.dtype:
        kind, rule = TypeError, "u and the prepared W_enc must have one type"
    elif u_ND.dim() != 2 or u_ND.shape[1] != W_PD.shape[1]:
        rule = "u must be [N, D] with the D of W_enc"
    elif u_ND.device != W_PD.device or u_ND.device != prepared.b_P.device:
        rule = "u and the prepared encoder must lie on one device"
    elif not u_ND.is_contiguous():
        rule = "u must be contiguous"
    elif not 1 <= k <= prepared.n_latents or len(u_ND) * k >= 2**31:
        rule = f"k must lie in 1..{prepared.n_latents} and N * K below 2^31"
    else:
        return None
    shape = (prepared.n_latents, W_PD.shape[1])
    return kind(f"{rule}; got {launch.described(u=u_ND)}, W_enc {shape} {W_PD.dtype} on {W_PD.device}, k {k}")


def encode_topk(
    u_ND: Tensor, prepared: PreparedEncoder, k: int, exact: bool = False, path: str = "auto", R: int | None = None,
    fused: Fused | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(values_NK float32, indices_NK int32, flags_N int8): relu of the K largest of ``u W_enc + b_enc`` per token.

    Slots have no order; a slot of value 0 is empty. Flag 0: the set is that of the float32 products. Flag 1: a tile may
    hide a winner, or NaN. Flag 2: more candidates than slots share the K-th value, to 16 bits of fraction. Values are
    truncated to those 16 bits (paths A and B). ``exact``: flagged tokens are computed again densely, of equal values
    the lower latent wins, values are gathered float32 dot products, and flags tell what was flagged before; the device
    is waited for once. No gradient. Errors as in :func:`refusal` and :func:`plan`.
    """
    error = refusal(u_ND, prepared, k)
    if error is not None:
        raise error
    sizes = (prepared.n_latents, k)
    bulk = takes_bulk(u_ND)
    best = launch.tuned("topk_path_bulk" if bulk else "topk_path_pointers", u_ND, *sizes)
    chosen = plan(
        prepared.n_latents, u_ND.shape[1], k, prepared.tile, exact, path, R, bulk, best["path"] if best else None
    )
    n_tokens, device = len(u_ND), u_ND.device
    values_NK = torch.empty(n_tokens, k, dtype=torch.float32, device=device)
    indices_NK = torch.empty(n_tokens, k, dtype=torch.int32, device=device)
    flags_N = torch.empty(n_tokens, dtype=torch.int8, device=device)
    if n_tokens == 0:
        return values_NK, indices_NK, flags_N
    with torch.no_grad():
        if chosen.path == "C":
            return _dense_topk(u_ND, prepared, k, settle_ties=exact)
        n_candidates = prepared.n_tiles * chosen.candidates
        slab = min(n_tokens, max(1, CANDIDATE_BYTES // (4 * n_candidates)))
        candidates_nC = torch.empty(slab, n_candidates, dtype=torch.int32, device=device)
        for start in range(0, n_tokens, slab):
            part = slice(start, start + slab)
            u_nD = u_ND[part]
            out_nC = candidates_nC[: len(u_nD)]
            if chosen.path == "A":
                _candidates_fused(u_nD, prepared, chosen.candidates, fused or _settings(u_nD, *sizes), out_nC)
            else:
                _candidates_blocks(u_nD, prepared, chosen.candidates, out_nC)
            topk_select.select_rows(
                out_nC, prepared.n_latents, prepared.tile, chosen.candidates,
                values_NK[part], indices_NK[part], flags_N[part],
            )  # fmt: skip
        if exact:
            _settle(u_ND, prepared, k, values_NK, indices_NK, flags_N)
    return values_NK, indices_NK, flags_N


def _settle(
    u_ND: Tensor, prepared: PreparedEncoder, k: int, values_NK: Tensor, indices_NK: Tensor, flags_N: Tensor
) -> None:
    """Flagged tokens anew, then all values in full precision."""
    rows_n = flags_N.nonzero().squeeze(1)
    if len(rows_n):
        indices_NK[rows_n] = _dense_topk(u_ND[rows_n], prepared, k, settle_ties=True)[1]
    topk_select.gathered_values(u_ND, prepared.W_PD, prepared.b_P, indices_NK, prepared.tile, values_NK)
