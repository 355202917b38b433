"""Which latents fire on a person's own text, and what pushing one of them does to the next token.

L tokens of the text, F latents, V vocabulary. All passes are of one row; nothing is written.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evals.latent_page import headline_text
from evals.page_data import SaeData, load_site_data, run_info
from evals.page_text import slug, visible
from sae.base import SAE
from sae.checkpoint import load
from sae.errors import ArtefactError, ConfigError
from sae.language_model import LanguageModel
from sae.tokens import prefix_id, use_prefix

MAX_CHARACTERS = 2000
MAX_TOKENS = 128
MAX_STRENGTH = 20.0
CONTINUED = 16
"""Tokens of a continuation, the likeliest each time."""
SHOWN = 10


class Live:
    """The language model of a run and its SAEs, loaded when first asked for. One question at a time."""

    def __init__(self, root: Path, lm: LanguageModel | None = None) -> None:
        """``root``: a results folder. ArtefactError where it holds no SAE; ``lm``: instead of the model of its run."""
        self.root = Path(root)
        self.data: dict[str, SaeData] = {i: d for i, d in sorted(load_site_data(self.root).items()) if d.cfg}
        if not self.data:
            raise ArtefactError(f"{self.root}/saes holds no SAE; run: python -m evals.run_all --root {self.root}")
        self._lm = lm
        self._saes: dict[str, SAE] = {}
        self._lock = threading.Lock()

    def subjects(self) -> list[dict[str, Any]]:
        """The SAEs to choose from: id, number of latents, name of its pages and where they start."""
        return [
            {"id": i, "d_sae": int(d.cfg.get("d_sae", 0)), "page": slug(i), "href": f"/site/sae/{slug(i)}.html"}
            for i, d in self.data.items()
        ]

    def _model(self) -> LanguageModel:
        if self._lm is None:
            config = run_info(self.root).config
            self._lm = LanguageModel.load(str(config.get("model") or "default"))
            use_prefix(self._lm.tokenizer, config.get("tokens", {}).get("prefix_id"))
        return self._lm

    def _sae(self, sae_id: str) -> tuple[SAE, str]:
        if sae_id not in self.data:
            raise ConfigError(f"there is no SAE {visible(sae_id)[:120]!r} here; choose one of {', '.join(self.data)}")
        if sae_id not in self._saes:
            sae = load(self.root / "saes" / sae_id)
            meta = sae.cfg.meta
            if meta is None or meta.hookpoint_out not in (None, meta.hookpoint):
                raise ConfigError(f"{sae_id} does not read and write one known hookpoint; choose another SAE")
            self._saes[sae_id] = sae
        sae = self._saes[sae_id]
        assert sae.cfg.meta is not None
        return sae, sae.cfg.meta.hookpoint

    def _ids(self, text: str) -> torch.Tensor:
        """Prefix and text, int64 [1, 1 + L]. ConfigError for no text or too much of it."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair is no text
        if not text.strip() or len(text) > MAX_CHARACTERS:
            raise ConfigError(f"the text has {len(text):,} characters; expected 1 to {MAX_CHARACTERS:,}")
        tokenizer = self._model().tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > MAX_TOKENS:
            raise ConfigError(f"the text has {len(ids):,} tokens; at most {MAX_TOKENS} are read")
        return torch.tensor([[prefix_id(tokenizer), *ids]], dtype=torch.long)

    def _piece(self, token_id: int) -> str:
        return visible(self._model().tokenizer.decode([token_id]))

    def _named(self, sae_id: str, latent: int) -> dict[str, Any]:
        known = next((x for x in self.data[sae_id].latents if x.latent == latent), None)
        return {
            "latent": latent,
            "text": headline_text(known) if known else "",
            "href": f"/site/latent/{slug(sae_id)}/{latent}.html" if known else "",
        }

    def tokens(self, sae_id: str, text: str) -> dict[str, Any]:
        """Per token its text and strongest latents; over the whole text the strongest, and every one that has a page.

        ``{"tokens": [{"text", "latents": [[latent, activation], ...]}], "latents": [{latent, text, href, max, acts}]}``
        """
        with self._lock:
            sae, hookpoint = self._sae(sae_id)
            ids_BL = self._ids(text)
            x_ND = self._model().capture(ids_BL, [hookpoint])[hookpoint][0, 1:].float()
            values_NK, indices_NK = sae.encode_sparse(x_ND)
            per_token: list[list[list[Any]]] = []
            acts: dict[int, list[float]] = {}
            for n in range(len(x_ND)):
                active = values_NK[n] > 0
                pairs = list(zip(indices_NK[n][active].tolist(), values_NK[n][active].tolist(), strict=True))
                pairs.sort(key=lambda p: (-p[1], p[0]))
                per_token.append([[f, float(f"{v:.4g}")] for f, v in pairs[:SHOWN]])
                for f, v in pairs:
                    acts.setdefault(f, [0.0] * len(x_ND))[n] = float(f"{v:.4g}")
            explained = {x.latent for x in self.data[sae_id].latents}
            order = sorted(acts, key=lambda f: (-max(acts[f]), f))
            strongest = [f for n, f in enumerate(order) if n < 2 * SHOWN or f in explained]
            return {
                "tokens": [
                    {"text": self._piece(int(i)), "latents": found}
                    for i, found in zip(ids_BL[0, 1:], per_token, strict=True)
                ],
                "latents": [
                    self._named(sae_id, f) | {"max": self._scale(sae_id, f, max(acts[f])), "acts": acts[f]}
                    for f in strongest
                ],
            }

    def _scale(self, sae_id: str, latent: int, least: float) -> float:
        """The latent's largest activation in the run, or ``least`` where that is larger or unknown."""
        stats = self.data[sae_id].stats
        known = float(stats["max_act"].get(latent, 0.0)) if stats is not None and "max_act" in stats else 0.0
        return max(known, least)

    def steer(self, sae_id: str, text: str, latent: int, strength: float) -> dict[str, Any]:
        """Next-token probabilities and a continuation, clean and with the latent pushed at every token of the text.

        Pushing adds ``strength * max_act * s_n * W_dec_FD[latent]`` to the activation of each token (METRICS 1, units):
        at 1 as much as the latent adds where it is strongest; below 0 the same taken away.
        """
        if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:  # false for NaN too
            raise ConfigError(f"strength {strength:g} is not between {-MAX_STRENGTH:g} and {MAX_STRENGTH:g}")
        with self._lock:
            sae, hookpoint = self._sae(sae_id)
            if sae.transcodes:
                raise ConfigError(f"{sae_id} is a transcoder: its latents add to another activation than they read")
            if not 0 <= latent < sae.d_sae:
                raise ConfigError(f"latent {latent} is not between 0 and {sae.d_sae - 1}")
            ids_BL = self._ids(text)
            scale = self._scale(sae_id, latent, 1.0)
            push_D = strength * scale * sae.W_dec_FD[latent].float()
            clean, steered = (self._continue(sae, hookpoint, ids_BL, p) for p in (None, push_D))
            return self._named(sae_id, latent) | {"max": scale, "clean": clean, "steered": steered}

    def _next(self, sae: SAE, hookpoint: str, ids_BL: torch.Tensor, push_D: torch.Tensor | None) -> torch.Tensor:
        """Probabilities [V] of the next token, float32."""
        lm = self._model()
        if push_D is None:
            return torch.softmax(lm.logits(ids_BL)[0, -1], dim=-1)
        x_LD = lm.capture(ids_BL, [hookpoint])[hookpoint][0].float()
        x_LD[1:] += sae.output_scale(x_LD[1:])[:, None] * push_D
        return torch.softmax(lm.replace(ids_BL, hookpoint, x_LD[None])[0, -1], dim=-1)

    def _continue(self, sae: SAE, hookpoint: str, ids_BL: torch.Tensor, push_D: torch.Tensor | None) -> dict[str, Any]:
        first: Sequence[Any] = ()
        start = ids_BL.shape[1]
        for _ in range(CONTINUED):
            probs_V = self._next(sae, hookpoint, ids_BL, push_D)
            if not first:
                top = torch.topk(probs_V, min(SHOWN, len(probs_V)))
                first = [
                    [self._piece(int(i)), float(f"{p:.4g}")]
                    for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ]
            ids_BL = torch.cat([ids_BL, probs_V.argmax().reshape(1, 1).to(ids_BL)], dim=1)
        text = visible(self._model().tokenizer.decode(ids_BL[0, start:].tolist()))
        return {"next": first, "continuation": text}
