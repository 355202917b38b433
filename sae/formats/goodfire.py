"""Goodfire's released SAEs: one ``.pt`` or ``.pth`` of two linear layers; import only (FORMATS 5.9).

ReLU, no pre-bias, no norm; nothing in the file says where it reads.
"""

from pathlib import Path

from sae.config import InputNorm
from sae.errors import ArtefactError
from sae.portable import ImportOptions, Portable, shaped, take
from sae.safe_files import read_torch, torch_mentions

_KEYS = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


class Goodfire:
    """Reader."""

    title = "Goodfire (.pt or .pth with encoder_linear and decoder_linear)"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and path.suffix in (".pt", ".pth") and torch_mentions(path, "encoder_linear.weight")

    def read(self, path: Path, options: ImportOptions) -> Portable:
        values = read_torch(path)
        take(path, values, _KEYS)
        encoder = values[_KEYS[0]]
        if encoder.dim() != 2:
            raise ArtefactError(f"{path}: {_KEYS[0]} is no matrix; expected [F, D]")
        d_sae, d_in = encoder.shape
        return Portable(
            format="goodfire", where=str(path), architecture="relu", activation="relu", W_enc_FD=encoder, k=None,
            W_dec_FD=shaped(path, _KEYS[2], values[_KEYS[2]], (d_in, d_sae)).t(),
            b_enc_F=shaped(path, _KEYS[1], values[_KEYS[1]], (d_sae,)),
            b_dec_D=shaped(path, _KEYS[3], values[_KEYS[3]], (d_in,)), apply_b_dec_to_input=False,
            input_norm=InputNorm(kind="none"), gate_scale="none", hook=path.stem, files=(path,),
        )  # fmt: skip


PLUGIN = Goodfire()
