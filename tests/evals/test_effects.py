"""Effects of taking a latent out: against full hooked passes of the real tiny model, and what may not be averaged."""

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore, memory_store, topk_subject

from autointerp.records import Exemplar
from evals.effect_records import read_effects
from evals.effects import T_POSITIONS, build_effects, effect_of, next_tokens, strongest
from sae.errors import Unsupported
from sae.manifest import is_complete

HOOKPOINT = "layers.1"


def window(store: MemoryStore, row: int, start: int, peak: int, act: float = 1.0, doc: str = "") -> Exemplar:
    acts = [0.0] * 16
    acts[peak] = act
    ids = tuple(int(i) for i in store.tokens.tokens_BL[row, start : start + 16])
    return Exemplar(exemplar_id=f"{row}-{start}-{peak}", latent=0, kind="top", split="explain", doc_id=doc or f"d{row}",
                    row=row, start=start, token_ids=ids, acts=tuple(acts), peak=peak)


@pytest.fixture(scope="module")
def scene(tiny_lm: Any) -> Any:
    """The tiny model, its activations, a briefly trained SAE, and a latent with windows where it is active."""
    store = memory_store(tiny_lm, HOOKPOINT, rows=6, split="explain")
    subject = topk_subject(tiny_lm, HOOKPOINT, store, steps=20)
    codes = subject.encode_sparse(store.x_ND)
    counts = torch.bincount(codes.indices_NK[codes.values_NK > 0], minlength=64)
    latent = int(counts.argmax())
    places = [int(n) for n in ((codes.indices_NK == latent) & (codes.values_NK > 0)).any(1).nonzero()[:, 0]]
    return types.SimpleNamespace(lm=tiny_lm, store=store, subject=subject, latent=latent, places=places)


def test_equals_full_passes_with_the_decoder_row_subtracted(scene: Any) -> None:
    L, lm = scene.store.tokens.L, scene.lm
    chosen = [n for n in scene.places if 20 <= n % L < L - 20 and n % L % 16 < 12][:3]
    rows = [(n // L, n % L) for n in chosen]
    assert len({r for r, _ in rows}) >= 1 and len(rows) == 3
    found = effect_of(scene.subject, scene.latent, [window(scene.store, r, p - 8, 8) for r, p in rows], scene.store,
                      lm.upper(HOOKPOINT), lm)
    deltas, kl, rise, n = [], [], 0.0, 0
    for r, p in rows:
        x = scene.store.x_ND[r * L : (r + 1) * L]
        ids = torch.from_numpy(scene.store.tokens.tokens_BL[r].astype(np.int64))[None]
        code = scene.subject.sae.encode(x[p][None])[0]
        without = x.clone()
        scale = scene.subject.sae.normalise(x[p][None])[1].scale_N[0]
        without[p] -= code[scene.latent] * scale * scene.subject.sae.W_dec_FD[scene.latent]
        clean, ablated = (lm.replace(ids, HOOKPOINT, v[None])[0].double().log_softmax(-1) for v in (x, without))
        deltas.append((clean[p].exp() - ablated[p].exp()).detach().numpy())
        kl.append(float((clean[p].exp() * (clean[p] - ablated[p])).sum()))
        doc = scene.store.doc_of_N.reshape(-1, L)[r]
        for t in range(p, p + T_POSITIONS):
            if t + 1 >= L or doc[t + 1] != doc[p]:
                break
            rise += float(clean[t, ids[0, t + 1]] - ablated[t, ids[0, t + 1]])
            n += 1
    mean = np.mean(deltas, axis=0)
    assert found.n_windows == 3 and found.n_tokens == n and not found.failures
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-7)
    assert found.loss_rise == pytest.approx(rise / n, rel=1e-3, abs=1e-6)
    assert found.raised[0][0] == lm.tokenizer.decode([int(mean.argmax())])
    assert found.raised[0][1] == pytest.approx(mean.max(), rel=1e-2)
    assert found.lowered[0][1] == pytest.approx(mean.min(), rel=1e-2)
    assert found.lowered[0][1] < 0 < found.raised[0][1] and abs(found.loss_rise) > 1e-5


def test_a_window_without_the_latent_is_counted_and_not_averaged(scene: Any) -> None:
    L, lm = scene.store.tokens.L, scene.lm
    active = set(scene.places)
    on = next(n for n in scene.places if 20 <= n % L < L - 20)
    off = next(n for n in range(L, 6 * L) if n not in active and 20 <= n % L < L - 20)
    pair = [window(scene.store, n // L, n % L - 8, 8) for n in (on, off)]
    upper = lm.upper(HOOKPOINT)
    both, alone = (effect_of(scene.subject, scene.latent, w, scene.store, upper, lm) for w in (pair, pair[:1]))
    assert both.failures == {"no_active_latent": 1} and both.n_windows == 1
    assert replace(both, failures={}) == alone
    silent = effect_of(scene.subject, scene.latent, pair[1:], scene.store, upper, lm)
    assert silent.failure is not None and silent.failure.code == "no_active_latent"
    assert silent.loss_rise is None and silent.kl is None and silent.raised == ()
    nothing = effect_of(scene.subject, scene.latent, [], scene.store, upper, lm)
    assert nothing.failure is not None and nothing.failure.code == "too_few_positive"


def test_strongest_windows_of_different_documents_first(scene: Any) -> None:
    windows = [window(scene.store, 0, 4, 3, act, doc) for act, doc in ((1.0, "a"), (3.0, "b"), (2.0, "b"), (0.5, "c"))]
    other = replace(windows[1], kind="quantile", acts=(9.0, *windows[1].acts[1:]), peak=0, doc_id="z")
    assert [(e.doc_id, e.acts[e.peak]) for e in strongest([*windows, other], 2)] == [("b", 3.0), ("a", 1.0)]
    assert strongest([], 3) == []


def test_next_tokens_end_with_the_document_and_the_row() -> None:
    ids, doc = np.arange(10, 20), np.array([0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    assert next_tokens(ids, doc, 1, 8).tolist() == [12, 13]
    assert next_tokens(ids, doc, 7, 8).tolist() == [18, 19]
    assert next_tokens(ids, doc, 9, 8).tolist() == []
    assert next_tokens(ids, doc, 4, 1).tolist() == [15]


def test_a_finished_folder_is_read_again_and_half_precision_refused(scene: Any, tmp_path: Path) -> None:
    L = scene.store.tokens.L
    places = [n for n in scene.places if 20 <= n % L < L - 20][:4]
    windows = {scene.latent: [window(scene.store, n // L, n % L - 8, 8, 1 + i) for i, n in enumerate(places)], 63: []}
    table = types.SimpleNamespace(key="e" * 16, sae_id="tiny", latents=sorted(windows),
                                  exemplars=lambda latent, split: windows[latent])
    arguments: Any = (tmp_path, scene.subject, table, scene.store, scene.lm, HOOKPOINT)
    folder = build_effects(*arguments, windows=2)
    found = read_effects(folder)
    assert is_complete(folder) and sorted(found) == sorted(windows)
    assert found[scene.latent].n_windows >= 1 and found[scene.latent].loss_rise is not None
    assert found[63].failure is not None
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert build_effects(*arguments, windows=2) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert build_effects(*arguments, windows=1) != folder
    half = types.SimpleNamespace(dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="float32"):
        build_effects(tmp_path, scene.subject, table, scene.store, half, HOOKPOINT, windows=2)  # type: ignore[arg-type]
