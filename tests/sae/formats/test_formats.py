"""The contract of every format plug-in, and of outside ones given by ``--plugin module:object``.

A format is met by a golden of its library (``tests/interop``) or by an independent writer (``test_described.py``).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    LLAMA_SCOPE,
    D,
    F,
    K,
    arrays,
    tensor,
    write_gemma,
    write_llama_scope,
    write_openai,
    write_tracer,
)  # fmt: skip

from sae import loading
from sae.agreement import compare, sample_inputs
from sae.errors import SaescopeError
from sae.plugins import names
from sae.portable import ImportOptions, Portable, check

GOLDENS = Path(__file__).parents[2] / "interop" / "goldens"


def example(name: str, root: Path) -> Path | None:
    """One file or folder of a format."""
    w = arrays()
    if name in ("saelens", "dictionary_learning", "sparsify", "llamascopium"):
        return min((GOLDENS / name).glob("*topk*"), default=GOLDENS / name / "layers.3")
    if name == "goodfire":
        values = {"encoder_linear.weight": w["enc"], "encoder_linear.bias": w["b_enc"]}
        values |= {"decoder_linear.weight": w["dec"].T, "decoder_linear.bias": w["b_dec"]}
        torch.save({k: tensor(a) for k, a in values.items()}, root / "a.pth")
        return root / "a.pth"
    if name == "qwen_scope":
        values = {"W_enc": w["enc"], "W_dec": w["dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
        torch.save({k: tensor(a) for k, a in values.items()}, root / "layer1.sae.pt")
        return root / "layer1.sae.pt"
    makers: dict[str, Any] = {
        "openai": lambda: write_openai(root / "a.pt", w, "TopK"), "gemmascope": lambda: write_gemma(root / "g", w),
        "llama_scope": lambda: write_llama_scope(root / "l", w, LLAMA_SCOPE),
        "circuit_tracer": lambda: write_tracer(root / "c", w, {"activation": "relu"}),
    }  # fmt: skip
    return makers[name]() if name in makers else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [*names(loading.FORMATS), *metafunc.config.getoption("--plugin")])


def test_it_says_what_it_is(name: str):
    plugin = loading.plugin(name)
    assert isinstance(plugin.title, str) and 8 <= len(plugin.title) <= 100
    assert plugin.title not in [loading.plugin(other).title for other in names(loading.FORMATS) if other != name]


def test_only_it_recognises_its_files(name: str, tmp_path: Path):
    path = example(name, tmp_path)
    if path is None:
        pytest.skip("no example of an outside format")
    assert loading.recognise(path) == name
    p = loading.read(path, ImportOptions(k=K) if name == "qwen_scope" else None)
    assert (p.format, p.d_in, p.d_sae) == (name, D, F)
    assert all(f.is_file() for f in p.files) and len(p.files) >= 1


def test_nothing_raises_on_what_is_not_its_own(name: str, tmp_path: Path):
    plugin = loading.plugin(name)
    assert not plugin.recognises(tmp_path)
    odd = [
        "sae_weights.safetensors", "cfg.json", "ae.pt", "config.json", "sae.safetensors", "params.npz", "config.yaml",
        "params.safetensors", "hyperparams.json", "a.pt", "a.pth", "layer_1.safetensors", "layer1.sae.pt",
    ]  # fmt: skip
    for kind in ("folders", "empty", "noise"):
        (tmp_path / kind).mkdir()
        for file in odd:
            path = tmp_path / kind / file
            path.mkdir() if kind == "folders" else path.write_bytes(b"" if kind == "empty" else bytes(range(256)))
        for path in (tmp_path / kind, *(tmp_path / kind / file for file in odd), tmp_path / "absent"):
            if plugin.recognises(path):
                with pytest.raises(SaescopeError):
                    plugin.read(path, ImportOptions())


def test_what_it_writes_it_reads(name: str, tmp_path: Path):
    plugin, path = loading.plugin(name), example(name, tmp_path)
    if path is None or not hasattr(plugin, "write"):
        pytest.skip("read only")
    p: Portable = loading.read(path)
    plugin.write(p, tmp_path / "out")
    written = tmp_path / "out" if plugin.recognises(tmp_path / "out") else next((tmp_path / "out").iterdir())
    again = check(plugin.read(written, ImportOptions()), ImportOptions())
    found = compare(p, again, sample_inputs(p))
    assert found.same_sets == 1.0 and max(found.codes, found.reconstructions) <= 1e-5
