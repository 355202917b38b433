"""The explaining half of the main job: contexts, explanations, scores, one SAE after the other.

V vocabulary, D = d_in.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from autointerp import pipeline
from autointerp.client import CachedClient, open_client
from autointerp.estimate import estimate, total
from autointerp.exemplars import ExemplarTable
from autointerp.interfaces import EmbedderLike, ExplainContext, ScoreContext
from autointerp.last_acts import make_last_acts
from autointerp.ledger import Ledger, load_prices
from autointerp.output_tokens import output_tokens
from autointerp.records import EXPLAIN
from autointerp.vllm_engine import engines_planned
from evals.effects import build_effects
from evals.run_config import RunConfig
from evals.run_log import RunLog
from evals.stages import Pipeline
from sae.base import SAE
from sae.errors import BudgetExceeded, ConfigError

_LATER = object()
"""Stands for the SAE, where only the needs of a scorer are looked at."""
logger = logging.getLogger(__name__)


class Interpretation:
    """Explanations and scores of every SAE of a run."""

    def __init__(self, cfg: RunConfig, stages: Pipeline, log: RunLog) -> None:
        self.cfg, self.stages, self.log = cfg, stages, log
        # Before any work: unknown names and missing needs are errors now, not in an hour.
        if cfg.interp.client == "vllm":
            logger.info("%s", engines_planned(cfg.interp.replicas, cfg.interp.engine_options()))
        explaining, scoring = self.explain_context(None), replace(self.score_context, sae=_LATER)  # type: ignore[arg-type]
        self.explainers, self.scorers = pipeline.load_plugins(cfg.interp, explaining, scoring)

    @cached_property
    def client(self) -> CachedClient:
        """The LLM back-end behind the reply cache; `transformers` without a model name is the subject LM itself."""
        i = self.cfg.interp
        named = {"model": i.llm} | ({"revision": i.llm_revision} if i.llm_revision else {})
        options: dict[str, Any] = {}
        if i.client == "openai":
            known = {"concurrency": i.concurrency, "timeout_s": i.timeout_s, "next_token": i.next_token}
            options = {**named, "base_url": i.base_url, **known}
        elif i.client == "vllm":
            options = {**named, "replicas": i.replicas, **i.engine_options()}
        elif i.client == "replay":
            options = {**named, "next_token": i.next_token}
        elif i.client == "batch":
            options = {**named, "folder": self.cfg.root / "batch"}
        elif i.client == "transformers":
            options = {**named, "device": self.cfg.device} if i.llm else {"lm": self.stages.lm_float32()}
        elif i.base_url or i.llm:
            raise ConfigError(f"--interp.client {i.client} takes no --interp.llm or --interp.base-url")
        return open_client(
            i.client, replies=self.cfg.root / "replies.sqlite", max_tokens=i.max_llm_tokens,
            max_cost_usd=i.max_cost_usd, ledger=Ledger(load_prices(i.prices)), **options,
        )  # fmt: skip

    @cached_property
    def embedder(self) -> EmbedderLike | None:
        """The sentence embedding model of the embedded judges."""
        return self.stages.embedder

    @cached_property
    def score_context(self) -> ScoreContext:
        lm = self.stages.lm_float32()
        return ScoreContext(
            seed=self.cfg.seed, client=self.client, embedder=self.embedder, lm=lm, tokenizer=lm.tokenizer,
            check_descriptions=self.cfg.interp.sizes.check_descriptions,
        )  # fmt: skip

    def explain_context(self, sae: SAE | None) -> ExplainContext:
        """Context of one SAE; without one, a context that answers which needs can be met."""
        lm = self.stages.lm()
        hookpoint = self.stages.hookpoint
        last_acts = make_last_acts(lm, sae, hookpoint) if sae is not None else (lambda probes: torch.empty(0).numpy())
        return ExplainContext(
            seed=self.cfg.seed,
            client=self.client,
            embedder=self.embedder,
            lm=lm,
            sae=sae,
            tokenizer=lm.tokenizer,
            hookpoint=hookpoint,
            last_acts=last_acts,
        )

    def note_estimate(self) -> None:
        """Say and note what will be asked of a model that is paid for, before it is."""
        if self.client.capabilities.local:
            return
        i = self.cfg.interp
        stages = estimate(
            self.explainers, self.scorers, self.cfg.exemplars, latents=i.latents,
            tokenizer=self.stages.lm().tokenizer, capabilities=self.client.capabilities,
            embedder=i.embedder != "none", check_descriptions=i.sizes.check_descriptions,
        )  # fmt: skip
        whole = total(stages, len(self.stages.saes))
        cost = whole.cost_usd(self.client.price)
        self.log.notes["llm_estimate"] = {
            "requests": whole.requests, "prompt_tokens": whole.prompt_tokens, "output_tokens": whole.output_tokens,
            "cost_usd": cost, "stages": [vars(s) for s in stages],
        }  # fmt: skip
        logger.info(
            "%s: about %s requests, %s prompt and %s output tokens at most%s, less what is in the reply cache",
            self.client.identity.model, f"{whole.requests:,}", f"{whole.prompt_tokens:,}", f"{whole.output_tokens:,}",
            "" if cost is None else f", {cost:.2f} US dollars",
        )  # fmt: skip

    @contextmanager
    def _ledger_kept(self) -> Iterator[None]:
        """Whatever stops the work inside, what was asked and paid is written."""
        try:
            yield
        finally:
            if self.client.ledger.entries:  # a run that found everything done has nothing to add
                self.client.ledger.write(self.cfg.root / "ledger.parquet")

    @cached_property
    def explanations(self) -> dict[str, Path]:
        """Folder of explanations by sae_id."""
        tables, folders = self.stages.exemplars, {}
        self.note_estimate()
        with self.log.stage("explanations") as stage, self._ledger_kept():
            for sae in self.stages.saes:
                table = tables.get(sae.sae_id)
                if table is None or not table.latents:
                    continue
                try:
                    folders[sae.sae_id] = pipeline.explain(
                        self.cfg.root,
                        table,
                        self.explainers,
                        self.explain_context(sae),
                        force=self.cfg.force,
                        output_tokens=output_tokens(self.stages.lm(), sae, table.latents),
                    )
                except (ConfigError, BudgetExceeded):
                    raise
                except Exception as error:  # one SAE must not stop the others
                    self.log.fail(sae.sae_id, "explain", error)
            stage.finish(folders.values())
            stage.note = f"by {', '.join(e.name for e in self.explainers)}"
            for sae_id, folder in folders.items():
                failed = pipeline.failures_of(pipeline.open_explanations(folder))
                self.log.notes.setdefault("failed_explanations", {})[sae_id] = failed
        return folders

    @cached_property
    def scores(self) -> dict[str, Path]:
        """Folder of scores by sae_id."""
        explained, folders = self.explanations, {}
        saes = {sae.sae_id: sae for sae in self.stages.saes}
        with self.log.stage("scores") as stage, self._ledger_kept():
            for sae_id, folder in explained.items():
                table: ExemplarTable = self.stages.exemplars[sae_id]
                try:
                    context = replace(self.score_context, sae=saes[sae_id], hookpoint=self.stages.hookpoint)
                    folders[sae_id] = pipeline.score(
                        self.cfg.root, folder, table, self.scorers, context, force=self.cfg.force
                    )
                except (ConfigError, BudgetExceeded):
                    raise
                except Exception as error:
                    self.log.fail(sae_id, "score", error)
            stage.finish(folders.values())
            checks = [c for f in list(folders.values())[:1] for c in pipeline.open_checks(f)]
            self.log.notes["judges"] = [c.to_dict() for c in checks]
            self.log.notes["llm"] = self.client.ledger.totals()
            stage.note = ", ".join(f"{c.scorer} judge AUC {c.auc:.2f}" for c in checks if c.auc is not None)
        return folders

    @cached_property
    def effects(self) -> dict[str, Path]:
        """Folder by sae_id of what taking each explained latent out does; of the random SAE none."""
        folders: dict[str, Path] = {}
        if not self.cfg.effect_windows:
            return folders
        store = self.stages.store(EXPLAIN)
        with self.log.stage("effects") as stage:
            for subject in self.stages.subjects[: len(self.stages.trained)]:
                sae_id = subject.info.sae_id
                table = self.stages.exemplars.get(sae_id)
                if table is None or not table.latents or "directions" not in subject.provides:
                    continue
                try:
                    folders[sae_id] = build_effects(
                        self.cfg.root, subject, table, store, self.stages.lm_float32(), self.stages.hookpoint,
                        windows=self.cfg.effect_windows, force=self.cfg.force,
                    )  # fmt: skip
                except Exception as error:  # a page without effects is still a page
                    self.log.fail(sae_id, "effects", error)
            stage.finish(folders.values())
        return folders
