"""A small SAE written and run by e2e_sae itself, in SAELens's environment: ``make_e2e_sae.py OUT``.

The package cannot be imported whole (2.1.1 lacks a module that it imports); its SAE is a file that needs torch alone.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

D, F, N = 16, 48, 24


def sample() -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(N, D, generator=g) @ torch.randn(D, D, generator=g) * 0.7 + torch.randn(D, generator=g)


def library() -> ModuleType:
    """e2e_sae/models/sparsifiers.py of the installed package."""
    package = importlib.util.find_spec("e2e_sae")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "models" / "sparsifiers.py"
    spec = importlib.util.spec_from_file_location("sparsifiers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(out: Path) -> None:
    SAE = library().SAE
    folder = out / "relu"
    folder.mkdir(parents=True, exist_ok=True)
    saes = torch.nn.ModuleDict({"blocks-6-hook_resid_pre": SAE(D, F)})  # as SAETransformer holds them
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(saes.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 2 else 0.5))
        torch.save(saes.state_dict(), folder / "samples_100.pt")  # as its save_module does
        x = sample()
        x_hat, z = saes["blocks-6-hook_resid_pre"](x)
    save_file({"x_ND": x, "z_NF": z.contiguous(), "x_hat_ND": x_hat.contiguous()}, folder / "golden.safetensors")
    version = importlib.metadata.version("e2e-sae")
    (folder / "about.json").write_text(json.dumps({"library": "e2e-sae", "version": version}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
