"""Coverage of an SAE's explanations, and scores beside those of shuffled ones."""

from dataclasses import replace

import synthetic_latents as synthetic
from synthetic_results import TOPK

from evals.latent_page import score_columns
from evals.page_data import SaeData
from evals.page_scores import coverage, distributions


def test_scores_stand_beside_their_floors() -> None:
    sae = synthetic.site_data()[TOPK]
    columns = score_columns(sae)
    found = {d["title"]: d for d in distributions(sae, columns)}
    auc = found["embedding auc"]
    assert auc["n"] == 3 and auc["value"].startswith("0.83 (") and auc["floor"].startswith("0.52 (")
    assert auc["above"] == "3 of 3" and "floor" in auc["svg"] and 'class="line floor"' in auc["svg"]
    for latent in sae.latents[:2]:
        latent.scores = [replace(s, value=None, null_reason="too_few_positive") for s in latent.scores]
    gone = next(d for d in distributions(sae, columns) if d["title"] == "embedding auc")
    assert gone["n"] == 1 and gone["nulls"] == "too_few_positive 2"
    facts = dict(coverage(sae))
    assert facts["Chosen for explanation"] == "3" and facts["Scored"] == "3" and "Failed explanations" in facts
    assert coverage(SaeData(sae_id="none")) == [] and distributions(SaeData(sae_id="none"), []) == []
