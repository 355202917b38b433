"""Qwen Scope: ``layerN.sae.pt`` with W_enc [F, D] and W_dec [D, F]; import only (FORMATS 5.9).

TopK without pre-bias and without norm. K is in the name of the repository (``L0_K``) alone: it is taken from a folder
above the file, or from ``--k``, and two that differ are an error.
"""

import re
from pathlib import Path

from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError
from sae.portable import ImportOptions, Portable, shaped, take
from sae.safe_files import read_torch, torch_mentions

_KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")


class QwenScope:
    """Reader."""

    title = "Qwen Scope (layerN.sae.pt with W_enc and W_dec)"

    def recognises(self, path: Path) -> bool:
        if not path.is_file() or not path.name.endswith(".sae.pt"):
            return False
        return any(torch_mentions(path, key) for key in _KEYS[:2])  # one that lacks a tensor is told which

    def read(self, path: Path, options: ImportOptions) -> Portable:
        values = read_torch(path)
        take(path, values, _KEYS)
        encoder = values["W_enc"]
        if encoder.dim() != 2:
            raise ArtefactError(f"{path}: W_enc is no matrix; expected [F, D]")
        d_sae, d_in = encoder.shape
        layer = re.search(r"layer(\d+)", path.name)
        return Portable(
            format="qwen_scope", where=str(path), architecture="topk", activation="topk", W_enc_FD=encoder,
            W_dec_FD=shaped(path, "W_dec", values["W_dec"], (d_in, d_sae)).t(), k=_k(path, options),
            b_enc_F=shaped(path, "b_enc", values["b_enc"], (d_sae,)),
            b_dec_D=shaped(path, "b_dec", values["b_dec"], (d_in,)), apply_b_dec_to_input=False,
            input_norm=InputNorm(kind="none"), gate_scale="none", hook=f"layer {layer.group(1)}" if layer else None,
            files=(path,),
        )  # fmt: skip


def _k(path: Path, options: ImportOptions) -> int:
    found = re.findall(r"L0_(\d+)", str(path.parent.resolve()))
    stated = int(found[-1]) if found else None
    if stated is not None and options.k not in (None, stated):
        raise ConfigError(f"{path}: the folder says K {stated}, --k says {options.k}")
    k = stated if stated is not None else options.k
    if k is None:
        raise ConfigError(f"{path} does not say K, and no folder above it is named L0_K; pass --k")
    return k


PLUGIN = QwenScope()
