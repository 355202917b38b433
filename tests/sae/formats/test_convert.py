"""``convert`` and ``inspect``: every pair of formats agrees or is refused with a reason; what the doors say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import arrays, write_gemma, write_openai
from safetensors.torch import load_file, save_file

import sae as package
from sae import adapt, agreement, checkpoint, inspect, loading
from sae.__main__ import main as package_main
from sae.config import InputNorm, SAEConfig
from sae.convert import convert
from sae.errors import ArtefactError, CheckpointMismatch, ConfigError, Unsupported
from sae.plugins import find
from sae.portable import ImportOptions, naive_forward

GOLDENS = Path(__file__).parents[2] / "interop" / "goldens"
CASES = {
    f"{p.parent.parent.name}/{p.parent.name}": next(p.parent.glob("samples_*.pt"), p.parent)
    for p in sorted(GOLDENS.glob("*/*/golden.safetensors"))
    if "uncalibrated" not in p.parent.name
}
WRITABLE = ["native", "saelens", "sparsify", "dictionary_learning", "openai", "gemmascope"]
# activation of the source -> formats that can say it, for SAEs without norm
EXPRESSIBLE = {
    "relu": {"native", "saelens", "dictionary_learning", "openai", "gemmascope"},
    "topk": {"native", "saelens", "sparsify", "dictionary_learning"},
    "threshold": {"native", "saelens", "dictionary_learning", "gemmascope"},
    "gated": {"native", "saelens", "dictionary_learning"},
    "groupmax": {"native", "sparsify"},
}


def allowed(path: Path) -> set[str]:
    p = loading.read(path)
    if p.transcoder:
        return {"native", "sparsify"} if p.activation == "topk" else {"native", "saelens"}
    if p.input_norm.kind == "layer_norm":
        return {"native", "saelens"} | ({"openai"} if p.activation == "topk" else set())
    if p.input_norm.kind == "unit_norm":
        return {"native", "saelens"}
    return EXPRESSIBLE[p.activation]


@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_formats_agrees_or_is_refused(case: str, tmp_path: Path):
    """Whatever is written does on the library's own sample what the library did with the source."""
    x_ND = load_file(GOLDENS / case / "golden.safetensors")["x_ND"]
    source = loading.read(CASES[case])
    for to in WRITABLE:
        if to not in allowed(CASES[case]):
            with pytest.raises(Unsupported):
                convert(CASES[case], tmp_path / to, to)
            assert not list(tmp_path.glob(f"{to}*")), "a refusal leaves nothing behind"
            continue
        found = convert(CASES[case], tmp_path / to, to)
        assert found.passed and found.l0_before == found.l0_after > 0
        path = tmp_path / to / "autoencoder.pt" if to == "openai" else tmp_path / to
        again = agreement.compare(source, loading.read(path), x_ND)
        assert again.same_sets == 1.0 and max(again.codes, again.reconstructions) <= 1e-5, to


@pytest.mark.parametrize("case", ["saelens/jumprelu", "dictionary_learning/gated", "sparsify/layers.3"])
def test_writing_twice_gives_the_same_tensors(case: str, tmp_path: Path):
    to = case.split("/")[0]
    convert(CASES[case], tmp_path / "a", to)
    convert(tmp_path / "a", tmp_path / "b", to)
    a, b = loading.read(tmp_path / "a"), loading.read(tmp_path / "b")
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


def trained(architecture: str, norm: InputNorm) -> package.SAE:
    """A native SAE with a norm of its own."""
    kind = find("sae.architectures", architecture)
    cfg = SAEConfig(
        architecture=architecture, activation=kind.activation, d_in=16, d_out=16, d_sae=48, k=4,
        apply_b_dec_to_input=True, input_norm=norm, decoder_unit_norm=False, sae_id=f"t.{architecture}", meta=None,
        train_tokens=0, train_steps=0, seed=0,
    )  # fmt: skip
    sae = kind(cfg)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in kind.tensor_shapes(cfg):
            getattr(sae, name).copy_(torch.randn(getattr(sae, name).shape, generator=g).abs() ** 0.5 * 0.4)
        sae.W_enc_FD.mul_(torch.randn(48, 16, generator=g).sign())
    return sae


@pytest.mark.parametrize(
    ("norm", "formats"),
    [
        (InputNorm(kind="unit_norm"), {"saelens", "openai"}),
        (InputNorm(kind="layer_norm"), {"saelens", "openai"}),
        (InputNorm(kind="dataset_rms", scale_in=0.3, scale_out=0.3), {"saelens", "sparsify", "dictionary_learning"}),
        (InputNorm(kind="none"), {"saelens", "sparsify", "dictionary_learning"}),
        (InputNorm(kind="layer_norm", eps=1e-3), set()),
    ],
)
def test_native_norms_are_folded_or_refused(norm: InputNorm, formats: set[str], tmp_path: Path):
    sae = trained("topk", norm)
    x_ND = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * 3 + 1
    checkpoint.save(sae, tmp_path / "sae", x_ND)
    for to in ("saelens", "sparsify", "dictionary_learning", "openai"):
        if to in formats:
            assert convert(tmp_path / "sae", tmp_path / to, to, x_ND=x_ND).passed
        else:
            with pytest.raises(Unsupported, match="norm"):
                convert(tmp_path / "sae", tmp_path / to, to)


