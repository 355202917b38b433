"""The probing cross-check on the embedded model: data sets, codes, and how a prompt becomes one. Rows as the files have
them, duplicates included. N rows of a data set, D channels, F latents, K active ones.

``goldens/codes_embedded.npz`` holds what a test needs of each data set, so that it runs without model and texts: the
codes of the SAE that sae-probes was given (``<name>.values`` float16 [N, K], ``<name>.indices`` uint16), the labels
(``<name>.y``) and which prompts are equal (``<name>.prompt``: number of the first row of that text).
"""

from pathlib import Path
from typing import Any

import numpy as np

DATASETS = ("24_headline_isiran", "41_truthqa_tf", "95_toxic_is", "117_us_state_FL", "154_athlete_sport_football")
"""News, answers, comments, places, names: the package's small files, 728 to 1,772 rows."""
MODEL = "embedded"
HOOKPOINT, HOOK = "layers.15", "blocks.15.hook_resid_post"
F, K = 512, 16
STEPS, BATCH, RATE = 400, 512, 2e-3


def fit_sae(x_ND: np.ndarray) -> dict[str, np.ndarray]:
    """A TopK SAE fitted to the prompts' own activations (no label is read), as float32 W_enc, b_enc, W_dec, b_dec."""
    import torch

    torch.manual_seed(0)
    mean, scale = x_ND.mean(axis=0), float((x_ND - x_ND.mean(axis=0)).std())
    s = torch.from_numpy((x_ND - mean) / scale)
    w_dec = torch.nn.functional.normalize(torch.randn(F, s.shape[1]), dim=1)
    weights = [w.requires_grad_() for w in (w_dec.T.clone(), torch.zeros(F), w_dec.clone())]
    w_enc, b_enc, w_dec = weights
    optimiser = torch.optim.Adam(weights, lr=RATE)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = s[torch.randint(len(s), (BATCH,), generator=generator)]
        values, indices = torch.relu(batch @ w_enc + b_enc).topk(K, dim=1)
        code = torch.zeros(len(batch), F).scatter(1, indices, values)
        loss = (code @ w_dec - batch).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    made = {"W_enc": w_enc / scale, "b_enc": b_enc, "W_dec": w_dec * scale, "b_dec": torch.from_numpy(mean)}
    return {name: np.ascontiguousarray(w.detach().numpy(), dtype=np.float32) for name, w in made.items()}


def encode(weights: dict[str, np.ndarray], x: Any) -> tuple[Any, Any]:
    """(values, indices) [N, K] of the K largest, in float16's numbers: what both sides probe, to the last bit."""
    import torch

    w = {name: torch.from_numpy(a) for name, a in weights.items()}
    found = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(K, dim=-1)
    return found.values.half(), found.indices


def write_codes(path: Path, found: dict[str, dict[str, np.ndarray]]) -> None:
    """The archive that the head of this file describes; equal inputs give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{name}.{part}": values for name, parts in found.items() for part, values in parts.items()}
    np.savez_compressed(path, **{name: flat[name] for name in sorted(flat)})
