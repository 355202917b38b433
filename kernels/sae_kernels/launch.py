"""What every kernel needs before it starts: checks of its operands, the sizes of its blocks, settings tuned for a GPU.

Shapes: N tokens, K slots per token, F = d_sae, D = d_in. No kernel looks at the device: a tensor on the CPU works under
Triton's interpreter (TRITON_INTERPRET=1) and meets Triton's own "0 active drivers" without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sae_kernels import tuned as tables

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
MAX_WIDTH = 16_384
MAX_BLOCK = 1_024
"""Channels per program; a wider row is cut into several."""
ROWS = 4
"""Gathered rows per step: a loop over single rows has only one load in flight."""
CHUNK = 128
"""Entries of one latent that a program of the weight gradient walks in sequence; a latent may fire on every token."""


class Blocks(NamedTuple):
    """Launch settings of a kernel over rows of D channels."""

    channels: int
    """Channels per program, a power of two."""
    programs: int
    """Programs that cover the D channels."""
    warps: int


class Gather(NamedTuple):
    """The same for a kernel that gathers rows."""

    channels: int
    programs: int
    warps: int
    rows: int
    """Gathered rows per step."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. ``triton.cdiv`` is the same in 30 times the time, which counts where kernels are short."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (at least 1)."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def described(**operands: Tensor) -> str:
    """What was found, for an error."""
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype} strides {t.stride()} on {t.device}" for name, t in operands.items()
    )


@cache
def blocks(width: int) -> Blocks:
    """Settings for rows of ``width`` channels (at least 1) where no table has any.

    Data like the tables, no timing made in the run: another block would be another order of sums, hence other bits.
    """
    channels = min(MAX_BLOCK, max(16, power_of_2(width)))
    return Blocks(channels, cdiv(width, channels), min(4, max(1, channels // 256)))


_FORCED: dict[str, tables.Settings] = {}
_UNTUNED = False


@contextmanager
def trying(kernel: str, dtype: torch.dtype, settings: tables.Settings) -> Iterator[None]:
    """Launch ``kernel`` with these settings for a while, whatever tables say. ``ValueError`` for impossible ones."""
    wanted = tables.check(kernel, str(dtype).removeprefix("torch."), settings)
    before = _FORCED.get(kernel)
    _FORCED[kernel] = wanted
    try:
        yield
    finally:
        del _FORCED[kernel]
        if before is not None:
            _FORCED[kernel] = before


@contextmanager
def untuned() -> Iterator[None]:
    """Launch everything with the constants for a while."""
    global _UNTUNED
    before, _UNTUNED = _UNTUNED, True
    try:
        yield
    finally:
        _UNTUNED = before


def tuned(kernel: str, rows: Tensor, n_latents: int = 0, k: int = 0) -> tables.Settings | None:
    """Settings measured for the device, type and D of the rows [*, D], and for F and K where a kernel depends on them.

    None where nothing was measured: the constants beside the kernel hold then. First the user's table, then the
    shipped one. Under ``torch.use_deterministic_algorithms(True)`` the user's is left out: another setting is another
    order of sums, and bits must not depend on what was timed on this machine.
    """
    if _FORCED and kernel in _FORCED:
        return _FORCED[kernel]
    device = device_name(rows.device)
    if not device or _UNTUNED:
        return None
    shipped_only = torch.are_deterministic_algorithms_enabled()
    return _found(kernel, device, rows.dtype, rows.shape[-1], n_latents, k, shipped_only)


@lru_cache(maxsize=1_024)
def device_name(device: torch.device) -> str:
    """Name of a GPU; empty for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@lru_cache(maxsize=1_024)
def _found(
    kernel: str, device: str, dtype: torch.dtype, width: int, n_latents: int, k: int, shipped_only: bool
) -> tables.Settings | None:
    used = _tables(device)[1 if shipped_only else 0 :]
    kind = str(dtype).removeprefix("torch.")
    return tables.find((t for t in used if t is not None), kernel, kind, width, n_latents, k)


@cache
def _tables(device: str) -> tuple[tables.Table | None, tables.Table | None]:
    """The user's table of a device and the shipped one."""
    version = triton.__version__
    own = tables.read(tables.user_file(device, version), device, version)
    return own, tables.read(tables.shipped_file(device), device)


def forget() -> None:
    """Read the tables again at the next call."""
    _found.cache_clear()
    _tables.cache_clear()


def gather(kernel: str, rows: Tensor, otherwise: Blocks | None = None) -> Gather:
    """Settings of a kernel that gathers rows [*, D], D at least 1; ``otherwise`` where no table has any."""
    width, found = rows.shape[-1], tuned(kernel, rows)
    if found is None:
        return Gather(*(otherwise or blocks(width)), ROWS)
    channels = min(found["channels"], max(16, power_of_2(width)))
    return Gather(channels, cdiv(width, channels), found["warps"], found["rows"])


def refusal(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, *, mixed: bool = False) -> Exception | None:
    """The error for operands of a sparse product that the kernels do not take, with what was found; None if they do.

    ``mixed``: values may have another of the float types than W.
    """
    error = _rule_broken(values_NK, indices_NK, W_FD, mixed)
    if error is None:
        return None
    kind, rule = error
    return kind(f"{rule}; got {described(values=values_NK, indices=indices_NK, W=W_FD)}")


def _rule_broken(
    values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, mixed: bool
) -> tuple[type[Exception], str] | None:
    # The text is made where it is needed: formatting took a third of the time before a launch.
    if W_FD.dtype not in FLOATS or values_NK.dtype not in (FLOATS if mixed else (W_FD.dtype,)):
        return TypeError, "values and W must both be float32, bfloat16 or float16"
    if indices_NK.dtype not in INTEGERS:
        return TypeError, "indices must be int32 or int64"
    if values_NK.dim() != 2 or values_NK.shape != indices_NK.shape or W_FD.dim() != 2:
        return ValueError, "values and indices must be [N, K], W must be [F, D]"
    if not values_NK.device == indices_NK.device == W_FD.device:
        return ValueError, "values, indices and W must lie on one device"
    if not W_FD.is_contiguous():
        return ValueError, "W must be contiguous, a copy at every call would cost more than the kernel"
    if values_NK.numel() >= 2**31 or not 1 <= W_FD.shape[1] <= MAX_WIDTH or not 1 <= len(W_FD) < 2**31:
        return ValueError, f"N * K and F must be below 2^31, D must lie in 1..{MAX_WIDTH}, F must not be 0"
    return None


def check(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> None:
    """Raise what :func:`refusal` finds: ``TypeError`` for a type, ``ValueError`` for a shape, a device or strides."""
    error = refusal(values_NK, indices_NK, W_FD)
    if error is not None:
        raise error
