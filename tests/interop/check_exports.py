"""Load what saescope exported with the library itself, in its environment: ``check_exports.py LIBRARY FOLDER GOLDENS``.

The library's reconstruction must be the golden's to 1e-5 and its sets of active latents equal. Imports nothing of
saescope. Writes ``checked.json`` into FOLDER; any difference is an exit status of 1.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

Run = Callable[[Path, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
PACKAGES = {
    "saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify",
    "llamascopium": "llamascopium", "circuit_tracer": "circuit-tracer",
}  # fmt: skip


def run_saelens(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, device="cpu")
    z = sae.encode(x)
    return z, sae(x) if hasattr(sae, "W_skip") else sae.decode(z)  # a skip path is part of forward alone


def run_dictionary_learning(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    kind = next(getattr(m, name) for m in (dictionary, batch_top_k, matryoshka_batch_top_k, top_k) if hasattr(m, name))
    extra = {"normalize_decoder": False} if name == "AutoEncoder" else {}
    ae = kind.from_pretrained(str(folder / "ae.pt"), **extra)
    z = ae.encode(x, use_threshold=True) if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") else ae.encode(x)
    return z, ae.decode(z)


def run_sparsify(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    found = coder(x)
    z = torch.zeros(len(x), coder.num_latents).scatter(1, found.latent_indices, found.latent_acts)
    return z, found.sae_out


def run_llamascopium(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from llamascopium.models.sae import SparseAutoEncoder

    sae = SparseAutoEncoder.from_pretrained(str(folder), device="cpu", dtype=torch.float32)
    z = sae.encode(x)
    return z, sae.decode(z)


def run_circuit_tracer(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    (path,) = folder.glob("layer_*.safetensors")
    transcoder = load_relu_transcoder(str(path), 0, lazy_encoder=False, lazy_decoder=False)
    return transcoder.encode(x), transcoder(x)


RUN: dict[str, Run] = {
    "saelens": run_saelens, "dictionary_learning": run_dictionary_learning, "sparsify": run_sparsify,
    "llamascopium": run_llamascopium, "circuit_tracer": run_circuit_tracer,
}  # fmt: skip


def main(library: str, out: Path, goldens: Path) -> int:
    same, different = [], {}
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        golden = load_file(goldens / folder.name.replace("__", "/", 1) / "golden.safetensors")
        with torch.no_grad():
            z, x_hat = RUN[library](folder, golden["x_ND"])
        error = float((x_hat - golden["x_hat_ND"]).norm() / golden["x_hat_ND"].norm())
        sets = bool(((z != 0) == (golden["z_NF"] != 0)).all())
        if sets and error <= 1e-5:
            same.append(folder.name)
        else:
            different[folder.name] = {"error": error, "sets": sets}
    version = importlib.metadata.version(PACKAGES[library])
    found = {"library": PACKAGES[library], "version": version, "same": same, "different": different}
    (out / "checked.json").write_text(json.dumps(found, indent=1))
    print(library, version, f"{len(same)} the same", different or "")
    return 1 if different or not same else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
