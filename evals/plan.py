"""``--dry-run``: what would run, and what it would cost in minutes, memory, disk and LLM tokens.

Time = multiply-adds x 2 / measured speed of this machine; the speed is taken from one matrix product of the language
model's own shape, in the type that will be used. D = d_in, F = d_sae, P = parameters below the hookpoint.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autointerp.embedding_near import POOL_WINDOWS
from autointerp.estimate import planned, total
from autointerp.ledger import load_prices
from autointerp.vllm_engine import engines_planned
from evals.checks import (
    applicable,
    check_before_loading,
    check_context,
    check_disk,
    fitted,
    free_disk_gb,
    hookpoint_of,
)
from evals.effects import T_POSITIONS
from evals.more_tasks import named
from evals.probe_activations import ProbeConfig
from evals.run_config import RunConfig
from sae import console, loading
from sae.base import SAE
from sae.errors import ConfigError
from sae.language_model import LanguageModel, default_dtype
from sae.tokens import SPLITS

LM_EFFICIENCY = 0.75
"""Share of the plain product's speed that a whole forward pass reaches (attention, norms, softmax)."""
TRAIN_EFFICIENCY = 0.9
MORE_PROMPT_TOKENS = 25
"""Of a prompt of the tasks of ``--tasks``, on average: 12.5 of those that the default text leaves (docs/log.md)."""
EMBEDDED_PER_S = 47
"""Windows of 32 tokens by MiniLM in float64 on one core."""
PRODUCTS = {"topk": 1.1, "batchtopk": 1.2, "matryoshka": 1.6, "jumprelu": 1.2, "relu": 1.4, "gated": 1.3}
"""Time of a step over that of its encoder product (docs/log.md)."""


@dataclass(frozen=True)
class PlanLine:
    """One stage of the plan."""

    stage: str
    seconds: float
    detail: str
    disk_gb: float = 0.0
    llm_tokens: int = 0


def machine_flops(dtype: torch.dtype, device: str, rows: int = 1024, d: int = 576, width: int = 1536) -> float:
    """Multiply-adds x 2 per second of a [rows, d] x [d, width] product; best of five."""
    a = torch.randn(rows, d, device=device, dtype=dtype)
    b = torch.randn(d, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / 4)
    return 2 * rows * d * width / best


