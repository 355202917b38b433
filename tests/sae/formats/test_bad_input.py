"""What can be wrong with a file, for every format that can have it: file, key and expectation are named."""

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import LLAMA_SCOPE, D, F, arrays, tensor, write_gemma, write_gemma2, write_llama_scope, write_openai
from foreign import write_tracer as _tracer
from safetensors.torch import load_file, save_file

from sae import loading
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.portable import ImportOptions

GOLDENS = Path(__file__).parents[2] / "interop" / "goldens"
HOOKS = {"hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output"}
GEMMA2 = {"architecture": "jump_relu", "model_name": "google/gemma-v3-1b-pt", **HOOKS}


def _single(path: Path, names: dict[str, str]) -> Path:
    """A .pt of plain tensors: our array -> their key; a key that ends in ``.T`` is stored transposed."""
    made = {}
    for ours, theirs in names.items():
        a = arrays()[ours]
        made[theirs.removesuffix(".T")] = tensor(a.T if theirs.endswith(".T") else a)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return path


def _golden(root: Path, case: str) -> Path:
    return Path(shutil.copytree(GOLDENS / case, root / case.replace("/", "_")))


def _goodfire(root: Path) -> Path:
    names = {"enc": "encoder_linear.weight", "b_enc": "encoder_linear.bias", "dec": "decoder_linear.weight.T",
             "b_dec": "decoder_linear.bias"}  # fmt: skip
    return _single(root / "goodfire.pth", names)


def _qwen(root: Path) -> Path:
    names = {"enc": "W_enc", "b_enc": "b_enc", "dec": "W_dec.T", "b_dec": "b_dec"}
    return _single(root / "L0_4" / "layer3.sae.pt", names)


def _e2e(root: Path) -> Path:
    names = {"enc": "encoder.0.weight", "b_enc": "encoder.0.bias", "dec": "decoder.weight.T", "b_dec": "decoder.bias"}
    return _single(root / "e2e.pt", names)


# name -> (what is loaded, its file of tensors, encoder key, a bias key, threshold key or None)
Made = tuple[Path, Path, str, str, str | None]


def make(root: Path, name: str) -> Made:
    w = arrays()
    if "/" in name:
        folder = _golden(root, name)
        file = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "dictionary_learning": "ae.pt",
                "llamascopium": "sae_weights.safetensors"}[name.split("/")[0]]  # fmt: skip
        keys: dict[str, tuple[str, str, str | None]] = {
            "saelens/jumprelu": ("W_enc", "b_dec", "threshold"), "sparsify/layers.3": ("encoder.weight", "b_dec", None),
            "sparsify/skip_transcoder": ("W_skip", "encoder.bias", None),
            "dictionary_learning/jumprelu": ("W_enc", "b_dec", "threshold"),
            "dictionary_learning/gated": ("encoder.weight", "r_mag", None),
            "llamascopium/jumprelu_dataset": ("W_E", "b_D", "activation_function.log_jumprelu_threshold"),
        }  # fmt: skip
        return folder, folder / file, *keys[name]
    if name == "openai":
        path = write_openai(root / "7.pt", w, "TopK")
        return path, path, "decoder.weight", "pre_bias", None
    if name == "gemma1":
        folder = write_gemma(root / "gemma1", w)
        return folder, folder / "params.npz", "W_dec", "b_dec", "threshold"
    if name == "gemma2":
        folder = write_gemma2(root / "gemma2", w, GEMMA2)
        return folder, folder / "params.safetensors", "w_dec", "b_enc", "threshold"
    if name == "llama_scope":
        folder = write_llama_scope(root / "llama", w, LLAMA_SCOPE)
        return folder, folder / "checkpoints" / "final.safetensors", "encoder.weight", "encoder.bias", None
    if name == "circuit_tracer":
        path = _tracer(root / "tracer", w, {}, **{"activation_function.threshold": w["theta"]})
        return path, path, "W_dec", "b_enc", "activation_function.threshold"
    keys = {"goodfire": ("decoder_linear.weight", "decoder_linear.bias"), "qwen_scope": ("W_dec", "b_enc"),
            "e2e_sae": ("decoder.weight", "decoder.bias")}  # fmt: skip
    path = {"goodfire": _goodfire, "qwen_scope": _qwen, "e2e_sae": _e2e}[name](root)
    return path, path, *keys[name], None  # type: ignore[return-value]


