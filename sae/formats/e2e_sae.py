"""e2e_sae (Braun et al., arXiv 2405.12241): one ``.pt`` of an encoder and a decoder; import only (FORMATS 5.9).

ReLU, no pre-bias, no norm. The library divides each decoder column by its length on every use and stores the columns as
they are: dividing them is part of the recipe, and nothing else changes. A file of several SAEs is refused.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from sae.config import InputNorm
from sae.errors import ArtefactError
from sae.portable import ImportOptions, Portable, shaped, take
from sae.safe_files import read_torch, torch_mentions

_KEYS = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
_PREFIX = re.compile(r"(?:saes\.)?(?P<hook>blocks-\d+-\w+)\.(?=encoder\.0\.|decoder\.)")


class E2ESae:
    """Reader."""

    title = "e2e_sae (.pt with encoder.0 and decoder)"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and path.suffix in (".pt", ".pth") and torch_mentions(path, "encoder.0.weight")

    def read(self, path: Path, options: ImportOptions) -> Portable:
        values, hook = _one(path, read_torch(path))
        take(path, values, _KEYS)
        encoder = values[_KEYS[0]]
        if not isinstance(encoder, Tensor) or encoder.dim() != 2:
            raise ArtefactError(f"{path}: {_KEYS[0]} is no matrix; expected [F, D]")
        d_sae, d_in = encoder.shape
        columns_DF = shaped(path, _KEYS[2], values[_KEYS[2]], (d_in, d_sae)).double()
        lengths_F = torch.linalg.vector_norm(columns_DF, dim=0).clamp_min(1e-12)
        return Portable(
            format="e2e_sae", where=str(path), architecture="relu", activation="relu", W_enc_FD=encoder, k=None,
            W_dec_FD=(columns_DF / lengths_F).t().float(), b_enc_F=shaped(path, _KEYS[1], values[_KEYS[1]], (d_sae,)),
            b_dec_D=shaped(path, _KEYS[3], values[_KEYS[3]], (d_in,)), apply_b_dec_to_input=False,
            input_norm=InputNorm(kind="none"), gate_scale="none", hook=hook or path.stem, files=(path,),
            recipe=("decoder columns divided by their lengths, as the library does on every use",),
        )  # fmt: skip


def _one(path: Path, values: dict[str, object]) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of the one SAE in a file, whose names may begin with its hook (dots written as hyphens)."""
    hooks = sorted({found.group("hook") for name in values if (found := _PREFIX.match(name))})
    if len(hooks) > 1:
        raise ArtefactError(f"{path} holds {len(hooks)} SAEs ({', '.join(hooks)}); save each in a file of its own")
    return {_PREFIX.sub("", name): value for name, value in values.items()}, (  # type: ignore[misc]
        hooks[0].replace("-", ".") if hooks else None
    )


PLUGIN = E2ESae()
