"""The shuffle buffer against a list that is cut, permuted and read; its thread, its memory, its failures."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.buffer import Block, Feed, Slots, batches, window_order

SUPPORT = Path(__file__).resolve().parent.parent / "support"
WIDTHS = (3, 2)


def block(flat_n: np.ndarray) -> Block:
    """Activations that say which token they are of."""
    base = torch.from_numpy(flat_n.astype(np.float32))[:, None]
    return Block([(base + i).expand(-1, d).contiguous() for i, d in enumerate(WIDTHS)], [flat_n, flat_n + 1])


def blocks(first: int, last: int, *, slow: bool = False, seed: int = 0) -> Iterator[Block]:
    """The tokens ``first`` to ``last`` in blocks of 1 to 40."""
    rng = np.random.default_rng(seed)
    while first < last:
        n = int(min(rng.integers(1, 41), last - first))
        if slow and rng.random() < 0.3:
            time.sleep(0.002)
        yield block(np.arange(first, first + n))
        first += n


def feed(window: int, source: Iterator[Block], threaded: bool) -> Feed:
    return Feed(Slots(window, WIDTHS, torch.float32, torch.device("cpu")), source, threaded=threaded)


def reference(window: int, batch: int, n_batches: int, seed: int) -> list[np.ndarray]:
    """One thread, one list: windows of consecutive tokens, each permuted, read batch by batch."""
    n_windows = -(-n_batches * batch // window)
    order = np.concatenate([w * window + window_order(seed, w, window) for w in range(n_windows)])
    return [order[i * batch : (i + 1) * batch] for i in range(n_batches)]


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(("window", "batch"), [(96, 8), (96, 96), (60, 12)])
def test_batches_are_those_of_a_list_in_one_thread(window: int, batch: int, threaded: bool) -> None:
    n_batches = 7 * window // batch + 1
    end = -(-n_batches * batch // window) * window
    for seed, slow in ((0, False), (1, True)):
        source = feed(window, blocks(0, end, slow=slow), threaded)
        found = list(batches(source, batch, seed=seed, first=0, last=n_batches))
        expected = reference(window, batch, n_batches, seed)
        assert len(found) == n_batches
        for ((x_ND, flat), (y_ND, other)), wanted in zip(found, expected, strict=True):
            assert np.array_equal(flat, wanted) and np.array_equal(other, wanted + 1)
            assert torch.equal(x_ND, torch.from_numpy(wanted.astype(np.float32))[:, None].expand(-1, 3))
            assert torch.equal(y_ND, x_ND[:, :2] + 1)


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("first", [1, 11, 12, 13, 40])
def test_any_batch_may_be_the_first(first: int, threaded: bool) -> None:
    """The blocks begin with the window that holds it; nothing before is needed."""
    window, batch, last = 96, 8, 45
    source = blocks(first // 12 * window, -(-last // 12) * window, seed=first)
    found = list(batches(feed(window, source, threaded), batch, seed=4, first=first, last=last))
    expected = reference(window, batch, last, 4)[first:]
    assert len(found) == last - first
    assert all(np.array_equal(parts[0][1], wanted) for parts, wanted in zip(found, expected, strict=True))


def test_neighbours_have_nothing_to_do_with_each_other() -> None:
    """Lag-1 correlation of arrival positions inside a window: 1 as they come, within 4 standard errors of 0 as they
    leave; and a batch has tokens of all parts of its window."""
    window, batch = 4_096, 256
    found = [parts[0][1] for parts in batches(feed(window, blocks(0, window), False), batch, seed=0, first=0, last=16)]
    order = np.concatenate(found).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / window**0.5
    sixteenth = [np.bincount(flat // 256, minlength=16) for flat in found]
    chi = sum(((counts - 16.0) ** 2 / 16).sum() for counts in sixteenth) / (16 * 15)
    assert 0.6 < chi < 1.4, "as even as chance makes it, no more and no less"


@pytest.mark.slow
def test_the_memory_is_the_stated_one_over_a_thousand_refills() -> None:
    """Of what the code holds: the fixed threshold keeps glibc from holding on to what was freed (tens of MB)."""
    found = json.loads(
        subprocess.run(
            [sys.executable, str(SUPPORT / "buffer_probe.py"), "65536", "1024", "1024", "2048", "1024"],
            capture_output=True, text=True, check=True,
            env={
                "PYTHONPATH": f"{SUPPORT.parent.parent}:{SUPPORT.parent.parent / 'kernels'}", "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",
            },
        ).stdout.splitlines()[-1]
    )  # fmt: skip
    assert found["batches"] == 512 and not found["moved"], "slots are filled in place"
    assert found["taken"] == pytest.approx(found["stated"], rel=0.05), found


class Odd(RuntimeError):
    """An error that nobody else raises."""


def broken(after: int) -> Iterator[Block]:
    yield from blocks(0, after)
    raise Odd("the model fell over")


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("after", [0, 10, 500])
def test_the_producers_error_reaches_the_trainer_as_it_is(after: int, threaded: bool) -> None:
    begun = time.monotonic()
    with pytest.raises(Odd, match="fell over") as caught:
        for _ in batches(feed(96, broken(after), threaded), 8, seed=0, first=0, last=1_000):
            pass
    assert time.monotonic() - begun < 20, "it hung"
    assert any("broken" in entry.name for entry in caught.traceback), "the traceback names the place"
    assert not prefetch_threads()


@pytest.mark.parametrize("threaded", [False, True])
def test_blocks_that_end_too_early_end_the_stream(threaded: bool) -> None:
    found = list(batches(feed(96, blocks(0, 200), threaded), 8, seed=0, first=0, last=1_000))
    assert len(found) == 24, "two windows were whole"


def test_a_trainer_that_leaves_takes_the_thread_with_it() -> None:
    stream = batches(feed(96, blocks(0, 10**9), True), 8, seed=0, first=0, last=10**6)
    next(stream)
    assert len(prefetch_threads()) == 1
    stream.close()
    assert not prefetch_threads()


@pytest.mark.parametrize("threaded", [False, True])
def test_whoever_waits_is_told_and_may_end_it(threaded: bool) -> None:
    shares: list[float] = []

    def stop(share: float) -> None:
        shares.append(share)
        if share > 0.5:
            raise KeyboardInterrupt

    def trickle() -> Iterator[Block]:
        for one in blocks(0, 70):
            yield one
            time.sleep(0.05 if threaded else 0)
        time.sleep(0.6 if threaded else 0)
        yield block(np.arange(70, 96))

    with pytest.raises(KeyboardInterrupt):
        list(batches(feed(96, trickle(), threaded), 8, seed=0, first=0, last=12, tick=stop))
    assert shares == sorted(shares) and 0.5 < shares[-1] < 1
    assert not prefetch_threads()


def test_slots_hold_two_windows_in_the_room_of_one() -> None:
    slots = Slots(8, (1, 1), torch.float32, torch.device("cpu"))
    assert (slots.room, slots.ready) == (8, False)
    widened = Block([torch.arange(10.0)[:, None]] * 2, [np.arange(10)] * 2)
    assert slots.put(widened) == 8 and slots.ready and slots.room == 0
    slots.take(np.array([6, 1]))
    assert slots.room == 2 and slots.put(widened.cut(8)) == 2 and slots.room == 0
    assert sorted(slots.x_SD[0][:, 0].tolist()) == [0, 2, 3, 4, 5, 7, 8, 9]
    left = slots.take(np.array([0, 2, 3, 4, 5, 7]))
    assert left[0][1].tolist() == [0, 2, 3, 4, 5, 7], "what came in meanwhile has overwritten nothing"
    slots.turn()
    assert (slots.n_here, slots.room) == (2, 6)
