"""Memory of an evaluation does not grow with latents x tokens: measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent.parent / "support"
ALLOWED_GB = 0.4


def peak_above_start(d_sae: int, n_tokens: int, d_in: int) -> float:
    """GB; the SAE itself lies before the start."""
    root = SUPPORT.parent.parent
    path = os.pathsep.join(map(str, (root, root / "kernels", SUPPORT)))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "streamed.py"), str(d_sae), str(n_tokens), str(d_in)], capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    fvu, tokens, _, before, peak, _ = map(float, done.stdout.split())
    assert tokens == n_tokens * 127 / 128 and fvu > 0
    return peak - before


@pytest.mark.slow
def test_reconstruction_of_a_wide_sae_is_streamed():
    """65,536 latents x 16,384 tokens would be 4.3 GB of codes, a block of 8,192 tokens 2.1 GB."""
    wide = peak_above_start(65_536, 16_384, 32)
    assert wide < ALLOWED_GB, f"{wide:.2f} GB above the start"
    assert wide - peak_above_start(65_536, 8_192, 32) < 0.1, "memory grows with the tokens"
