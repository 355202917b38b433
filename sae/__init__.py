"""Subject language models, activations and sparse autoencoders.

Public names resolve lazily, so that ``import sae`` costs nothing and pulls no torch.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "SAE": "sae.base",
    "SparseLatents": "sae.base",
    "load": "sae.loading",
    "from_weights": "sae.weights",
    "save": "sae.weights",
    "upload": "sae.hub_upload",
    "LanguageModel": "sae.language_model",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sae' has no attribute {name!r}")
