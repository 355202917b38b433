"""One SAE and one set of tokens for us and for the peers; numpy alone, so that any environment makes the same.

B rows of L tokens, D channels, F latents.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

B, L, D, F, K = 16, 64, 32, 64, 8
LAYER = 1
ROWS_PER_BATCH = 4
BOS = 0


def tokens_BL() -> np.ndarray:
    """Random bytes; position 0 holds the token that opens a row."""
    ids = np.random.default_rng(7).integers(3, 259, size=(B, L))
    ids[:, 0] = BOS
    return ids.astype(np.int64)


def sae_weights() -> dict[str, np.ndarray]:
    """TopK: z = topk(relu((x - b_dec) W_enc + b_enc)), x_hat = z W_dec + b_dec; unit decoder rows."""
    r = np.random.default_rng(11)
    w_dec = r.standard_normal((F, D))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    w_enc = (w_dec + 0.1 * r.standard_normal((F, D))).T * 0.6
    b_enc, b_dec = 0.1 * r.standard_normal(F), 0.3 * r.standard_normal(D)
    made = {"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    return {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in made.items()}


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Of a model's weights: what both sides must have loaded."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(name.encode())
        total.update(np.ascontiguousarray(arrays[name], dtype=np.float32).tobytes())
    return total.hexdigest()[:16]


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """Weights of a Hugging Face folder."""
    from safetensors.numpy import load_file

    return dict(load_file(folder / "model.safetensors"))


def write(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
