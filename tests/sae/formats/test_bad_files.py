"""Malicious, damaged and contradictory files: a typed error that names file and key, and nothing of theirs runs."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import LLAMA_SCOPE, D, F, arrays, write_gemma, write_gemma2, write_llama_scope, write_openai
from safetensors.torch import load_file, save_file

from sae import loading, safe_files
from sae.errors import ArtefactError, ConfigError, SaescopeError, Unsupported
from sae.portable import ImportOptions

GOLDENS = Path(__file__).parents[2] / "interop" / "goldens"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def golden(tmp_path: Path, case: str) -> Path:
    return Path(shutil.copytree(GOLDENS / case, tmp_path / "sae"))


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    save_file({k: v for k, v in (load_file(path) | changes).items() if v is not None}, path)


# -- code that must not run ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["activation", "encoder.weight", "extra"])
def test_a_pickled_payload_is_named_and_not_run(tmp_path: Path, legacy: bool, key: str):
    marker = tmp_path / "ran"
    path = write_openai(tmp_path / "a.pt", arrays(), "TopK", legacy, **{key: Payload(marker)})
    with pytest.raises(Unsupported, match=r"posix.system|os.system"):
        loading.load(path)
    assert not marker.exists()


def test_a_payload_beside_the_tensors_of_dictionary_learning(tmp_path: Path):
    folder, marker = golden(tmp_path, "dictionary_learning/topk"), tmp_path / "ran"
    torch.save(torch.load(folder / "ae.pt", weights_only=True) | {"k": Payload(marker)}, folder / "ae.pt")
    with pytest.raises(Unsupported, match="system"):
        loading.load(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises((Unsupported, ArtefactError)):
        loading.load(folder)
    assert not marker.exists()


def test_a_whole_module_is_refused(tmp_path: Path):
    folder = golden(tmp_path, "dictionary_learning/topk")
    torch.save(torch.nn.Linear(2, 2), folder / "ae.pt")
    with pytest.raises(Unsupported, match="torch.nn.modules.linear.Linear"):
        loading.load(folder)


def test_the_look_through_does_not_call_what_it_reads(tmp_path: Path):
    """A pickle that sets attributes of the stand-ins and calls them must not reach anything real."""
    path = tmp_path / "a.pt"
    stream = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(U\x05__x__K\x01ub."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", stream)
    with pytest.raises((ArtefactError, Unsupported)):
        safe_files.read_torch(path)


def test_object_arrays_in_npz(tmp_path: Path):
    folder, marker = write_gemma(tmp_path / "g", arrays()), tmp_path / "ran"
    values = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **(values | {"threshold": np.array([Payload(marker)], dtype=object)}))
    with pytest.raises(Unsupported, match="pickled objects"):
        loading.load(folder)
    assert not marker.exists()


# -- sizes and paths ----------------------------------------------------------------------------------------------
def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def test_an_array_that_declares_more_than_it_holds(tmp_path: Path):
    folder = write_gemma(tmp_path / "g", arrays())
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("huge.npy", npy((10**6, 10**6), b"\0" * 64))
    with pytest.raises(ArtefactError, match="declares"):
        loading.load(folder)


def test_archives_that_leave_their_folder(tmp_path: Path):
    folder = write_gemma(tmp_path / "g", arrays())
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("../outside.npy", npy((1,), b"\0" * 4))
    with pytest.raises(Unsupported, match="leaves the archive"):
        loading.load(folder)
    assert not (tmp_path / "outside.npy").exists()
    path = write_openai(tmp_path / "a.pt", arrays(), "ReLU")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("/etc/evil", b"x")
    with pytest.raises(Unsupported, match="leaves the archive"):
        loading.load(path)


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_gemma(tmp_path / "g", arrays())
    values = dict(np.load(folder / "params.npz"))
    np.savez_compressed(folder / "params.npz", **(values | {"padding": np.zeros(10**6, dtype=np.float32)}))
    assert (folder / "params.npz").stat().st_size < 100_000
    monkeypatch.setattr(safe_files, "LIMIT_BYTES", 10**6)
    with pytest.raises(ArtefactError, match="unpacks to"):
        loading.load(folder)


def test_storages_larger_than_the_file(tmp_path: Path):
    """The pickle of a torch file claims 2^40 numbers; nothing of that size is allocated."""
    path = write_openai(tmp_path / "a.pt", arrays(), "ReLU")
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    name = next(n for n in members if n.endswith("data.pkl"))
    small = b"K" + bytes([D])  # BININT1 16: the number of items and the size of pre_bias
    assert small in members[name]
    members[name] = members[name].replace(small, b"\x8a\x06" + (2**40).to_bytes(6, "little"))
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    with pytest.raises(ArtefactError, match="storage of"):
        loading.load(path)


def test_tensors_that_reach_beyond_their_storage(tmp_path: Path):
    path = write_openai(tmp_path / "a.pt", arrays(), "ReLU", pre_bias=torch.zeros(1).expand(2**40))
    with pytest.raises(ArtefactError, match="in a storage of"):
        loading.load(path)


def test_compressed_torch_files(tmp_path: Path):
    path = write_openai(tmp_path / "a.pt", arrays(), "ReLU")
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    with pytest.raises(ArtefactError, match="compressed"):
        loading.load(path)


def test_a_configuration_of_many_megabytes(tmp_path: Path):
    folder = golden(tmp_path, "saelens/topk")
    (folder / "cfg.json").write_text('{"x": "' + "a" * (17 * 2**20) + '"}')
    with pytest.raises(ArtefactError, match="at most"):
        loading.load(folder)


def test_a_configuration_nested_without_end(tmp_path: Path):
    folder = golden(tmp_path, "saelens/topk")
    (folder / "cfg.json").write_text("[" * 200_000)
    with pytest.raises(ArtefactError, match="not JSON"):
        loading.load(folder)


# -- damage -------------------------------------------------------------------------------------------------------
def broken_cases(root: Path) -> dict[str, Path]:
    """One file of each format, whose bytes are then cut."""
    w = arrays()
    return {
        "saelens": golden(root / "a", "saelens/topk") / "sae_weights.safetensors",
        "sparsify": golden(root / "b", "sparsify/layers.3") / "sae.safetensors",
        "dictionary_learning": golden(root / "c", "dictionary_learning/topk") / "ae.pt",
        "openai": write_openai(root / "d.pt", w, "TopK"),
        "openai_legacy": write_openai(root / "e.pt", w, "TopK", legacy=True),
        "gemma": write_gemma(root / "f", w) / "params.npz",
        "gemma2": write_gemma2(root / "g", w, None) / "params.safetensors",
        "llama_scope": write_llama_scope(root / "h", w, LLAMA_SCOPE) / "checkpoints" / "final.safetensors",
    }


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, share: float):
    for name, file in broken_cases(tmp_path).items():
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])
        folder = file if name.startswith("openai") else file.parent
        with pytest.raises((ArtefactError, Unsupported)) as caught:
            loading.load(folder.parent if name == "llama_scope" else folder)
        assert file.parent.name in str(caught.value) or file.name in str(caught.value), name


def test_random_damage_is_never_another_kind_of_error(tmp_path: Path):
    """300 files with flipped bytes: they load, or fail with an error of saescope."""
    rng = np.random.default_rng(0)
    loaded = 0
    for name, file in broken_cases(tmp_path).items():
        data = file.read_bytes()
        folder = file if name.startswith("openai") else file.parent
        path = folder.parent if name == "llama_scope" else folder
        for _ in range(38):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 2_000), size=3):
                damaged[place] = rng.integers(0, 256)
            file.write_bytes(damaged)
            try:
                loading.load(path)
                loaded += 1
            except SaescopeError:
                pass
    assert 0 < loaded < 250, loaded


@pytest.mark.parametrize("header", [b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 2) + b"{}"])
def test_safetensors_headers(tmp_path: Path, header: bytes):
    folder = golden(tmp_path, "saelens/topk")
    (folder / "sae_weights.safetensors").write_bytes(header + b"\0" * 16)
    with pytest.raises(ArtefactError, match="sae_weights.safetensors"):
        loading.load(folder)


# -- contradictions -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("case", "changes", "error", "named"),
    [
        ("saelens/topk", {"architecture": "matching_pursuit"}, Unsupported, "matching_pursuit"),
        ("saelens/topk", {"architecture": "abstopk"}, Unsupported, "'abstopk' cannot be run; known: "),
        ("saelens/topk", {"architecture": "temporal"}, Unsupported, "'temporal' cannot be run; known: "),
        ("saelens/topk", {"d_in": 15}, ConfigError, r"b_enc|W_enc has shape \(16, 48\), expected \(15, 48\)"),
        ("saelens/topk", {"d_sae": 47}, ConfigError, "expected"),
        ("saelens/topk", {"k": None}, ConfigError, "does not say 'k'"),
        ("saelens/topk", {"k": 0}, ConfigError, "k in 1..48"),
        ("saelens/topk", {"k": True}, ConfigError, "k is True"),
        ("saelens/topk", {"apply_b_dec_to_input": None}, ConfigError, "apply_b_dec_to_input"),
        ("saelens/topk", {"apply_b_dec_to_input": 1}, ConfigError, "apply_b_dec_to_input is 1"),
        ("saelens/topk", {"normalize_activations": "expected_average_only_in"}, ConfigError, "--scale-in"),
        ("saelens/topk", {"normalize_activations": "covariance_whitening"}, Unsupported, "covariance_whitening"),
        ("saelens/topk", {"bias_trick": 1}, ConfigError, "bias_trick"),
        ("saelens/topk", {"architecture": "jumprelu"}, ArtefactError, "lacks threshold"),
        ("saelens/jumprelu", {"architecture": "standard"}, ArtefactError, "threshold, which this format"),
        ("saelens/old_topk", {"activation_fn_str": "tanh-relu"}, Unsupported, "tanh-relu"),
        ("sparsify/layers.3", {"k": 49}, ConfigError, "k in 1..48"),
        ("sparsify/layers.3", {"num_latents": 40}, ConfigError, "expected"),
        ("sparsify/layers.3", {"activation": "relu"}, Unsupported, "'relu'"),
        ("sparsify/layers.3", {"skip_connection": True}, ArtefactError, "W_skip"),
        ("sparsify/layers.3", {"gate": 1}, ConfigError, "gate"),
        ("sparsify/layers.3", {"d_in": "16"}, ConfigError, "d_in is '16'"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(tmp_path: Path, case: str, changes: dict, error: Any, named: str):
    folder = golden(tmp_path, case)
    edit_json(folder / "cfg.json", **changes)
    with pytest.raises(error, match=named):
        loading.load(folder)


@pytest.mark.parametrize(
    ("trainer", "error", "named"),
    [
        ({"dict_class": "AutoEncoderNew"}, ConfigError, "tensors of AutoEncoderTopK"),
        ({"dict_class": "IdentityDict"}, Unsupported, "IdentityDict"),
        ({"dict_size": 49}, ConfigError, "dict_size 49"),
        ({"activation_dim": 8}, ConfigError, "activation_dim 8"),
        ({"k": 5}, ConfigError, "k 5"),
    ],
)
def test_dictionary_learning_contradictions(tmp_path: Path, trainer: dict, error: Any, named: str):
    folder = golden(tmp_path, "dictionary_learning/topk")
    edit_json(folder / "config.json", trainer=json.loads((folder / "config.json").read_text())["trainer"] | trainer)
    with pytest.raises(error, match=named):
        loading.load(folder)


def test_an_uncalibrated_threshold(tmp_path: Path):
    with pytest.raises(ConfigError, match="never calibrated"):
        loading.load(GOLDENS / "dictionary_learning" / "batchtopk_uncalibrated")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["W_enc", "b_dec", "threshold"])
def test_numbers_that_are_not_finite(tmp_path: Path, key: str, value: float):
    folder = golden(tmp_path, "saelens/jumprelu")
    tensor = load_file(folder / "sae_weights.safetensors")[key]
    tensor.view(-1)[3] = value
    edit_tensors(folder / "sae_weights.safetensors", **{key: tensor})
    with pytest.raises(ArtefactError, match=r"1 numbers that are NaN or infinite"):
        loading.load(folder)


def test_thresholds_of_16_bits(tmp_path: Path):
    folder = golden(tmp_path, "saelens/jumprelu")
    file = folder / "sae_weights.safetensors"
    edit_tensors(file, threshold=load_file(file)["threshold"].bfloat16())
    with pytest.raises(ArtefactError, match="bfloat16, expected float32"):
        loading.load(folder)
    assert loading.load(folder, options=ImportOptions(allow_16bit_thresholds=True)).d_sae == F


def test_a_transposed_matrix_is_named_as_such(tmp_path: Path):
    folder = golden(tmp_path, "saelens/topk")
    file = folder / "sae_weights.safetensors"
    edit_tensors(file, W_enc=load_file(file)["W_enc"].t().contiguous())
    with pytest.raises(ConfigError, match="W_enc .* it lies transposed"):
        loading.load(folder)


def test_missing_and_unknown_tensors(tmp_path: Path):
    folder = golden(tmp_path, "saelens/topk")
    file = folder / "sae_weights.safetensors"
    edit_tensors(file, b_dec=None)
    with pytest.raises(ArtefactError, match="lacks b_dec"):
        loading.load(folder)
    edit_tensors(file, b_dec=torch.zeros(D), b_pre=torch.zeros(D))
    with pytest.raises(ArtefactError, match="b_pre"):
        loading.load(folder)


def test_two_formats_in_one_folder(tmp_path: Path):
    folder = golden(tmp_path, "saelens/topk")
    shutil.copy(GOLDENS / "dictionary_learning" / "topk" / "ae.pt", folder)
    with pytest.raises(ArtefactError, match="dictionary_learning and of saelens"):
        loading.load(folder)


def test_the_right_path_is_suggested(tmp_path: Path):
    folder = golden(tmp_path, "saelens/topk")
    with pytest.raises(ArtefactError, match=f"did you mean {folder}"):
        loading.load(folder / "sae_weights.safetensors")
    with pytest.raises(ArtefactError, match=f"did you mean {folder}"):
        loading.load(tmp_path)


def test_no_format_at_all(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ArtefactError, match=r"notes.txt.*SAELens"):
        loading.load(tmp_path)
    with pytest.raises(ArtefactError, match="no SAE of a known format"):
        loading.load(tmp_path / "notes.txt")


def config_files(root: Path) -> dict[str, tuple[Path, Path]]:
    """Of each format with a configuration: (what is loaded, its JSON file)."""
    w = arrays()
    hooks = {"hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output"}
    gemma = write_gemma2(root / "g", w, {"architecture": "jump_relu", "model_name": "google/gemma-v3-1b-pt", **hooks})
    llama = write_llama_scope(root / "h", w, LLAMA_SCOPE)
    found = {"gemma2": (gemma, gemma / "config.json"), "llama_scope": (llama, llama / "hyperparams.json")}
    cases = {
        "saelens/topk_rescaled": "cfg.json", "saelens/old_topk": "cfg.json", "saelens/batchtopk_checkpoint": "cfg.json",
        "sparsify/layers.3": "cfg.json", "dictionary_learning/matryoshka": "config.json",
        "llamascopium/jumprelu_dataset": "config.json",
    }  # fmt: skip
    for i, (case, name) in enumerate(cases.items()):
        folder = golden(root / str(i), case)
        found[case] = (folder, folder / name)
    return found


ODD = [None, True, 0, -1, 2**70, 0.5, float("nan"), float("inf"), "", "x", [], [1], {}, {"a": 1}]


def test_every_value_of_every_configuration_by_an_odd_one(tmp_path: Path):
    """Each field, nested ones too, by a value of another kind: it loads, or fails with an error of saescope."""
    tried = 0
    for name, (path, file) in config_files(tmp_path).items():
        whole = json.loads(file.read_text())
        places = [(key, None) for key in whole]
        places += [(key, inner) for key, value in whole.items() if isinstance(value, dict) for inner in value]
        for key, inner in places:
            for odd in ODD:
                values = json.loads(json.dumps(whole))
                target = values if inner is None else values[key]
                target[key if inner is None else inner] = odd
                file.write_text(json.dumps(values))
                try:
                    loading.load(path)
                except SaescopeError as error:
                    assert str(path) in str(error), f"{name}: {error}"
                tried += 1
    assert tried > 1_000
