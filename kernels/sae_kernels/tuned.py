"""Tables of launch settings that were measured on a device: their file, its checks, the entry for a call.

Shapes: D = d_in, F = d_sae, K slots per token. One table a device: shipped beside this module, or made by
``python kernels/bench.py --tune`` in the user's cache folder, there one for each version of Triton. Only
:mod:`sae_kernels.launch` looks settings up. A setting changes the order of sums at most, never what is summed.
"""

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
SHARED_BYTES = 232_448
"""Shared memory that a program may take on sm_90; Triton's compiler does not look."""
BLOCK_BYTES = 2**27
"""Largest float32 block of path B: it is the memory of the encoder."""
logger = logging.getLogger(__name__)
Settings = Mapping[str, Any]


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(1 << n for n in range(first.bit_length() - 1, last.bit_length()))


_GATHER = {"channels": _powers(16, 4_096), "warps": _powers(1, 8), "rows": _powers(2, 16)}
_PRODUCT = {"rows": _powers(64, 256), "channels": _powers(32, 128), "warps": (4, 8), "stages": (2, 3, 4, 5)}
_BULK = {**_PRODUCT, "group": _powers(1, 64), "programs": (0, 1, 2, 3, 4)}
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "topk_path_bulk": {"path": ("A", "B")},
    "topk_path_pointers": {"path": ("A", "B")},
    "topk_bulk": _BULK,
    "topk_pointers": {**_PRODUCT, "group": _powers(1, 64)},
    "topk_blocks": {"rows": _powers(256, 4_096), "latents": _powers(4_096, 65_536)},
    "threshold_bulk": {**_BULK, "programs": (1, 2, 3), "registers": (96, 128, 168, 255)},
    "decode": _GATHER,
    "decode_values": _GATHER,
    "decode_error": _GATHER,
    "weight_gradients": {**_GATHER, "channels": _powers(128, 1_024)},
    "adam_rows": {"warps": _powers(1, 16)},
}
"""Fields of the settings of each kernel, with the values they may have."""


class Entry(NamedTuple):
    """Settings of a kernel for one type of operands and one class of sizes."""

    kernel: str
    dtype: str
    sizes: tuple[int, int, int]
    """Classes of D, F and K: the least power of two that is not below them; 0 where a kernel does not depend on it."""
    settings: Settings | None
    """None: measured, and the constants beside the kernel are as good."""


class Table(NamedTuple):
    """All entries of a device."""

    device: str
    triton: str
    entries: tuple[Entry, ...]


def size_class(n: int) -> int:
    """The class of a size: the least power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def check(kernel: str, dtype: str, settings: object) -> Settings:
    """The settings, if the kernel can be launched with them; ``ValueError`` with what is wrong otherwise."""
    fields = FIELDS.get(kernel) if isinstance(kernel, str) else None
    if fields is None:
        raise ValueError(f"no kernel {kernel!r} has launch settings; there are {', '.join(FIELDS)}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"settings of {kernel} are for float32, bfloat16 or float16, got {dtype!r}")
    if not isinstance(settings, Mapping) or set(settings) != set(fields):
        found = sorted(settings) if isinstance(settings, Mapping) else settings
        raise ValueError(f"settings of {kernel} are {sorted(fields)}, got {found!r}")
    for name, allowed in fields.items():
        if type(settings[name]) is not type(allowed[0]) or settings[name] not in allowed:
            raise ValueError(f"{name} of {kernel} must be one of {allowed}, got {settings[name]!r}")
    too_much = _too_much(kernel, 4 if dtype == "float32" else 2, settings)
    if too_much:
        raise ValueError(f"{kernel} cannot run with {dict(settings)}: {too_much}")
    return settings


def _too_much(kernel: str, item: int, s: Settings) -> str:
    tile = 128  # latents per program of both encoders
    if "stages" in s:
        shared = s["stages"] * s["channels"] * (s["rows"] + tile) * item
        if shared > SHARED_BYTES:
            return f"{shared} B of shared memory, at most {SHARED_BYTES}"
        if s["rows"] * tile > 128 * 32 * s["warps"]:
            return "more than 128 sums a thread"
    if kernel.endswith("_bulk") and item != 2:
        return "bulk loads are for 16-bit operands"
    if kernel == "topk_blocks" and 4 * s["rows"] * s["latents"] > BLOCK_BYTES:
        return f"blocks of more than {BLOCK_BYTES} B"
    return ""


def slug(device: str) -> str:
    """The name of a device as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def user_file(device: str, triton: str) -> Path:
    """Where ``--tune`` writes: ``kernels/`` below ``$SAESCOPE_CACHE`` or the folder that sae.assets.cache_dir names."""
    base = os.environ.get("SAESCOPE_CACHE")
    if base:
        folder = Path(base).expanduser()
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        folder = Path(os.environ["LOCALAPPDATA"]) / "saescope"
    else:
        folder = Path.home() / ".cache" / "saescope"
    return folder / "kernels" / f"tuned-{slug(device)}-triton-{triton}.json"


