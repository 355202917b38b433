"""Text of token ids for the pages, from a model's ``tokenizer.json``; without torch and without transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from autointerp.prompts import pieces


class TokenReader:
    """Decodes token ids. Without a tokenizer it shows the ids themselves, as ``⟨123⟩``."""

    def __init__(self, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self._decode = decode
        self._known: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a run of tokens, specials included."""
        if self._decode is None:
            return "".join(f"⟨{i}⟩" for i in token_ids)
        return self._decode(list(token_ids))

    def piece(self, token_id: int) -> str:
        """Text of one token alone; half a character is U+FFFD."""
        if token_id not in self._known:
            self._known[token_id] = self.decode([token_id])
        return self._known[token_id]

    def window(self, token_ids: Sequence[int]) -> list[str]:
        """One text per token; a character split over tokens stands at its last one."""
        if self._decode is None:
            return [self.piece(i) for i in token_ids]
        single = [self.piece(i) for i in token_ids]
        return pieces(self, token_ids) if any("\ufffd" in text for text in single) else single


def tokenizer_file(reference: str) -> Path | None:
    """``tokenizer.json`` of a model: a folder, `default` (or its name), or a hub id already in the local cache."""
    from sae.assets import ASSETS, cache_dir

    if not reference:
        return None
    folder = Path(reference)
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    member, sha = next(iter(ASSETS["smollm2"].member_sha256.items()))
    if reference in ("default", Path(member).stem):
        return next(iter(sorted((cache_dir() / "models").glob(f"*-{sha[:16]}/tokenizer.json"))), None)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(reference, "tokenizer.json")
    except (ImportError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def read_tokenizer(references: Sequence[str]) -> TokenReader:
    """The first of these models whose tokenizer is at hand."""
    for reference in references:
        path = tokenizer_file(reference)
        if path is not None:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))

            def decode(token_ids: Sequence[int], tokenizer: Tokenizer = tokenizer) -> str:
                return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))

            return TokenReader(decode)
    return TokenReader()
