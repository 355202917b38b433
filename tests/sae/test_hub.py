"""SAEs from the hub: a real server that speaks its protocol, the hub's own client and its cache."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from foreign import arrays, write_gemma, write_openai, write_tracer
from hub_server import Hub
from huggingface_hub import constants
from safetensors.torch import load_file

from sae import hub, loading
from sae.convert import convert
from sae.errors import ArtefactError, ConfigError, Unsupported

GOLDENS = Path(__file__).parents[1] / "interop" / "goldens"
FOLDERS = ("saelens/topk", "sparsify/layers.3", "dictionary_learning/gated", "llamascopium/relu_dataset")


def content(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when the hub's library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of its own for each test, an empty cache, and nothing remembered of another."""
    with Hub() as found:
        ask(found.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.chdir(tmp_path)  # no folder of the checkout may look like an organisation
        loading._fetched.cache_clear()
        yield found
    loading._fetched.cache_clear()


def test_one_repository_of_many_formats(server: Hub):
    """Each loads as from the disk; only the files of the SAE that is named are fetched, each once."""
    files = {"optimizer.pt": b"x" * 10_000, "sparsify/config.json": b'{"model": "org/lm"}'}
    for name in FOLDERS:
        files |= content(GOLDENS / name, f"{name}/")
    commit = server.add("org/all", files)
    for name in FOLDERS:
        server.served.clear()
        found, local = loading.load(f"org/all/{name}"), loading.load(GOLDENS / name)
        x_ND = load_file(GOLDENS / name / "golden.safetensors")["x_ND"]
        assert torch.equal(found.encode(x_ND), local.encode(x_ND)) and torch.equal(found(x_ND), local(x_ND))
        assert found.cfg.extra["hub"] == f"org/all/{name}@{commit}"
        wanted = {p.name for p in loading.read(GOLDENS / name).files}
        fetched = {s for s in server.served if s.startswith(name)}
        assert {Path(s).name for s in fetched} == wanted and len(server.served) == len(set(server.served))
        assert not any("golden" in s or "optimizer" in s for s in server.served)
    assert loading.read("org/all/sparsify/layers.3").lm == "org/lm", "the run's own config.json comes along"


def test_native_and_files_that_stand_alone(server: Hub, tmp_path: Path):
    w = arrays()
    convert(GOLDENS / "saelens/topk", tmp_path / "mine", "native")
    openai = write_openai(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "7.pt", w, "TopK")
    layer = write_tracer(tmp_path / "transcoders", w, {})
    (layer.parent / "layer_6.safetensors").write_bytes(layer.read_bytes())
    server.add("org/native", content(tmp_path / "mine"))
    server.add("org/gpt2", {"resid_post_mlp_v5_32k/autoencoders/7.pt": openai.read_bytes()})
    server.add("org/clt", content(layer.parent))
    server.add("org/single", {"README.md": b"", "model.pt": openai.read_bytes()})
    assert torch.equal(loading.load("org/native").W_enc_FD, loading.load(tmp_path / "mine").W_enc_FD)
    meta = loading.load("org/gpt2/resid_post_mlp_v5_32k/autoencoders/7.pt").cfg.meta
    assert meta is not None and meta.hookpoint == "h.7", "the folders of the repository say where it reads"
    server.served.clear()
    assert loading.load("org/clt/layer_6.safetensors").cfg.architecture == "relu_transcoder"
    assert sorted(server.served) == ["config.yaml", "layer_6.safetensors"]
    assert loading.load("org/single").d_sae == 48
    with pytest.raises(ArtefactError, match="2 files that may be one, name the file: layer_5.safetensors"):
        loading.load("org/clt")


def test_gemma_scope_needs_no_organisation(server: Hub, tmp_path: Path):
    folder = write_gemma(tmp_path / "g", arrays())
    server.add("google/gemma-scope-2b-pt-res", content(folder, "layer_9/width_16k/average_l0_73/"))
    found = loading.load("gemma-scope-2b-pt-res/layer_9/width_16k/average_l0_73")
    assert found.cfg.meta is not None and found.cfg.meta.lm == "google/gemma-2-2b"
    assert found.cfg.meta.hookpoint == "layers.9", "layer and site come from the repository and its folders"


def test_a_revision_is_pinned(server: Hub):
    first = server.add("org/a", content(GOLDENS / "saelens/topk"))
    second = server.add("org/a", content(GOLDENS / "saelens/gated"))
    assert loading.load(f"org/a@{first}").cfg.architecture == "topk"
    newest = loading.load("org/a")
    assert newest.cfg.architecture == "gated" and newest.cfg.extra["hub"].endswith(second)
    with pytest.raises(ArtefactError, match="RevisionNotFound"):
        loading.load("org/a@v9")


def test_run_all_imports_by_the_same_ids(server: Hub, tmp_path: Path):
    """What --sae does: a native folder below the run's root, made once, that knows where it came from."""
    commit = server.add("org/a", content(GOLDENS / "saelens/topk", "sub/"))
    folder = loading.import_into(tmp_path / "root", "org/a/sub")
    assert folder.parent == tmp_path / "root" / "saes" and folder.name.startswith("saelens.")
    assert json.loads((folder / "cfg.json").read_text())["extra"]["hub"] == f"org/a/sub@{commit}"
    assert loading.import_into(tmp_path / "root", "org/a/sub") == folder


def test_without_a_network_the_cache_serves(server: Hub, monkeypatch: pytest.MonkeyPatch):
    server.add("org/a", content(GOLDENS / "saelens/topk", "sub/"))
    before = loading.load("org/a/sub")
    loading._fetched.cache_clear()
    ask("http://127.0.0.1:9", monkeypatch)  # nobody listens there
    server.served.clear()
    after = loading.load("org/a/sub")
    assert torch.equal(before.W_enc_FD, after.W_enc_FD) and after.cfg.extra["hub"] == before.cfg.extra["hub"]
    assert not server.served
    with pytest.raises(ArtefactError, match=r"org/b does not exist here, is not in the local hub cache.*ConnectError"):
        loading.load("org/b")
    with pytest.raises(ArtefactError, match="below it lie sub.*in the local cache"):
        loading.load("org/a")


def test_too_large_is_refused_before_anything_is_fetched(server: Hub, monkeypatch: pytest.MonkeyPatch):
    server.add("org/a", content(GOLDENS / "saelens/topk"))
    server.sizes["sae_weights.safetensors"] = hub.LIMIT_BYTES + 1
    with pytest.raises(ArtefactError, match="at most 34,359,738,368 are fetched"):
        loading.load("org/a")
    monkeypatch.setattr(hub, "LIMIT_BYTES", 2**60)
    server.sizes["sae_weights.safetensors"] = 2**58
    with pytest.raises(ArtefactError, match="free; set HF_HOME"):
        hub.fetch("org/a", {"saelens": ("sae_weights.safetensors", "cfg.json")}, limit_bytes=2**60)
    assert not server.served


def test_what_the_hub_gives_is_read_as_safely_as_any_file(server: Hub, tmp_path: Path):
    class Payload:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {tmp_path / 'ran'}",)

    bad = write_openai(tmp_path / "bad.pt", arrays(), "ReLU", activation=Payload())
    server.add("org/bad", {"bad.pt": bad.read_bytes(), "../outside.pt": b"x", "/abs.pt": b"x"})
    with pytest.raises(Unsupported, match="system"):
        loading.load("org/bad")
    assert server.served == ["bad.pt"] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("org/repo", ("org/repo", "", None)), ("org/repo/a/b@v1", ("org/repo", "a/b", "v1")),
        ("hf:org/repo@refs/pr/3", ("org/repo", "", "refs/pr/3")), ("hf://org/repo/x", ("org/repo", "x", None)),
        ("org/repo/", ("org/repo", "", None)), ("../repo", None), ("/org/repo", None), ("org", None),
        ("org/repo/../x", None), ("org//repo", None), ("C:\\a/b", None), ("org/repo@", None),
    ],
)  # fmt: skip
def test_references(text: str, parsed: tuple[str, str, str | None] | None):
    assert hub.parse(text) == parsed


