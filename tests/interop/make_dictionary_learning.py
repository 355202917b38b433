"""Small SAEs written and run by dictionary_learning itself, in its own environment: ``make_... OUT``."""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import save_file

D, F, K, N = 16, 48, 4, 24


def sample() -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(N, D, generator=g) @ torch.randn(D, D, generator=g) * 0.7 + torch.randn(D, generator=g)


def fill(ae: torch.nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(ae.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 2 else 0.5))
            if name == "threshold":
                p.copy_(torch.rand(p.shape, generator=g) + 0.2)


def write(out: Path, ae, name: str, extra: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.save(ae.state_dict(), out / "ae.pt")
    trainer = {
        "dict_class": name, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "EleutherAI/pythia-70m",
        "submodule_name": "resid_post_layer_3", **extra,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}) + "\n")
    x = sample()
    with torch.no_grad():
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and float(ae.threshold) >= 0:
            z = ae.encode(x, use_threshold=True)
        elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):  # never calibrated: exact K per token, one at a time
            z = torch.cat([ae.encode(row[None], use_threshold=False) for row in x])
        else:
            z = ae.encode(x)
        golden = {"x_ND": x, "z_NF": z, "x_hat_ND": ae.decode(z)}
    save_file({k: v.float().contiguous() for k, v in golden.items()}, out / "golden.safetensors")
    version = importlib.metadata.version("dictionary-learning")
    (out / "about.json").write_text(json.dumps({"library": "dictionary-learning", "version": version}) + "\n")


def main(out: Path) -> None:
    groups = [8, 16, 24]
    cases = {
        "autoencoder": (AutoEncoder(D, F), {}), "autoencoder_new": (AutoEncoderNew(D, F), {}),
        "topk": (AutoEncoderTopK(D, F, K), {"k": K}), "batchtopk": (BatchTopKSAE(D, F, K), {"k": K}),
        "batchtopk_uncalibrated": (BatchTopKSAE(D, F, K), {"k": K}),
        "matryoshka": (MatryoshkaBatchTopKSAE(D, F, K, groups), {"k": K, "group_sizes": groups}),
        "jumprelu": (JumpReluAutoEncoder(D, F), {}), "gated": (GatedAutoEncoder(D, F), {}),
    }  # fmt: skip
    for seed, (name, (ae, extra)) in enumerate(cases.items()):
        fill(ae, seed)
        if "threshold" in dict(ae.named_buffers()) and "uncalibrated" not in name and name != "topk":
            ae.threshold.fill_(1.3)
        write(out / name, ae, type(ae).__name__, extra)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
