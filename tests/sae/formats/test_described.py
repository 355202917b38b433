"""Formats without a library to install: files by an independent writer, expected values by numpy from its arrays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import (
    LLAMA_SCOPE,
    D,
    F,
    K,
    arrays,
    sample,
    tensor,
    write_gemma,
    write_gemma2,
    write_llama_scope,
    write_openai,
    write_tracer,
)

import sae
from sae import loading
from sae.convert import convert
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.portable import ImportOptions, naive_forward

X = sample()


def agree(path: Path, z: np.ndarray, x_hat: np.ndarray, options: ImportOptions | None = None) -> None:
    """Sets of active latents equal, values and reconstructions to 1e-5, of the class and of the portable recipe."""
    found = loading.load(path, options=options)
    x_ND = tensor(X)
    got = found.encode(x_ND).numpy()
    assert ((got != 0) == (z != 0)).all()
    assert 0 < (z != 0).sum(1).mean() < F
    assert np.linalg.norm(got - z) <= 1e-5 * np.linalg.norm(z)
    assert np.linalg.norm(found(x_ND).numpy() - x_hat) <= 1e-5 * np.linalg.norm(x_hat)
    assert np.linalg.norm(naive_forward(loading.read(path, options), x_ND).x_hat_ND - x_hat) <= 1e-5 * np.linalg.norm(
        x_hat
    )


def topk(h: np.ndarray) -> np.ndarray:
    kept = h >= np.sort(h, axis=1)[:, -K][:, None]
    return np.where(kept, np.maximum(h, 0), 0)


@pytest.mark.parametrize("legacy", [False, True])
def test_openai_topk_normalises_its_input(tmp_path: Path, legacy: bool):
    w = arrays()
    path = write_openai(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "7.pt", w, "TopK", legacy)
    mean, std = X.mean(1, keepdims=True), X.std(1, ddof=1, keepdims=True)
    n = (X - mean) / (std + 1e-5)
    z = topk((n - w["b_dec"]) @ w["enc"].T + w["b_enc"])
    agree(path, z, (z @ w["dec"] + w["b_dec"]) * std + mean)
    found = loading.load(path)
    assert found.cfg.meta is not None and (found.cfg.meta.lm, found.cfg.meta.hookpoint) == ("gpt2", "h.7")
    assert found.sae_id.startswith("openai.gpt2.h.7.topk-f48-k4.")


def test_openai_relu_does_not(tmp_path: Path):
    w = arrays()
    path = write_openai(tmp_path / "3.pt", w, "ReLU")
    z = np.maximum((X - w["b_dec"]) @ w["enc"].T + w["b_enc"], 0)
    agree(path, z, z @ w["dec"] + w["b_dec"])
    assert loading.load(path).cfg.meta is None, "the path does not say where it reads"


def test_openai_training_checkpoints_must_be_explained(tmp_path: Path):
    w = arrays()
    path = write_openai(
        tmp_path / "a.pt", w, "TopK", activation=None, activation_state_dict=None, latents_activation_frequency=None,
        latents_mean_square=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--activation and --input-norm"):
        loading.load(path)
    with pytest.raises(ConfigError, match="--k"):
        loading.load(path, options=ImportOptions(activation="topk", input_norm="none"))
    z = topk((X - w["b_dec"]) @ w["enc"].T + w["b_enc"])
    agree(path, z, z @ w["dec"] + w["b_dec"], ImportOptions(activation="topk", input_norm="none", k=K))


@pytest.mark.parametrize(
    "change", [{"activation": "Identity"}, {"activation_state_dict": {"k": K, "postact_fn": "Tanh"}}]
)
def test_openai_activations_that_cannot_be_run(tmp_path: Path, change: dict):
    with pytest.raises(Unsupported, match="Identity|Tanh"):
        loading.load(write_openai(tmp_path / "a.pt", arrays(), "TopK", **change))


@pytest.mark.parametrize("kind", ["npz", "npz_lower", "safetensors"])
def test_gemma_scope_has_no_pre_bias(tmp_path: Path, kind: str):
    w = arrays(2)
    if kind == "safetensors":
        hooks = {"hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output"}
        folder = write_gemma2(
            tmp_path / "resid_post" / "layer_9_width_16k_l0_small", w,
            {"architecture": "jump_relu", "model_name": "google/gemma-v3-1b-pt", **hooks},
        )  # fmt: skip
    else:
        place = tmp_path / "gemma-scope-2b-pt-res" / "layer_9" / "width_16k" / "average_l0_73"
        folder = write_gemma(place, w, lower=kind == "npz_lower")
    h = X @ w["enc"].T + w["b_enc"]
    z = np.where(h > w["theta"], np.maximum(h, 0), 0)
    agree(folder, z, z @ w["dec"] + w["b_dec"])
    meta = loading.load(folder).cfg.meta
    lm = "google/gemma-3-1b-pt" if kind == "safetensors" else "google/gemma-2-2b"
    assert meta is not None and (meta.lm, meta.hookpoint) == (lm, "layers.9")


def test_gemma_scope_transcoders_and_layers_of_a_clt(tmp_path: Path):
    w = arrays(3)
    skip = np.random.default_rng(0).normal(size=(D, D))
    hooks = {
        "hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output",
    }
    cfg = {"architecture": "jump_relu", "model_name": "google/gemma-v3-1b-pt", **hooks}
    folder = write_gemma2(tmp_path / "transcoder" / "layer_4", w, cfg, affine_skip_connection=skip)
    h = X @ w["enc"].T + w["b_enc"]
    want = np.where(h > w["theta"], np.maximum(h, 0), 0) @ w["dec"] + w["b_dec"] + X @ skip
    p = loading.read(folder)
    assert p.transcoder and p.hookpoint == "layers.4.pre_feedforward_layernorm"
    assert np.linalg.norm(naive_forward(p, tensor(X)).x_hat_ND - want) <= 1e-5 * np.linalg.norm(want)
    agree(folder, np.where(h > w["theta"], np.maximum(h, 0), 0), want)
    assert loading.load(folder).cfg.architecture == "jumprelu_skip_transcoder"
    clt = write_gemma2(tmp_path / "clt", w | {"dec": np.zeros((F, 3, D))}, cfg)
    with pytest.raises(Unsupported, match="cross-layer"):
        loading.load(clt)
    other = write_gemma2(tmp_path / "other", w, cfg | {"architecture": "topk"})
    with pytest.raises(ConfigError, match="jump_relu"):
        loading.load(other)


def test_gemma_scope_by_its_folders_alone(tmp_path: Path):
    """Embedding SAEs are scaled; hooks of sites and transcoders come from the folders where no configuration says."""
    w = arrays(2)
    folder = write_gemma(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6", w)
    h = X / D**0.5 @ w["enc"].T + w["b_enc"]
    z = np.where(h > w["theta"], np.maximum(h, 0), 0)
    agree(folder, z, z @ (w["dec"] * D**0.5) + w["b_dec"])
    assert loading.read(folder).hookpoint == "layers.0:in"
    place = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_4" / "width_16k" / "average_l0_80"
    p = loading.read(write_gemma(place, w))
    assert p.transcoder and (p.hookpoint, p.hookpoint_out) == (
        "layers.4.pre_feedforward_layernorm", "layers.4.post_feedforward_layernorm"
    )  # fmt: skip
    assert loading.load(place).cfg.architecture == "jumprelu_transcoder"
    attention = write_gemma2(tmp_path / "gemma-scope-2-1b-pt" / "attn_out" / "layer_3_width_16k_l0_small", w, None)
    p = loading.read(attention)
    assert (p.lm, p.hookpoint) == ("google/gemma-3-1b-pt", "layers.3.self_attn.o_proj:in")
    small = write_gemma2(tmp_path / "gemma-scope-2-270m-pt" / "resid_post" / "layer_3_width_16k_l0_small", w, None)
    assert loading.read(small).lm == "google/gemma-3-270m"
    hooks = {"hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output"}
    cfg = {"architecture": "jump_relu", "model_name": "google/gemma-v3-270m-pt", **hooks}
    assert loading.read(write_gemma2(tmp_path / "s", w, cfg)).lm == "google/gemma-3-270m"


@pytest.mark.parametrize("with_norm", [True, False])
def test_llama_scope_is_its_train_time_gate(tmp_path: Path, with_norm: bool):
    """The library in training: normalise, gate on h (times the decoder norm), compare with theta, denormalise.

    Where the gate includes decoder norms theta is in output units of the folded weights, so theta * s_out there.
    """
    w = arrays(4)
    folder = write_llama_scope(tmp_path / "l8r", w, LLAMA_SCOPE | {"sparsity_include_decoder_norm": with_norm})
    s = D**0.5 / 12.5
    h = (X * s) @ w["enc"].T + w["b_enc"]
    gate = h * np.linalg.norm(w["dec"], axis=1) if with_norm else h
    z = np.where((gate > LLAMA_SCOPE["jump_relu_threshold"] * s) & (gate > 0), h, 0)
    x_hat = (z @ w["dec"] + w["b_dec"]) / s
    ours = z * np.linalg.norm(w["dec"], axis=1) / s if with_norm else z / s
    agree(folder, ours, x_hat)
    meta = loading.load(folder).cfg.meta
    assert meta is None and loading.read(folder).hookpoint == "layers.8"


def test_llama_scope_transcoder_uses_both_norms(tmp_path: Path):
    w = arrays(5)
    cfg = LLAMA_SCOPE | {
        "dataset_average_activation_norm": {"in": 12.5, "out": 1.1}, "hook_point_out": "blocks.8.hook_mlp_out"
    }  # fmt: skip
    folder = write_llama_scope(tmp_path / "l8tc", w, cfg)
    s_in, s_out = D**0.5 / 12.5, D**0.5 / 1.1
    h = (X * s_in) @ w["enc"].T + w["b_enc"]
    active = h * np.linalg.norm(w["dec"], axis=1) > LLAMA_SCOPE["jump_relu_threshold"] * s_out
    want = (np.where(active, np.maximum(h, 0), 0) @ w["dec"] + w["b_dec"]) / s_out
    got = naive_forward(loading.read(folder), tensor(X)).x_hat_ND
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_llama_scope_with_thresholds_of_its_own(tmp_path: Path):
    w = arrays(6)
    cfg = {k: v for k, v in LLAMA_SCOPE.items() if k != "jump_relu_threshold"} | {"norm_activation": "inference"}
    log = torch.from_numpy(np.log(w["theta"])).float()
    folder = write_llama_scope(tmp_path / "r1", w, cfg, log_jumprelu_threshold=log)
    h = X @ w["enc"].T + w["b_enc"]
    norms = np.linalg.norm(w["dec"], axis=1)
    z = np.where((h * norms > w["theta"]) & (h > 0), h, 0)
    agree(folder, z * norms, z @ w["dec"] + w["b_dec"])


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"norm_activation": "batch-wise"}, Unsupported, "batch-wise"),
        ({"dataset_average_activation_norm": {"in": 12.5}}, ConfigError, "'out'"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, ConfigError, "positive"),
        ({"expansion_factor": 4}, ConfigError, r"decoder.weight has shape \(16, 48\), expected \(16, 64\)"),
        ({"jump_relu_threshold": None}, ConfigError, "jump_relu_threshold"),
        ({"hook_point_in": None}, ConfigError, "hook_point_in"),
    ],
)
def test_llama_scope_that_contradicts_itself(tmp_path: Path, change: dict, error: type[Exception], named: str):
    with pytest.raises(error, match=named):
        loading.load(write_llama_scope(tmp_path / "a", arrays(), LLAMA_SCOPE | change))


def test_the_public_name_reads_them(tmp_path: Path):
    assert sae.load(str(write_gemma(tmp_path / "g", arrays()))).d_sae == F
    with pytest.raises(ArtefactError, match="does not exist"):
        sae.load("org/repository-of-the-hub")


def test_circuit_tracer_transcoders(tmp_path: Path):
    w, skip = arrays(7), np.random.default_rng(0).normal(size=(D, D))
    h = X @ w["enc"].T + w["b_enc"]
    order = np.argsort(-h, axis=1)[:, :K]
    signed = np.zeros_like(h)
    np.put_along_axis(signed, order, np.take_along_axis(h, order, 1), 1)
    cases = {
        "relu": (np.maximum(h, 0), {"activation": "relu"}, {}),
        "silent_relu": (np.maximum(h, 0), {}, {}),
        "jumprelu": (np.where(h > w["theta"], h, 0), {}, {"activation_function.threshold": w["theta"]}),
        "topk": (signed, {"activation": "topk", "k": K}, {}),
        "skip": (np.maximum(h, 0), {"activation": "relu"}, {"W_skip": skip}),
    }
    for name, (z, cfg, extra) in cases.items():
        path = write_tracer(tmp_path / name, w, cfg, **extra)
        p = loading.read(path)
        want = z @ w["dec"] + w["b_dec"] + (X @ skip.T if name == "skip" else 0)
        found = naive_forward(p, tensor(X))
        assert ((found.z_NF != 0) == (z != 0)).all(), name
        assert np.linalg.norm(found.x_hat_ND - want) <= 1e-5 * np.linalg.norm(want), name
        assert p.hookpoint == "layers.5.pre_feedforward_layernorm:in" and p.transcoder
        assert p.hookpoint_out == "layers.5.post_feedforward_layernorm"
        if name == "topk":
            with pytest.raises(Unsupported, match="--activation topk"):
                loading.load(path)
            positive = np.maximum(signed, 0)
            agree(path, positive, positive @ w["dec"] + w["b_dec"], ImportOptions(activation="topk"))
        else:
            agree(path, z, want)
        assert loading.read(path.parent).where == str(path), "one layer needs no name"
        (path.parent / "layer_6.safetensors").write_bytes(path.read_bytes())
        with pytest.raises(ConfigError, match="layer_5.safetensors"):
            loading.read(path.parent)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "skip"])
def test_circuit_tracer_files_are_written_again(tmp_path: Path, name: str):
    """Through native and back: the same hooks, model and function."""
    w, skip = arrays(7), np.random.default_rng(0).normal(size=(D, D))
    extra = {"relu": {}, "jumprelu": {"activation_function.threshold": w["theta"]}, "skip": {"W_skip": skip}}[name]
    path = write_tracer(tmp_path / name, w, {}, **extra)
    convert(path, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "circuit_tracer")
    again, p = loading.read(tmp_path / "back" / "layer_5.safetensors"), loading.read(path)
    assert (again.hook, again.hookpoint, again.hookpoint_out, again.lm) == (
        p.hook, p.hookpoint, p.hookpoint_out, p.lm
    )  # fmt: skip
    a, b = (naive_forward(q, tensor(X)) for q in (again, p))
    assert ((a.z_NF != 0) == (b.z_NF != 0)).all() and np.abs(a.x_hat_ND - b.x_hat_ND).max() <= 1e-4
    with pytest.raises(Unsupported, match="is an SAE"):
        convert(write_gemma(tmp_path / "g", w), tmp_path / "no", "circuit_tracer")
    hookless = write_gemma2(tmp_path / "transcoder" / "x", w, None)
    with pytest.raises(Unsupported, match="two hooks of one layer"):
        convert(hookless, tmp_path / "no", "circuit_tracer")


def test_circuit_tracer_files_that_cannot_be_read(tmp_path: Path):
    w = arrays(7)
    negative = {"activation_function.threshold": w["theta"] - 1}
    cases = {
        "negative": ({}, negative, Unsupported, "negative"), "clt": ({"model_kind": "clt"}, {}, Unsupported, "clt"),
        "none": ({"model_name": None}, {}, ConfigError, "model_name"),
        "both": ({"activation": "relu"}, {"activation_function.threshold": w["theta"]}, ConfigError, "relu"),
        "no_k": ({"activation": "topk"}, {}, ConfigError, "'k'"),
        "tanh": ({"activation": "tanh"}, {}, Unsupported, "tanh"),
    }  # fmt: skip
    for name, (cfg, extra, error, named) in cases.items():
        with pytest.raises(error, match=named):
            loading.load(write_tracer(tmp_path / name, w, cfg, **extra))
    path = write_tracer(tmp_path / "tag", w, {})
    (path.parent / "config.yaml").write_text(
        "a: !!python/object/apply:os.system ['touch " + str(tmp_path / "ran") + "']"
    )
    with pytest.raises(ArtefactError, match="not plain YAML"):
        loading.load(path)
    assert not (tmp_path / "ran").exists()


def test_goodfire_and_qwen_scope_have_no_pre_bias(tmp_path: Path):
    w = arrays(8)
    h = X @ w["enc"].T + w["b_enc"]
    goodfire = tmp_path / "llama-layer-19.pth"
    names = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
    torch.save(dict(zip(names, map(tensor, (w["enc"], w["b_enc"], w["dec"].T, w["b_dec"])), strict=True)), goodfire)
    agree(goodfire, np.maximum(h, 0), np.maximum(h, 0) @ w["dec"] + w["b_dec"])
    z = topk(h)
    values = {"W_enc": w["enc"], "W_dec": w["dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    named = tmp_path / "SAE-Res-Qwen3-8B-Base-W64K-L0_4" / "layer7.sae.pt"
    named.parent.mkdir()
    torch.save({k: tensor(a) for k, a in values.items()}, named)
    agree(named, z, z @ w["dec"] + w["b_dec"])
    with pytest.raises(ConfigError, match="--k says 5"):
        loading.load(named, options=ImportOptions(k=5))
    silent = tmp_path / "layer7.sae.pt"
    silent.write_bytes(named.read_bytes())
    with pytest.raises(ConfigError, match="pass --k"):
        loading.load(silent)
    agree(silent, z, z @ w["dec"] + w["b_dec"], ImportOptions(k=K))


def write_e2e(path: Path, w: dict[str, np.ndarray], prefix: str = "", **changes: np.ndarray) -> Path:
    names = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
    made = dict(zip(names, (w["enc"], w["b_enc"], w["dec"].T, w["b_dec"]), strict=True)) | changes
    torch.save({prefix + name: tensor(a) for name, a in made.items()}, path)
    return path


def test_e2e_sae_normalises_its_decoder_on_every_use(tmp_path: Path):
    w = arrays(9)
    z = np.maximum(X @ w["enc"].T + w["b_enc"], 0)
    unit = w["dec"] / np.linalg.norm(w["dec"], axis=1, keepdims=True)
    plain = write_e2e(tmp_path / "a.pt", w)
    agree(plain, z, z @ unit + w["b_dec"])
    named = write_e2e(tmp_path / "b.pt", w, "saes.blocks-6-hook_resid_pre.")
    agree(named, z, z @ unit + w["b_dec"])
    assert loading.read(named).hook == "blocks.6.hook_resid_pre"
    assert loading.load(plain).cfg.decoder_unit_norm
    with pytest.raises(ConfigError, match="decoder.weight has shape .* transposed"):
        loading.load(write_e2e(tmp_path / "c.pt", w, **{"decoder.weight": w["dec"]}))
    both = torch.load(named, weights_only=True)
    both |= {k.replace("-6-", "-10-"): v for k, v in both.items()}
    torch.save(both, tmp_path / "two.pt")
    with pytest.raises(ArtefactError, match="2 SAEs"):
        loading.load(tmp_path / "two.pt")
