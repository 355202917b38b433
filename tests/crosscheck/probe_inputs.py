"""Activations for sae-probes in the form of its own cache, by our environment: ``probe_inputs.py LM_FOLDER OUT``."""

import sys
from pathlib import Path

import case
import probe_case
import torch

from sae.language_model import LanguageModel


def main(lm_folder: str, out: str) -> None:
    lm = LanguageModel.load(lm_folder, dtype="float32")
    folder = Path(out) / "model_activations_case"
    folder.mkdir(parents=True, exist_ok=True)
    for name in probe_case.DATASETS:
        prompts, _ = probe_case.table(name)
        x = probe_case.activations(lm, f"layers.{case.LAYER}", prompts)
        torch.save(torch.from_numpy(x), folder / f"{name}_blocks.{case.LAYER}.hook_resid_post.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
