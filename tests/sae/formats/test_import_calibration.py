"""What a file lacks is measured on activations or refused; a wrong recipe is found where activations are at hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import arrays, write_gemma
from safetensors.torch import load_file, save_file

from sae import inspect, loading
from sae.errors import ConfigError, DataError, Unsupported
from sae.import_calibration import fill
from sae.portable import ImportOptions, Portable, naive_forward

GOLDENS = Path(__file__).parents[2] / "interop" / "goldens"
D, K = 16, 4


def activations(n: int = 4_096, size: float = 3.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return size * (torch.randn(n, D, generator=g) @ torch.randn(D, D, generator=g) * 0.7 + 0.3)


def options(x_ND: torch.Tensor | None = None) -> ImportOptions:
    return ImportOptions(calibrate_on=lambda p: activations() if x_ND is None else x_ND)


def copied(tmp_path: Path, case: str, file: str, **changes: Any) -> Path:
    folder = Path(shutil.copytree(GOLDENS / case, tmp_path / "sae"))
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(values))
    return folder


def test_an_unfolded_saelens_norm_is_measured(tmp_path: Path):
    """The library scales inputs to a mean norm of sqrt(d_in): the same SAE, folded by hand, does the same."""
    folder = copied(tmp_path, "saelens/standard", "cfg.json", normalize_activations="expected_average_only_in")
    with pytest.raises(ConfigError, match="--calibrate --check-on MODEL"):
        loading.load(folder)
    x_ND = activations()
    found = loading.load(folder, options=options())
    scale = D**0.5 / float(torch.linalg.vector_norm(x_ND.double(), dim=1).mean())
    assert found.cfg.input_norm.kind == "dataset_rms" and found.cfg.input_norm.scale_in == pytest.approx(scale)
    plain = loading.load(GOLDENS / "saelens" / "standard")
    want_ND = plain(x_ND * scale) / scale
    assert float((found(x_ND) - want_ND).norm() / want_ND.norm()) <= 1e-5
    assert "measured on 4,096 tokens" in str(found.cfg.source)
    assert loading.load(folder, options=ImportOptions(scale_in=scale)).cfg.input_norm == found.cfg.input_norm


@pytest.mark.parametrize("case", ["dictionary_learning/batchtopk_uncalibrated", "llamascopium/batchtopk"])
def test_a_missing_threshold_is_calibrated(tmp_path: Path, case: str):
    if case.startswith("llamascopium"):  # act_fn batchtopk stores none; the tensors are those of the TopK golden
        folder = copied(tmp_path, "llamascopium/topk_dataset", "config.json", act_fn="batchtopk")
    else:
        folder = GOLDENS / case
    with pytest.raises((ConfigError, Unsupported), match="--calibrate --check-on MODEL"):
        loading.load(folder)
    x_ND, found = activations(), loading.load(folder, options=options())
    assert found.cfg.architecture == "batchtopk" and found.cfg.k == K
    active = float((found.encode(x_ND) > 0).sum(1).double().mean())
    assert active == pytest.approx(K, rel=0.03)
    other = torch.randn(2_000, D, generator=torch.Generator().manual_seed(8)) + 0.0
    z_NF = naive_forward(loading.read(folder, options()), other).z_NF
    ours_NF = found.encode(other).numpy()
    assert ((z_NF != 0) == (ours_NF != 0)).mean() > 0.9999, "the recipe and the class have one threshold"
    assert "calibrated on 3,584 tokens" in str(found.cfg.source)
    with pytest.raises(DataError, match=r"got \(100, 16\)"):
        loading.load(folder, options=options(x_ND[:100]))
    with pytest.raises(DataError, match="not finite"):
        loading.load(folder, options=options(x_ND.clone().index_fill_(0, torch.tensor([5]), torch.nan)))


def test_what_is_there_is_not_measured():
    """A file that lacks nothing never asks for activations."""
    asked: list[Portable] = []
    found = loading.load(GOLDENS / "saelens" / "jumprelu", options=ImportOptions(calibrate_on=asked.append))  # type: ignore[arg-type]
    assert not asked and found.cfg.architecture == "jumprelu"
    with pytest.raises(ConfigError, match="does not say k"):
        p = loading.read(GOLDENS / "saelens" / "jumprelu")
        p.lacks = ("threshold",)
        fill(p, activations())


def planted(transcoder: bool) -> tuple[Portable, torch.Tensor, torch.Tensor]:
    """An SAE (or ReLU transcoder) that fits planted data, the inputs and what it is to predict."""
    g = torch.Generator().manual_seed(0)
    rows_FD = torch.nn.functional.normalize(torch.randn(48, D, generator=g), dim=1)
    codes_NF = 10 * torch.relu(torch.randn(512, 48, generator=g) - 1.8)
    x_ND = codes_NF @ rows_FD
    p = loading.read(GOLDENS / "saelens" / ("transcoder" if transcoder else "standard"))
    p.W_enc_FD, p.b_enc_F = rows_FD, torch.full((48,), -3.0)
    if not transcoder:
        p.W_dec_FD, p.b_dec_D = rows_FD * 0.5, torch.zeros(D)
        return p, x_ND, x_ND
    p.b_dec_D = 20.0 + torch.rand(D, generator=g)
    p.W_dec_FD = torch.randn(48, D, generator=g)
    return p, x_ND, torch.from_numpy(naive_forward(p, x_ND).x_hat_ND).float() + 0.1 * torch.randn(512, D, generator=g)


@pytest.mark.parametrize("change", ["input norm layer_norm", "input norm unit_norm"])
def test_a_wrong_norm_is_suspect(change: str):
    p, x_ND, target_ND = planted(False)
    assert inspect.suspicion(inspect.probe(p, x_ND, target_ND)) is None
    wrong = inspect.probe(inspect.variants(p)[change], x_ND, target_ND)
    assert inspect.suspicion(wrong) is not None and "input norm none" in str(inspect.suspicion(wrong))


def test_transcoders_are_judged_by_what_they_predict():
    p, x_ND, target_ND = planted(True)
    with pytest.raises(Unsupported, match="judged by its target"):
        inspect.probe(p, x_ND)
    rows = inspect.probe(p, x_ND, target_ND)
    assert inspect.suspicion(rows) is None and rows[0][1] < 0.05
    wrong = inspect.probe(inspect.variants(p)["with b_dec subtracted from the input"], x_ND, target_ND)
    assert inspect.suspicion(wrong) is not None
    with pytest.raises(ConfigError, match="the target has"):
        inspect.probe(p, x_ND, target_ND[:, :3])


def test_an_sae_of_another_scale_of_inputs_reconstructs_nothing():
    """Trained on inputs of mean norm sqrt(d), fed raw ones a hundred times as long."""
    p, x_ND, _ = planted(False)
    p.input_norm = type(p.input_norm)(kind="dataset_rms", scale_in=100.0, scale_out=1.0)
    found = inspect.suspicion(inspect.probe(p, x_ND))
    assert found is not None and "as imported" in found


def test_a_file_of_another_library_with_a_forgotten_scale(tmp_path: Path):
    """A folded file whose biases were divided twice is found by the probe on its own activations (SAELens #354)."""
    p, x_ND, _ = planted(False)
    folder = Path(shutil.copytree(GOLDENS / "saelens" / "standard", tmp_path / "sae"))
    file = folder / "sae_weights.safetensors"
    shifted = x_ND + 50.0
    right = {"W_enc": p.W_enc_FD.t(), "W_dec": p.W_dec_FD, "b_enc": p.b_enc_F, "b_dec": torch.full((D,), 50.0)}
    for factor, suspect in ((1.0, False), (0.2, True)):
        made = {**right, "b_dec": right["b_dec"] * factor}
        save_file({k: v.float().contiguous() for k, v in (load_file(file) | made).items()}, file)  # type: ignore[union-attr]
        rows = inspect.probe(loading.read(folder), shifted)
        assert (inspect.suspicion(rows) is not None) == suspect, (factor, rows)
    assert np.isfinite([row[1] for row in rows]).all()


def test_a_published_l0_is_compared(tmp_path: Path):
    """Gemma Scope's folders and SAELens's metadata state it; 15 % are allowed."""
    p, x_ND, _ = planted(False)
    rows = inspect.probe(p, x_ND)
    l0 = rows[0][2]
    assert inspect.suspicion(rows, l0 * 1.1) is None and inspect.suspicion(rows, None) is None
    assert "published" in str(inspect.suspicion(rows, l0 * 1.25)) and inspect.verdict(rows, l0 / 1.25) == 1
    folder = copied(tmp_path, "saelens/standard", "cfg.json")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"metadata": cfg["metadata"] | {"l0": 71.5}}))
    assert loading.read(folder).published_l0 == 71.5
    gemma = write_gemma(tmp_path / "layer_9" / "width_16k" / "average_l0_73", arrays())
    assert loading.read(gemma).published_l0 == 73 and ("published L0", "73") in inspect.semantics(loading.read(gemma))
