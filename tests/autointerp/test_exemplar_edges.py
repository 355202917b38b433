"""Exemplars at the edges: equal documents, repeated windows, latents that never, always or once fire, or are broken."""

import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from held_out import activations, documents, pack, random_sae, store, stores

from autointerp.config import ExemplarConfig
from autointerp.documents import assert_disjoint, content_hashes
from autointerp.exemplar_draws import read_texts
from autointerp.exemplars import build_exemplars
from autointerp.explainers.token_list import PLUGIN as TokenList
from autointerp.interfaces import ExplainContext
from autointerp.latent_cache import build_latents, sample_latents
from autointerp.records import NEGATIVE_KINDS
from sae.errors import LeakError

SPLITS = ("explain", "calibrate", "score")
CFG = ExemplarConfig(
    window_tokens=12, min_window_tokens=4, left_tokens=8, explain_top=6, explain_silent=5, explain_random=8,
    calibrate_positive=4, calibrate_silent=4, score_positive=12, score_silent=14, score_hard=6, min_windows=(6, 3, 8),
)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return stores(tmp_path_factory.mktemp("text"))


def test_equal_documents_are_known_by_their_tokens(tmp_path):
    docs = [list(range(1, 40)), [5] * 9, list(range(1, 40)), [5] * 8, [6] * 7, list(range(2, 50))]
    tokens = pack([*docs, [9] * 70], "explain", tmp_path)  # the last one fills the row that would be left out
    found = content_hashes(tokens)
    assert found[0] == found[2] and len(set(found[:4])) == 3 and found[4] == "" and found[5] not in found[:5]
    other = pack([[7] * 30, [6] * 7, [9] * 70], "score", tmp_path)
    with pytest.raises(LeakError, match="file2"):
        assert_disjoint({"explain": tokens, "score": pack([[7] * 30, [8] * 9, [5] * 9, [9] * 71], "score", tmp_path)})
    assert content_hashes(other)[1] == ""
    assert_disjoint({"explain": pack([*docs, [3] * 70], "explain", tmp_path), "score": other})  # seven tokens are none


def test_windows_that_recur_do_not_make_a_latent_eligible(tmp_path):
    """Every document of score begins with a text that all documents of explain begin with; a latent that fires there
    alone has as many windows as anyone, and none that may be scored."""
    header = [*documents("header", 1)[0][:10], 58, 59]
    docs = {s: [(header if s != "calibrate" else []) + d for d in documents(s, 60)] for s in SPLITS}
    docs["calibrate"] = [[*d, 58, 59] for d in docs["calibrate"]]
    held = {s: store(pack(docs[s], s, tmp_path), tmp_path, keep="all") for s in SPLITS}
    sae, where = random_sae("relu", d_sae=2), activations(np.array([[58, 59]]))[1]

    def encode(x_ND):
        z = torch.zeros(len(x_ND), 2)
        z[:, 0] = ((x_ND - where).abs().amax(1) < 1e-4).float()  # on 59 after 58
        z[::3, 1] = 1.0
        return z, torch.arange(2).expand(len(x_ND), 2)

    object.__setattr__(sae, "encode_sparse", encode)
    cache = build_latents(tmp_path, sae, held, window_tokens=12, min_window_tokens=4)
    cfg = replace(CFG, min_windows=(6, 3, 20))
    assert cache.eligible(cfg).tolist() == [0, 1] and len(cache.positive_windows(0, "score")) > 50
    table = build_exemplars(tmp_path, cache, [0, 1], cfg)
    allowed = read_texts(cache)[0]["score"].allowed
    left = int(allowed[cache.positive_windows(0, "score")].sum())
    assert 0 < left < 20 and table.latents == [1]  # rows cut some of the texts elsewhere
    [failure] = table.failures_of(0)
    assert failure.code == "too_few_positive" and f"{left} of 20 positive windows on split score" in failure.detail
    assert table.counts["failures"]["too_few_positive"] == 1 and table.counts["n_requested"] == 2


