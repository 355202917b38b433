"""Small SAEs and transcoders written and run by sparsify itself, in its own environment: ``make_sparsify.py OUT``."""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

D, F, K, N = 16, 48, 4, 24


def sample() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(N, D, generator=g) @ torch.randn(D, D, generator=g) * 0.7 + torch.randn(D, generator=g)


def main(out: Path) -> None:
    cases = {
        "layers.3": {"expansion_factor": 3}, "h.5.mlp": {"num_latents": F, "expansion_factor": 7},
        "layers.4": {"activation": "groupmax", "expansion_factor": 3},
        "transcoder": {"transcode": True, "expansion_factor": 3},
        "skip_transcoder": {"transcode": True, "skip_connection": True, "expansion_factor": 3},
    }  # fmt: skip
    for seed, (name, extra) in enumerate(cases.items()):
        sae = SparseCoder(D, SparseCoderConfig(k=K, **extra))
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, p in sorted(sae.named_parameters()):
                p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 2 else 0.5))
            sae.save_to_disk(out / name)
            x = sample()
            found = sae(x)
            z = torch.zeros(N, F).scatter(1, found.latent_indices, found.latent_acts)
        save_file({"x_ND": x, "z_NF": z, "x_hat_ND": found.sae_out.contiguous()}, out / name / "golden.safetensors")
        version = importlib.metadata.version("eai-sparsify")
        (out / name / "about.json").write_text(json.dumps({"library": "eai-sparsify", "version": version}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
