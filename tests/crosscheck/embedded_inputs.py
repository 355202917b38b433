"""Activations of the embedded model for sae-probes, in the form of its own cache, and the codes of one SAE on them.

By our environment: ``embedded_inputs.py CACHE CODES.npz``. About 90,000 tokens through the lower half of the model.
"""

import sys
from pathlib import Path

import embedded_case as case
import numpy as np
import probe_case
import torch

from sae.language_model import LanguageModel


def main(out: str, codes: str) -> None:
    lm = LanguageModel.load("default", dtype="float32")
    folder = Path(out) / f"model_activations_{case.MODEL}"
    folder.mkdir(parents=True, exist_ok=True)
    acts, found = {}, {}
    for name in case.DATASETS:
        prompts, y = probe_case.table(name)
        path = folder / f"{name}_{case.HOOK}.pt"
        if not path.is_file():
            torch.save(torch.from_numpy(probe_case.activations(lm, case.HOOKPOINT, prompts)), path)
        acts[name] = torch.load(path)
        first = {text: i for i, text in reversed(list(enumerate(prompts)))}
        found[name] = {"y": y.astype(np.uint8), "prompt": np.array([first[p] for p in prompts], dtype=np.uint16)}
    weights = case.fit_sae(torch.cat(list(acts.values())).numpy())
    np.savez(Path(out) / "sae.npz", **weights)
    for name, x in acts.items():
        values, indices = case.encode(weights, x)
        found[name] |= {"values": values.numpy(), "indices": indices.numpy().astype(np.uint16)}
    case.write_codes(Path(codes), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
