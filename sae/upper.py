"""The layers above a hookpoint as one function of its activations (METRICS 4).

The blocks are the model's own, run through the decoder's own ``forward`` on a **view**: shallow copies of the modules
on the way (weights shared) whose list of blocks starts above the hookpoint. Whatever the decoder does to its embeddings
does not matter, since the first block's input is replaced. The runner is compared once with a full hooked pass; where
they differ (per-layer embeddings, odd heads) it works by full passes instead and says so in ``is_exact``.
Letters: B sequences, P tokens of a prefix, T tokens after it, L = P + T, D width, V vocabulary.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae.errors import ConfigError, Unsupported
from sae.hooks import replace_input, with_first

if TYPE_CHECKING:
    from sae.language_model import LanguageModel

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Largest difference of logits accepted at construction, relative to their largest absolute value (float32)."""
_CHECK_TOKENS = 12
_NUMBERS = ("layer_idx", "layer_id")
"""What modules call the number of their block; the second one GPT-Neo."""


@dataclass(frozen=True)
class Past:
    """A clean prefix: its residual, and the keys and values it leaves in each upper block. Never modified."""

    resid_BPD: Tensor
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    """Per upper block (key, value), each [B, heads, P, d_head]; empty for a runner that works by full passes."""

    @property
    def n_tokens(self) -> int:
        return int(self.resid_BPD.shape[1])


