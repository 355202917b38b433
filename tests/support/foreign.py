"""Files of other libraries, written from their description (FORMATS 5) by code that shares nothing with saescope.

D = 16 channels, F = 48 latents, K = 4. Every writer returns the arrays it wrote, in float64, for an oracle in numpy.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D, F, K, N = 16, 48, 4, 64


def arrays(seed: int = 0, d_out: int = D) -> dict[str, np.ndarray]:
    """Rows of unequal length, biases far from 0, thresholds that differ."""
    rng = np.random.default_rng(seed)
    made = {
        "enc": rng.normal(size=(F, D)) * 0.3, "dec": rng.normal(size=(F, d_out)) * 0.3,
        "b_enc": rng.normal(size=F) * 0.5, "b_dec": rng.normal(size=d_out) * 0.5,
        "theta": rng.uniform(0.2, 1.2, size=F),
    }  # fmt: skip
    return {name: a.astype(np.float32).astype(np.float64) for name, a in made.items()}


def sample(seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) * 0.7 + rng.normal(size=D)


def tensor(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(a)).float()


def write_openai(path: Path, w: dict[str, np.ndarray], kind: str, legacy: bool = False, **changes: Any) -> Path:
    state: dict[str, Any] = OrderedDict(
        pre_bias=tensor(w["b_dec"]), latent_bias=tensor(w["b_enc"]), stats_last_nonzero=torch.zeros(F).long(),
        latents_activation_frequency=torch.zeros(F), latents_mean_square=torch.zeros(F),
    )  # fmt: skip
    state["encoder.weight"], state["decoder.weight"] = tensor(w["enc"]), tensor(w["dec"].T)
    state["activation"] = kind
    if kind == "TopK":
        state["activation_state_dict"] = OrderedDict(k=K, postact_fn="ReLU")
    state.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v for k, v in state.items() if v is not None}, path, _use_new_zipfile_serialization=not legacy)
    return path


def write_gemma(folder: Path, w: dict[str, np.ndarray], lower: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    enc, dec = ("w_enc", "w_dec") if lower else ("W_enc", "W_dec")
    made = {enc: w["enc"].T, dec: w["dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"], "threshold": w["theta"]}
    np.savez(folder / "params.npz", **{k: a.astype(np.float32) for k, a in made.items()})
    return folder


def write_gemma2(folder: Path, w: dict[str, np.ndarray], cfg: dict[str, Any] | None, **extra: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = {"w_enc": w["enc"].T, "w_dec": w["dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"], "threshold": w["theta"]}
    save_file({k: tensor(a) for k, a in (made | extra).items()}, folder / "params.safetensors")
    if cfg is not None:
        (folder / "config.json").write_text(json.dumps(cfg))
    return folder


LLAMA_SCOPE = {
    "d_model": D, "expansion_factor": 3, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
    "dataset_average_activation_norm": {"in": 12.5, "out": 12.5}, "jump_relu_threshold": 0.6, "top_k": 50,
    "apply_decoder_bias_to_pre_encoder": False, "hook_point_in": "blocks.8.hook_resid_post",
    "hook_point_out": "blocks.8.hook_resid_post", "use_decoder_bias": True,
}  # fmt: skip


def write_llama_scope(folder: Path, w: dict[str, np.ndarray], cfg: dict[str, Any], **extra: torch.Tensor) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    made = {
        "encoder.weight": tensor(w["enc"]), "encoder.bias": tensor(w["b_enc"]), "decoder.weight": tensor(w["dec"].T),
        "decoder.bias": tensor(w["b_dec"]), **extra,
    }  # fmt: skip
    save_file(made, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(cfg))
    return folder


def write_tracer(folder: Path, w: dict[str, np.ndarray], cfg: dict[str, Any], **extra: np.ndarray) -> Path:
    """One layer of circuit-tracer."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"W_enc": w["enc"], "W_dec": w["dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"], **extra}
    save_file({k: tensor(a) for k, a in made.items()}, folder / "layer_5.safetensors")
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    values = {"model_kind": "transcoder_set", "model_name": "google/gemma-2-2b", "scan_name": "x", **hooks, **cfg}
    (folder / "config.yaml").write_text("\n".join(f"{k}: {v}" for k, v in values.items() if v is not None))
    return folder / "layer_5.safetensors"
