"""Small SAEs written and run by Llamascopium itself, in its own environment: ``make_llamascopium.py OUT``."""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from safetensors.torch import save_file

D, F, K, N = 16, 48, 4, 24
HOOK = "blocks.3.hook_resid_post"


def sample() -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(N, D, generator=g) @ torch.randn(D, D, generator=g) * 0.7 + torch.randn(D, generator=g)


def main(out: Path) -> None:
    cases = {
        "relu_dataset": {"act_fn": "relu"}, "topk_dataset": {"act_fn": "topk"},
        "jumprelu_dataset": {"act_fn": "jumprelu"},
        "topk_no_gate": {"act_fn": "topk", "sparsity_include_decoder_norm": False},
        "jumprelu_token": {"act_fn": "jumprelu", "norm_activation": "token-wise"},
        "jumprelu_folded": {"act_fn": "jumprelu", "norm_activation": "inference"},
        "transcoder": {"act_fn": "jumprelu", "hook_point_out": "blocks.3.hook_mlp_out"},
    }  # fmt: skip
    for seed, (name, extra) in enumerate(cases.items()):
        cfg = SAEConfig(
            d_model=D, expansion_factor=F / D, top_k=K, dtype=torch.float32, device="cpu",
            **({"hook_point_in": HOOK, "hook_point_out": HOOK} | extra),
        )  # fmt: skip
        sae = SparseAutoEncoder(cfg)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in sorted(sae.named_parameters()):
                p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 2 else 0.5))
                if "threshold" in key:
                    p.copy_((torch.rand(p.shape, generator=g) * 0.8 + 0.1).log())
            sae.set_dataset_average_activation_norm({cfg.hook_point_out: 5.0, HOOK: 11.0})
            sae.save_pretrained(out / name)
            sae.cfg.save_hyperparameters(out / name)
            x = sample()
            batch, factors = sae.normalize_activations({HOOK: x, cfg.hook_point_out: x}, return_scale_factor=True)
            z = sae.encode(batch[HOOK])
            x_hat = sae.decode(z) / factors[cfg.hook_point_out]
        golden = {"x_ND": x, "z_NF": z.float().contiguous(), "x_hat_ND": x_hat.float().contiguous()}
        save_file(golden, out / name / "golden.safetensors")
        version = importlib.metadata.version("llamascopium")
        (out / name / "about.json").write_text(json.dumps({"library": "llamascopium", "version": version}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
