"""What delphi and we are given alike: a TopK SAE started at activations of the text, and the numbers of windows.

D channels, F latents. Numpy alone: the peer's environment imports it too.
"""

from typing import Any

import numpy as np

PLACE, D, F, K, L = "layers.15", 576, 4_608, 32, 128
BATCH_ROWS = 8
"""Rows a pass, of both: on a CPU never slower than delphi's 32."""
N_SPLITS = 5
SHOWN, POSITIVE, SILENT = 20, 20, 20
"""Windows that the explainer sees, active and silent windows that are judged."""
PER_REQUEST = 5
"""Windows a request, delphi's default."""
ANSWER = "[1, 0, 1, 0, 1]\n[EXPLANATION]: words that stand at the end of a sentence"
"""Read by delphi's explainer and by its classifiers alike."""


def weights(x_ND: np.ndarray) -> dict[str, np.ndarray]:
    """float32 ``W`` [F, D] (encoder and decoder rows, unit) and ``b`` [D]: centred activations of F drawn tokens."""
    r = np.random.default_rng(0)
    b = x_ND.mean(axis=0)
    rows = x_ND[r.choice(len(x_ND), size=F, replace=len(x_ND) < F)] - b
    return {"W": (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), "b": b.astype(np.float32)}


def entries(rows: Any, position: Any, latent: Any) -> np.ndarray:
    """One number per nonzero activation, the same for both."""
    flat = np.asarray(rows, dtype=np.int64) * L + np.asarray(position, dtype=np.int64)
    return flat * F + np.asarray(latent, dtype=np.int64)