def test_what_is_a_path_is_never_looked_up(server: Hub, tmp_path: Path):
    (tmp_path / "results").mkdir()
    server.add("results/typo", content(GOLDENS / "saelens/topk"))
    with pytest.raises(ArtefactError, match="results/typo does not exist"):
        loading.load("results/typo")
    assert loading.load("hf:results/typo").d_sae == 48, "unless it is asked for"
    with pytest.raises(ConfigError, match="expected hf:org/repo"):
        loading.load("hf:../x")


@pytest.mark.slow
def test_by_the_environment_alone(server: Hub, tmp_path: Path):
    """A process of its own with HF_ENDPOINT: import and inspect; then offline; then with an empty cache."""
    server.add("org/a", content(GOLDENS / "saelens/topk"))
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    run = lambda *words, **env: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "sae", *words], capture_output=True, text=True, env=environment | env, cwd=tmp_path
    )
    shown = run("inspect", "org/a")
    assert shown.returncode == 0 and f"org/a@{server.commit('org/a')}" in shown.stdout, shown.stderr
    offline = run("convert", "org/a", "out", "--to", "native", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads((tmp_path / "out" / "cfg.json").read_text())["extra"]["hub"].startswith("org/a@")
    empty = run("inspect", "org/a", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert empty.returncode == 2 and "not in the local hub cache" in empty.stderr and "Traceback" not in empty.stderr
