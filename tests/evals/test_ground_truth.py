"""Scores against a known dictionary: the true codes score 1, half a dictionary half, random directions the floor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import planted, truth_of

from evals.base import EvalContext, SAESubject
from evals.measure import Measurement
from evals.results import SubjectInfo, write_rows
from evals.run_log import RunLog
from evals.suite.ground_truth import PLUGIN
from evals.truth import Truth, best_reconstruction
from sae.config import InputNorm, SAEConfig
from sae.errors import ArtefactError, DataError, Unsupported
from sae.ops import SparseLatents
from sae.plugins import find

D, G = 32, 64
DATA = planted(n=3_000, d=D, g=G, sigma=0.0)
TRUTH = truth_of(DATA)


def plain_topk(f=G, k=4):
    """An untrained TopK SAE without input norm."""
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=D, d_out=D, d_sae=f, k=k, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id="topk", meta=None, train_tokens=0,
        train_steps=0, seed=0,
    )  # fmt: skip
    return find("sae.architectures", "topk")(cfg)


def subject_of(sae, kind=SAESubject):
    info = SubjectInfo(
        sae_id="s", kind="sae", lm="none", lm_revision="0", hookpoint="planted", architecture="topk", d_in=D,
        d_sae=sae.d_sae, k=4, train_tokens=0, sae_sha256="0",
    )  # fmt: skip
    return kind(sae, info)


class Oracle(SAESubject):
    """Knows the true codes of TRUTH's tokens, whatever its encoder; latents are a permutation of the truth."""

    order = torch.randperm(G, generator=torch.Generator().manual_seed(1))

    def _rows(self, x_ND):
        return torch.cdist(x_ND.double(), DATA.x_ND.double()).argmin(dim=1)

    def encode_sparse(self, x_ND):
        return SparseLatents(DATA.codes_NG[self._rows(x_ND)][:, self.order], torch.arange(G).expand(len(x_ND), G))

    def reconstruct(self, x_ND):
        codes = self.encode_sparse(x_ND).values_NK
        return codes @ self.sae.W_dec_FD + DATA.bias_D


def oracle():
    sae = plain_topk()
    with torch.no_grad():
        sae.W_dec_FD.copy_(DATA.directions_GD[Oracle.order])
    return subject_of(sae, Oracle)


def run(subject, truth=TRUTH, shared=None):
    return PLUGIN.run(EvalContext(
        root=None, subject=subject, preset="tiny", seed=0, hookpoint="planted", run_key="r", truth=truth,
        shared={} if shared is None else shared,
    ))  # fmt: skip


def values(result):
    return {row.metric: row.value for row in result.rows}


def test_the_true_codes_score_perfectly(tmp_path):
    result = run(oracle())
    found = values(result)
    for metric in ("mcc", "recovered_09", "firing_precision", "firing_recall", "firing_f1", "uniqueness"):
        assert found[metric] == pytest.approx(1.0), metric
    assert found["fvu_gap"] == pytest.approx(0.0, abs=1e-6)
    assert 0.2 < found["floor_mcc"] < 0.6
    assert write_rows(tmp_path, result.rows, PLUGIN.metrics) == len(PLUGIN.metrics)


