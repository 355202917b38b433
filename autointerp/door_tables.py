"""What the doors ``explain`` and ``score`` print: an estimate before, means of scores after. Torch-free."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sae import console
from sae.errors import ConfigError

if TYPE_CHECKING:
    from autointerp.exemplars import ExemplarTable
    from autointerp.workplace import Workplace


def say_estimate(
    place: "Workplace", tokenizer: Any, explainers: Sequence[Any], scorers: Sequence[Any], table: "ExemplarTable"
) -> None:
    """A table of what would be asked, and what it would cost. No client is opened: no key, no engine, no weights."""
    from autointerp.estimate import capabilities_of, estimate, total
    from autointerp.ledger import load_prices

    stages = estimate(
        explainers, scorers, table.config, latents=len(table.latents), tokenizer=tokenizer,
        capabilities=capabilities_of(place.client, next_token=place.next_token), embedder=place.embedder != "none",
    )  # fmt: skip
    model = place.llm or ("the embedded model" if place.client in ("transformers", "vllm") else place.client)
    price = load_prices(place.prices).get(model)
    rows = [
        (s.stage, f"{s.requests:,}", f"{s.prompt_tokens:,}", f"{s.output_tokens:,}",
         "" if price is None else f"{s.cost_usd(price):.4f}")
        for s in (*stages, total(stages, 1))
    ]  # fmt: skip
    if price is None and (place.prices is not None or place.max_cost_usd is not None):
        raise ConfigError(f"{place.prices or '--max-cost-usd'}: no price of {model!r}; give it in --prices FILE")
    columns = ("stage", "requests", "prompt tokens", "output tokens at most", "US dollars at most")
    console.table(f"{place.sae_id}: {len(table.latents)} latents, {model}", columns, rows, right=(1, 2, 3, 4))


def say_scores(sae_id: str, found: Any) -> None:
    """Per scorer and explainer the mean of each headline over latents, with its floor and the judge's check."""
    import numpy as np

    headline = ("auc", "balanced_accuracy", "accuracy", "pearson", "surprisal_gain", "choice", "choice_likelihood")
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for s in found.scores:
        if not s.group and s.metric in headline and s.value is not None:
            values.setdefault((s.scorer, s.explainer, s.metric, s.floor_kind), []).append(s.value)
    weak = {c.scorer: c.weak for c in found.checks}
    rows = []
    for (scorer, explainer, metric, floor), mine in sorted(values.items()):
        if not floor:
            under = values.get((scorer, explainer, metric, "shuffled"))
            below = "" if not under else f"{np.mean(under):.3f}"
            note = "weak judge" if weak.get(scorer) else ""
            rows.append((scorer, explainer, metric, f"{np.mean(mine):.3f}", below, len(mine), note))
    console.table(sae_id, ("scorer", "explainer", "metric", "mean", "shuffled", "latents", ""), rows, right=(3, 4, 5))
