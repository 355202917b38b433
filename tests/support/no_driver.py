"""A program without GPU and without Triton's interpreter, in a process of its own: the interpreter is chosen when the
kernels are defined."""

import os
import subprocess
import sys
from pathlib import Path


def run_without_driver(program: str) -> None:
    """AssertionError with the program's errors unless it ends well."""
    _output(["-c", program], {"CUDA_VISIBLE_DEVICES": ""}, seconds=120)


OTHER_TRITON = "SAESCOPE_TRITON"
"""Variable that names a folder with another version of Triton, to compile with that (``.ci/run``: the one that torch
2.11 brings)."""
WHICH = """
import os, sys, triton
wanted = os.environ.get("SAESCOPE_TRITON")
assert not wanted or triton.__file__.startswith(os.path.abspath(wanted) + os.sep), triton.__file__
print("Triton", triton.__version__)
"""


def compile_without_driver(program: str, folder: Path) -> str:
    """What a program prints that compiles kernels afresh, with ``folder`` as Triton's cache; errors as above.

    ``pytest -rP`` shows it: registers, spills and instructions of each kernel.
    """
    file = folder / "compile_kernels.py"
    file.write_text(WHICH + program)
    printed = _output([str(file)], {"TRITON_CACHE_DIR": str(folder)}, seconds=280)
    print(printed)
    return printed


def _output(arguments: list[str], variables: dict[str, str], seconds: int) -> str:
    other = os.environ.get(OTHER_TRITON)
    paths = os.pathsep.join(([os.path.abspath(other)] if other else []) + [p for p in sys.path if p])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths} | variables
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-3_000:]
    return done.stdout
