"""Keys, artefact folders and provenance: how one stage hands files to the next.

A folder without ``manifest.json`` does not exist for readers. It is written last, into a temporary folder that is
renamed into place, so a process killed at any moment leaves either a complete artefact or none.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import ArtefactError

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
KEY_HEX_DIGITS = 16


def plain(value: Any) -> Any:
    """What ``json`` cannot write by itself: dataclasses, paths, numpy scalars and arrays, sets."""
    import numpy as np  # lazily: every door's --help passes through this module

    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} into a manifest")


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=plain)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash64(text: str) -> int:
    """H(s) of the design: blake2b with 8 bytes, as an unsigned integer."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def rng(*parts: object) -> "np.random.Generator":
    """A generator that depends on ``parts`` alone (seed, sae_id, latent, purpose, ...), never on the order of calls."""
    import numpy as np

    text = "|".join(str(p) for p in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def seed_of(*parts: object) -> int:
    """A 63-bit seed for libraries that take an integer, e.g. ``torch.Generator.manual_seed``."""
    return hash64("|".join(str(p) for p in parts)) >> 1


def key_of(kind: str, stage_version: int, config: Any, inputs: Mapping[str, str] | None = None) -> str:
    """First 16 hex digits of SHA-256 over (kind, stage version, configuration, keys of the inputs)."""
    return sha256_text(canonical_json([kind, stage_version, config, dict(inputs or {})]))[:KEY_HEX_DIGITS]


def artefact_dir(root: Path, kind: str, key: str) -> Path:
    return Path(root) / kind / key


def is_complete(folder: Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete artefact, its files present at their recorded size; else :class:`ArtefactError`."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{folder} is not a complete artefact: it has no {MANIFEST}; run its stage again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); delete the folder and run its stage again") from error
    for name, entry in manifest.get("files", {}).items():
        file = Path(folder) / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != entry["bytes"]:
            raise ArtefactError(
                f"{file} has {actual} bytes where its manifest says {entry['bytes']}; "
                "delete the folder and run its stage again"
            )
    return manifest


def content_of(folder: Path) -> str:
    """16 hex digits over the files of a complete artefact.

    For a stage whose artefact may change under one key because it asks others: what depends on it names its content.
    """
    files = read_manifest(folder)["files"]
    return sha256_text(canonical_json({name: entry["sha256"] for name, entry in files.items()}))[:KEY_HEX_DIGITS]


@dataclass
class Writer:
    """Handed out by :func:`writing`."""

    path: Path
    """The temporary folder; put the files here."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Numbers of the stage, copied into the manifest."""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of this artefact whose process is gone (killed runs)."""
    for old in folder.parent.glob(f"{folder.name}.tmp-*"):
        pid = old.name.rpartition("-")[2]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists() and int(pid) != os.getpid()):
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(
    folder: Path,
    *,
    kind: str,
    key: str,
    stage_version: int,
    config: Any,
    inputs: Mapping[str, str] | None = None,
    began: float | None = None,
) -> Iterator[Writer]:
    """Write an artefact: files first, manifest last, then a rename. An exception leaves nothing behind.

    An older complete folder of the same name is replaced only once the new one is whole. ``began``: the
    ``time.monotonic()`` at which its work started, where that was before this call; ``wall_s`` counts from it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    writer = Writer(temporary)
    started = time.monotonic() if began is None else began
    try:
        yield writer
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            files[path.relative_to(temporary).as_posix()] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            _fsync(path)
        manifest = {
            "kind": kind,
            "stage_version": stage_version,
            "key": key,
            "config": config,
            "inputs": dict(inputs or {}),
            "files": files,
            "counts": writer.counts,
            "wall_s": round(time.monotonic() - started, 3),
            "provenance": provenance(),
        }
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False, default=plain)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
        _fsync(temporary / MANIFEST)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _fsync(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            free = shutil.disk_usage(folder.parent).free
            raise ArtefactError(
                f"the disk is full while writing {folder} ({free / 1e9:.2f} GB free); finished stages are kept: "
                "free some space or choose another --root, and run the same command again"
            ) from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _code_state() -> tuple[str | None, bool | None]:
    """(commit, dirty) of the source tree of this package itself, not of the caller's folder."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10)  # noqa: E731
        head = run("rev-parse", "HEAD")
        tracked = run("ls-files", "--error-unmatch", "manifest.py")
        if head.returncode or tracked.returncode:
            return None, None
        status = run("status", "--porcelain", "--untracked-files=no", "--", "..", ":(exclude)../results")
        return head.stdout.strip(), bool(status.stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def provenance() -> dict[str, Any]:
    """Where a number came from: commit, versions, machine, command, time."""
    code_sha, dirty = _code_state()
    return {
        "code_sha": code_sha,
        "dirty": dirty,
        "saescope": _version("saescope"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "vllm": _version("vllm"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
