"""Environments of other libraries for ``python -m sae bench --peers``: made once, below one folder. Free of torch.

Each library pins what the others do not, so each has an environment of its own: torch first, then the library with that
torch as a constraint, then out with what drags in a torchvision that does not fit (design PEERS).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae.assets import cache_dir, cache_lock
from sae.console import progress
from sae.errors import ArtefactError

TORCH = "torch==2.13.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
MARK = "saescope-peer.txt"
"""Written into an environment when it is complete; holds what it is of."""


@dataclass(frozen=True)
class Peer:
    """A library that trains sparse autoencoders."""

    name: str
    """Trainer in :mod:`sae.bench_worker`, and folder of its environment."""
    package: str
    """On the package index."""
    version: str
    module: str
    """What must be importable."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


PEERS = (
    Peer("sparsify", "eai-sparsify", "1.3.3", "sparsify"),
    Peer("dictionary_learning", "dictionary-learning", "0.1.0", "dictionary_learning.trainers.top_k"),
    Peer("saelens", "sae-lens", "6.54.12", "sae_lens"),
)


def default_folder() -> Path:
    """Below the cache of assets."""
    return cache_dir() / "peers"


def python_of(peer: Peer, envs: Path) -> Path:
    """Interpreter of the environment of a library."""
    return envs.absolute() / peer.name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def is_ready(peer: Peer, envs: Path) -> bool:
    """Whether its environment is complete and of this version."""
    mark = envs / peer.name / MARK
    return mark.is_file() and mark.read_text(encoding="utf-8").split() == [peer.requirement, TORCH]


def ensure(peer: Peer, envs: Path) -> Path:
    """The interpreter of a library's environment, which is made now unless it is there (a minute, 1.5 to 2.5 GB).

    What was left half made is completed. ``ArtefactError`` with the end of pip's output where that fails.
    """
    folder = envs.absolute() / peer.name
    with cache_lock(folder):
        if not is_ready(peer, envs):
            python = str(python_of(peer, envs))
            pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
            commands = (
                [sys.executable, "-m", "venv", str(folder)],
                [*pip, "install", "--quiet", TORCH],
                [*pip, "install", "--quiet", peer.requirement, TORCH],
                [*pip, "uninstall", "--quiet", "--yes", *UNWANTED],
                [python, "-c", f"import {peer.module}"],
            )
            with progress(f"environment of {peer.package}", len(commands), "step") as bar:
                for command in commands:
                    _run(peer, command)
                    bar.advance()
            (folder / MARK).write_text(f"{peer.requirement} {TORCH}\n", encoding="utf-8")
    return python_of(peer, envs)


def _run(peer: Peer, command: Sequence[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise ArtefactError(
            f"the environment of {peer.requirement} could not be made: {' '.join(command)} ended with "
            f"{done.returncode}:\n{tail}\nLeave this library out with --providers, or give --envs a folder where it is"
        )
