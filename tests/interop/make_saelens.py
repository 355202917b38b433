"""Small SAEs written and run by SAELens itself; run in its own environment: ``make_saelens.py OUT`` (see Makefile)."""

import importlib.metadata
import json
import sys
from pathlib import Path

import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

D, F, K, N = 16, 48, 4, 24


def sample() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=g) @ torch.randn(D, D, generator=g) * 0.7 + torch.randn(D, generator=g)


def fill(sae: torch.nn.Module, seed: int) -> None:
    """Weights that no convention can hide behind: rows of unequal length, biases far from 0, a threshold per latent."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(sae.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if name.startswith("W") else 0.5))
            if name == "threshold":
                p.copy_(torch.rand(p.shape, generator=g) + 0.2)


def write(out: Path, sae, model: str = "gpt2-small", hook: str = "blocks.7.hook_resid_pre", save: str = "save_model"):
    getattr(sae, save)(out)
    loaded = sae_lens.SAE.load_from_disk(out, device="cpu") if save == "save_inference_model" else sae
    x = sample()
    with torch.no_grad():
        z = loaded.encode(x)
        golden = {"x_ND": x, "z_NF": z, "x_hat_ND": loaded.decode(z)}
        if hasattr(loaded, "W_skip"):
            golden["x_hat_ND"] = loaded(x)
    save_file({k: v.float().contiguous() for k, v in golden.items()}, out / "golden.safetensors")
    about = {"library": "sae-lens", "version": importlib.metadata.version("sae-lens"), "model": model, "hook": hook}
    (out / "about.json").write_text(json.dumps(about) + "\n")


def metadata() -> SAEMetadata:
    return SAEMetadata(model_name="gpt2-small", hook_name="blocks.7.hook_resid_pre", context_size=128, prepend_bos=True)


def main(out: Path) -> None:
    base = {"d_in": D, "d_sae": F}
    cases = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "standard_no_pre_bias": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "standard_layer_norm": (
            sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"normalize_activations": "layer_norm"}
        ),
        "standard_constant_norm": (
            sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"normalize_activations": "constant_norm_rescale"}
        ),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K}),
        "topk_layer_norm": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K, "normalize_activations": "layer_norm"}),
        "topk_rescaled": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
        "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig, {"d_out": D, "apply_b_dec_to_input": False}),
        "skip_transcoder": (
            sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig, {"d_out": D, "apply_b_dec_to_input": False}
        ),
        "jumprelu_transcoder": (
            sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig, {"d_out": D, "apply_b_dec_to_input": False}
        ),
        "jumprelu_skip_transcoder": (
            sae_lens.JumpReLUSkipTranscoder, sae_lens.JumpReLUSkipTranscoderConfig,
            {"d_out": D, "apply_b_dec_to_input": False},
        ),
    }  # fmt: skip
    for seed, (name, (kind, config, extra)) in enumerate(cases.items()):
        sae = kind(config(**base, **extra, metadata=metadata()))
        fill(sae, seed)
        write(out / name, sae)
    trained = {
        "batchtopk_exported": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {"k": K}),
        "matryoshka_exported": (
            sae_lens.MatryoshkaBatchTopKTrainingSAE, sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": K, "matryoshka_widths": [8, 24, F]},
        ),
        "jumprelu_exported": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig, {}),
        "topk_exported": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, {"k": K}),
    }  # fmt: skip
    for seed, (name, (kind, config, extra)) in enumerate(trained.items()):
        sae = kind(config(**base, **extra, metadata=metadata()))
        fill(sae, 100 + seed)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.2)
        write(out / name, sae, save="save_inference_model")
        if hasattr(sae, "topk_threshold"):
            checkpoint(out / name.replace("exported", "checkpoint"), sae, out / name)
    old(out / "old_topk", out / "topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}})
    old(out / "old_standard", out / "standard", {"normalize_activations": False})


def checkpoint(out: Path, sae, exported: Path) -> None:
    """A training checkpoint; what it means at inference is what the library exports from it."""
    sae.save_model(out)
    for name in ("golden.safetensors", "about.json"):
        (out / name).write_bytes((exported / name).read_bytes())


def old(out: Path, like: Path, extra: dict) -> None:
    """The flat configuration of version 3, read back and run by today's library."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "sae_weights.safetensors").write_bytes((like / "sae_weights.safetensors").read_bytes())
    cfg = {
        "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_point": "blocks.7.hook_resid_pre", "context_size": 128, "prepend_bos": True,
    } | extra  # fmt: skip
    (out / "cfg.json").write_text(json.dumps(cfg) + "\n")
    sae, x = sae_lens.SAE.load_from_disk(out, device="cpu"), sample()
    with torch.no_grad():
        z = sae.encode(x)
        golden = {"x_ND": x, "z_NF": z.contiguous(), "x_hat_ND": sae.decode(z).contiguous()}
    save_file(golden, out / "golden.safetensors")
    (out / "about.json").write_bytes((like / "about.json").read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
