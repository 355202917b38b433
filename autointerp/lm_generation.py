"""Batched generation from a local causal LM in which every request keeps its own sampling.

Random draws depend on (seed, step) of a request alone, so neither its neighbours in the batch nor their order matter.
Letters: B requests, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.manifest import rng


@dataclass
class Row:
    """One request on its way."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    new: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    """"" while it runs."""


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, rows: Sequence[Row]) -> None:
    """Fill ``new``, ``text`` and ``finish_reason`` of all rows; prompts are left-padded into one batch."""
    width = max(len(r.prompt) for r in rows)
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for b, row in enumerate(rows):
        ids_BT[b, width - len(row.prompt) :] = torch.tensor(row.prompt)
        mask_BT[b, width - len(row.prompt) :] = 1
    ends = _end_ids(model, tokenizer)
    ids, mask = ids_BT.to(model.device), mask_BT.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    past = None
    alive = list(range(len(rows)))
    while alive:
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past = out.past_key_values
        next_ids = _choose(out.logits[:, -1].float(), [rows[b] for b in alive])
        keep = []
        for i, b in enumerate(alive):
            _extend(rows[b], next_ids[i], ends, tokenizer)
            if not rows[b].finish_reason:
                keep.append(i)
        if len(keep) < len(alive):
            index = torch.tensor(keep, dtype=torch.long, device=model.device)
            past.batch_select_indices(index)
            mask, positions = mask[index], positions[index]
        alive = [alive[i] for i in keep]
        ids = torch.tensor([[next_ids[i]] for i in keep], dtype=torch.long, device=model.device)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
        positions = positions[:, -1:] + 1


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """All ids that end a reply."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return {i for i in ends | {tokenizer.eos_token_id} if i is not None}


def _choose(logits_BV: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row: the largest, or a draw at its own temperature and top_p."""
    greedy = logits_BV.argmax(-1).tolist()
    return [
        _draw(logits_BV[b].double().cpu().numpy(), row) if row.temperature > 0 else greedy[b]
        for b, row in enumerate(rows)
    ]


def _draw(logits_V: np.ndarray, row: Row) -> int:
    scaled = (logits_V - logits_V.max()) / row.temperature
    p = np.exp(scaled)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    cumulative = np.cumsum(p[order])
    # Nucleus: the smallest set of likeliest tokens whose mass reaches top_p (arXiv 1904.09751, section 3.1).
    n_kept = int(np.searchsorted(cumulative, row.top_p * (1 - 1e-12)) + 1) if row.top_p < 1 else len(p)
    n_kept = min(n_kept, len(p))
    u = rng("generate", row.seed, len(row.new)).random() * cumulative[n_kept - 1]
    return int(order[min(int(np.searchsorted(cumulative[:n_kept], u, side="right")), n_kept - 1)])


def _extend(row: Row, token: int, ends: set[int], tokenizer: Any) -> None:
    if token in ends:
        row.finish_reason = "stop"
        return
    row.new.append(token)
    row.text = tokenizer.decode(row.new, skip_special_tokens=True)
    found = [at for at in (row.text.find(s) for s in row.stop) if at >= 0]
    if found:
        row.text = row.text[: min(found)]
        row.finish_reason = "stop"
    elif len(row.new) >= row.max_tokens:
        row.finish_reason = "length"