class Chosen:
    """An SAE whose codes are said: latent 0 is always on, latent 1 fires once a split, latent 2 on one token, latent 3
    never, latent 4 at random, latent 5 likewise but is NaN once, latent 6 infinite once."""

    def __init__(self) -> None:
        self.sae = random_sae("relu", d_sae=7)
        self.seen = 0

    def __call__(self, x_ND):
        n = len(x_ND)
        z = np.zeros((n, 7), dtype=np.float32)
        z[:, 0] = 1 + np.arange(n) % 5
        z[n // 2, 1] = 3.0
        z[(x_ND[:, 0] > 1.5).numpy(), 2] = 2.0
        z[:, 4:] = np.maximum(np.random.default_rng(self.seen).random((n, 3)).astype(np.float32) - 0.9, 0)
        z[9, 5], z[11, 6] = np.nan, np.inf
        self.seen += 1
        return torch.from_numpy(z), torch.arange(7).expand(n, 7)


def test_edge_latents_have_typed_results(held_out, tmp_path):
    """Dead, always on, once, one token, NaN, infinite: a record or a failure with a name, and no warning on the way."""
    chosen = Chosen()
    object.__setattr__(chosen.sae, "encode_sparse", chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = build_latents(tmp_path, chosen.sae, held_out, window_tokens=12, min_window_tokens=4, block_tokens=10**6)
        table = build_exemplars(tmp_path, cache, range(7), replace(CFG, min_windows=(1, 1, 1)))
        strict = build_exemplars(tmp_path, cache, range(7), CFG)
    assert cache.stats["n_non_finite"].tolist() == [0, 0, 0, 0, 0, 3, 3]
    assert np.isfinite(cache.stats[["max_act", "mean_act", "mean_act_squared"]].to_numpy()).all()
    assert {i: [f.code for f in table.failures_of(i)] for i in (3, 5, 6)} == {
        3: ["dead"], 5: ["non_finite"], 6: ["non_finite"]
    }  # fmt: skip
    assert table.latents == [0, 1, 2, 4] and strict.latents == [0, 2, 4]
    assert strict.failures_of(1)[0].code == "too_few_positive"
    always = Counter(e.kind for s in SPLITS for e in table.exemplars(0, s))
    assert not set(always) & set(NEGATIVE_KINDS) and always["quantile"] >= 12 and always["top"] == 6
    assert {f.code for f in table.failures_of(0)} == {"no_hard_negative"}
    once = {s: [e for e in table.exemplars(1, s) if e.positive] for s in SPLITS}
    assert [len(once[s]) for s in ("calibrate", "score")] == [1, 1] and {e.peak >= 0 for e in once["score"]} == {True}
    # Once in explain: the strongest window, and the drawn activation; as a quantile it would be the same again.
    assert sorted(e.kind for e in once["explain"]) == ["random_positive", "top"]
    assert all(sorted(e.acts)[-2:] == [0.0, 3.0] for s in SPLITS for e in once[s])
    sample = sample_latents(cache, 100, 0, replace(CFG, min_windows=(1, 1, 1)))
    assert sample.latents.tolist() == [0, 1, 2, 4] and sample.alive == 6


def test_another_text_of_the_split_score_changes_nothing_that_an_explainer_sees(held_out, tmp_path):
    """Views, what is chosen by, and a text made of them: byte for byte, whatever will be scored."""
    other = held_out | {"score": store(pack(documents("elsewhere", 150), "score", tmp_path), tmp_path)}
    seen = []
    for number, held in enumerate((held_out, other)):
        cache = build_latents(tmp_path / str(number), random_sae(), held, window_tokens=12, min_window_tokens=4)
        table = build_exemplars(tmp_path / str(number), cache, range(64), CFG)
        views = {i: table.view(i, tokenizer=Ids()) for i in table.latents}
        texts = {i: TokenList().explain_many([v], ExplainContext(tokenizer=Ids()))[0][0].text for i, v in views.items()}
        seen.append({
            i: ([bare(e) for e in views[i].exemplars], [bare(e) for e in table.scored(i, "calibrate")],
                replace(views[i], exemplars=()), texts[i], [bare(e) for e in table.scored(i)])
            for i in views
        })  # fmt: skip
    first, second = seen
    both = sorted(first.keys() & second.keys())
    assert len(both) > 30 and all(first[i][:4] == second[i][:4] for i in both)
    assert all(first[i][4] != second[i][4] for i in both)


class Ids:
    """A tokenizer whose texts are the ids."""

    def decode(self, ids):
        return "".join(f" w{int(i)}" for i in ids)


def bare(exemplar):
    """Without the id, which begins with the key of the cache."""
    return replace(exemplar, exemplar_id="")
