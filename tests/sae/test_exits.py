"""How commands end: one place decides, and every door asks it."""

import asyncio
import importlib
import importlib.util
import inspect
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import autointerp
import evals
import sae
from autointerp.retries import run_to_end
from sae import exits
from sae.errors import ArtefactError, BudgetExceeded, ConfigError, DataError, MissingExtra, NoAnswer, SaescopeError

REPOSITORY = Path(__file__).resolve().parents[2]


def failing(error: BaseException) -> Callable[..., int]:
    def door(*args: object, **options: object) -> int:
        raise error

    return door


@pytest.mark.parametrize(("error", "status"), [
    (ConfigError("x"), 2), (ArtefactError("x"), 2), (DataError("x"), 2), (MissingExtra("ray", "ray"), 2),
    (NoAnswer("x"), 1), (SaescopeError("x"), 1), (OSError(28, "No space left on device", "/x"), 1),
    (BudgetExceeded("x"), 3), (KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 1),
])  # fmt: skip
def test_one_status_and_one_line_for_each_error(error: BaseException, status: int, capsys) -> None:
    assert exits.run(failing(error)) == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("interrupted" if status == 130 else "error: ")
    assert (exits.KEPT in said) == isinstance(error, (OSError, KeyboardInterrupt))
    assert exits.run(failing(error), kept="") == status and exits.KEPT not in capsys.readouterr().err


def test_what_a_door_says_is_its_status() -> None:
    assert [exits.run(lambda code=code: code) for code in (0, 1, 2)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback; Python ends with 1
        exits.run(lambda: 1 // 0)
    with pytest.raises(SystemExit) as usage:
        exits.run(failing(SystemExit(2)))
    assert usage.value.code == 2


def test_every_error_of_the_packages_has_one_of_the_statuses() -> None:
    """Usage is what the user can mend in command, inputs or installation."""
    found: dict[str, int] = {}
    for package in (sae, autointerp, evals):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            spec = importlib.util.find_spec(module.name)
            text = "" if spec is None or spec.origin is None else Path(spec.origin).read_text(encoding="utf-8")
            if "Error):" not in text and "(ConfigError" not in text:
                continue
            for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if issubclass(kind, SaescopeError):
                    found[name] = kind.exit_status
    failed = {"SaescopeError", "NoAnswer", "TrainingDiverged", "RankLost", "Told", "CollectiveFailed", "PartsFailed"}
    assert {name for name, status in found.items() if status == 1} == failed
    assert {name for name, status in found.items() if status == 3} == {"BudgetExceeded"}
    assert {found[name] for name in ("ConfigError", "TooLarge", "LeakError", "Unsupported", "MissingAsset")} == {2}
    assert set(found.values()) == {1, 2, 3}


def _study() -> object:
    spec = importlib.util.spec_from_file_location("study_door", REPOSITORY / "scripts" / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_door"] = module
    spec.loader.exec_module(module)
    return module


DOORS = {
    "sae.__main__": (["inspect", "x"], "sae.format_doors.inspect_main"),
    "autointerp.__main__": (["show"], "autointerp.__main__._show"),
    "evals.run_all": (["--preset", "tiny"], "evals.job.run_job"),
    "evals.compare": (["a", "b"], "evals.comparison.compare"),
    "evals.leaderboard": ([], "evals.leaderboard.build"),
    "evals.serve": ([], "evals.serve._run"),
    "study_door": (["--dry-run"], "study_door.dry_run"),
}
"""Each door with words for it, and what it calls then."""


@pytest.mark.parametrize("name", DOORS)
def test_every_door_ends_alike(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The real door on a real signal, or on an error from within."""
    words, called = DOORS[name]
    door = _study() if name == "study_door" else importlib.import_module(name)
    holder, _, attribute = called.rpartition(".")
    inner = importlib.import_module(holder)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):

        def interrupted(*args: object, number: int = number, **options: object) -> int:
            os.kill(os.getpid(), number)
            time.sleep(30)
            raise AssertionError("the signal was not heard")

        monkeypatch.setattr(inner, attribute, interrupted)
        assert door.main(words) == 130 and capsys.readouterr().err.startswith("interrupted")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    for error, status in ((ConfigError("wrong"), 2), (NoAnswer("silence"), 1), (PermissionError(13, "no", "/x"), 1)):
        monkeypatch.setattr(inner, attribute, failing(error))
        assert door.main(words) == status and capsys.readouterr().err.startswith("error: ")
    for wrong in (["--no-such-option"], ["no-such-command", "b", "c", "d"]):
        try:
            status = door.main(wrong)
        except SystemExit as usage:
            status = usage.code
        assert status == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_requests_in_flight_are_let_go(number: int) -> None:
    """A signal within the event loop of a client: what was begun is cancelled, once."""
    ended: list[str] = []

    async def request(name: str) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(name)

    async def work() -> list[object]:
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), number)
        return list(await asyncio.gather(request("a"), request("b")))

    assert exits.run(lambda: len(run_to_end(work()))) == 130 and sorted(ended) == ["a", "b"]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, "it never began"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_waits_for_a_file_ends_with_130(tmp_path: Path, number: int) -> None:
    from autointerp.reply_cache import ReplyCache

    ReplyCache(tmp_path / "replies.sqlite").close()
    os.mkfifo(tmp_path / "batch.jsonl")
    command = [sys.executable, "-m", "autointerp", "batch-read", str(tmp_path / "batch.jsonl"), "--root", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        writer = os.open(tmp_path / "batch.jsonl", os.O_WRONLY)  # returns once the command has opened it
        process.send_signal(number)
        assert process.wait(60) == 130
        os.close(writer)
        assert process.stderr is not None and process.stderr.read() == f"interrupted; {exits.KEPT}\n"


WORK = """
import sys, time
from pathlib import Path
from sae import exits
from sae.engines import run_jobs

def job(name):
    Path(name).touch()
    time.sleep(600)

if __name__ == "__main__":
    sys.exit(exits.run(lambda: len(list(run_jobs(job, sys.argv[1:], workers=2)))))
"""


def test_workers_do_not_hold_up_a_command_that_is_terminated(tmp_path: Path) -> None:
    """SIGTERM goes to the command alone; its jobs would run on for ten minutes."""
    (tmp_path / "work.py").write_text(WORK)
    names = [str(tmp_path / name) for name in "ab"]
    command = [sys.executable, str(tmp_path / "work.py"), *names]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}) as process:
        for name in names:
            wait_for(Path(name), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130


def test_a_reader_that_leaves_is_no_failure() -> None:
    """``python -m sae inspect ... | head -1``, through rich, which by itself ends with 1."""
    text = ("from sae import console, exits; import sys\n"
            "sys.exit(exits.run(lambda: [console.say('x' * 99) for _ in range(9999)] and 5))")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""
