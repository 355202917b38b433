"""Oracles of METRICS B: identity, mean, a float64 brute force on the tiny LM, the scaling law."""

import numpy as np
import pytest
import torch
from memory_store import Function, context, info, memory_store, topk_subject

import evals.passes
from evals.passes import scored_positions
from evals.suite import downstream_loss as downstream
from evals.units import UnitSums
from sae.manifest import rng

EVAL = downstream.PLUGIN


@pytest.fixture(scope="module")
def hookpoint(tiny_lm) -> str:
    return tiny_lm.default_hookpoint()


@pytest.fixture(scope="module")
def store(tiny_lm, hookpoint):
    return memory_store(tiny_lm, hookpoint)


def run(tiny_lm, hookpoint, store, subject, tmp_path, shared=None) -> dict:
    result = EVAL.run(context(tiny_lm, hookpoint, store, subject, tmp_path, shared))
    return {row.metric: row for row in result.rows} | {"details": result.details, "counts": result.counts}


def function(tiny_lm, hookpoint, store, f) -> Function:
    return Function(info(tiny_lm, hookpoint, "f", d_in=store.d_in), f)


def test_identity_changes_nothing_bit_for_bit(tiny_lm, hookpoint, store, tmp_path) -> None:
    found = run(tiny_lm, hookpoint, store, function(tiny_lm, hookpoint, store, lambda x: x), tmp_path)
    assert found["delta_ce"].value == 0 and found["kl"].value == 0 and found["top1_agree"].value == 1
    assert found["ce_recovered_mean"].value in (1.0, None)
    assert found["floor_random_error_kl"].value == 0
    assert found["counts"]["equiv_compute_clipped"] is True


def test_mean_and_zero_reproduce_their_ablations(tiny_lm, hookpoint, store, tmp_path) -> None:
    mean = store.read(store.kept_N).double().mean(0).float()
    shared: dict = {}
    by_mean, by_zero = (
        run(tiny_lm, hookpoint, store, function(tiny_lm, hookpoint, store, f), tmp_path, shared)
        for f in (lambda x: mean.expand_as(x), torch.zeros_like)
    )
    assert by_mean["delta_ce"].value == pytest.approx(by_mean["floor_mean_delta_ce"].value, abs=1e-5)
    assert by_zero["delta_ce"].value == pytest.approx(by_zero["floor_zero_delta_ce"].value, abs=1e-6)
    for row in (by_mean["ce_recovered_mean"], by_zero["ce_recovered_zero"]):
        assert row.failure == "gate_failed" if row.value is None else row.value == pytest.approx(0, abs=1e-3)


def test_equal_to_a_float64_brute_force(tiny_lm, hookpoint, store, tmp_path) -> None:
    subject = topk_subject(tiny_lm, hookpoint, store)
    found = run(tiny_lm, hookpoint, store, subject, tmp_path)
    B, L = store.tokens.tokens_BL.shape
    ids = torch.from_numpy(store.tokens.tokens_BL.astype(np.int64))
    keep = store.keep_N.reshape(B, L)
    x = store.x_ND.reshape(B, L, -1)
    patched = x.clone()
    patched[torch.from_numpy(keep)] = subject.reconstruct(x[torch.from_numpy(keep)])
    p, q = (tiny_lm.replace(ids, hookpoint, acts).double().log_softmax(-1) for acts in (x, patched))
    ce, kl, top1 = [], [], []
    for b in range(B):
        for t in range(L - 1):
            same = store.tokens.docs_BL[b, t] == store.tokens.docs_BL[b, t + 1]
            if keep[b, t] and same and int(ids[b, t + 1]) not in (0, 1, 2):
                ce.append(float(p[b, t, ids[b, t + 1]] - q[b, t, ids[b, t + 1]]))
                kl.append(float((p[b, t].exp() * (p[b, t] - q[b, t])).sum()))
                top1.append(float(p[b, t].argmax() == q[b, t].argmax()))
    assert found["counts"]["scored_tokens"] == len(ce) > 500
    assert found["delta_ce"].value == pytest.approx(np.mean(ce), abs=1e-6 * max(1, abs(np.mean(ce))) + 2e-6)
    assert found["kl"].value == pytest.approx(np.mean(kl), rel=1e-5)
    assert found["top1_agree"].value == pytest.approx(np.mean(top1), abs=2 / len(top1))
    details = found["details"]
    for name in ("delta_ce", "kl", "top1_agree"):
        share = details[f"{name}.num"].sum() / details[f"{name}.den"].sum()
        assert share == pytest.approx(found[name].value, rel=1e-6), name
    assert found["kl"].n == len(details) and found["kl"].ci_low < found["kl"].value < found["kl"].ci_high


def test_unfiltered_positions_keep_their_own_activation(tiny_lm, hookpoint, store, tmp_path) -> None:
    """A subject that would ruin position 0 never sees it (SAEBench zero-ablates BOS in one arm only)."""
    seen = []
    run(tiny_lm, hookpoint, store, function(tiny_lm, hookpoint, store, lambda x: seen.append(len(x)) or x), tmp_path)
    assert sum(seen) == int(store.keep_N.sum())


def test_shared_passes_run_once(tiny_lm, hookpoint, store, tmp_path, monkeypatch) -> None:
    calls, real = [], downstream.shared_passes
    monkeypatch.setattr(downstream, "shared_passes", lambda *a: calls.append(1) or real(*a))
    shared: dict = {}
    first = run(tiny_lm, hookpoint, store, topk_subject(tiny_lm, hookpoint, store), tmp_path, shared)
    second = run(tiny_lm, hookpoint, store, topk_subject(tiny_lm, hookpoint, store), tmp_path, shared)
    assert len(calls) == 1
    assert first["kl"] == second["kl"] and first["floor_random_error_kl"] == second["floor_random_error_kl"]