ALL = [
    "saelens/jumprelu", "sparsify/layers.3", "sparsify/skip_transcoder", "dictionary_learning/jumprelu",
    "dictionary_learning/gated", "llamascopium/jumprelu_dataset", "openai", "gemma1", "gemma2", "llama_scope",
    "circuit_tracer", "goodfire", "qwen_scope", "e2e_sae",
]  # fmt: skip


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Read, change and write the tensors of a file of any kind."""
    if file.suffix == ".npz":
        values: dict[str, Any] = {k: torch.from_numpy(a) for k, a in np.load(file).items()}
        change(values)
        arrays_out: dict[str, Any] = {k: v.float().numpy() for k, v in values.items()}
        np.savez(file, **arrays_out)
        return
    values = dict(load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True))
    change(values)
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in values.items()}, file)
    else:
        torch.save(values, file)


@pytest.mark.parametrize("name", ALL)
def test_they_load_before_they_are_broken(tmp_path: Path, name: str):
    assert loading.load(make(tmp_path, name)[0]).d_sae == F


@pytest.mark.parametrize("name", ALL)
def test_a_missing_tensor(tmp_path: Path, name: str):
    path, file, matrix, bias, _ = make(tmp_path, name)
    for key in (bias, matrix):
        kept: dict[str, Any] = {}

        def drop(values: dict[str, Any], key: str = key, kept: dict[str, Any] = kept) -> None:
            kept[key] = values.pop(key)

        edit(file, drop)
        with pytest.raises((ArtefactError, ConfigError)) as caught:
            loading.load(path)
        text = str(caught.value)
        assert key.lower() in text.lower() and "expected" in text and file.name in text, text
        edit(file, lambda values, kept=kept: values.update(kept))  # type: ignore[misc]


@pytest.mark.parametrize("name", [n for n in ALL if n != "sparsify/skip_transcoder"])
def test_wrong_orientation(tmp_path: Path, name: str):
    path, file, matrix, _, _ = make(tmp_path, name)
    edit(file, lambda values: values.update({matrix: values[matrix].t().contiguous()}))
    with pytest.raises((ConfigError, ArtefactError)) as caught:
        loading.load(path)
    text = str(caught.value)
    assert file.name in text and "expected" in text and ("shape" in text or "says" in text or "disagree" in text), text


@pytest.mark.parametrize("name", ALL)
def test_a_vector_of_another_length(tmp_path: Path, name: str):
    path, file, _, bias, _ = make(tmp_path, name)
    edit(file, lambda values: values.update({bias: torch.zeros(D + 3)}))
    with pytest.raises(ConfigError) as caught:
        loading.load(path)
    text = str(caught.value)
    assert bias in text and f"({D + 3},)" in text and "expected" in text and file.name in text, text


@pytest.mark.parametrize("name", [n for n in ALL if n in (
    "saelens/jumprelu", "dictionary_learning/jumprelu", "llamascopium/jumprelu_dataset", "gemma2", "circuit_tracer")])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_16_bit_thresholds(tmp_path: Path, name: str, kind: torch.dtype):
    path, file, _, _, key = make(tmp_path, name)
    assert key is not None
    edit(file, lambda values: values.update({key: values[key].to(kind)}))
    with pytest.raises(ArtefactError) as caught:
        loading.load(path)
    text = str(caught.value)
    assert str(kind) in text and "expected float32" in text and "--allow-16bit-thresholds" in text
    assert str(path) in text or str(path.parent) in text
    assert loading.load(path, options=ImportOptions(allow_16bit_thresholds=True)).d_sae == F


@pytest.mark.parametrize(
    ("name", "file", "field", "error"),
    [
        ("saelens/jumprelu", "cfg.json", "architecture", Unsupported),
        ("sparsify/layers.3", "cfg.json", "activation", Unsupported),
        ("llamascopium/jumprelu_dataset", "config.json", "act_fn", Unsupported),
        ("llamascopium/jumprelu_dataset", "config.json", "sae_type", Unsupported),
        ("gemma2", "config.json", "architecture", ConfigError),
        ("llama_scope", "hyperparams.json", "norm_activation", Unsupported),
    ],
)
def test_an_unknown_architecture(tmp_path: Path, name: str, file: str, field: str, error: Any):
    path = make(tmp_path, name)[0]
    values = json.loads((path / file).read_text()) | {field: "perceiver"}
    (path / file).write_text(json.dumps(values))
    with pytest.raises(error) as caught:
        loading.load(path)
    text = str(caught.value)
    assert field in text and "'perceiver'" in text and file in text and ("known: " in text or "expected" in text), text


def test_two_formats_in_one_folder_are_both_named(tmp_path: Path):
    pairs = (("saelens/jumprelu", "sparsify/layers.3"), ("dictionary_learning/gated", "llamascopium/topk_dataset"))
    for i, (a, b) in enumerate(pairs):
        folder = _golden(tmp_path / str(i), a)
        for file in (GOLDENS / b).iterdir():
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
        with pytest.raises(ArtefactError, match="holds files of .* and of ") as caught:
            loading.load(folder)
        assert all(n.split("/")[0] in str(caught.value) for n in (a, b)) and "give each a folder" in str(caught.value)


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


BOMBS = {
    "bytes of 2^60": pickled(b"\x8e" + struct.pack("<Q", 2**60)),
    "a text of 2^31": pickled(b"X" + struct.pack("<I", 2**31 - 1)),
    "a memo of 2^32": pickled(b"N", b"r" + struct.pack("<I", 2**32 - 1)),
    "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a number of 2^31 bytes": pickled(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "100,000 nested lists": pickled(b"(" * 100_000, b"l" * 100_000),
    "an extension": pickled(b"\x82\x01"),
    "a persistent id": pickled(b"U\x01xQ"),
    "eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "a class of torch": b"ctorch.serialization\nload\n(S'/etc/passwd'\ntR.",
    "attributes of what is built": pickled(b"ccollections\nOrderedDict\n)R}U\x09__class__Nsb"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("as_zip", [True, False])
def test_pickles_that_claim_or_call(tmp_path: Path, bomb: str, as_zip: bool):
    """Refused without the memory that they claim and without calling what they name."""
    import resource

    folder = _golden(tmp_path, "dictionary_learning/topk")
    if as_zip:
        with zipfile.ZipFile(folder / "ae.pt", "w") as archive:
            archive.writestr("ae/data.pkl", BOMBS[bomb])
    else:
        (folder / "ae.pt").write_bytes(BOMBS[bomb])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ArtefactError, Unsupported)) as caught:
        loading.load(folder)
    assert "ae.pt" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


@pytest.mark.parametrize("size", [2**63 - 1, 2**40, 10**9, 100_000_001])
def test_huge_headers(tmp_path: Path, size: int):
    """The length of the JSON header is the first number of a safetensors file."""
    for name in ("saelens/jumprelu", "sparsify/layers.3", "gemma2", "circuit_tracer"):
        path, file, *_ = make(tmp_path / name.replace("/", "_"), name)
        file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
        with pytest.raises((ArtefactError, ConfigError), match=file.name):
            loading.load(path)


def test_headers_that_overlap_or_overflow(tmp_path: Path):
    """Offsets outside the file, below each other's, and shapes whose product overflows."""
    folder = _golden(tmp_path, "saelens/topk")
    file = folder / "sae_weights.safetensors"
    for entry in (
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
    ):
        header = json.dumps({"W_enc": entry, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
        with pytest.raises(ArtefactError, match="sae_weights.safetensors"):
            loading.load(folder)


def test_links_out_of_the_folder_are_only_read(tmp_path: Path):
    """A link is followed like any path (the hub's cache is made of them), and what it leads to must still be an SAE."""
    folder = _golden(tmp_path, "saelens/topk")
    (folder / "sae_weights.safetensors").unlink()
    (folder / "sae_weights.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        loading.load(folder)