class UpperRunner:
    """Made by :meth:`LanguageModel.upper`. Inputs are residuals at the hookpoint, any float type; logits are float32.

    ``is_exact`` is True if only the layers above run; False if every call costs a full pass of the model.
    """

    def __init__(self, lm: "LanguageModel", hookpoint: str) -> None:
        lm.check_hookpoint(hookpoint)
        self.lm = lm
        self.hookpoint = hookpoint
        self._given: Tensor | None = None
        self._view: Any = None
        self.is_exact = False
        below = lm.block_of(hookpoint)
        self._residual = below is not None
        if below is not None:
            self._view = self._build_view(below)
            self.is_exact = self._verified()
            if not self.is_exact:
                self._view = None
                logger.warning("%s: the layers above %s cannot run apart; full passes are used", lm.name, hookpoint)

    @torch.no_grad()
    def hidden(
        self,
        resid_BLD: Tensor,
        positions: Tensor | Sequence[int] | slice | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Final normed hidden states [B, L, D], or [B, len(positions), D]: what :meth:`unembed` turns into logits.

        ``positions`` index the tokens of ``resid_BLD``; ``past`` is a prefix these tokens follow.
        """
        if self._view is not None:
            states = self._run(resid_BLD, past)
        else:
            states = self._hidden_by_full_pass(resid_BLD, past, None)
        if positions is None:
            return states
        return states[:, positions] if isinstance(positions, slice) else states[:, torch.as_tensor(positions)]

    @torch.no_grad()
    def logits(self, resid_BLD: Tensor, *, ids_BL: Tensor | None = None) -> Tensor:
        """Logits [B, L, V]. ``ids_BL``: for full passes alone, and needed there unless the hookpoint is residual."""
        if self._view is not None:
            return self.unembed(self._run(resid_BLD, None))
        return self.lm.replace(self._ids(resid_BLD, ids_BL), self.hookpoint, resid_BLD)

    @torch.no_grad()
    def prefix(self, resid_BPD: Tensor) -> Past:
        """The clean prefix of later :meth:`continue_from` calls; one prefix [1, P, D] serves any number of them."""
        if self._view is None:
            self._require_residual()
            return Past(resid_BPD, ())
        cache = _cache([], resid_BPD.shape[0])
        self._run(resid_BPD, None, cache)
        return Past(resid_BPD, tuple((layer.keys, layer.values) for layer in cache.layers))

    @torch.no_grad()
    def continue_from(self, past: Past, resid_BTD: Tensor, first_position: int | None = None) -> Tensor:
        """Logits [B, T, V] of B alternatives for the tokens at ``first_position`` …, each after the same clean prefix.

        ``first_position`` (default: the prefix's length) may be smaller than the prefix, which is then cut there: the
        prefix of a whole row serves every position. The prefix has batch 1 or B. :class:`ConfigError` if it is too
        short.
        """
        return self.unembed(self.hidden(resid_BTD, past=self.cut(past, first_position)))

    def cut(self, past: Past, first_position: int | None) -> Past:
        """The first ``first_position`` tokens of a prefix, exact because attention is causal."""
        if first_position is None or first_position == past.n_tokens:
            return past
        if not 0 <= first_position <= past.n_tokens:
            raise ConfigError(f"first_position {first_position} lies outside the prefix of {past.n_tokens} tokens")
        pairs = tuple((k[:, :, :first_position], v[:, :, :first_position]) for k, v in past.keys_values)
        return Past(past.resid_BPD[:, :first_position], pairs)

    @torch.no_grad()
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V], float32, of final normed hidden states [..., D]; :class:`Unsupported` for an odd head."""
        return self.lm.unembedding(hidden.to(self.lm.dtype))

    def _run(self, resid_BLD: Tensor, past: Past | None, cache: Any = None) -> Tensor:
        """The view's forward: final hidden states. ``cache`` collects keys and values if given."""
        batch, length, _ = resid_BLD.shape
        first = 0
        if past is not None and past.n_tokens:
            first = past.n_tokens
            cache = _cache(past.keys_values, batch)
        positions = torch.arange(first, first + length, device=self.lm.device).unsqueeze(0)
        self._given = resid_BLD.to(self.lm.device, self.lm.dtype)
        try:
            output = self._view(
                inputs_embeds=self._given, position_ids=positions, past_key_values=cache, use_cache=cache is not None
            )
        finally:
            self._given = None
        return output.last_hidden_state

    def _build_view(self, below: int) -> Any:
        """A shallow copy of the decoder from block ``below`` on (or the last one, whose output is then replaced)."""
        lm = self.lm
        first = min(below, lm.n_layers - 1)
        blocks = [_copied(block) for block in list(lm.blocks)[first:]]
        for index, block in enumerate(blocks):
            _renumber(block, first, index)
        if below < lm.n_layers:
            blocks[0].register_forward_pre_hook(
                lambda _, args, kwargs: replace_input(self._replacement(), args, kwargs), with_kwargs=True
            )
        else:
            blocks[0].register_forward_hook(lambda _, args, output: with_first(output, self._replacement()))
        view = _copied(lm.decoder)
        view._modules[lm.stack_name] = nn.ModuleList(blocks)
        view.config = _shortened(lm.decoder.config, first)
        return view

    def _replacement(self) -> Tensor:
        assert self._given is not None
        return self._given

    @torch.no_grad()
    def _verified(self) -> bool:
        """Does the view agree with a full hooked pass, alone and after a prefix?"""
        lm = self.lm
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, lm.vocab_size, (2, _CHECK_TOKENS), generator=generator)
        cut = _CHECK_TOKENS // 2
        try:
            clean = lm.capture(ids, [self.hookpoint])[self.hookpoint].float()
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            patched = torch.cat([clean[:1, :cut].expand(2, -1, -1), (clean + noise * clean.std())[:, cut:]], dim=1)
            expected = lm.replace(ids, self.hookpoint, patched)
            tolerance = TOLERANCE if lm.dtype == torch.float32 else 0.05
            limit = tolerance * float(expected.abs().max())
            whole = self.logits(patched)
            tail = self.continue_from(self.prefix(clean[:1]), patched[:, cut:], cut)
        except Exception:  # foreign model code: any refusal to run apart means the slow way
            logger.debug("%s cannot run apart above %s", lm.name, self.hookpoint, exc_info=True)
            return False
        return all(float(d.abs().max()) <= limit for d in (whole - expected, tail - expected[:, cut:]))

    def _ids(self, resid_BLD: Tensor, ids_BL: Tensor | None) -> Tensor:
        """Token ids of a full pass. Above a residual hookpoint they do not matter: all below is overwritten."""
        if ids_BL is not None:
            return ids_BL
        self._require_residual()
        return torch.zeros(resid_BLD.shape[:2], dtype=torch.long)

    def _require_residual(self) -> None:
        if not self._residual:
            raise Unsupported(
                f"{self.hookpoint!r} is no residual hookpoint: what lies above it depends on more than its "
                f"activations; use a block such as {self.lm.default_hookpoint()!r}, or logits(acts, ids_BL=...)"
            )

    def _hidden_by_full_pass(self, resid_BLD: Tensor, past: Past | None, ids_BL: Tensor | None) -> Tensor:
        """The unembedding's input during a full hooked pass over prefix and continuation."""
        skip = 0 if past is None else past.n_tokens
        if past is not None and skip:
            resid_BLD = torch.cat([past.resid_BPD.to(resid_BLD).expand(resid_BLD.shape[0], -1, -1), resid_BLD], dim=1)
        seen: list[Tensor] = []
        handle = self.lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self.lm.replace(self._ids(resid_BLD, ids_BL), self.hookpoint, resid_BLD)
        finally:
            handle.remove()
        return seen[0][:, skip:]


def _copied(module: Any) -> Any:
    """A module of its own (hooks, children list, attributes) that shares weights and grandchildren."""
    new = copy.copy(module)
    new.__dict__ = dict(module.__dict__)
    hooks = [f"_forward{pre}_hooks{kw}" for pre in ("", "_pre") for kw in ("", "_with_kwargs")]
    for name in ("_modules", *hooks):
        new.__dict__[name] = copy.copy(module.__dict__[name])
    return new


def _renumber(block: Any, first: int, index: int) -> None:
    """Blocks find their keys and values by their number; that of the view's first block is 0."""
    for name, child in list(block._modules.items()):
        if child is not None and any(hasattr(m, number) for m in child.modules() for number in _NUMBERS):
            block._modules[name] = _copied(child)
            _renumber(block._modules[name], first, index)
    for number in _NUMBERS:
        if getattr(block, number, None) is not None:
            setattr(block, number, index)


def _shortened(config: Any, first: int) -> Any:
    """The configuration of the upper blocks alone: their number, and their kinds where they differ."""
    new = copy.copy(config)
    new.__dict__ = dict(config.__dict__)
    text = new.get_text_config()
    if text.__dict__.get("layer_types"):
        text.__dict__["layer_types"] = list(text.layer_types)[first:]
    text.num_hidden_layers = int(text.num_hidden_layers) - first
    return new


def _cache(pairs: Sequence[tuple[Tensor, Tensor]], batch: int) -> Any:
    """A fresh key/value cache that starts from ``pairs``, broadcast over the batch without copying them."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys = keys.expand(batch, -1, -1, -1)
        layer.values = values.expand(batch, -1, -1, -1)
        cache.layers.append(layer)
    return cache