def test_half_a_dictionary_finds_half():
    sae = plain_topk(f=G // 2)
    with torch.no_grad():
        sae.W_dec_FD.copy_(DATA.directions_GD[: G // 2])
        sae.W_enc_FD.copy_(DATA.directions_GD[: G // 2])
        sae.b_dec_D.copy_(DATA.bias_D)
    found = values(run(subject_of(sae)))
    assert found["mcc"] == pytest.approx(0.5, abs=1e-6) and found["recovered_09"] == 0.5
    assert found["firing_recall"] <= 0.5 and found["fvu_gap"] > 0.1


def test_a_permuted_decoder_ruins_it():
    good = oracle()
    with torch.no_grad():  # latents keep their codes, and point where other latents should
        good.sae.W_dec_FD.copy_(good.sae.W_dec_FD.roll(1, dims=0))
    found = values(run(good))
    assert found["mcc"] == pytest.approx(1.0)  # as a set of directions it is still the true one
    assert found["firing_f1"] < 0.3 and found["fvu_gap"] > 0.5


def test_copies_are_not_unique_and_take_no_second_partner():
    sae = plain_topk()
    with torch.no_grad():
        sae.W_dec_FD.copy_(DATA.directions_GD[: G // 4].repeat(4, 1))
        sae.W_enc_FD.copy_(sae.W_dec_FD + 1e-3 * torch.randn(G, D, generator=torch.Generator().manual_seed(0)))
    found = values(run(subject_of(sae)))
    assert found["uniqueness"] <= 0.26
    assert found["recovered_09"] <= 0.25


def test_training_recovers_the_dictionary_and_random_does_not():
    """METRICS J: a plain TopK on `tiny` reaches 0.85 (measured .91 to .93)."""
    data = planted(n=20_000, d=D, g=G)
    truth = truth_of(planted(n=22_000, d=D, g=G))
    truth = replace(truth, x_ND=truth.x_ND[20_000:], codes_NG=truth.codes_NG[20_000:])
    torch.manual_seed(0)
    sae = plain_topk()
    sae.initialise(data.x_ND[:4096], 0)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    untrained = values(run(subject_of(sae), truth))
    for _ in range(1_000):
        x = data.x_ND[torch.randint(len(data.x_ND), (1024,), generator=generator)]
        optimiser.zero_grad()
        (sae(x) - x).square().sum(-1).mean().backward()
        optimiser.step()
    sae.requires_grad_(False)
    found = values(run(subject_of(sae), truth))
    assert found["mcc"] >= 0.85 and found["firing_f1"] > 0.6
    assert found["mcc"] > untrained["mcc"] + 0.2 and abs(untrained["mcc"] - found["floor_mcc"]) < 0.2
    assert 0 < found["fvu_gap"] < untrained["fvu_gap"]


def test_the_ideal_reconstruction_beats_any_other_on_its_support():
    noisy = planted(n=200, d=D, g=G, sigma=0.05)
    truth, rows = truth_of(noisy), np.arange(200)
    ideal = best_reconstruction(truth, rows)
    x = noisy.x_ND.double().numpy()
    true = (noisy.codes_NG @ noisy.directions_GD + noisy.bias_D).double().numpy()
    assert np.square(x - ideal).sum() < np.square(x - true).sum()
    silent = np.flatnonzero((noisy.codes_NG == 0).all(dim=1).numpy())
    assert np.allclose(ideal[silent], noisy.bias_D)
    clean = best_reconstruction(TRUTH, rows)
    assert np.allclose(clean, DATA.x_ND[:200], atol=1e-5)


def test_dead_saes_are_undefined_where_they_must_be():
    sae = plain_topk()
    with torch.no_grad():
        sae.b_enc_F -= 1e6
    result = run(subject_of(sae))
    found = {row.metric: row for row in result.rows}
    assert found["uniqueness"].failure == "no_active_latent" and found["mcc"].value == 0.0
    assert found["firing_precision"].value is None and found["firing_recall"].value == 0.0
    assert found["fvu_gap"].value > 0


def test_a_truth_survives_its_file_and_bad_ones_are_refused(tmp_path):
    path = TRUTH.save(tmp_path / "t")
    again = Truth.open(tmp_path / "t")
    assert torch.equal(again.x_ND, TRUTH.x_ND) and torch.equal(again.codes_NG, TRUTH.codes_NG)
    assert len(again.key) == 16 and Truth.open(path).key == again.key
    with pytest.raises(ArtefactError, match="there is no"):
        Truth.open(tmp_path / "nowhere.safetensors")
    from safetensors.torch import save_file

    save_file({"x": TRUTH.x_ND}, tmp_path / "part.safetensors")
    with pytest.raises(ArtefactError, match="lacks bias, codes, directions"):
        Truth.open(tmp_path / "part.safetensors")
    with pytest.raises(DataError, match=r"codes is \(10, 64\)"):
        replace(TRUTH, codes_NG=TRUTH.codes_NG[:10])
    with pytest.raises(DataError, match="negative"):
        replace(TRUTH, codes_NG=-TRUTH.codes_NG)
    with pytest.raises(DataError, match="NaN"):
        replace(TRUTH, x_ND=TRUTH.x_ND * torch.nan)
    with pytest.raises(DataError, match="length 0"):
        replace(TRUTH, directions_GD=TRUTH.directions_GD * 0)


def test_an_sae_of_another_width_is_refused():
    subject = subject_of(plain_topk())
    with pytest.raises(Unsupported, match="reads 32 channels, the known data have 16"):
        run(subject, truth_of(planted(n=50, d=16, g=8)))


def test_a_run_without_truth_leaves_it_out(tmp_path):
    log = RunLog(root=tmp_path, preset="tiny", key="k", config={})
    options = {"root": tmp_path, "preset": "tiny", "seed": 0, "hookpoint": "planted", "log": log,
               "latents": lambda i: None, "scores": lambda i: None, "load_lm": None}  # fmt: skip
    lone = Measurement(parts={}, **options)
    lone.run_all([PLUGIN], [oracle()])
    assert lone.folders == [] and not log.failures and not log.stages
    assert log.notes["not_applicable"] == {"ground_truth": "this run has no known dictionary"}
    lone.run_all([PLUGIN], [oracle()], asked=("ground_truth",))
    [failure] = log.failures
    assert failure.task == "ground_truth" and "no known dictionary" in failure.error
    log.failures.clear()
    known = Measurement(parts={"truth": lambda: TRUTH}, **options)
    known.run_all([PLUGIN], [oracle()])
    assert len(known.folders) == 1 and not log.failures