def shipped_file(device: str) -> Path:
    """Where the package has the table of a device, if it has one."""
    return Path(__file__).with_name("tuned_tables") / f"{slug(device)}.json"


def parse(text: str) -> Table:
    """The table of a file. ``ValueError`` for anything that is no table, wrong in one entry or more."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"no table of launch settings of format {FORMAT}")
    entries = []
    for part in ("entries", "constants_are_best"):
        items = data.get(part, [] if part == "constants_are_best" else None)
        if not isinstance(items, list):
            raise ValueError(f"{part} must be a list")
        entries += [_entry(item, part == "entries") for item in items]
    return Table(str(data.get("device", "")), str(data.get("triton", "")), tuple(entries))


def _entry(item: object, with_settings: bool) -> Entry:
    wanted = {"kernel", "dtype", "d", "f", "k"} | ({"settings"} if with_settings else set())
    if not isinstance(item, dict) or wanted - set(item):
        raise ValueError(f"an entry wants {', '.join(sorted(wanted))}")
    sizes = (item["d"], item["f"], item["k"])
    if any(type(n) is not int or n < 0 or size_class(n) != n for n in sizes):
        raise ValueError(f"classes of sizes are powers of two, got {sizes}")
    settings = check(item["kernel"], item["dtype"], item["settings"]) if with_settings else None
    return Entry(str(item["kernel"]), str(item["dtype"]), sizes, settings)


def read(path: Path, device: str, triton: str | None = None) -> Table | None:
    """The table of a file; None if there is none, and with a warning if it is damaged or of another device."""
    try:
        table = parse(path.read_text(encoding="utf-8"))
        if table.device != device or (triton is not None and table.triton != triton):
            raise ValueError(f"it is of {table.device!r} with Triton {table.triton!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(
            "launch settings of %s are not used (%s: %s); delete the file, or make it anew by "
            "`python kernels/bench.py --tune`", path, type(error).__name__, error,
        )  # fmt: skip
        return None
    return table


def find(tables: Iterable[Table], kernel: str, dtype: str, d: int, f: int = 0, k: int = 0) -> Settings | None:
    """Settings of the first table that has the kernel, the type and the class of D; of several entries there the one
    whose classes of F and K are nearest (fewest doublings, the first of equal ones). None: the constants."""
    wanted = (size_class(f), size_class(k))
    for table in tables:
        fitting = [e for e in table.entries if (e.kernel, e.dtype, e.sizes[0]) == (kernel, dtype, size_class(d))]
        if fitting:
            return min(fitting, key=lambda e: _doublings(e.sizes[1:], wanted)).settings
    return None


def _doublings(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(one, other, strict=True))


def write(
    path: Path, device: str, triton: str, entries: Sequence[Mapping[str, Any]],
    constants_are_best: Sequence[Mapping[str, Any]] = (), **notes: object,
) -> None:  # fmt: skip
    """Write a table in one step: a reader sees the old file or the new one. Entries may carry their times.

    ``ValueError`` for an entry that could not be read again; nothing is written then.
    """
    data = {"format": FORMAT, "device": device, "triton": triton, **notes}
    data |= {"constants_are_best": list(constants_are_best), "entries": list(entries)}
    text = json.dumps(data, indent=1) + "\n"
    parse(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