def test_the_random_error_in_some_batches_alone(tiny_lm, hookpoint, store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evals.passes, "BATCH_TOKENS", 256)
    subject = topk_subject(tiny_lm, hookpoint, store)
    every = run(tiny_lm, hookpoint, store, subject, tmp_path)
    config = EVAL.config("tiny") | {"random_error_every": 2}
    monkeypatch.setattr(downstream.DownstreamLoss, "config", lambda self, preset: config)
    some = run(tiny_lm, hookpoint, store, subject, tmp_path)
    assert some["kl"] == every["kl"] and some["floor_random_error_kl"].n < every["floor_random_error_kl"].n
    assert some["floor_random_error_kl"].value == pytest.approx(every["floor_random_error_kl"].value, rel=0.5)


def test_clean_states_computed_again_give_the_same_numbers(tiny_lm, hookpoint, store, tmp_path, monkeypatch) -> None:
    subject = topk_subject(tiny_lm, hookpoint, store)
    kept = run(tiny_lm, hookpoint, store, subject, tmp_path)
    monkeypatch.setattr(downstream, "MEMO_BYTES", 0)
    assert run(tiny_lm, hookpoint, store, subject, tmp_path)["kl"] == kept["kl"]


def test_nothing_before_the_spliced_position_changes(tiny_lm, hookpoint, store) -> None:
    upper = tiny_lm.upper(hookpoint)
    x = store.x_ND[:64][None]
    patched = x.clone()
    patched[0, 30] += 5
    a, b = upper.logits(x), upper.logits(patched)
    assert torch.equal(a[0, :30], b[0, :30]) and not torch.equal(a[0, 30], b[0, 30])


def test_a_nan_reconstruction_is_named_not_scored(tiny_lm, hookpoint, store, tmp_path) -> None:
    found = run(tiny_lm, hookpoint, store, function(tiny_lm, hookpoint, store, lambda x: x * float("nan")), tmp_path)
    assert found["delta_ce"].failure == "non_finite" and found["kl"].value is None


def test_scored_positions() -> None:
    keep = np.array([[False, True, True, True, True, True]])
    doc = np.array([[0, 0, 0, 1, 1, 1]])
    ids = np.array([[0, 5, 6, 7, 1, 8]])
    score = scored_positions(keep, doc, ids, (0, 1))
    # 0 is filtered out, after 2 another document begins, after 3 comes a special token, 5 has no next token
    assert score.tolist() == [[False, True, False, False, True, False]]


def test_random_error_has_the_length_and_not_the_direction() -> None:
    error = torch.from_numpy(rng("e").normal(size=(2, 200, 64)).astype(np.float32))
    noise = downstream.random_error(error, np.array([4, 9]), 0)
    assert torch.allclose(noise.norm(dim=-1), error.norm(dim=-1), rtol=1e-5)
    assert torch.nn.functional.cosine_similarity(noise, error, dim=-1).mean().abs() < 0.03
    assert torch.equal(noise[1], downstream.random_error(error[1:], np.array([9]), 0)[0])


def test_equivalent_compute_constants() -> None:
    """Values computed in METRICS B."""
    def at(delta, tokens, law):
        return float(downstream.equivalent_compute(delta, tokens, law))

    assert at(0.1, 3e11, downstream.HOFFMANN) == pytest.approx(0.2693, abs=5e-5)
    assert at(0.1, 3e11, downstream.REFIT) == pytest.approx(0.2142, abs=5e-5)
    assert at(0.1, 2e12, downstream.HOFFMANN) == pytest.approx(0.1326, abs=5e-5)
    assert at(0.1, 2e12, downstream.REFIT) == pytest.approx(0.0803, abs=5e-5)
    assert at(0.01, 2e12, downstream.HOFFMANN) == pytest.approx(0.7687, abs=5e-5)
    assert at(0.0, 2e12, downstream.HOFFMANN) == 1 and at(-0.5, 2e12, downstream.REFIT) == 1


def test_estimates_by_hand() -> None:
    own, ablations = UnitSums(), UnitSums()
    own.add([0, 1], {"n": [10, 30], "ce": [20, 60], "ce.sae": [21, 63], "kl.sae": [2, 6], "top1.sae": [9, 25],
                     "n.random": [10, 0], "kl.random": [4, 0]})
    ablations.add([0, 1], {"ce.zero": [60, 180], "ce.mean": [19, 59]})
    found = downstream.estimates(own, ablations, 2e12, 0, 200)
    assert found["delta_ce"].value == pytest.approx(0.1) and found["kl"].value == pytest.approx(0.2)
    assert found["floor_random_error_kl"].value == pytest.approx(0.4) and found["floor_random_error_kl"].n == 1
    assert found["ce_recovered_zero"].value == pytest.approx((240 - 84) / (240 - 80))
    assert found["ce_recovered_mean"].failure == "gate_failed"  # the ablation costs nothing here
    assert found["equiv_compute"].value == pytest.approx(0.1326, abs=5e-5)
    assert downstream.estimates(own, ablations, None, 0, 200)["equiv_compute"].failure == "gate_failed"
    assert downstream.pretraining_tokens("HuggingFaceTB/SmolLM2-135M-Instruct") == 2e12
    assert downstream.pretraining_tokens("gpt2") is None
