"""Which documents are equal, and that no two splits share one (AUTOINTERP 2). Torch-free.

Equal means equal tokens, whatever the token filter drops: it may drop a token of one copy and not of the other.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from sae.errors import LeakError

if TYPE_CHECKING:
    from sae.tokens import TokenSet

MIN_TOKENS = 8
"""Shorter documents are not compared: the last one of a split is cut where its budget ends, and a few tokens at the
beginning of a text are no leak. No window is cut from them either."""


def content_hashes(tokens: "TokenSet") -> list[str]:
    """16 hex digits per document over its tokens without prefixes and separators; "" below :data:`MIN_TOKENS`."""
    tokens_N = np.asarray(tokens.tokens_BL).reshape(-1)
    own = np.flatnonzero(tokens_N != tokens.prefix_id)
    content = tokens_N[own].astype(np.uint32)
    bounds = np.append(np.searchsorted(own, tokens.doc_starts), own.size).tolist()
    return [
        hashlib.blake2b(content[a:b].tobytes(), digest_size=8).hexdigest() if b - a >= MIN_TOKENS else ""
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def assert_disjoint(tokens_of: Mapping[str, "TokenSet"]) -> None:
    """:class:`LeakError` if any document stands in two of the splits. About a second for four million tokens."""
    split_of: dict[str, str] = {}
    for split, tokens in tokens_of.items():
        for doc, content in enumerate(content_hashes(tokens)):
            if content and (other := split_of.setdefault(content, split)) != split:
                raise LeakError(
                    f"document {content} ({tokens.sources[doc]}) is in the splits {other} and {split}; "
                    "build the tokens again with splits by document"
                )
