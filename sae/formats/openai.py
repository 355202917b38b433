"""OpenAI's sparse autoencoders of GPT-2: one ``.pt`` file of plain tensors and strings (FORMATS 5.4).

The recipe is that of openai/sparse_autoencoder 4965b94: the pre-bias is subtracted and added back, and a file whose
activation is TopK normalises its input as layer_norm does, any other file does not.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, cast

import torch

from sae import foldings
from sae.config import InputNorm
from sae.errors import ArtefactError, ConfigError, Unsupported
from sae.hook_names import from_openai
from sae.portable import Activation, ImportOptions, Portable, shaped, stated, take
from sae.safe_files import read_torch, torch_mentions

WEIGHTS = ["pre_bias", "latent_bias", "encoder.weight", "decoder.weight"]
_STATS = ["stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"]
_SITES = ("resid_delta_attn", "resid_delta_mlp", "resid_post_attn", "resid_post_mlp", "mlp_post_act")


class OpenAI:
    """Reader and writer."""

    title = "OpenAI's .pt (pre_bias, latent_bias, encoder.weight, decoder.weight)"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and path.suffix in (".pt", ".pth") and torch_mentions(path, "latent_bias")

    def read(self, path: Path, options: ImportOptions) -> Portable:
        values = read_torch(path)
        optional = [*_STATS, "activation", "activation_state_dict", "activation_state_dict.k"]
        nested = [name for name in values if name.startswith("activation.")]
        take(path, values, WEIGHTS, [*optional, *nested])
        encoder = values["encoder.weight"]
        if not isinstance(encoder, torch.Tensor) or encoder.dim() != 2:
            raise ArtefactError(f"{path}: encoder.weight is no matrix; expected [F, D]")
        d_sae, d_in = encoder.shape
        activation, k, norm = _semantics(path, values, options)
        location, layer = _place(path)
        return Portable(
            format="openai", where=str(path), architecture="topk" if activation != "relu" else "relu",
            activation=activation, W_enc_FD=encoder, k=k, input_norm=norm, gate_scale="none",
            W_dec_FD=shaped(path, "decoder.weight", values["decoder.weight"], (d_in, d_sae)).t(),
            b_enc_F=shaped(path, "latent_bias", values["latent_bias"], (d_sae,)),
            b_dec_D=shaped(path, "pre_bias", values["pre_bias"], (d_in,)), apply_b_dec_to_input=True,
            lm="gpt2" if location else None, hook=f"{location}:{layer}" if location else None,
            hookpoint=from_openai(location, layer) if location else None, files=(path,),
        )  # fmt: skip

    def write(self, p: Portable, folder: Path) -> None:
        """One file ``autoencoder.pt``. ``Unsupported``: all but topk with layer_norm and relu without norm."""
        p = foldings.fold_gate_scale(foldings.fold_dataset_norm(p, keep_codes=True))
        if p.input_norm.kind == "unit_norm":
            p = foldings.unit_norm_to_layer_norm(p)
        ours = (p.activation, p.input_norm)
        if ours not in (("topk", foldings.LAYER_NORM), ("relu", foldings.NO_NORM)) or p.transcoder:
            raise Unsupported(
                f"{p.where}: OpenAI's format means layer_norm by TopK and no norm by ReLU; it cannot say "
                f"{p.activation} with {p.input_norm.kind}; --to saelens can"
            )
        p = foldings.add_pre_bias(p)
        zeros = torch.zeros(p.d_sae)
        state: dict[str, Any] = OrderedDict(
            {
                "pre_bias": p.b_dec_D, "latent_bias": p.b_enc_F, "encoder.weight": p.W_enc_FD.contiguous(),
                "decoder.weight": p.W_dec_FD.t().contiguous(), "stats_last_nonzero": zeros.long(),
                "latents_activation_frequency": zeros, "latents_mean_square": zeros.clone(),
            }
        )  # fmt: skip
        # activation.k and activation.postact_fn, which the library's state_dict() adds, make its own loader fail.
        state["activation"] = "TopK" if p.activation == "topk" else "ReLU"
        if p.activation == "topk":
            state["activation_state_dict"] = {"k": p.k, "postact_fn": "ReLU"}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "autoencoder.pt")


def _semantics(path: Path, values: dict[str, Any], options: ImportOptions) -> tuple[Activation, int | None, InputNorm]:
    trained = "activation" not in values and not any(name in values for name in _STATS[1:])
    if trained:  # train.py writes neither: trained without the norm that the same activation has in a release (#19)
        if options.activation is None or options.input_norm is None:
            raise ConfigError(f"{path} is a training checkpoint that does not say how it runs; pass --activation and "
                              "--input-norm (train.py itself uses none)")  # fmt: skip
        if options.activation == "topk" and options.k is None:
            raise ConfigError(f"{path} does not say k; pass --k")
        return options.activation, options.k, InputNorm(kind=options.input_norm)
    name = values.get("activation", "ReLU")
    if name == "ReLU":
        return "relu", None, InputNorm(kind="none")
    if name != "TopK":
        raise Unsupported(f"{path}: activation {name!r} cannot be run; known: ReLU, TopK")
    state = stated(path, values, "activation_state_dict", dict)
    function = str(stated(path, state, "postact_fn", str)).removesuffix("()")
    kinds = {"ReLU": "topk", "Identity": "topk_signed"}
    if function not in kinds:
        raise Unsupported(f"{path}: postact_fn {function!r} cannot be run; known: ReLU, Identity")
    kind = cast(Literal["topk", "topk_signed"], kinds[function])
    return kind, int(stated(path, state, "k", int)), foldings.LAYER_NORM


def _place(path: Path) -> tuple[str, int]:
    """Location and layer from the folders of the release: ``{location}[_v5_32k]/autoencoders/{layer}.pt``."""
    text = path.parent.parent.name if path.parent.name == "autoencoders" else ""
    location = next((site for site in _SITES if text == site or text.startswith(f"{site}_v")), "")
    return (location, int(path.stem)) if location and path.stem.isdigit() else ("", 0)


PLUGIN = OpenAI()
