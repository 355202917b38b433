"""Activations in shards: read across their borders, kept when collecting ends badly, several hookpoints in one pass."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae import activations, shards
from sae.activations import ActivationStore, capture_activations, capture_many
from sae.config import TokensConfig
from sae.errors import ArtefactError, DataError
from sae.language_model import LanguageModel
from sae.resume import locked
from sae.tokens import TokenSet, build_tokens

HOOKPOINTS = ["layers.0", "layers.1.mlp", "layers.2"]
SUPPORT = Path(__file__).resolve().parent.parent / "support"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tiny_texts: Path) -> TokenSet:
    """50 rows of 32."""
    cfg = TokensConfig(
        text=str(tiny_texts), context_tokens=32, train_tokens=32 * 50, explain_tokens=64, calibrate_tokens=64,
        score_tokens=64, test_tokens=64,
    )  # fmt: skip
    return build_tokens(tmp_path_factory.mktemp("tokens"), cfg, tiny_lm.name, tiny_lm.tokenizer)["train"]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows each: 512, 512, 512 and 64 tokens."""
    monkeypatch.setattr(activations, "SHARD_TOKENS", 512)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_lm: LanguageModel, tokens: TokenSet) -> list[ActivationStore]:
    """Each hookpoint by itself, in one file."""
    root = tmp_path_factory.mktemp("whole")
    return [capture_activations(root, tiny_lm, tokens, hookpoint) for hookpoint in HOOKPOINTS]


def same(found: ActivationStore, expected: ActivationStore) -> bool:
    assert found.key == expected.key and found.manifest["counts"] == expected.manifest["counts"]
    return torch.equal(found.read(slice(None)), expected.read(slice(None)))


class Passes:
    """Counts the passes of a model, and acts in one of them."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int = 0, act: Any = None) -> None:
        self.n, real = 0, lm.capture

        def capture(*args: Any) -> Any:
            self.n += 1
            if self.n == at:
                act()
            return real(*args)

        monkeypatch.setattr(lm, "capture", capture)


def test_several_hookpoints_in_one_pass(
    tiny_lm: LanguageModel, tokens: TokenSet, whole: list[ActivationStore], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tiny_lm.check_hookpoint("layers.1")  # which takes a pass of its own, once
    passes = Passes(tiny_lm, monkeypatch)
    found = capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS)
    assert passes.n == 7, "50 rows, 8 at once"
    assert all(same(mine, theirs) for mine, theirs in zip(found, whole, strict=True))
    again = capture_many(tmp_path, tiny_lm, tokens, [*HOOKPOINTS, "layers.1"])
    assert passes.n == 14 and [store.folder for store in again[:3]] == [store.folder for store in found]
    assert len(list((tmp_path / "activations").iterdir())) == 4, "nothing else is left"


def test_shards_read_as_one(
    small_shards: None, tiny_lm: LanguageModel, tokens: TokenSet, whole: list[ActivationStore], tmp_path: Path
) -> None:
    found = capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS)
    for mine, theirs in zip(found, whole, strict=True):
        names = sorted(path.name for path in mine.folder.glob("acts_ND.*"))
        assert names == ["acts_ND.1.bin", "acts_ND.2.bin", "acts_ND.3.bin", "acts_ND.bin"]
        assert (mine.folder / "acts_ND.bin").stat().st_size == 512 * mine.d_in * 2
        assert same(mine, theirs)
        for part in (slice(500, 530), slice(3, 1_500, 7), slice(-70, None), slice(5, 5)):
            wanted = theirs.read(np.arange(1_600)[part])
            assert torch.equal(mine.read(part), wanted)
        flat = np.random.default_rng(0).integers(1_600, size=300)
        for index in (flat, torch.from_numpy(flat), flat.tolist(), flat[:0], flat[::-1]):
            assert torch.equal(mine.read(index), theirs.read(index))
        pairs = zip(mine.batches(64, seed=1, epochs=2), theirs.batches(64, seed=1, epochs=2), strict=True)
        assert all(torch.equal(a, b) and np.array_equal(i, j) for (a, i), (b, j) in pairs)


def test_what_failed_goes_on_after_its_last_whole_shard(
    small_shards: None, tiny_lm: LanguageModel, tokens: TokenSet, whole: list[ActivationStore], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail() -> None:
        raise RuntimeError("unplugged")

    Passes(tiny_lm, monkeypatch, 6, fail)  # two passes a shard: two shards are whole
    with pytest.raises(RuntimeError, match="unplugged"):
        capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS[:2])
    monkeypatch.undo()
    monkeypatch.setattr(activations, "SHARD_TOKENS", 512)
    left = sorted(path.name for path in (tmp_path / "activations").glob("*.run/*"))
    assert left == sorted(2 * ["acts-0-16.bin", "acts-16-32.bin", "norms-0-16.npy", "norms-16-32.npy"])
    passes = Passes(tiny_lm, monkeypatch)
    found = capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS)
    assert passes.n == 7, "the third hookpoint needs all rows"
    assert all(same(mine, theirs) for mine, theirs in zip(found, whole, strict=True))
    assert not list((tmp_path / "activations").glob("*.run"))


def test_only_the_shards_that_are_missing_are_computed(
    small_shards: None, tiny_lm: LanguageModel, tokens: TokenSet, whole: list[ActivationStore], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail() -> None:
        raise KeyboardInterrupt

    Passes(tiny_lm, monkeypatch, 7, fail)
    with pytest.raises(KeyboardInterrupt):
        capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINTS[0])
    monkeypatch.undo()
    monkeypatch.setattr(activations, "SHARD_TOKENS", 512)
    passes = Passes(tiny_lm, monkeypatch)
    assert same(capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINTS[0]), whole[0])
    assert passes.n == 1
    assert same(capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINTS[0], force=True), whole[0])
    assert passes.n == 8


def test_a_full_disk_keeps_the_whole_shards(
    small_shards: None, tiny_lm: LanguageModel, tokens: TokenSet, whole: list[ActivationStore], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The device /dev/full answers every write with ENOSPC."""
    real, opened = open, []

    def full(path: Any, mode: str = "r", **more: Any) -> Any:
        opened.append(str(path))
        late = mode == "wb" and sum("acts-" in name and name.endswith(".part") for name in opened) > 3
        return real("/dev/full" if late else path, mode, **more)

    monkeypatch.setattr(shards, "open", full, raising=False)
    with pytest.raises(ArtefactError, match="disk is full"):
        capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINTS[0])
    monkeypatch.undo()
    monkeypatch.setattr(activations, "SHARD_TOKENS", 512)
    assert list((tmp_path / "activations").glob("*.run/norms-0-16.npy"))
    passes = Passes(tiny_lm, monkeypatch)
    assert same(capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINTS[0]), whole[0])
    assert 0 < passes.n < 7


