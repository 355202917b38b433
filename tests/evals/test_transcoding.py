"""Transcoding on the tiny LM: against brute force, with known transcoders, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import context, info, memory_store

from evals.base import SAESubject
from evals.suite.transcoding import PLUGIN
from sae.config import InputNorm, SAEConfig, SubjectMeta
from sae.errors import Unsupported
from sae.plugins import find

READ, WRITE = "layers.1.mlp:in", "layers.1.mlp"


def transcoder(lm: Any, out: str | None = WRITE, d_out: int = 0) -> SAESubject:
    """Random weights of a useful size."""
    width = lm.check_hookpoint(READ)
    meta = SubjectMeta(
        lm=lm.name, lm_revision=lm.revision, hookpoint=READ, lm_dtype="float32", context_length_tokens=64,
        hookpoint_out=out,
    )  # fmt: skip
    cfg = SAEConfig(
        architecture="relu_skip_transcoder", activation="relu", d_in=width, d_out=d_out or width, d_sae=64, k=None,
        apply_b_dec_to_input=False, input_norm=InputNorm(kind="none"), decoder_unit_norm=False,
        sae_id="tiny.transcoder", meta=meta, train_tokens=0, train_steps=0, seed=0,
    )  # fmt: skip
    sae = find("sae.architectures", cfg.architecture)(cfg)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(sae.named_parameters()):
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    sae.requires_grad_(False)
    return SAESubject(sae, info(lm, READ, cfg.sae_id, d_in=width, d_sae=64))


@pytest.fixture(scope="module")
def store(tiny_lm: Any) -> Any:
    return memory_store(tiny_lm, READ, rows=8)


def values(result: Any) -> dict[str, float]:
    return {row.metric: row.value for row in result.rows}


def test_against_brute_force(tiny_lm: Any, store: Any, tmp_path: Path):
    """Every metric again, row by row, from full passes with the target replaced by hand."""
    subject = transcoder(tiny_lm)
    found = values(PLUGIN.run(context(tiny_lm, READ, store, subject, tmp_path)))
    tokens, L = store.tokens, store.tokens.L
    keep_BL = store.keep_N.reshape(-1, L)
    ids = torch.from_numpy(tokens.tokens_BL.astype(np.int64))
    t_BLD = tiny_lm.capture(ids, [WRITE])[WRITE].float()
    hat_BLD = subject.sae(store.x_ND).reshape(t_BLD.shape)
    keep = torch.from_numpy(keep_BL)
    mean = t_BLD[keep].double().mean(0)
    error = (t_BLD[keep].double() - hat_BLD[keep].double()).square().sum()
    assert found["target_fvu"] == pytest.approx(float(error / (t_BLD[keep].double() - mean).square().sum()), rel=1e-6)
    active = (subject.sae.encode(store.x_ND[store.kept_N]) > 0).sum(1).double().mean()
    assert found["l0"] == pytest.approx(float(active))
    clean_BLV = tiny_lm.logits(ids).log_softmax(-1)
    arms = {
        name: tiny_lm.replace(ids, WRITE, torch.where(keep[..., None], value, t_BLD)).log_softmax(-1)
        for name, value in (("own", hat_BLD), ("mean", mean.float().expand_as(t_BLD)))
    }
    from sae.tokens import drop_ids

    special, losses = set(drop_ids(tiny_lm.tokenizer)), {"clean": [], "own": [], "mean": [], "kl": []}
    for b, n in np.argwhere(keep_BL[:, :-1]):
        following = int(ids[b, n + 1])
        if tokens.docs_BL[b, n] != tokens.docs_BL[b, n + 1] or following in special:
            continue
        for name, log_p in (("clean", clean_BLV), *arms.items()):
            losses[name].append(-float(log_p[b, n, following]))
        p, q = clean_BLV[b, n].double(), arms["own"][b, n].double()
        losses["kl"].append(float((p.exp() * (p - q)).sum()))
    clean, own, meant, kl = (np.mean(losses[name]) for name in ("clean", "own", "mean", "kl"))
    assert found["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert found["delta_ce"] == pytest.approx(own - clean, abs=2e-6) and found["kl"] == pytest.approx(kl, abs=2e-6)
    assert found["floor_mean_delta_ce"] == pytest.approx(meant - clean, abs=2e-6)


def test_the_better_transcoder_scores_better(tiny_lm: Any, store: Any, tmp_path: Path):
    """A skip path fitted by least squares has the FVU of that fit, and the mean scores 1."""
    fitted, silent = transcoder(tiny_lm), transcoder(tiny_lm)
    ids = torch.from_numpy(store.tokens.tokens_BL.astype(np.int64))
    t_ND = tiny_lm.capture(ids, [WRITE])[WRITE].float().reshape(store.n_tokens, -1)[store.kept_N]
    x_ND = store.x_ND[store.kept_N]
    one = torch.cat([x_ND, torch.ones(len(x_ND), 1)], dim=1)
    found = torch.linalg.lstsq(one.double(), t_ND.double()).solution.float()
    for subject in (fitted, silent):
        subject.sae.W_dec_FD.zero_()
        subject.sae.W_skip_DD.zero_()
    fitted.sae.W_skip_DD.copy_(found[:-1].T)
    fitted.sae.b_dec_D.copy_(found[-1])
    silent.sae.b_dec_D.copy_(t_ND.double().mean(0))
    scores = [values(PLUGIN.run(context(tiny_lm, READ, store, s, tmp_path))) for s in (fitted, silent)]
    residual_ND = t_ND.double() - one.double() @ found.double()
    fit = float(residual_ND.square().sum() / (t_ND.double() - t_ND.double().mean(0)).square().sum())
    assert scores[0]["target_fvu"] == pytest.approx(fit, rel=1e-4) and fit < 0.8
    assert scores[1]["target_fvu"] == pytest.approx(1.0, abs=1e-5)
    assert scores[1]["delta_ce"] == pytest.approx(scores[1]["floor_mean_delta_ce"], abs=1e-6)
    assert scores[0]["kl"] < scores[1]["kl"]


def test_what_is_refused(tiny_lm: Any, store: Any, tmp_path: Path):
    for subject, says in ((transcoder(tiny_lm, out=None), "does not say which activation"),
                          (transcoder(tiny_lm, d_out=7), "predicts 7 channels")):  # fmt: skip
        with pytest.raises(Unsupported, match=says):
            PLUGIN.run(context(tiny_lm, READ, store, subject, tmp_path))


def test_what_a_transcoder_offers(tiny_lm: Any):
    """Its output lies elsewhere: evaluations that reconstruct the input, or push along decoder rows, leave it out."""
    from evals.measure import select

    provides = transcoder(tiny_lm).provides
    chosen = {e.name for e in select(()) if e.uses <= provides}
    assert {"transcoding", "n2g", "explanation", "probe_loss", "sparse_probing"} <= chosen
    assert not chosen & {"reconstruction", "downstream_loss", "ablation_sparsity"}
