"""Small transcoders written and run by circuit-tracer itself, in SAELens's environment: ``make_circuit_tracer.py OUT``.

Its readers of Gemma Scope 1 and 2 are oracles of those formats, whose own library is not published.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from circuit_tracer.transcoder import single_layer_transcoder as library
from circuit_tracer.transcoder.activation_functions import JumpReLU
from safetensors.torch import save_file

D, F, N, LAYER = 16, 48, 24, 5
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}


def sample() -> torch.Tensor:
    g = torch.Generator().manual_seed(6)
    return torch.randn(N, D, generator=g) @ torch.randn(D, D, generator=g) * 0.7 + torch.randn(D, generator=g)


def numbers(seed: int) -> dict[str, torch.Tensor]:
    """Weights that no convention can hide behind: rows of unequal length, biases far from 0, a threshold per latent."""
    g = torch.Generator().manual_seed(seed)
    made = {"W_enc": (F, D), "W_dec": (F, D), "W_skip": (D, D), "b_enc": (F,), "b_dec": (D,)}
    found = {n: torch.randn(s, generator=g) * (0.3 if len(s) == 2 else 0.5) for n, s in made.items()}
    return found | {"threshold": torch.rand(F, generator=g) + 0.2}


def finish(folder: Path, transcoder: library.SingleLayerTranscoder) -> None:
    x = sample()
    with torch.no_grad():
        golden = {"x_ND": x, "z_NF": transcoder.encode(x), "x_hat_ND": transcoder(x)}
    save_file({k: v.float().contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
    version = importlib.metadata.version("circuit-tracer")
    (folder / "about.json").write_text(json.dumps({"library": "circuit-tracer", "version": version}) + "\n")


def own(folder: Path, seed: int, jump: bool, skip: bool) -> None:
    """Saved by the library, loaded by it again and run."""
    folder.mkdir(parents=True, exist_ok=True)
    w, path = numbers(seed), folder / f"layer_{LAYER}.safetensors"
    activation = JumpReLU(w["threshold"], 0.1) if jump else torch.nn.functional.relu
    made = library.SingleLayerTranscoder(D, F, activation, LAYER, skip, dtype=torch.float32)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", *(["W_skip"] if skip else [])):
            getattr(made, name).copy_(w[name])
    made.to_safetensors(str(path))
    cfg = {"model_kind": "transcoder_set", "model_name": "meta-llama/Llama-3.2-1B", "scan_name": "golden", **HOOKS}
    (folder / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in cfg.items()))
    finish(folder, library.load_relu_transcoder(str(path), LAYER, lazy_encoder=False, lazy_decoder=False))


def gemma_1(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    w = numbers(seed)
    arrays = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    with open(folder / "params.npz", "wb") as file:
        np.savez(file, **{k: v.contiguous().numpy() for k, v in (arrays | {"threshold": w["threshold"]}).items()})
    finish(folder, library.load_gemma_scope_transcoder(str(folder / "params.npz"), LAYER))


def gemma_2(folder: Path, seed: int, skip: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    w = numbers(seed)
    made = {"w_enc": w["W_enc"].T, "w_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    made |= {"threshold": w["threshold"]} | ({"affine_skip_connection": w["W_skip"]} if skip else {})
    save_file({k: v.contiguous() for k, v in made.items()}, folder / "params.safetensors")
    hooks = {f"hf_hook_point_{side}": f"model.layers.{LAYER}.{name}_feedforward_layernorm.output"
             for side, name in (("in", "pre"), ("out", "post"))}  # fmt: skip
    cfg = {"architecture": "jump_relu", "model_name": "google/gemma-v3-1b-pt", "affine_connection": skip, **hooks}
    (folder / "config.json").write_text(json.dumps(cfg) + "\n")
    finish(folder, library.load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), LAYER))


def main(out: Path) -> None:
    for seed, (name, jump, skip) in enumerate(
        (("relu", False, False), ("jumprelu", True, False), ("relu_skip", False, True), ("jumprelu_skip", True, True))
    ):
        own(out / name, seed, jump, skip)
    gemma_1(out / "gemma_scope_1_transcoder", 4)
    gemma_2(out / "gemma_scope_2_transcoder", 5, False)
    gemma_2(out / "gemma_scope_2_transcoder_skip", 6, True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