def block_parameters(lm: LanguageModel) -> tuple[int, int]:
    """(parameters of one block, parameters of the unembedding)."""
    total = sum(p.numel() for p in lm.model.parameters())
    embedding = lm.vocab_size * lm.d_model
    return max(1, (total - embedding) // lm.n_layers), embedding


def make_plan(cfg: RunConfig, lm: LanguageModel, hookpoint: str, d_in: int) -> list[PlanLine]:
    """Lines of the plan, in the order of the run."""
    speed = machine_flops(default_dtype(cfg.device), cfg.device)
    speed32 = machine_flops(torch.float32, cfg.device)
    block, unembed = block_parameters(lm)
    digits = [int(part) for part in hookpoint.split(":")[0].split(".") if part.isdigit()]
    below = block * ((digits[0] + 1) if digits else lm.n_layers)
    above = block * lm.n_layers - below + unembed
    lower_s = 2 * below / (speed * LM_EFFICIENCY)
    lower32_s, upper_s = 2 * below / (speed32 * LM_EFFICIENCY), 2 * above / (speed32 * LM_EFFICIENCY)
    lines = [PlanLine("tokens", 2 + sum(cfg.tokens.split_tokens(s) for s in SPLITS) / 40_000, "read, clean, tokenise")]
    for split in SPLITS:
        if split == "train" and cfg.sae:
            continue
        n = cfg.tokens.split_tokens(split)
        width = 4 if split == "test" else 2
        each = lower32_s if split == "test" else lower_s
        lines.append(
            PlanLine(f"activations: {split}", n * each, f"{n:,} tokens to {hookpoint}", n * d_in * width / 1e9)
        )
    n_saes = len(cfg.sae) or len(cfg.train_configs())
    if not cfg.sae:
        lines.append(_train_line(cfg, d_in, speed32))
    evaluations, _ = applicable(cfg)
    needs = frozenset().union(*(e.needs for e in evaluations))
    found = _interp_lines(cfg, n_saes + 1, lower_s, lower32_s + upper_s, lm.tokenizer)
    lines.extend(p for p in found if "scores" in needs or ("interp" in needs and p.stage == "latents"))
    if cfg.effect_windows and "scores" in needs:
        n = n_saes * cfg.interp.latents * cfg.effect_windows
        passed = n * (cfg.tokens.context_tokens // 2 + 2 * T_POSITIONS)
        lines.append(PlanLine("effects", passed * upper_s, f"{n} windows, {passed:,} tokens above the hookpoint"))
    for evaluation in evaluations:
        lines.append(_eval_line(evaluation, cfg, n_saes, lower_s, upper_s))
    lines.extend(_more_tasks_lines(cfg, lower_s))
    if cfg.random_model:
        lines.append(_random_model_line(lines, n_saes))
    lines.append(PlanLine("leaderboard and pages", 5, ""))
    return lines


def _more_tasks_lines(cfg: RunConfig, lower_s: float) -> list[PlanLine]:
    """Prompts of ``--tasks``: at most so many, since those trained on are left out."""
    names, sizes = named(cfg.tasks), ProbeConfig.of_preset(cfg.preset)
    tokens = 2 * sizes.cap_rows * len(names) * min(sizes.max_tokens, MORE_PROMPT_TOKENS)
    detail = f"up to {len(names)} tasks, {tokens:,} tokens; what was trained on is left out"
    return [PlanLine("probe prompts of more tasks", tokens * lower_s, detail)] if names else []


def _random_model_line(lines: list[PlanLine], n_saes: int) -> PlanLine:
    """Collecting its activations, one SAE more, and that SAE's share of latents, explanations and scores."""
    collecting = sum(p.seconds for p in lines if p.stage.startswith("activations"))
    training = sum(p.seconds for p in lines if p.stage == "train SAEs") / n_saes
    shared = sum(p.seconds for p in lines if p.stage in ("latents", "explanations", "scores")) / (n_saes + 1)
    disk = sum(p.disk_gb for p in lines if p.stage.startswith("activations"))
    return PlanLine("random-weights model", collecting + training + shared, "activations and one SAE anew", disk)


def _train_line(cfg: RunConfig, d_in: int, speed: float) -> PlanLine:
    t = cfg.train
    trained = [c.architecture for c in cfg.train_configs()]
    flops = sum(PRODUCTS.get(a, 1.6) * 2 * d_in * t.d_sae * t.train_tokens for a in trained)
    seeds = f" x {len(cfg.train_seeds)} seeds" if cfg.train_seeds else ""
    detail = f"{', '.join(cfg.architectures)}{seeds}; {t.d_sae:,} latents; {t.train_tokens:,} tokens each"
    disk = len(trained) * 2 * d_in * t.d_sae * 4 / 1e9
    return PlanLine("train SAEs", flops / (speed * TRAIN_EFFICIENCY), detail, disk)


def _interp_lines(
    cfg: RunConfig, n_subjects: int, lower_s: float, whole_s: float, tokenizer: Any
) -> list[PlanLine]:
    i, e = cfg.interp, cfg.exemplars
    dear = min(i.latents, i.costly_latents or i.latents)
    held = cfg.tokens.explain_tokens + cfg.tokens.calibrate_tokens + cfg.tokens.score_tokens
    k = cfg.train.k or 64
    lines = [
        PlanLine(
            "latents",
            n_subjects * held / 15_000,
            f"{n_subjects} SAEs x {held:,} tokens",
            n_subjects * held * k * 6 / 1e9,
        )
    ]
    n2g_tokens = i.latents * e.explain_random * 40 if "n2g" in i.explainers else 0
    windows = e.score_positive + e.score_silent + 2 * e.score_hard + e.calibrate_positive + e.calibrate_silent
    windows += e.score_embedding_near
    if e.score_embedding_near:
        held_windows = min(POOL_WINDOWS, cfg.tokens.score_tokens // e.window_tokens)
        texts = held_windows + n_subjects * i.latents * (e.explain_top + e.n_groups + e.explain_random)
        lines.append(PlanLine("exemplars", texts / EMBEDDED_PER_S, f"embedding_near: {texts:,} windows embedded"))
    llm_tokens = 0
    if "pmi" in i.explainers:
        llm_tokens += i.latents * 6 * 60
    asked = planned(i, e, tokenizer)
    local = i.client == "transformers"
    lines.append(
        PlanLine(
            "explanations",
            n_subjects * (n2g_tokens * lower_s + (i.latents * 6 * 60 * whole_s if local else 0)),
            f"{i.latents} latents of {n_subjects} SAEs by {', '.join(i.explainers)}",
        )
    )
    seconds = n_subjects * windows * (dear / 120 + i.latents / 1_000)
    if local:
        read = 3 * i.sizes.likelihood_windows * 66
        seconds += n_subjects * dear * read * whole_s * ("surprisal" in i.scorers)
    lines.append(
        PlanLine("scores", seconds, f"{', '.join(i.scorers)}; {windows} windows a latent", 0.0,
                 n_subjects * llm_tokens + total(asked, n_subjects).tokens)
    )
    return lines


def _eval_line(evaluation: Any, cfg: RunConfig, n_saes: int, lower_s: float, upper_s: float) -> PlanLine:
    """An evaluation may offer ``lm_tokens(preset, n_subjects) -> (tokens below, tokens above the hookpoint)``."""
    subjects = n_saes + 1
    estimate = getattr(evaluation, "lm_tokens", None)
    below, above = estimate(cfg.preset, subjects) if estimate else (0, 0)
    detail = f"{below:,} tokens below, {above:,} above the hookpoint" if below or above else "no LM pass"
    return PlanLine(f"eval: {evaluation.name}", 3 * subjects + below * lower_s + above * upper_s, detail)


def memory_gb(cfg: RunConfig, lm: LanguageModel, d_in: int) -> float:
    """Peak resident memory: interpreter and libraries, LM, SAEs with gradients and Adam, one encoded block."""
    n_parameters = sum(p.numel() for p in lm.model.parameters())
    lm_bytes = n_parameters * (4 if lm.dtype == torch.float32 else 4 + lm.dtype.itemsize)  # losses want float32 too
    copies = 1 if cfg.sae else 4  # what is not trained has no gradients and no moments
    saes = (len(cfg.sae) or len(cfg.train_configs())) * 2 * d_in * cfg.train.d_sae * 4 * copies
    block = 3 * cfg.train.batch_tokens * cfg.train.d_sae * 4
    logits = 2 * 1024 * lm.vocab_size * 4
    return 1.25 * (1.1e9 + lm_bytes + saes + max(block, logits)) / 1e9 + mapped_gb(cfg, d_in)


def mapped_gb(cfg: RunConfig, d_in: int) -> float:
    """Part of it: pages of the stores that were read, which the system drops when it wants the room."""
    return 1.25 * 2 * d_in * sum(cfg.tokens.split_tokens(s) for s in SPLITS) / 1e9


def _cost_text(cfg: RunConfig, tokenizer: Any) -> str:
    """What the language model would cost, where its price is given; :class:`ConfigError` where the table lacks it."""
    if cfg.interp.prices is None:
        return ""
    prices, model = load_prices(cfg.interp.prices), cfg.interp.llm or ""
    if model not in prices:
        raise ConfigError(f"{cfg.interp.prices} has no price of {model or 'the embedded model'!r} (--interp.llm)")
    n_subjects = (len(cfg.sae) or len(cfg.train_configs())) + 1
    whole = total(planned(cfg.interp, cfg.exemplars, tokenizer), n_subjects)
    tokens = f"{whole.prompt_tokens:,} prompt and {whole.output_tokens:,} output tokens"
    return f"{model}: {whole.requests:,} requests, {tokens}, {whole.cost_usd(prices[model]):.2f} US dollars at most"


def _sized(cfg: RunConfig, given: Sequence[SAE]) -> RunConfig:
    """With the width and k of the largest SAE given, where some are: what is not trained is estimated as it is."""
    if not given:
        return cfg
    largest = max(given, key=lambda sae: sae.d_sae)
    k = largest.cfg.k if largest.cfg.k is not None else min(cfg.train.k or 64, largest.d_sae)
    return replace(cfg, train=replace(cfg.train, d_sae=largest.d_sae, k=k))


def print_plan(cfg: RunConfig) -> None:
    """Print the plan; reads the model (seconds), computes nothing else."""
    engines = engines_planned(cfg.interp.replicas, cfg.interp.engine_options()) if cfg.interp.client == "vllm" else ""
    check_before_loading(cfg)
    given = [loading.load(path) for path in cfg.sae]
    cfg = fitted(cfg, given)
    lm = LanguageModel.load(cfg.model, dtype=default_dtype(cfg.device), device=cfg.device)
    check_context(cfg, lm)
    hookpoint = hookpoint_of(cfg, lm, given)
    cfg = _sized(cfg, given)
    d_in = lm.check_hookpoint(hookpoint)
    lines = make_plan(cfg, lm, hookpoint, d_in)
    rows = [
        (
            p.stage,
            f"{p.seconds / 60:.1f}",
            f"{p.disk_gb:.2f}" if p.disk_gb else "",
            f"{p.llm_tokens:,}" if p.llm_tokens else "",
            p.detail,
        )
        for p in lines
    ]
    disk = sum(p.disk_gb for p in lines)
    rows.append(
        (
            "total",
            f"{sum(p.seconds for p in lines) / 60:.1f}",
            f"{disk:.2f}",
            f"{sum(p.llm_tokens for p in lines):,}",
            "",
        )
    )
    console.table(
        f"Plan: preset {cfg.preset}, {lm.name} at {hookpoint}",
        ("stage", "minutes", "disk GB", "LLM tokens", "detail"),
        rows,
        right=(1, 2, 3),
    )
    memory, mapped = memory_gb(cfg, lm, d_in), mapped_gb(cfg, d_in)
    pages = f", {mapped:.1f} of them pages of activations that need not stay" if mapped > 0.1 * memory else ""
    console.say(
        f"memory: about {memory:.1f} GB{pages}; "
        f"disk: {disk:.2f} GB of {free_disk_gb(Path(cfg.root)):.1f} GB free"
    )
    if engines:
        console.say(engines)
    if cost := _cost_text(cfg, lm.tokenizer):
        console.say(cost)
    check_disk(cfg, hookpoint, d_in)
    console.say("Stages that are complete under the same configuration are reused; nothing was run.")
