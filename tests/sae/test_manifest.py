"""Keys, artefact folders, randomness: what every stage leans on."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from sae import manifest
from sae.errors import ArtefactError


def write(folder: Path, text: str = "content") -> None:
    with manifest.writing(folder, kind="k", key="abc", stage_version=1, config={"a": 1}, inputs={"b": "c"}) as out:
        (out.path / "file.txt").write_text(text)
        out.counts["n"] = 3


def test_key_depends_on_everything_and_on_nothing_else():
    base = manifest.key_of("kind", 1, {"a": 1, "b": [1, 2]}, {"x": "y"})
    assert len(base) == 16 and int(base, 16) >= 0
    assert base == manifest.key_of("kind", 1, {"b": (1, 2), "a": 1}, {"x": "y"})
    for changed in (
        manifest.key_of("other", 1, {"a": 1, "b": [1, 2]}, {"x": "y"}),
        manifest.key_of("kind", 2, {"a": 1, "b": [1, 2]}, {"x": "y"}),
        manifest.key_of("kind", 1, {"a": 2, "b": [1, 2]}, {"x": "y"}),
        manifest.key_of("kind", 1, {"a": 1, "b": [1, 2]}, {"x": "z"}),
    ):
        assert changed != base
    with pytest.raises(ValueError):
        manifest.key_of("kind", 1, {"a": float("nan")})


def test_artefact_is_complete_and_described(tmp_path: Path):
    write(tmp_path / "k" / "abc")
    found = manifest.read_manifest(tmp_path / "k" / "abc")
    assert found["files"]["file.txt"]["sha256"] == manifest.sha256_text("content")
    assert found["counts"] == {"n": 3} and found["inputs"] == {"b": "c"} and found["wall_s"] >= 0
    assert not list((tmp_path / "k").glob("*.tmp-*"))


def test_an_exception_leaves_nothing_and_keeps_the_old_artefact(tmp_path: Path):
    folder = tmp_path / "k" / "abc"
    write(folder, "old")
    with pytest.raises(ZeroDivisionError):
        with manifest.writing(folder, kind="k", key="abc", stage_version=1, config={}) as out:
            (out.path / "file.txt").write_text("new")
            raise ZeroDivisionError
    assert (folder / "file.txt").read_text() == "old"
    assert [p.name for p in (tmp_path / "k").iterdir()] == ["abc"]


def test_full_disk_says_so_and_keeps_what_was_there(tmp_path: Path):
    with pytest.raises(ArtefactError, match="disk is full"):
        with manifest.writing(tmp_path / "k" / "abc", kind="k", key="abc", stage_version=1, config={}):
            raise OSError(28, "No space left on device")
    assert not list((tmp_path / "k").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device_has_the_error_number_we_look_for():
    with pytest.raises(OSError) as caught:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)
    assert caught.value.errno == 28


def _write_slowly(folder: str) -> None:
    with manifest.writing(Path(folder), kind="k", key="abc", stage_version=1, config={}) as out:
        (out.path / "file.txt").write_text("half")
        time.sleep(60)


def test_sigkill_leaves_no_artefact_and_the_next_writer_clears_up(tmp_path: Path):
    folder = tmp_path / "k" / "abc"
    process = multiprocessing.get_context("spawn").Process(target=_write_slowly, args=(str(folder),))
    process.start()
    while not list(tmp_path.glob("k/*.tmp-*/file.txt")):
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not manifest.is_complete(folder) and list(tmp_path.glob("k/*.tmp-*"))
    write(folder)
    assert [p.name for p in (tmp_path / "k").iterdir()] == ["abc"]


def test_what_another_process_is_writing_is_left_to_it(tmp_path: Path):
    gone = multiprocessing.get_context("spawn").Process(target=os.getpid)
    gone.start()
    gone.join()
    pids = {"living": os.getppid(), "gone": gone.pid, "our own, of a failed try": os.getpid()}
    for pid in pids.values():
        (tmp_path / "k" / f"abc.tmp-{pid}").mkdir(parents=True)
    write(tmp_path / "k" / "abc")
    assert {p.name for p in (tmp_path / "k").iterdir()} == {"abc", f"abc.tmp-{pids['living']}"}


@pytest.mark.parametrize("damage", ["missing", "truncated", "not json"])
def test_damage_is_named(tmp_path: Path, damage: str):
    folder = tmp_path / "k" / "abc"
    write(folder)
    if damage == "missing":
        (folder / "file.txt").unlink()
    elif damage == "truncated":
        (folder / "file.txt").write_text("con")
    else:
        (folder / manifest.MANIFEST).write_text("{")
    with pytest.raises(ArtefactError, match="abc"):
        manifest.read_manifest(folder)


def test_a_folder_without_manifest_does_not_exist(tmp_path: Path):
    (tmp_path / "abc").mkdir()
    assert not manifest.is_complete(tmp_path / "abc")
    with pytest.raises(ArtefactError, match="not a complete artefact"):
        manifest.read_manifest(tmp_path / "abc")


def test_randomness_is_a_function_of_its_parts():
    draw = lambda *parts: manifest.rng(*parts).integers(2**60, size=3)  # noqa: E731
    assert np.array_equal(draw(0, "sae", 5, "windows"), draw(0, "sae", 5, "windows"))
    assert not np.array_equal(draw(0, "sae", 5, "windows"), draw(0, "sae", 6, "windows"))
    assert 0 <= manifest.seed_of(1, "x") < 2**63


def test_hash64_is_blake2b_of_eight_bytes():
    import hashlib

    assert manifest.hash64("é") == int.from_bytes(hashlib.blake2b("é".encode(), digest_size=8).digest(), "big")


def test_manifest_holds_plain_json(tmp_path: Path):
    with manifest.writing(
        tmp_path / "a", kind="k", key="a", stage_version=1, config={"x": np.float64(1.5), "p": Path("q")}
    ):
        pass
    assert json.loads((tmp_path / "a" / manifest.MANIFEST).read_text())["config"] == {"x": 1.5, "p": "q"}
