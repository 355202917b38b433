"""Our numbers against those of SAEBench's core evaluation and SAELens's evaluator, on one SAE and the same tokens.

``goldens/core.json`` was computed by the peers (``make crosscheck``); nothing of theirs is needed here. Where a peer's
formula is right we agree; where it is not, the test pins what it computes, so that a table of theirs can be read.
"""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore, MemoryTokens, context, info

from evals.base import SAESubject
from sae import plugins
from sae.config import InputNorm, SAEConfig

HERE = Path(__file__).parent
PEERS = ("sae_bench", "sae_lens")


def load(name: str) -> Any:
    spec = spec_from_file_location(name, HERE / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


case = load("case")
GOLDEN = json.loads((HERE / "goldens" / "core.json").read_text())


@pytest.fixture(scope="module")
def ours(tiny_lm, tiny_lm_dir, tmp_path_factory) -> dict[str, Any]:
    """Rows of reconstruction and downstream_loss, x, x_hat and the row of each token that passes the filter."""
    assert case.digest(case.weights_of(tiny_lm_dir)) == GOLDEN["lm"], "the tiny model changed: run make crosscheck"
    hookpoint = f"layers.{case.LAYER}"
    ids = case.tokens_BL()
    x = tiny_lm.capture(torch.from_numpy(ids), [hookpoint])[hookpoint].float()
    keep = np.ones(ids.shape, dtype=bool)
    keep[:, 0] = False
    docs = np.repeat(np.arange(case.B)[:, None], case.L, axis=1)
    store = MemoryStore(MemoryTokens(ids.astype(np.uint16), docs), x.reshape(-1, case.D), keep.ravel())
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=case.D, d_out=case.D, d_sae=case.F, k=case.K,
        apply_b_dec_to_input=True, input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id="case", meta=None,
        train_tokens=0, train_steps=0, seed=0)
    sae = plugins.find("sae.architectures", "topk")(cfg)
    weights = {name: torch.from_numpy(a) for name, a in case.sae_weights().items()}
    with torch.no_grad():
        sae.W_enc_FD.copy_(weights["W_enc"].T) if hasattr(sae, "W_enc_FD") else sae.W_enc_DF.copy_(weights["W_enc"])
        sae.b_enc_F.copy_(weights["b_enc"])
        sae.W_dec_FD.copy_(weights["W_dec"])
        sae.b_dec_D.copy_(weights["b_dec"])
    sae.requires_grad_(False)
    subject = SAESubject(sae, info(tiny_lm, hookpoint, "case", d_in=case.D, d_sae=case.F, k=case.K))
    rows: dict[str, float] = {}
    for name in ("reconstruction", "downstream_loss"):
        made = plugins.find("evals.suite", name).run(
            context(tiny_lm, hookpoint, store, subject, tmp_path_factory.mktemp(name)))
        rows |= {r.metric: r.value for r in made.rows if r.slice == "" and r.value is not None}
    kept = x[:, 1:].reshape(-1, case.D).double()
    x_hat = sae(kept.float()).double()
    row = np.repeat(np.arange(case.B), case.L - 1)
    return {"rows": rows, "x": kept, "x_hat": x_hat, "batch": row // case.ROWS_PER_BATCH, "lm": tiny_lm, "all": x}


@pytest.mark.parametrize("peer", PEERS)
def test_l0_and_cross_entropies_agree(ours, peer: str) -> None:
    rows, theirs = ours["rows"], GOLDEN[peer]
    assert rows["l0"] == pytest.approx(theirs["l0"], abs=1e-6)
    assert rows["ce_clean"] == pytest.approx(theirs["ce_loss_without_sae"], rel=1e-5)
    assert rows["ce_clean"] + rows["delta_ce"] == pytest.approx(theirs["ce_loss_with_sae"], rel=1e-5)
    assert rows["cosine"] == pytest.approx(theirs["cossim"], rel=1e-5)


@pytest.mark.parametrize("peer", PEERS)
def test_kl_agrees_where_a_token_is_predicted(ours, peer: str) -> None:
    assert ours["rows"]["kl"] == pytest.approx(GOLDEN[peer]["kl_where_scored"], rel=1e-4)
    # their own figure also counts the last position of each row, at which nothing is predicted
    assert ours["rows"]["kl"] != pytest.approx(GOLDEN[peer]["kl_div_with_sae"], rel=1e-4)


def test_fvu_agrees_with_saelens(ours) -> None:
    assert 1 - ours["rows"]["fvu"] == pytest.approx(GOLDEN["sae_lens"]["explained_variance"], abs=1e-5)


def test_pinned_explained_variance_of_saebench_is_not_one_minus_fvu(ours) -> None:
    """0.6.0 subtracts the square of mean x² (over tokens, batches and channels alike) where |mean x|² belongs."""
    x, x_hat, batch = ours["x"], ours["x_hat"], ours["batch"]
    parts = [(x[batch == b], x_hat[batch == b]) for b in np.unique(batch)]
    residual = np.mean([float((a - h).square().sum(1).mean()) for a, h in parts])
    power = np.mean([float(a.square().sum(1).mean()) for a, _ in parts])
    squares = float(torch.cat([a.square().mean(0) for a, _ in parts]).mean())
    wrong = 1 - residual / (power - squares**2)
    theirs = GOLDEN["sae_bench"]["explained_variance"]
    assert theirs == pytest.approx(wrong, rel=1e-4)
    assert abs(theirs - (1 - ours["rows"]["fvu"])) > 0.1


@pytest.mark.parametrize("peer", PEERS)
def test_pinned_legacy_explained_variance_is_a_mean_of_ratios(ours, peer: str) -> None:
    x, x_hat, batch = ours["x"], ours["x_hat"], ours["batch"]
    ratios = []
    for b in np.unique(batch):
        a, h = x[batch == b], x_hat[batch == b]
        ratios.append(1 - (a - h).square().sum(1) / (a - a.mean(0)).square().sum(1))
    assert GOLDEN[peer]["explained_variance_legacy"] == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-4)


def test_pinned_mse_of_saebench_is_divided_by_the_tokens_twice(ours) -> None:
    squared = float((ours["x"] - ours["x_hat"]).square().sum(1).mean())
    tokens = case.ROWS_PER_BATCH * (case.L - 1)
    assert GOLDEN["sae_lens"]["mse"] == pytest.approx(squared, rel=1e-4)
    assert GOLDEN["sae_bench"]["mse"] == pytest.approx(squared / tokens, rel=1e-4)


@pytest.mark.parametrize("peer", PEERS)
def test_pinned_zero_ablation_of_the_peers_zeroes_the_first_position_too(ours, peer: str) -> None:
    """The SAE's arm keeps it, so the two arms of their recovered loss differ in more than the SAE."""
    lm, ids = ours["lm"], torch.from_numpy(case.tokens_BL())
    found = {}
    for name, first in (("theirs", 0), ("ours", 1)):
        acts = ours["all"].clone()
        acts[:, first:] = 0
        logits = lm.replace(ids, f"layers.{case.LAYER}", acts)[:, 1:-1].log_softmax(-1)
        found[name] = float(-logits.gather(-1, ids[:, 2:, None]).mean())
    rows = ours["rows"]
    assert GOLDEN[peer]["ce_loss_with_ablation"] == pytest.approx(found["theirs"], rel=1e-4)
    assert rows["ce_clean"] + rows["floor_zero_delta_ce"] == pytest.approx(found["ours"], rel=1e-4)
