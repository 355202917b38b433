"""Push a language model along a latent's decoder row, as hard as moves its next word by a set amount; let it go on.

AUTOINTERP 5.6: c d_f / |d_f| is added to the residual stream at every position but the first (BOS), of the prompt and
of what is written after it; c > 0 is such that the mean KL(clean || steered) at the last position of the prompts is
0.5 nats, so that latents are compared at equal strength of effect and not of push.
Letters: B prompts, L tokens of a prompt with its first one, D width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autointerp.records import Failure
from sae.errors import Unsupported
from sae.hooks import first_tensor, with_first

if TYPE_CHECKING:
    from sae.language_model import LanguageModel

TARGET_NATS = 0.5
TOLERANCE = 0.1
"""Of the target, relative."""
MAX_STEPS = 12
MAX_NORMS = 8.0
"""A push longer than so many mean residual norms is not tried."""
FIRST_NORMS = 0.2


class Push(NamedTuple):
    """A push that has the wanted effect."""

    vector_D: Tensor
    kl_nats: float
    norms: float
    """Its length in mean residual norms."""


class Steering:
    """One set of prompts: their clean pass is made once and serves every latent pushed on them."""

    def __init__(
        self, lm: "LanguageModel", hookpoint: str, prompts: Sequence[Sequence[int]], *,
        target_nats: float = TARGET_NATS, new_tokens: int = 8,
    ) -> None:  # fmt: skip
        """``prompts``: token ids of equal number, the first of each the model's first token (BOS).

        Raises :class:`Unsupported` unless ``hookpoint`` is the residual stream after a block.
        """
        below = lm.block_of(hookpoint)
        if not below:
            raise Unsupported(
                f"steering adds to the residual stream after a block, which {hookpoint!r} of {lm.name} is not; leave "
                "the scorer 'intervention' out"
            )
        self.lm, self.block, self.target_nats, self.new_tokens = lm, lm.blocks[below - 1], target_nats, new_tokens
        self.ids_BL = torch.tensor([list(p) for p in prompts], dtype=torch.long, device=lm.device)
        self.upper = lm.upper(hookpoint)
        self.resid_BLD = lm.capture(self.ids_BL, [hookpoint])[hookpoint].float()
        self.mean_norm = float(self.resid_BLD[:, 1:].norm(dim=-1).mean())
        self.clean_BV = self._last_log_probs(None)
        special = sorted({int(i) for i in lm.tokenizer.all_special_ids})
        self._never = torch.tensor(special, dtype=torch.long, device=lm.device)

    def matched(self, direction_D: Tensor) -> Push | Failure:
        """The push along ``direction_D`` whose mean KL is the target; `kl_unreachable` where there is none."""
        norm = float(direction_D.norm())
        if not math.isfinite(norm) or norm == 0:
            return Failure(code="kl_unreachable", stage="score", detail="the decoder row has no direction")
        unit_D = direction_D.detach().to(self.resid_BLD) / norm
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        limit, length, kl = MAX_NORMS * self.mean_norm, FIRST_NORMS * self.mean_norm, 0.0
        for _ in range(MAX_STEPS):
            kl = self.kl(length * unit_D)
            if not math.isfinite(kl):
                break
            if abs(kl - self.target_nats) <= TOLERANCE * self.target_nats:
                return Push(length * unit_D, kl, length / self.mean_norm)
            if kl < self.target_nats:
                low = (length, kl)
                if length >= limit:
                    break
            else:
                high = (length, kl)
            length = min(limit, _next_length(low, high, self.target_nats))
        detail = f"KL {kl:.3g} nats at {length / self.mean_norm:.3g} mean residual norms, wanted {self.target_nats:g}"
        return Failure(code="kl_unreachable", stage="score", detail=detail)

    def kl(self, push_D: Tensor) -> float:
        """Mean over prompts of KL(clean || steered) of the token after the prompt, nats."""
        steered_BV = self._last_log_probs(push_D)
        return float((self.clean_BV.exp() * (self.clean_BV - steered_BV)).sum(dim=-1).mean())

    def _last_log_probs(self, push_D: Tensor | None) -> Tensor:
        resid_BLD = self.resid_BLD
        if push_D is not None:
            resid_BLD = resid_BLD.clone()
            resid_BLD[:, 1:] += push_D
        hidden_BD = self.upper.hidden(resid_BLD, positions=[resid_BLD.shape[1] - 1])[:, 0]
        return torch.log_softmax(self.upper.unembed(hidden_BD), dim=-1)

    @torch.no_grad()
    def continuations(self, push_D: Tensor | None) -> list[str]:
        """What the model writes after each prompt, the likeliest token each time, never a special one."""
        ids, past, written = self.ids_BL, None, []
        with self._pushed(push_D):
            for _ in range(self.new_tokens):
                out = self.lm.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                logits_BV, past = out.logits[:, -1].float(), out.past_key_values
                logits_BV[:, self._never] = -math.inf
                ids = logits_BV.argmax(dim=-1, keepdim=True)
                written.append(ids)
        return [str(self.lm.tokenizer.decode(row)) for row in torch.cat(written, dim=1).tolist()]

    @contextmanager
    def _pushed(self, push_D: Tensor | None) -> Iterator[None]:
        """Inside, the push is added after the block at every position but the prompt's first."""
        if push_D is None:
            yield
            return
        push = push_D.to(self.lm.device, self.lm.dtype)

        def after(_: Any, args: Any, output: Any) -> Any:
            x_BTD = first_tensor(output).clone()
            x_BTD[:, 1 if x_BTD.shape[1] > 1 else 0 :] += push  # what follows the prompt comes one token at a time
            return with_first(output, x_BTD)

        handle = self.block.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def _next_length(low: tuple[float, float] | None, high: tuple[float, float] | None, target: float) -> float:
    """Where to look next, from (length, KL) below and above the target: a KL grows about as the square of a small push,
    so steps are taken in logarithms; between two points never nearer to an end than a fifth, as bisection would."""
    if low is None or high is None:
        length, kl = low or high or (1.0, target)
        return length * min(4.0, max(0.25, math.sqrt(target / max(kl, 1e-9))))
    (a, kl_a), (b, kl_b) = low, high
    share = (math.log(target) - math.log(max(kl_a, 1e-9))) / (math.log(kl_b) - math.log(max(kl_a, 1e-9)))
    return math.exp(math.log(a) + min(0.8, max(0.2, share)) * (math.log(b) - math.log(a)))