def test_native_keeps_what_the_source_said(tmp_path: Path):
    convert(CASES["saelens/jumprelu"], tmp_path / "n", "native")
    sae = package.load(tmp_path / "n")
    assert sae.cfg.source is not None and sae.cfg.source["format"] == "saelens"
    assert set(sae.cfg.source["files"]) == {"cfg.json", "sae_weights.safetensors"}
    assert sae.cfg.threshold_source == {"kind": "imported", "tokens": None, "l0": None}
    assert sae.sae_id.startswith("saelens.gpt2-small.h.7-in.jumprelu-f48.")
    assert sae.cfg.meta is not None and sae.cfg.meta.hookpoint == "h.7:in"
    manifest = json.loads((tmp_path / "n" / "manifest.json").read_text())
    assert manifest["counts"]["self_check"]["same_sets"] == 1.0


def test_import_into_writes_once(tmp_path: Path):
    folder = loading.import_into(tmp_path, CASES["saelens/topk"])
    assert folder.parent == tmp_path / "saes"
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert loading.import_into(tmp_path, CASES["saelens/topk"]) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    assert loading.import_into(tmp_path, folder) == folder, "a native folder stays where it is"
    other = loading.import_into(tmp_path, CASES["saelens/topk"], ImportOptions(hookpoint="h.3"))
    assert other != folder


def test_native_stays_native(tmp_path: Path):
    convert(CASES["saelens/topk"], tmp_path / "a", "native")
    with pytest.raises(ConfigError, match="own format already"):
        convert(tmp_path / "a", tmp_path / "b", "native")


def test_comparison_in_blocks_is_the_comparison(monkeypatch: pytest.MonkeyPatch):
    p = loading.read(CASES["saelens/topk"])
    other = loading.read(CASES["saelens/topk"])
    other.b_enc_F = other.b_enc_F + 0.05 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    x_ND = agreement.sample_inputs(p, 100)
    whole = agreement.compare(p, other, x_ND)
    assert 0 < whole.same_sets < 1 and whole.codes > 0
    found = naive_forward(p, x_ND)
    residual = (x_ND.double() - torch.from_numpy(found.x_hat_ND)).square().sum()
    assert whole.fvu_before == pytest.approx(float(residual / (x_ND - x_ND.mean(0)).double().square().sum()), rel=1e-5)
    assert whole.l0_before == (found.z_NF != 0).sum(1).mean()
    monkeypatch.setattr(agreement, "block_tokens", lambda d_sae: 7)
    for got, want in zip(agreement.compare(p, other, x_ND), whole, strict=True):
        assert got == pytest.approx(want, rel=1e-9)


def test_existing_output_is_kept(tmp_path: Path):
    convert(CASES["saelens/topk"], tmp_path / "a", "saelens")
    with pytest.raises(ArtefactError, match="--force"):
        convert(CASES["saelens/standard"], tmp_path / "a", "saelens")
    convert(CASES["saelens/standard"], tmp_path / "a", "saelens", force=True)
    assert loading.read(tmp_path / "a").activation == "relu"
    with pytest.raises(ConfigError, match="no such format"):
        convert(CASES["saelens/topk"], tmp_path / "b", "sealens")
    with pytest.raises(Unsupported, match="read but not written"):
        convert(CASES["saelens/topk"], tmp_path / "b", "llama_scope")


