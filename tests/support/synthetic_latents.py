"""Latents of a made-up run with exemplars, explanations, scores and verdicts, for tests of pages."""

from typing import Any

import numpy as np
from synthetic_results import RELU, TOPK

from autointerp.records import (
    ActivationScale,
    Exemplar,
    Explanation,
    Failure,
    JudgeCheck,
    LatentScore,
    ScoreItem,
    Simulation,
)
from evals.effect_records import LatentEffect
from evals.page_data import LatentData, SaeData
from evals.page_tokens import TokenReader

WORDS = [
    " the",
    " court",
    " of",
    " appeals",
    " held",
    " that",
    " law",
    " must",
    " stand",
    ",",
    " and",
    " cell",
    " growth",
    ".",
]


def reader(extra: dict[int, str] | None = None) -> TokenReader:
    """Token i is WORDS[i]; more by ``extra``."""
    texts = dict(enumerate(WORDS)) | (extra or {})
    return TokenReader(lambda ids: "".join(texts[i] for i in ids))


def exemplar(i: int, kind: str, split: str, *, group: int = -1, ids: tuple[int, ...] | None = None) -> Exemplar:
    """Active on "court" (1) and a little on "law" (6) where the kind is positive."""
    rng = np.random.default_rng(i)
    token_ids = ids or tuple(int(t) for t in rng.integers(len(WORDS), size=32))
    positive = kind in ("top", "quantile", "random_positive")
    acts = tuple((3.7 - 0.1 * (i % 9) if t == 1 else 0.6 if t == 6 else 0.0) if positive else 0.0 for t in token_ids)
    if positive and max(acts) == 0:
        acts = (2.2, *acts[1:])
    return Exemplar(
        exemplar_id=f"{split}-{kind}-{i}",
        latent=17,
        kind=kind,
        split=split,
        group=group,
        doc_id=f"d{split}{i}",
        source="36_sciq_tf.csv",
        token_ids=token_ids,
        acts=acts,
        peak=int(np.argmax(acts)) if positive else -1,
    )


