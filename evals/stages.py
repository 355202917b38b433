"""The stages of the main job, from text to scores. Each returns at once if its artefact is complete.

Stages meet as files; what is kept here between them are open handles, not results.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autointerp.exemplars import ExemplarTable, build_exemplars, sample_latents
from autointerp.latent_cache import LatentCache, build_latents_many
from autointerp.records import INTERP_SPLITS
from evals.base import SAESubject, subject_info
from evals.checks import check_context, hookpoint_of
from evals.probe_texts import kept_out
from evals.run_config import RunConfig
from evals.run_log import RunLog
from sae import adapt, checkpoint, inspect, loading
from sae.activations import ActivationStore, capture_activations
from sae.base import SAE, random_like
from sae.config import SubjectMeta, to_dict
from sae.language_model import LanguageModel, default_dtype
from sae.manifest import is_complete, sha256_file, writing
from sae.tokens import TokenSet, build_tokens, drop_ids, use_prefix
from sae.train import TrainingDiverged, train_many

if TYPE_CHECKING:
    from autointerp.interfaces import EmbedderLike

logger = logging.getLogger(__name__)
SAMPLE_TOKENS = 16_384
REFERENCE_SAMPLE = 256
RECIPE_TOKENS = 512


class Pipeline:
    """Stages 1 to 5: tokens, activations, SAEs, latents, exemplars. Made once per run."""

    def __init__(self, cfg: RunConfig, log: RunLog) -> None:
        self.cfg, self.log, self.root = cfg, log, cfg.root
        self._lms: dict[torch.dtype, LanguageModel] = {}
        self._stores: dict[str, ActivationStore] = {}

    # -- the language model -------------------------------------------------------------------------------------
    def lm(self, dtype: str = "auto") -> LanguageModel:
        """The subject LM; float32 for losses, `auto` for collecting. One object when both are the same type."""
        wanted = torch.float32 if dtype == "float32" else default_dtype(self.cfg.device)
        if wanted not in self._lms:
            self._lms[wanted] = LanguageModel.load(self.cfg.model, dtype=wanted, device=self.cfg.device)
            use_prefix(self._lms[wanted].tokenizer, self.cfg.tokens.prefix_id)
        return self._lms[wanted]

    def lm_float32(self) -> LanguageModel:
        return self.lm("float32")

    @cached_property
    def hookpoint(self) -> str:
        """Where the run measures; the model reads rows of this length, the SAEs given fit it (:mod:`evals.checks`)."""
        check_context(self.cfg, self.lm())
        return hookpoint_of(self.cfg, self.lm(), self.given_saes)

    @cached_property
    def given_saes(self) -> list[SAE]:
        """The SAEs named with --sae, loaded and self-checked before any work."""
        return [checkpoint.load(folder).to(self.cfg.device) for folder in self.given_folders]

    @cached_property
    def given_folders(self) -> list[Path]:
        """Native folders of the SAEs named with --sae; those of other formats are imported below saes/."""
        return [loading.import_into(self.root, path) for path in self.cfg.sae]

    # -- tokens and activations ---------------------------------------------------------------------------------
    @cached_property
    def tokens(self) -> dict[str, TokenSet]:
        with self.log.stage("tokens") as stage:
            lm = self.lm()
            sets = build_tokens(
                self.root, self.cfg.tokens_config(), lm.name, lm.tokenizer, force=self.cfg.force,
                keep_out=kept_out(self.cfg),
            )  # fmt: skip
            stage.finish(s.folder for s in sets.values())
            stage.note = ", ".join(f"{name} {s.n_tokens:,}" for name, s in sets.items())
            if (left_out := sets["train"].manifest["counts"].get("kept_out")) is not None:
                stage.note += f"; {left_out:,} documents left out that hold a probe prompt"
                self.log.notes["documents_with_probe_prompts"] = left_out
            return sets

    def store(self, split: str) -> ActivationStore:
        """Activations of one split; the norm median comes from the first store made, and serves all (TRAINING 1)."""
        if split not in self._stores:
            self._stores[split] = self._capture(split)
        return self._stores[split]

    def _capture(self, split: str) -> ActivationStore:
        tokens = self.tokens[split]
        exact = split == "test"
        lm = self.lm("float32" if exact else "auto")
        hookpoint, median = self.hookpoint, self.norm_median(split)
        with self.log.stage(f"activations: {split}") as stage:
            store = capture_activations(
                self.root,
                lm,
                tokens,
                hookpoint,
                store_dtype="float32" if exact else "bfloat16",
                filter_cfg=self.cfg.filter,
                norm_median=median,
                force=self.cfg.force,
            )
            stage.finish([store.folder])
            rate = store.n_tokens / max(stage.work_seconds, 1e-9)
            dropped = ", ".join(f"{n} {k}" for k, n in store.n_dropped.items())
            stage.note = f"{store.n_tokens:,} tokens at {rate:,.0f}/s in {dtype_name(lm)}; dropped {dropped}"
        self.log.notes.setdefault("dropped_tokens", {})[split] = {"seen": store.n_tokens, **store.n_dropped}
        return store

    def norm_median(self, split: str) -> float | None:
        """The constant that fixes the norm filter; None for the store on which it is to be taken."""
        reference = self.reference_split
        if self.given_saes and self.given_saes[0].cfg.meta is not None:
            stored = self.given_saes[0].cfg.meta.token_filter.get("norm_median")
            if stored is not None:
                return float(stored)
        return None if split == reference else self.store(reference).norm_median

    @property
    def reference_split(self) -> str:
        """Where constants are fitted: the training text, or the split explain when no SAE is trained."""
        return "explain" if self.cfg.sae else "train"

    @cached_property
    def reference_sample(self) -> torch.Tensor:
        """Kept activations [<= 16,384, D], evenly spread over the reference store."""
        store = self.store(self.reference_split)
        kept = store.kept_N
        step = max(1, len(kept) // SAMPLE_TOKENS)
        return store.read(kept[::step][:SAMPLE_TOKENS])

    # -- SAEs ---------------------------------------------------------------------------------------------------
    @cached_property
    def trained(self) -> list[SAE]:
        """Either the SAEs given, or those trained here from one stream of activations."""
        if self.cfg.sae:
            _ = self.hookpoint  # checks that they fit the model
            return self.given_saes
        store = self.store("train")
        with self.log.stage("train SAEs") as stage:
            try:
                cfgs, meta = self.cfg.train_configs(), self._meta(store)
                folders = train_many(self.root, store, cfgs, meta, device=self.cfg.device, force=self.cfg.force)
            except TrainingDiverged as error:  # the SAEs that did converge go on
                if not error.paths:
                    raise
                self.log.fail(", ".join(error.failures), "train", error)
                folders = error.paths
            stage.finish(folders)
            saes = [checkpoint.load(folder).to(self.cfg.device) for folder in folders]
            for sae, folder in zip(saes, folders, strict=True):
                self.folders[sae.sae_id] = folder
            stage.note = f"{len(saes)} SAEs, {self.cfg.train.train_tokens:,} tokens each"
        return saes

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Checkpoint folder by sae_id."""
        return {sae.sae_id: folder for sae, folder in zip(self.given_saes, self.given_folders, strict=True)}

    def _meta(self, store: ActivationStore) -> SubjectMeta:
        lm, tokens = self.lm(), store.tokens
        return SubjectMeta(
            lm=lm.name,
            lm_revision=lm.revision,
            hookpoint=self.hookpoint,
            lm_dtype=dtype_name(lm),
            lm_slug=lm.slug,
            context_length_tokens=tokens.L,
            tokens_key=tokens.key,
            activations_key=store.key,
            text_sources=tuple(sorted(set(tokens.sources))),
            token_filter={
                "drop_positions": list(self.cfg.filter.drop_positions),
                "drop_token_ids": list(drop_ids(lm.tokenizer)) if self.cfg.filter.drop_special else [],
                "norm_multiple": self.cfg.filter.norm_multiple,
                "norm_median": store.norm_median,
                "n_seen": store.n_tokens,
                "n_dropped": dict(store.n_dropped),
            },
        )

    @cached_property
    def random_sae(self) -> SAE:
        """The floor: isotropic unit decoder, encoder its transpose, same F and L0 as the first SAE (AUTOINTERP 5.4)."""
        # a given SAE's id does not say on which text its floor is scaled here
        sample = self.store(self.reference_split).key if self.cfg.sae else ""
        sae = random_like(self.trained[0], self.cfg.seed, self.reference_sample, sample)
        folder = self.root / "saes" / sae.sae_id
        if not is_complete(folder) or self.cfg.force:
            key = folder.name.rpartition(".")[2]
            with writing(folder, kind="saes", key=key, stage_version=1, config=to_dict(sae.cfg)) as out:
                checkpoint.save(sae, out.path, self.reference_sample[:REFERENCE_SAMPLE])
                out.counts["sae_id"] = sae.sae_id
        self.folders[sae.sae_id] = folder
        return checkpoint.load(folder).to(self.cfg.device)

    @cached_property
    def saes(self) -> list[SAE]:
        """Trained (or given) SAEs, then the random floor."""
        found = [*self.trained, self.random_sae]
        self._note_recipes()
        return found

    def _note_recipes(self) -> None:
        """A warning and a note of the run for each imported SAE whose recipe does not fit the activations at hand, so
        that a wrong bias or norm convention does not pass silently (FORMATS 7)."""
        for sae in self.given_saes:
            if sae.cfg.source is None or sae.transcodes:
                continue
            rows = inspect.probe(adapt.from_sae(sae), self.reference_sample[:RECIPE_TOKENS].cpu())
            suspect = inspect.suspicion(rows)
            self.log.notes.setdefault("recipes", {})[sae.sae_id] = suspect or f"FVU {rows[0][1]:.3f} as imported"
            if suspect is not None:
                logger.warning("%s is suspect: %s", sae.sae_id, suspect)

    @cached_property
    def subjects(self) -> list[SAESubject]:
        """The SAEs as subjects, in the order of :attr:`saes`; each file is hashed once."""
        random_id = self.random_sae.sae_id
        return [
            SAESubject(
                sae,
                subject_info(
                    sae,
                    sha256_file(self.folders[sae.sae_id] / "sae.safetensors"),
                    kind="baseline" if sae.sae_id == random_id else "sae",
                ),
            )
            for sae in self.saes
        ]

    # -- latents and exemplars ----------------------------------------------------------------------------------
    @cached_property
    def latents(self) -> dict[str, LatentCache]:
        """By sae_id; an SAE whose latents cannot be cached is reported and left out."""
        stores = {split: self.store(split) for split in INTERP_SPLITS}
        cfg = self.cfg.exemplars

        def build(saes: list[SAE]) -> list[LatentCache]:
            return build_latents_many(
                self.root, saes, stores, window_tokens=cfg.window_tokens,
                min_window_tokens=cfg.min_window_tokens, force=self.cfg.force,
            )  # fmt: skip

        with self.log.stage("latents") as stage:
            try:
                caches = dict(zip([sae.sae_id for sae in self.saes], build(self.saes), strict=True))
            except Exception as error:  # of one of them, or of what they share: each alone tells
                caches, failed = _each_alone(build, self.saes)
                if not caches:
                    raise
                logger.debug("not all SAEs together", exc_info=error)
                for sae_id, why in failed.items():
                    self.log.fail(sae_id, "latents", why)
            stage.finish(cache.folder for cache in caches.values())
            return caches

    @cached_property
    def embedder(self) -> "EmbedderLike | None":
        """The sentence embedding model of the embedded judges and of the windows `embedding_near`."""
        from autointerp.embedder import Embedder

        return Embedder.choose(self.cfg.interp.embedder, device=self.cfg.device)

    @cached_property
    def exemplars(self) -> dict[str, ExemplarTable]:
        """Exemplars of the sampled latents of every SAE; a subject that fails is reported and left out."""
        cfg, tables = replace(self.cfg.exemplars, seed=self.cfg.seed), {}
        caches = self.latents
        near: dict[str, Any] = {}
        if cfg.score_embedding_near:
            near = {"embedder": self.embedder, "tokenizer": self.lm().tokenizer}
        with self.log.stage("exemplars") as stage:
            for sae_id, cache in caches.items():
                try:
                    sample = sample_latents(cache, self.cfg.interp.latents, self.cfg.seed, cfg)
                    tables[sae_id] = build_exemplars(
                        self.root, cache, sample.latents, cfg, force=self.cfg.force, **near
                    )
                    self.log.notes.setdefault("latents", {})[sae_id] = {
                        "alive": sample.alive,
                        "eligible": sample.eligible,
                        "explained": len(sample.latents),
                    }
                except Exception as error:  # one subject must not stop the others
                    self.log.fail(sae_id, "exemplars", error)
            stage.finish(t.folder for t in tables.values())
        return tables


def _each_alone(
    build: Callable[[list[SAE]], list[LatentCache]], saes: Sequence[SAE]
) -> tuple[dict[str, LatentCache], dict[str, Exception]]:
    """(caches, errors) by sae_id."""
    found: dict[str, LatentCache] = {}
    failed: dict[str, Exception] = {}
    for sae in saes:
        try:
            [found[sae.sae_id]] = build([sae])
        except Exception as error:
            failed[sae.sae_id] = error
    return found, failed


def dtype_name(lm: LanguageModel) -> str:
    return str(lm.dtype).removeprefix("torch.")


def lm_description(lm: LanguageModel) -> dict[str, Any]:
    """What a run says of its language model."""
    return {
        "name": lm.name,
        "revision": lm.revision,
        "d_model": lm.d_model,
        "layers": lm.n_layers,
        "dtype": dtype_name(lm),
    }
