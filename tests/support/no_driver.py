"""A program without GPU and without Triton's interpreter, in a process of its own: the interpreter is chosen when the
kernels are defined."""

import os
import subprocess
import sys


def run_without_driver(program: str) -> None:
    """AssertionError with the program's errors unless it ends well."""
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
