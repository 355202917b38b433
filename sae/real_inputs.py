"""Activations of a language model for checking one SAE: a few thousand filtered tokens, kept in memory."""

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import ConfigError, DataError
from sae.language_model import LanguageModel
from sae.texts import iter_documents
from sae.tokens import drop_ids, prefix_id

CONTEXT_TOKENS, BATCH_SEQS = 128, 8
NORM_MULTIPLE = 5.0


class RealInputs(NamedTuple):
    """Activations of the same tokens."""

    x_ND: Tensor
    """What the SAE reads, raw, float32."""
    target_NO: Tensor
    """What it reconstructs: the same, or for a transcoder the activations at its second hookpoint."""


def model_inputs(
    model: str, hookpoint: str | None, d_in: int, texts: str, n_tokens: int, *, target: str | None = None,
) -> RealInputs:  # fmt: skip
    """About ``n_tokens`` activations at ``hookpoint`` (and at ``target``) without position 0, special tokens and
    outliers.

    One document a row, cut at 128 tokens behind the prefix token (TRAINING 1). ``ConfigError`` without a hookpoint or
    for another width, ``DataError`` for texts too short to fill a row.
    """
    if hookpoint is None:
        raise ConfigError("the file does not say where the SAE reads; give --hookpoint")
    lm = LanguageModel.load(model, dtype="float32")
    width = lm.check_hookpoint(hookpoint)
    if width != d_in:
        raise ConfigError(
            f"the SAE reads {d_in} channels, {hookpoint} of {lm.name} has {width}; is it the right model?"
        )
    ids_BL = _rows(lm, texts, n_tokens)
    dropped = torch.tensor(drop_ids(lm.tokenizer), dtype=torch.int64)
    points = [hookpoint] if target in (None, hookpoint) else [hookpoint, target]
    found: dict[str, list[Tensor]] = {point: [] for point in points}
    for batch_BL in ids_BL.split(BATCH_SEQS):
        keep_BL = ~torch.isin(batch_BL, dropped)
        keep_BL[:, 0] = False
        for point, acts_BLD in lm.capture(batch_BL, points).items():
            found[point].append(acts_BLD.float()[keep_BL])
    x_ND, target_NO = (torch.cat(found[point]) for point in (points[0], points[-1]))
    norms_N = torch.linalg.vector_norm(x_ND, dim=1)
    kept = torch.nonzero(norms_N <= NORM_MULTIPLE * norms_N.median())[:n_tokens, 0]
    return RealInputs(x_ND[kept], target_NO[kept])


def _rows(lm: LanguageModel, texts: str, n_tokens: int) -> Tensor:
    """ids_BL of documents that fill a row."""
    first = prefix_id(lm.tokenizer)
    rows = []
    for document in islice(iter_documents(texts), 100 * n_tokens // CONTEXT_TOKENS + 100):
        ids = lm.tokenizer(document.text, add_special_tokens=False, truncation=True, max_length=CONTEXT_TOKENS)[
            "input_ids"
        ]
        if len(ids) >= CONTEXT_TOKENS - 1:
            rows.append([first, *ids[: CONTEXT_TOKENS - 1]])
        if len(rows) * (CONTEXT_TOKENS - 1) >= n_tokens:
            break
    if not rows:
        raise DataError(f"the texts {texts!r} hold no document of {CONTEXT_TOKENS} tokens")
    return torch.tensor(rows)