def latent(number: int = 17, sae_id: str = TOPK) -> LatentData:
    """A latent with four explanations (one failed), scores with floors, verdicts (one failed) and simulations."""
    exemplars = [exemplar(i, "top", "explain") for i in range(4)]
    exemplars += [exemplar(10 + i, "quantile", "explain", group=i) for i in range(3)]
    exemplars += [exemplar(20 + i, "random_positive", "explain") for i in range(3)]
    positive = [exemplar(30 + i, "quantile", "score", group=i % 5) for i in range(6)]
    silent = [exemplar(50 + i, "silent", "score") for i in range(5)] + [
        exemplar(60 + i, "same_token", "score") for i in range(3)
    ]
    pattern = {
        "version": 1,
        "matcher": "longest",
        "pad_id": 0,
        "tokenizer_hash": "",
        "patterns": [
            {"ids": [0, None, 1], "anchored": False, "value": 3.1, "n_docs": 5},
            {"ids": [1], "anchored": True, "value": 2.0, "n_docs": 1},
        ],
    }
    base: dict[str, Any] = {"sae_id": sae_id, "latent": number}
    explanations = [
        Explanation(
            explanation_id="e-list",
            explainer="token_list",
            text="words such as court, law",
            calibrate_score=0.74,
            selected=True,
            **base,
        ),
        Explanation(
            explanation_id="e-n2g", explainer="n2g", text='"... the * court"', pattern=pattern, selected=False, **base
        ),
        Explanation(
            explanation_id="e-pmi",
            explainer="pmi",
            text="legal terms",
            margin=0.31,
            calibrate_score=0.69,
            selected=False,
            llm="SmolLM2-135M-Instruct",
            prompt_tokens=1600,
            output_tokens=9,
            **base,
        ),
        Explanation(
            explanation_id="e-llm",
            explainer="highlighted",
            selected=False,
            llm="some-model",
            failure=Failure(code="no_json", stage="explain", detail="the reply held no object"),
            **base,
        ),
    ]
    score: dict[str, Any] = {
        **base,
        "explanation_id": "e-list",
        "explainer": "token_list",
        "scorer_version": 1,
        "n_pos": 6,
        "n_neg": 8,
    }
    embedding: dict[str, Any] = {**score, "scorer": "embedding", "judge": "minilm"}
    scores = [
        LatentScore(metric="auc", value=0.83, ci_low=0.71, ci_high=0.93, n_failed=1, base_rate=0.01, **embedding),
        LatentScore(metric="precision", value=0.09, ci_low=0.02, ci_high=0.3, base_rate=0.01, **embedding),
        LatentScore(metric="recall", group="decile=1", value=0.5, ci_low=0.1, ci_high=0.9, **embedding),
        LatentScore(
            metric="auc",
            value=0.52,
            ci_low=0.4,
            ci_high=0.64,
            floor_kind="shuffled",
            **{**embedding, "explanation_id": "e-other"},
        ),
        LatentScore(
            metric="pearson",
            value=0.41,
            ci_low=0.2,
            ci_high=0.6,
            **{**score, "scorer": "simulation", "judge": "word_embedding/minilm"},
        ),
        LatentScore(
            metric="auc", null_reason="no_json", **{**embedding, "explanation_id": "e-llm", "explainer": "highlighted"}
        ),
    ]
    items = [
        ScoreItem(
            explanation_id="e-list",
            exemplar_id=e.exemplar_id,
            scorer="embedding",
            positive=e.positive,
            value=0.4 if e.positive else 0.1,
            verdict=e.positive if i != 2 else not e.positive,
        )
        for i, e in enumerate([*positive, *silent[:-1]])
    ]
    items.append(
        ScoreItem(
            explanation_id="e-list",
            exemplar_id=silent[-1].exemplar_id,
            scorer="embedding",
            positive=False,
            failure=Failure(code="timeout", stage="score"),
        )
    )
    items.append(
        ScoreItem(
            explanation_id="e-list", exemplar_id=silent[0].exemplar_id, scorer="simulation", positive=False, value=0.35
        )
    )
    simulations = [
        Simulation(
            explanation_id="e-list",
            exemplar_id=e.exemplar_id,
            simulator="word_embedding",
            scale=ActivationScale.UNIT,
            values=tuple(0.8 if t == 1 else 0.35 if t == 6 else 0.08 for t in e.token_ids),
        )
        for e in [*positive[:-1], *silent[:2]]
    ]
    simulations.append(
        Simulation(
            explanation_id="e-list",
            exemplar_id=positive[-1].exemplar_id,
            simulator="word_embedding",
            failure=Failure(code="low_mass", stage="simulate"),
        )
    )
    stats = {
        "density": 0.0031,
        "pi": 0.01,
        "max_act": 3.7,
        "mean_positive": 1.2,
        "n_active": 811,
        "skew": 21.0,
        "kurtosis": 600.0,
        "histogram": np.array([300, 200, 120, 80, 50, 30, 20, 8, 2, 1]),
    }
    return LatentData(
        latent=number,
        sae_id=sae_id,
        stats=stats,
        top_ids=(1, 6),
        promoted=(" judge", " ruling"),
        suppressed=(" cat",),
        effect=LatentEffect(
            sae_id=sae_id, latent=number, n_windows=3, n_tokens=24, loss_rise=0.0321, kl=0.0696,
            raised=((" one", 0.05348), (" a", 0.0085), (" x", -0.001)), lowered=((" get", -0.0057),),
            failures={"no_active_latent": 1},
        ),
        exemplars=[*exemplars, *positive, *silent],
        explanations=explanations,
        scores=scores,
        items=items,
        simulations=simulations,
    )


def site_data(n_latents: int = 3) -> dict[str, SaeData]:
    """What load_site_data would read of the made-up run."""
    import pandas as pd

    rng = np.random.default_rng(0)
    steps = np.arange(1, 129)
    data = {}
    for sae_id in (TOPK, RELU):
        density = 10 ** rng.uniform(-5, -1.3, size=4608)
        density[:280] = 0
        data[sae_id] = SaeData(
            sae_id=sae_id,
            cfg={"architecture": "topk", "d_sae": 4608, "meta": {"lm": "SmolLM2-135M"}},
            train=pd.DataFrame(
                {
                    "step": steps,
                    "tokens": steps * 4096,
                    "loss": 1 / np.sqrt(steps),
                    "fvu": 0.2 + 1 / steps,
                    "l0": np.full(128, 32.0),
                    "dead": np.minimum(steps * 3, 281),
                }
            ),
            stats=pd.DataFrame({"density": density}),
            latents=[latent(17 + 5 * i, sae_id) for i in range(n_latents)],
            tokens=reader(),
            checks=[
                JudgeCheck(
                    judge="minilm",
                    scorer="embedding",
                    auc=0.84,
                    ci_low=0.78,
                    ci_high=0.9,
                    wrong_auc=0.46,
                    n=24,
                    weak=False,
                ),
                JudgeCheck(
                    judge="word_embedding/minilm",
                    scorer="simulation",
                    auc=0.71,
                    ci_low=0.6,
                    ci_high=0.8,
                    wrong_auc=0.6,
                    n=24,
                    n_failed=1,
                    weak=True,
                ),
            ],
        )
    return data