def test_a_fault_of_an_exporter_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The self-check has teeth: an exporter that forgets the pre-bias writes nothing."""
    plugin = loading.plugin("saelens")
    whole = type(plugin).write

    def forgetful(self, p, folder):
        whole(self, p, folder)
        values = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(values | {"apply_b_dec_to_input": False}))

    monkeypatch.setattr(type(plugin), "write", forgetful)
    with pytest.raises(CheckpointMismatch, match="nothing is written"):
        convert(CASES["saelens/topk"], tmp_path / "a", "saelens")
    assert not list(tmp_path.iterdir())


def test_a_fault_of_our_class_is_noticed(monkeypatch: pytest.MonkeyPatch):
    sae_class = find("sae.architectures", "topk")
    monkeypatch.setattr(sae_class, "b_pre_D", property(lambda self: None))
    with pytest.raises(CheckpointMismatch, match="recipe of saelens"):
        loading.load(CASES["saelens/topk"])


def test_the_probe_finds_a_wrong_recipe(tmp_path: Path):
    """An SAE that reconstructs its inputs well only with its pre-bias: read without, the probe says so."""
    g = torch.Generator().manual_seed(0)
    rows_FD = torch.nn.functional.normalize(torch.randn(48, 16, generator=g), dim=1)
    codes_NF = torch.relu(torch.randn(512, 48, generator=g) - 1.5)
    bias_D = torch.randn(16, generator=g) * 3
    x_ND = codes_NF @ rows_FD + bias_D
    p = loading.read(CASES["saelens/standard"])
    p.W_enc_FD, p.W_dec_FD, p.b_enc_F, p.b_dec_D = rows_FD, rows_FD * 0.4, torch.full((48,), -0.3), bias_D
    right = inspect.probe(p, x_ND)
    wrong = inspect.probe(inspect.variants(p)["without pre-bias"], x_ND)
    assert inspect.verdict(right) == 0 and inspect.verdict(wrong) == 1
    assert min(right[1:], key=lambda row: row[1])[1] > right[0][1]
    assert min(wrong[1:], key=lambda row: row[1])[0] == "with b_dec subtracted from the input"


def test_health_marks_what_is_odd():
    p = loading.read(CASES["saelens/jumprelu"])
    assert not [row for row in inspect.health(p) if row[0].startswith("!")]
    p.W_dec_FD = p.W_dec_FD.clone()
    p.W_dec_FD[3] = 0
    p.threshold_F = p.threshold_F - 0.5
    marked = [name for name, _ in inspect.health(p) if name.startswith("!")]
    assert marked == ["! decoder rows of length 0", "! thresholds below 0"]
    assert any("cosine" in name for name, _ in inspect.health(p))
    assert not any("cosine" in name for name, _ in inspect.health(loading.read(CASES["saelens/transcoder"])))


def door(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sae", *words], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["convert", "inspect"])
def test_help_needs_no_torch(name: str):
    code = f"import sys\nfrom sae.__main__ import main\ntry:\n main(['{name}', '--help'])\nexcept SystemExit:\n pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--check-on" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_doors(tmp_path: Path):
    w = arrays()
    gemma = write_gemma(tmp_path / "gemma-scope-2b-pt-res" / "layer_9" / "width_16k" / "average_l0_73", w)
    done = door("convert", str(gemma), str(tmp_path / "out"), "--to", "saelens")
    assert done.returncode == 0, done.stderr
    assert "same active latents" in done.stdout and "100.00%" in done.stdout
    shown = door("inspect", str(tmp_path / "out"))
    assert shown.returncode == 0 and "google/gemma-2-2b" in shown.stdout and "threshold_F" in shown.stdout
    refused = door("convert", str(write_openai(tmp_path / "a.pt", w, "TopK")), str(tmp_path / "b"), "--to", "sparsify")
    assert refused.returncode == 2 and "sparsify has no input norm" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "b").exists()
    missing = door("inspect", str(tmp_path / "nowhere"))
    assert missing.returncode == 2 and "does not exist" in missing.stderr


@pytest.mark.slow
def test_check_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The probe on activations of a real (tiny) model stops a conversion; and the width that does not fit it."""
    from tiny import save_tiny_lm, write_texts

    def said(*words: str) -> tuple[int, str]:
        status = package_main(list(words))
        return status, "".join(capsys.readouterr())

    save_tiny_lm(tmp_path / "lm", width=16)
    texts = write_texts(tmp_path / "texts.jsonl", documents=300)
    case, where = str(CASES["saelens/topk"]), ["--hookpoint", "layers.1"]
    words = ["--check-on", str(tmp_path / "lm"), "--texts", str(texts), "--tokens", "512", *where]
    status, text = said("inspect", case, *words)
    assert status == 1 and "recipe probe on 512 tokens" in text and "without pre-bias" in text
    out = str(tmp_path / "o")
    status, text = said("convert", case, out, "--to", "sparsify", *words)
    assert status == 1 and "suspect" in text and not (tmp_path / "o").exists(), "random weights reconstruct nothing"
    status, text = said("convert", case, out, "--to", "sparsify", *words, "--accept-recipe")
    assert status == 0 and "synthetic" not in text and (tmp_path / "o").exists()
    save_tiny_lm(tmp_path / "wide", width=32)
    status, text = said("inspect", case, "--check-on", str(tmp_path / "wide"), *where)
    assert status == 2 and "reads 16 channels" in text
    status, text = said("inspect", str(GOLDENS / "dictionary_learning" / "batchtopk_uncalibrated"), "--calibrate")
    assert status == 2 and "give --check-on MODEL as well" in text
    status, text = said(
        "inspect", str(GOLDENS / "dictionary_learning" / "batchtopk_uncalibrated"), "--calibrate", *words
    )
    assert status in (0, 1) and "threshold" in text and "calibrated on" in text.replace("\n", " ")


def test_save_load_of_our_own_is_unchanged(tmp_path: Path):
    sae = trained("relu", InputNorm(kind="layer_norm"))
    x_ND = torch.randn(64, 16)
    checkpoint.save(sae, tmp_path / "sae", x_ND)
    assert loading.recognise(tmp_path / "sae") == "native"
    assert torch.equal(package.load(tmp_path / "sae")(x_ND), sae(x_ND))
    assert agreement.compare(adapt.from_sae(sae), sae, x_ND).passed


def test_stray_safetensors_are_no_gemma_scope(tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / "params.safetensors")
    with pytest.raises(ArtefactError, match="no SAE of a known format"):
        loading.recognise(tmp_path)