def test_values_that_are_not_finite_keep_the_shards_before(
    small_shards: None, tiny_lm: LanguageModel, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tiny_lm.capture, [0]

    def capture(*args: Any) -> Any:
        calls[0] += 1
        found = real(*args)
        return {h: x * (torch.inf if calls[0] == 4 else 1) for h, x in found.items()}

    monkeypatch.setattr(tiny_lm, "capture", capture)
    with pytest.raises(DataError, match="not finite at layers.0 in row 24"):
        capture_activations(tmp_path, tiny_lm, tokens, "layers.0")
    names = sorted(path.name for path in (tmp_path / "activations").glob("*.run/*"))
    assert names == ["acts-0-16.bin", "norms-0-16.npy"]


def test_two_processes_do_not_collect_the_same(
    tiny_lm: LanguageModel, tokens: TokenSet, whole: list[ActivationStore], tmp_path: Path
) -> None:
    with locked(tmp_path / "activations" / f"{whole[0].key}.run"):
        with pytest.raises(ArtefactError, match="collects these activations"):
            capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS)
    assert same(capture_activations(tmp_path, tiny_lm, tokens, HOOKPOINTS[0]), whole[0])


SCRIPT = """
import sys
from pathlib import Path
from sae import activations
from sae.language_model import LanguageModel
from sae.tokens import TokenSet
activations.SHARD_TOKENS = 256
lm = LanguageModel.load(sys.argv[2], dtype="float32")
real = lm.capture
def slow(*args):
    import time
    time.sleep(0.05)
    return real(*args)
lm.capture = slow
activations.capture_many(Path(sys.argv[1]), lm, TokenSet.open(Path(sys.argv[3])), sys.argv[4:])
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_whole_shard(
    tiny_lm: LanguageModel, tiny_lm_dir: Path, tokens: TokenSet, whole: list[ActivationStore], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    paths = f"{SUPPORT.parent.parent}:{SUPPORT.parent.parent / 'kernels'}"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(tiny_lm_dir), str(tokens.folder), *HOOKPOINTS],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("activations/*.run/norms-*.npy"))) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = len(list(tmp_path.glob(f"activations/{whole[0].key}.run/norms-*.npy")))
    monkeypatch.setattr(activations, "SHARD_TOKENS", 256)
    passes = Passes(tiny_lm, monkeypatch)
    found = capture_many(tmp_path, tiny_lm, tokens, HOOKPOINTS)
    assert 2 <= held < 7 and passes.n <= 7 - held + 1
    assert all(same(mine, theirs) for mine, theirs in zip(found, whole, strict=True))
    assert len(list((tmp_path / "activations").iterdir())) == 3
