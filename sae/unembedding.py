"""From final hidden states to logits, as the model itself does it: product, scale, soft cap.

Some families multiply their logits (Granite, Cohere), some cap them (Gemma 2). The number is measured on one short pass
and checked there, so that a family nobody has listed is either read right or refused, never read wrong.
D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from sae.errors import Unsupported

_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of logits accepted, relative to their largest absolute value."""
_LOW_PRECISION_TOLERANCE = 0.05


class Unembedding:
    """``logits = cap(scale * W_VD h)``; made from a causal LM of transformers.

    Raises :class:`Unsupported` if the model's logits are not of this form.
    """

    def __init__(self, model: Any) -> None:
        self.head = model.get_output_embeddings()
        self.cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.scale = 1.0
        hidden, logits = _one_pass(model)
        if self._agrees(hidden, logits):
            return
        self.scale = self._fitted(hidden, logits)
        if not self._agrees(hidden, logits):
            raise Unsupported(
                f"the logits of {type(model).__name__} are no multiple of its unembedding's output; only whole passes "
                "of this model can be read, so leave out what needs its upper layers alone"
            )

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V], float32, of final normed hidden states [..., D]."""
        logits: Tensor = self.head(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def _agrees(self, hidden: Tensor, logits: Tensor) -> bool:
        allowed = _TOLERANCE.get(hidden.dtype, _LOW_PRECISION_TOLERANCE)
        return float((self(hidden) - logits).abs().max()) <= allowed * float(logits.abs().max())

    def _fitted(self, hidden: Tensor, logits: Tensor) -> float:
        """Least squares, to the six digits that float32 gives: 0.125 of a configuration is 0.125 here."""
        plain = self.head(hidden).float()
        target = torch.atanh((logits / self.cap).clamp(-0.999, 0.999)) * self.cap if self.cap else logits
        return float(f"{float((plain * target).sum() / plain.square().sum()):.6g}")


@torch.no_grad()
def _one_pass(model: Any) -> tuple[Tensor, Tensor]:
    """(input of the unembedding [1, 8, D], logits [1, 8, V] float32) of eight fixed tokens."""
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(head.weight.shape[0]), (1, _TOKENS), generator=generator)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        logits = model(input_ids=ids.to(head.weight.device), use_cache=False).logits
    finally:
        handle.remove()
    return seen[0], logits.float()
