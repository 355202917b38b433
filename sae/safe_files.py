"""Read tensors and configurations of foreign files; nothing in a file is ever executed (FORMATS 3).

Sizes are checked from headers before anything is allocated: a file may not declare more bytes than it holds, nor more
than ``LIMIT_BYTES``. Every fault of a file is an :class:`ArtefactError` with its path, every content that is refused on
principle (a pickled object, a path that leaves the archive) an :class:`Unsupported`.
"""

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.errors import ArtefactError, Unsupported

LIMIT_BYTES = 64 * 2**30
"""Tensors of one SAE; F = 2^20 latents at D = 8,192 in float32 are 64 GiB."""
LIMIT_CONFIG_BYTES = 16 * 2**20
_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ``ArtefactError``: absent, over 16 MiB, not JSON, or not an object."""
    _check_size(path, LIMIT_CONFIG_BYTES)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtefactError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(values, dict):
        raise ArtefactError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _check_size(path: Path, limit: int = LIMIT_BYTES) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}); expected a file there") from error
    if size > limit:
        raise ArtefactError(f"{path} has {size:,} bytes; at most {limit:,} are read")
    return size


def _damaged(path: Path, error: object) -> ArtefactError:
    return ArtefactError(f"{path} is truncated or damaged ({error}); fetch the file again")


def safetensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the header alone; the library checks there that all tensors lie inside the file."""
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, struct.error) as error:
        raise _damaged(path, error) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors in their stored types."""
    names = list(safetensor_shapes(path))
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, struct.error) as error:
        raise _damaged(path, error) from error


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz, read from its directory."""
    return [info.filename.removesuffix(".npy") for info in _archive(path)]


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an .npz; object arrays and archives that unpack to more than they declare are refused."""
    _archive(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    except ValueError as error:
        if "pickle" in str(error):
            raise Unsupported(f"{path} holds pickled objects; only plain numbers are read") from error
        raise _damaged(path, error) from error
    except (OSError, zipfile.BadZipFile, EOFError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _archive(path: Path) -> list[zipfile.ZipInfo]:
    """Members of a zip file whose names stay inside it and whose unpacked size is bounded before reading."""
    _check_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for info in members:
                where = PurePosixPath(info.filename)
                if where.is_absolute() or ".." in where.parts or "\\" in info.filename:
                    raise Unsupported(f"{path}: the member {info.filename!r} leaves the archive; the file is refused")
                if info.filename.endswith(".npy"):
                    _check_npy(path, archive, info)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
        raise _damaged(path, error) from error
    total = sum(info.file_size for info in members)
    if total > LIMIT_BYTES:
        raise ArtefactError(f"{path} unpacks to {total:,} bytes; at most {LIMIT_BYTES:,} are read")
    return members


def _check_npy(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """The shape that an array's header declares may not need more bytes than the member has."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.hasobject:
        raise Unsupported(f"{path}: {info.filename} holds pickled objects; only plain numbers are read")
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ArtefactError(f"{path}: {info.filename} declares {shape} {dtype}, more than its {info.file_size:,} bytes")


class _Storage(NamedTuple):
    item_bytes: int
    items: int


