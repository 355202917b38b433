"""The estimate before a run against what the same run then asks; cost limits."""

from pathlib import Path

import pytest
from held_out import random_sae, stores
from judges import COIN, TOKENIZER

from autointerp import pipeline
from autointerp.client import CachedClient, Capabilities, GenerateRequest, Message, Reply, Usage
from autointerp.clients.scripted import ScriptedClient
from autointerp.config import ExemplarConfig, InterpConfig
from autointerp.estimate import _typical_reply, estimate, total
from autointerp.exemplars import build_exemplars
from autointerp.interfaces import ExplainContext, ScoreContext
from autointerp.latent_cache import build_latents
from autointerp.ledger import Ledger, Price
from autointerp.pipeline import load_plugins
from sae.errors import BudgetExceeded, ConfigError

CFG = ExemplarConfig(
    window_tokens=16, min_window_tokens=16, left_tokens=10, n_groups=4, explain_top=6, explain_silent=6,
    explain_random=4, calibrate_positive=4, calibrate_silent=4, score_positive=8, score_silent=8, score_hard=4,
    min_windows=(8, 4, 10),
)  # fmt: skip
LISTED, PROBED = Capabilities(structured="json_schema"), Capabilities(next_token=True, continuation=True)


@pytest.fixture(scope="module")
def exemplars(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("estimate")
    cache = build_latents(root, random_sae(), stores(root), window_tokens=16, min_window_tokens=16)
    return build_exemplars(root, cache, cache.eligible(CFG)[:4], CFG)


def typical(request):
    """What a model might say, as long as the estimate thinks."""
    import json

    return json.dumps(_typical_reply(request)) if request.verb == "generate" else COIN(request)


@pytest.mark.parametrize(
    ("explainers", "scorers", "candidates", "capabilities"),
    [
        (("highlighted", "token_list"), ("detection", "fuzzing"), 1, LISTED),
        (("highlighted", "token_activation", "contrastive"), ("detection", "intruder"), 3, LISTED),
        (("token_list",), ("detection", "fuzzing", "intruder", "surprisal"), 1, PROBED),
        (("token_list",), ("simulation",), 1, LISTED),
    ],
)
def test_the_estimate_is_near_what_is_asked(
    tmp_path: Path, exemplars, explainers, scorers, candidates, capabilities
) -> None:
    backend = ScriptedClient(typical, tokenizer=TOKENIZER, capabilities=capabilities)
    client = CachedClient(backend)
    ctx = ExplainContext(client=client, tokenizer=TOKENIZER)
    scoring = ScoreContext(client=client, tokenizer=TOKENIZER)
    cfg = InterpConfig(explainers=explainers, scorers=scorers, candidates=candidates, simulator="structured")
    plugins = load_plugins(cfg, ctx, scoring)
    stages = estimate(
        *plugins, CFG, latents=4, tokenizer=TOKENIZER, capabilities=capabilities, embedder=False
    )
    whole = total(stages, 1)
    folder = pipeline.explain(tmp_path, exemplars, plugins[0], ctx)
    pipeline.score(tmp_path, folder, exemplars, plugins[1], scoring)
    sent = backend.sent
    prompt = sum(sum(len(m.content.encode()) + 4 for m in r.messages) for r in sent if r.verb != "continuation")
    prompt += sum(
        len(r.prompt.encode()) + sum(len(c.encode()) for c in r.continuations)
        for r in sent if r.verb == "continuation"
    )  # fmt: skip
    assert whole.requests == pytest.approx(len(sent), rel=0.1)
    assert whole.prompt_tokens == pytest.approx(prompt, rel=0.1)
    if capabilities is LISTED:
        output = client.ledger.totals()["output_tokens"]
        assert whole.output_tokens == pytest.approx(output, rel=0.3)
    assert all(s.requests > 0 and s.prompt_tokens > 0 for s in stages)


def test_what_grows_and_what_does_not() -> None:
    ctx = ExplainContext(client=CachedClient(ScriptedClient(COIN, tokenizer=TOKENIZER)), tokenizer=TOKENIZER)
    scoring = ScoreContext(client=ctx.client, tokenizer=TOKENIZER)
    cfg = InterpConfig(explainers=("highlighted",), scorers=("detection", "surprisal"))
    plugins = load_plugins(cfg, ctx, scoring)
    few, many = (
        {s.stage: s for s in estimate(*plugins, CFG, latents=n, tokenizer=TOKENIZER, capabilities=PROBED)}
        for n in (20, 200)
    )
    assert many["score.detection"].prompt_tokens == pytest.approx(10 * few["score.detection"].prompt_tokens, rel=0.01)
    assert many["score.surprisal"] == few["score.surprisal"]  # of a few latents, however many there are
    assert many["check.detection"] == few["check.detection"] and many["check.detection"].once
    assert total(list(many.values()), 3).requests == sum(s.requests * (1 if s.once else 3) for s in many.values())
    price = Price(prompt=1.0, cached=0.5, output=4.0)
    e = few["explain.highlighted"]
    assert e.cost_usd(price) == pytest.approx((e.prompt_tokens + 4 * e.output_tokens) / 1e6)
    assert e.cost_usd(None) is None


# --- a limit on the cost ---------------------------------------------------------------------------------------------


def ask(i: int) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=f"{i:03d}"),), max_tokens=10)


def limited(usd: float, answer=None, model: str = "m") -> CachedClient:
    used = Usage(prompt_tokens=1, output_tokens=2)
    backend = ScriptedClient(answer or (lambda r: Reply(text="x", usage=used)), model=model)
    return CachedClient(backend, ledger=Ledger({"m": Price(prompt=1e6, cached=0.0, output=1e6)}), max_cost_usd=usd)


def test_the_cost_limit_stops_before_it_is_passed() -> None:
    """A dollar a token. A request may cost 5 + 10 and costs 3: rounds are reserved at 15 and settled at 3."""
    client = limited(40.0)
    with pytest.raises(BudgetExceeded, match=r"40 US dollars.*--max-cost-usd"):
        client.generate([ask(i) for i in range(30)])
    assert client.spent_usd == 3.0 * len(client.backend.sent) <= 40.0 < client.spent_usd + 15 + 3
    assert len(limited(15.0 * 4).generate([ask(i) for i in range(4)])) == 4


def test_a_limit_without_a_price_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="--interp.prices"):
        limited(1.0, model="unknown")


def test_what_is_cached_costs_nothing(tmp_path: Path) -> None:
    from autointerp.reply_cache import ReplyCache

    cache = ReplyCache(tmp_path / "r.sqlite")
    first = limited(1000.0)
    first.cache = cache
    first.generate([ask(i) for i in range(5)])
    again = limited(1.0)
    again.cache = cache
    assert len(again.generate([ask(i) for i in range(5)])) == 5 and again.spent_usd == 0.0
