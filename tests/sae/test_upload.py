"""``sae.upload``: the folder of a dry run, and a commit to a server that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import Hub
from huggingface_hub import constants

import sae
from sae import checkpoint, loading, model_card
from sae.convert import convert
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.manifest import sha256_file

GOLDENS = Path(__file__).parents[1] / "interop" / "goldens"
TOKEN = "hf_this_is_secret"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upload") / "mine"
    convert(GOLDENS / "saelens" / "topk", folder, "native")
    return folder


def row(metric: str, value: float | None, sha: str, **changes: Any) -> dict[str, Any]:
    made = {
        "sae_id": "mine", "sae_sha256": sha, "kind": "sae", "eval": "reconstruction", "eval_version": 3, "slice": "",
        "metric": metric, "value": value, "ci_low": None, "ci_high": None, "n": 99, "n_failed": 0, "preset": "quick",
        "split": "test", "seed": 0, "failure": None, "run_key": "a",
    }  # fmt: skip
    return made | changes


def write_rows(folder: Path, rows: list[dict[str, Any]], created_at: str = "2026-01-01") -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "manifest.json").write_text(json.dumps({"provenance": {"created_at": created_at}}))
    return folder


@pytest.fixture
def rows(native: Path, tmp_path: Path) -> Path:
    """Of this SAE (twice, the second time newer), of another one, and of the random floor."""
    sha, root = sha256_file(native / checkpoint.WEIGHTS), tmp_path / "rows"
    write_rows(root / "old", [row("fvu", 0.9, sha)], "2025-12-01")
    write_rows(
        root / "new",
        [row("fvu", 0.3291, sha, ci_low=0.3216, ci_high=0.3344), row("l0", 32.0, sha),
         row("dead_frac", None, sha, failure="too_few_rows"), row("fvu", 0.11, sha, slice="decile=3")],
    )  # fmt: skip
    write_rows(root / "floor", [row("fvu", 0.7013, "f" * 64, sae_id="baseline.random_sae.x", kind="baseline",
                                    ci_low=0.69, ci_high=0.71)])  # fmt: skip
    write_rows(root / "other", [row("fvu", 0.5, "e" * 64, sae_id="other")])
    return root


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_folder_of_a_dry_run(native: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the network would be noticed
    out = tmp_path / "out"
    said = sae.upload(native, "me/my-sae", licence="mit", rows=[rows], base_model="openai-community/gpt2", dry_run=out)
    assert said == str(out)
    names = {p.name for p in out.iterdir()}
    assert names == {"sae.safetensors", "cfg.json", "reference.safetensors", "README.md", "metrics.jsonl"}
    card = (out / "README.md").read_text()
    head = front_matter(card)
    assert head["license"] == "mit" and head["library_name"] == "saescope"
    assert head["base_model"] == "openai-community/gpt2" and {"sparse-autoencoder", "saescope"} <= set(head["tags"])
    assert "| reconstruction v3 | fvu | 0.3291 [0.3216, 0.3344] | 0.7013 [0.69, 0.71] | 99 | 0 |" in card
    assert "| reconstruction v3 | l0 | 32 |  | 99 | 0 |" in card and "undefined (too_few_rows)" in card
    assert "| hookpoint | h.7:in |" in card and "trained as, run as" in card and 'sae.load("me/my-sae")' in card
    assert "0.9" not in card.split("## Measured")[1].split("Random SAE")[0], "the older numbers are not shown"
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["value"] for r in kept] == [0.3291, 32.0, None, 0.11], "slices are in the file"
    assert torch.equal(sae.load(out).W_enc_FD, sae.load(native).W_enc_FD)
    with pytest.raises(ArtefactError, match="exists"):
        sae.upload(native, "me/my-sae", licence="mit", dry_run=out)


def test_in_the_words_of_saelens(native: Path, tmp_path: Path):
    out = tmp_path / "out"
    sae.upload(native, "me/x", licence="apache-2.0", to="saelens", dry_run=out)
    card = (out / "README.md").read_text()
    assert front_matter(card)["library_name"] == "saelens" and "base_model" not in front_matter(card)
    assert loading.recognise(out) == "saelens" and "SAE.load_from_disk" in card
    assert "No evaluation was given" in card and not (out / "metrics.jsonl").exists()
    with pytest.raises(Unsupported):
        sae.upload(native, "me/x", licence="mit", to="openai", dry_run=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_foreign_sae_is_sent_as_it_is(tmp_path: Path):
    """With the rows that were measured on its import."""
    source, root = GOLDENS / "sparsify" / "layers.3", tmp_path / "results"
    native = loading.import_into(root, source)
    write_rows(root / "rows", [row("fvu", 0.25, sha256_file(native / checkpoint.WEIGHTS), sae_id=native.name)])
    sae.upload(source, "me/x", licence="mit", rows=[root / "rows"], dry_run=tmp_path / "out")
    assert loading.recognise(tmp_path / "out") == "sparsify"
    assert (tmp_path / "out" / "sae.safetensors").read_bytes() == (source / "sae.safetensors").read_bytes()
    assert "| fvu | 0.25 |" in (tmp_path / "out" / "README.md").read_text()


def test_numbers_of_other_weights_are_refused(native: Path, rows: Path, tmp_path: Path):
    other = write_rows(tmp_path / "stale", [row("fvu", 0.1, "d" * 64, sae_id=sae.load(native).sae_id)])
    for given, says in ((rows / "other", "found other"), (other, "measured with other weights")):
        with pytest.raises(ConfigError, match=says):
            sae.upload(native, "me/x", licence="mit", rows=[given], dry_run=tmp_path / "no")
    with pytest.raises(ArtefactError, match="no rows.jsonl"):
        sae.upload(native, "me/x", licence="mit", rows=[native], dry_run=tmp_path / "no")
    (tmp_path / "bad.jsonl").write_text('{"sae_id": 1}\n')
    with pytest.raises(ArtefactError, match="a row without"):
        sae.upload(native, "me/x", licence="mit", rows=[tmp_path / "bad.jsonl"], dry_run=tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"licence": ""}, "--licence"), ({"licence": "My Licence"}, "--licence"),
        ({"base_model": "gpt2"}, "--base-model"),
        ({"repo": "alone"}, "no repository"), ({"repo": "a/b/c"}, "no repository"), ({"subfolder": "../x"}, "leaves"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_first(native: Path, tmp_path: Path, changes: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        sae.upload(**({"path": native, "repo": "me/x", "licence": "mit", "dry_run": tmp_path / "no"} | changes))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        loading._fetched.cache_clear()
        yield found
    loading._fetched.cache_clear()


def test_there_and_back(server: Hub, native: Path, rows: Path, caplog: pytest.LogCaptureFixture):
    """One call, one commit; large files by the large-file protocol; the token goes in the header and nowhere else."""
    url = sae.upload(native, "me/saes", licence="mit", rows=[rows], subfolder="layer_7", private=True)
    assert url == f"{server.url}/me/saes/commit/{server.commit('me/saes')}"
    _, files = server.files("me/saes", "main") or ("", {})
    assert set(files) == {
        f"layer_7/{n}" for n in ("sae.safetensors", "cfg.json", "reference.safetensors", "README.md", "metrics.jsonl")
    }
    assert server.private["me/saes"] and server.blobs, "weights went by the large-file protocol"
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in caplog.text and not any(TOKEN.encode() in data for data in files.values())
    again = sae.load("me/saes/layer_7")
    x_ND = torch.randn(8, again.d_in)
    assert torch.equal(again(x_ND), sae.load(native)(x_ND))
    sae.upload(native, "me/saes", licence="mit", subfolder="layer_8")
    assert {n.split("/")[0] for n in (server.files("me/saes", "main") or ("", {}))[1]} == {"layer_7", "layer_8"}


def test_without_token_or_hub(server: Hub, native: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="hf auth login"):
        sae.upload(native, "me/x", licence="mit")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtefactError, match="the hub did not take the upload") as caught:
        sae.upload(native, "me/x", licence="mit")
    assert TOKEN not in str(caught.value) and not server.repos


def test_a_card_cannot_be_broken_by_what_it_says():
    card = model_card.Card(name="x", licence="mit", library="saescope", base_model=None, facts=[("a|b", "c\nd|e")])
    assert "| a\\|b | c d\\|e |" in model_card.render(card)
    with pytest.raises(ConfigError):
        replace(card, licence="mit\nfoo: bar")


@pytest.mark.slow
def test_the_door(native: Path, tmp_path: Path):
    words = ["upload", str(native), "me/x", "--licence", "mit", "--dry-run", str(tmp_path / "out")]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "sae", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "written: " in done.stdout and TOKEN not in done.stdout + done.stderr, done.stderr
    assert not any(TOKEN.encode() in p.read_bytes() for p in (tmp_path / "out").iterdir())
    asked = subprocess.run([sys.executable, "-m", "sae", *words[:3]], capture_output=True, text=True, env=environment)
    assert asked.returncode == 2 and "--licence" in asked.stderr