class _Inert:
    """Stands for an object of a pickle while it is looked through; calling or filling it does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _Ordered(OrderedDict):  # type: ignore[type-arg]
    """An OrderedDict whose state (module metadata) is dropped."""

    def __setstate__(self, _: Any) -> None: ...


class _Scan(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Looks through a torch pickle without building a tensor: every global is one of a few inert stand-ins.

    The pure Python unpickler, as the C one allocates what a memo index of the file asks for.
    """

    def __init__(self, file: BinaryIO, path: Path, held_bytes: int) -> None:
        super().__init__(file)
        self.path, self.held_bytes = path, held_bytes
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Ordered
        if module == "torch" and name in _ITEM_BYTES:
            return name
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return self._tensor if name == "_rebuild_tensor_v2" else lambda tensor, *_: tensor
        if module == "torch" and name in ("Size", "device"):
            return _Inert
        raise Unsupported(
            f"{self.path} holds an object of {module}.{name}; only tensors, dicts, lists, strings and numbers are "
            "read, and no option turns that off"
        )

    def persistent_load(self, found: Any) -> _Storage:
        kind, storage, key, _, items = found[:5]
        if kind != "storage" or storage not in _ITEM_BYTES or not isinstance(items, int) or items < 0:
            raise _damaged(self.path, f"storage {key!r} of type {storage!r}")
        self.storages[str(key)] = made = _Storage(_ITEM_BYTES[storage], items)
        self._fits(made.item_bytes * items)
        return made

    def _tensor(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> _Inert:
        if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
            raise _damaged(self.path, f"a tensor of size {size} and stride {stride}")
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else -1
        if offset + last >= storage.items or math.prod(size) > storage.items:
            raise _damaged(self.path, f"a tensor of size {size} in a storage of {storage.items} numbers")
        return _Inert()

    def _fits(self, n_bytes: int) -> None:
        if n_bytes > self.held_bytes:
            raise _damaged(self.path, f"a storage of {n_bytes:,} bytes in {self.held_bytes:,}")


def read_torch(path: Path) -> dict[str, Any]:
    """A dict of tensors, strings, numbers and further such dicts from a .pt file, zip or legacy.

    The pickle is first looked through with inert stand-ins (what it names, how large it says its tensors are); only
    then ``torch.load(weights_only=True)`` reads it, without any class allowed beside torch's own plain ones.
    """
    size = _check_size(path)
    try:
        _scan_zip(path, size) if zipfile.is_zipfile(path) else _scan_legacy(path, size)
        values = torch.load(path, weights_only=True, map_location="cpu")
    except (Unsupported, ArtefactError):
        raise
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error):
            raise Unsupported(f"{path} is refused by torch.load(weights_only=True): {error}") from error
        raise _damaged(path, error) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(values, Mapping):
        raise ArtefactError(f"{path} holds a {type(values).__name__}, expected a dict of tensors")
    return dict(values)


def _scan_zip(path: Path, size: int) -> None:
    members = {info.filename: info for info in _archive(path)}
    found = [name for name in members if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ArtefactError(f"{path} is a zip file without one data.pkl; expected a file of torch.save")
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ArtefactError(f"{path} is compressed; torch.save stores plainly, so this file is not its own")
    with zipfile.ZipFile(path) as archive, archive.open(found[0]) as file:
        scan = _Scan(file, path, size)  # type: ignore[arg-type]
        scan.load()
    folder = found[0].removesuffix("data.pkl")
    for key, storage in scan.storages.items():
        member = members.get(f"{folder}data/{key}")
        if member is None or member.file_size != storage.item_bytes * storage.items:
            held = "no bytes" if member is None else f"{member.file_size:,} bytes"
            raise _damaged(path, f"storage {key} wants {storage.item_bytes * storage.items:,} bytes, has {held}")


def _scan_legacy(path: Path, size: int) -> None:
    with open(path, "rb") as file:
        if _Scan(file, path, size).load() != _LEGACY_MAGIC:
            raise ArtefactError(f"{path} is no file of torch.save; expected a zip archive or the legacy format")
        for _ in range(2):  # protocol version, facts on the system
            _Scan(file, path, size).load()
        _Scan(file, path, size).load()


def torch_mentions(path: Path, *names: str) -> bool:
    """Whether the pickle of a .pt file holds all of these words in its first megabyte; builds and raises nothing."""
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                text = file.read(2**20)
        else:
            with zipfile.ZipFile(path) as archive:
                found = [name for name in archive.namelist() if name.endswith("data.pkl")]
                if not found:
                    return False
                with archive.open(found[0]) as member:
                    text = member.read(2**20)
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError):
        return False
    return all(name.encode() in text for name in names)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values (no tags of Python); as strict as :func:`read_json`."""
    import yaml  # a dependency of transformers

    _check_size(path, LIMIT_CONFIG_BYTES)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ArtefactError(f"{path} is not plain YAML ({error}); fetch the file again") from error
    if not isinstance(values, dict):
        raise ArtefactError(f"{path} holds a {type(values).__name__}, expected a mapping")
    return values
