"""Native SAE folder: ``sae.safetensors``, ``cfg.json``, ``reference.safetensors`` (FORMATS 2). No pickle anywhere.

Loading re-encodes the stored reference sample, because the known loading faults (a wrong pre-bias, norm or bias) are
silent: they only make the reconstruction worse.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from sae.base import SAE
from sae.config import InputNorm, SAEConfig, from_dict, to_dict
from sae.errors import ArtefactError, CheckpointMismatch, ConfigError, DataError, UnknownPlugin
from sae.manifest import canonical_json, sha256_text
from sae.ops import SparseLatents, to_dense
from sae.plugins import find

MATRICES = ("W_enc_DF", "W_dec_FD", "W_skip_DD")
"""Tensors that ``weights_dtype`` rounds; biases and thresholds never are."""
LATER_FIELDS = {"group_sizes", "threshold_source"}
"""Fields of cfg.json that the first release did not write: all its SAEs were such that they are null."""
WEIGHTS, CFG, REFERENCE = "sae.safetensors", "cfg.json", "reference.safetensors"
REFERENCE_TOKENS = 32
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative error of the reference sample that is accepted, by stored type of the weights."""
UNIT_TOLERANCE = 1e-4


@torch.no_grad()
def save(sae: SAE, folder: Path, x_sample_ND: Tensor) -> None:
    """Write the three files into ``folder``, ``cfg.json`` last. The caller adds the manifest (``manifest.writing``).

    ``x_sample_ND``: at least one raw activation that passes the token filter, better some hundreds: the 32 whose
    selection is least close to a tie become the reference sample. ``DataError`` for weights that are not finite.
    """
    if len(x_sample_ND) == 0:
        raise DataError(f"{sae.sae_id}: saving needs at least one activation for the reference sample")
    for name, tensor in sae.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{sae.sae_id}: {name} holds numbers that are not finite, it is not saved")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg_text = _cfg_text(sae.cfg)
    matrix_type = torch.bfloat16 if sae.cfg.weights_dtype == "bfloat16" else torch.float32
    tensors = {
        name: getattr(sae, name).detach().to(matrix_type if name in MATRICES else torch.float32).contiguous()
        for name in sae.tensor_shapes(sae.cfg)
    }
    metadata = {"format": "pt", "saescope": "1", "cfg_sha256": sha256_text(cfg_text)}
    _write_tensors(folder / WEIGHTS, tensors, metadata)
    reference = _reference(_from_tensors(sae.cfg, tensors), x_sample_ND.float().cpu())
    _write_tensors(folder / REFERENCE, reference, {"format": "pt"})
    (folder / CFG).write_text(cfg_text, encoding="utf-8")


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with sorted metadata: the library keeps them in a hash map, so that their order, and with it
    the bytes of the file, would differ from call to call. Sorting changes no length, so offsets and padding stay."""
    data = memoryview(to_bytes(tensors, metadata))
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + size]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    with open(path, "wb") as file:
        file.write(data[:8])
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(size))
        file.write(data[8 + size :])


def _cfg_text(cfg: SAEConfig) -> str:
    plain = json.loads(canonical_json(to_dict(cfg)))
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _from_tensors(cfg: SAEConfig, tensors: dict[str, Tensor]) -> SAE:
    sae: SAE = find("sae.architectures", cfg.architecture)(cfg)
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(sae, name).copy_(tensor)  # W_enc_DF is a view of the parameter
    return sae.requires_grad_(False)


def _reference(sae: SAE, x_ND: Tensor) -> dict[str, Tensor]:
    """The reference sample of ``sae``: inputs, codes by falling value (padding: value 0, index 0), reconstructions."""
    gap_N = sae.selection_gap(x_ND)
    if gap_N is not None:
        # Another library or machine rounds differently: a token whose selection is nearly a tie would not agree.
        x_ND = x_ND[torch.sort(gap_N, descending=True, stable=True).indices[:REFERENCE_TOKENS].sort().values]
    x_ND = x_ND[:REFERENCE_TOKENS].contiguous()
    latents = sae.encode_sparse(x_ND)
    values_NK, order_NK = torch.sort(latents.values_NK, dim=1, descending=True, stable=True)
    width = int((values_NK > 0).sum(1).max()) if values_NK.numel() else 0
    indices_NK = torch.where(values_NK > 0, latents.indices_NK.gather(1, order_NK), 0)
    return {
        "x_ND": x_ND,
        "values_NK": values_NK[:, :width].contiguous(),
        "indices_NK": indices_NK[:, :width].to(torch.int32).contiguous(),
        "x_hat_ND": sae(x_ND),
    }


def load(path: str | Path, *, device: str = "cpu") -> SAE:
    """The SAE of a native folder, its weights in float32 without gradients.

    ``ArtefactError``: missing folder or file, truncated or foreign file, weights of another cfg, NaN;
    ``ConfigError``: unknown, missing or contradicting field; ``CheckpointMismatch``: the reference sample is not
    reproduced within 1e-4 relative (2e-2 for bfloat16 weights).
    """
    folder = Path(path)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise ArtefactError(f"{folder} {kind}; expected the folder of an SAE with {WEIGHTS}, {CFG} and {REFERENCE}")
    for name in (CFG, WEIGHTS, REFERENCE):
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder} has no {name}: it is not a complete saescope SAE; train or convert it again")
    cfg, cfg_sha = _read_cfg(folder / CFG)
    tensors, metadata = _read_tensors(folder / WEIGHTS, _shapes(cfg))
    if metadata.get("cfg_sha256") != cfg_sha:
        raise ArtefactError(
            f"{folder / WEIGHTS} was written with another {CFG} (cfg_sha256 differs): one of the two was changed; "
            "restore the folder or train the SAE again"
        )
    sae = _from_tensors(cfg, tensors)
    if cfg.decoder_unit_norm:
        worst = float((torch.linalg.vector_norm(sae.W_dec_FD, dim=1) - 1).abs().max())
        limit = UNIT_TOLERANCE if cfg.weights_dtype == "float32" else TOLERANCE["bfloat16"]
        if worst > limit:
            raise CheckpointMismatch(
                f"{folder}: cfg says decoder_unit_norm, but a row of W_dec_FD is {worst:.2g} off length 1"
            )
    _self_check(sae, folder / REFERENCE)
    return sae.to(device)


def _read_cfg(path: Path) -> tuple[SAEConfig, str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArtefactError(f"{path} is not JSON ({error}); restore it or train the SAE again") from error
    if not isinstance(values, dict) or values.get("format") != "saescope":
        raise ArtefactError(f'{path} does not say "format": "saescope": the file of another library; convert it first')
    try:
        cfg = from_dict(SAEConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    # No field has a default when it is read: what a file does not say is not guessed (FORMATS, rule of the house).
    for prefix, found, kind in (("", values, SAEConfig), ("input_norm.", values["input_norm"], InputNorm)):
        absent = {f.name for f in fields(kind) if f.name not in found}
        if values["activation"] in ("relu", "topk"):
            absent -= LATER_FIELDS
        if absent:
            raise ConfigError(
                f"{path} lacks {', '.join(prefix + n for n in sorted(absent))}; expected every field of an SAE"
            )
    return cfg, sha256_text(text)


def _shapes(cfg: SAEConfig) -> Mapping[str, tuple[int, ...] | None]:
    try:
        return find("sae.architectures", cfg.architecture).tensor_shapes(cfg)  # type: ignore[no-any-return]
    except UnknownPlugin:  # said later, unless the cfg was changed after the weights were written
        return SAE.tensor_shapes(cfg)


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...] | None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file; names, shapes and types are checked before anything is allocated."""
    try:
        with safe_open(path, framework="pt") as file:
            found, metadata = set(file.keys()), file.metadata() or {}
            if found != set(shapes):
                raise ArtefactError(f"{path} holds {sorted(found)}, expected {sorted(shapes)}")
            for name, shape in shapes.items():
                part = file.get_slice(name)
                if shape is not None and tuple(part.get_shape()) != shape:
                    raise ConfigError(f"{path}: {name} has shape {tuple(part.get_shape())}, {CFG} says {shape}")
                if part.get_dtype() not in ("F32", "BF16", "I32"):
                    raise ArtefactError(f"{path}: {name} has type {part.get_dtype()}, expected F32 or BF16")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError, struct.error) as error:
        raise ArtefactError(f"{path} is truncated or damaged ({error}); restore it or train the SAE again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtefactError(f"{path}: {name} holds NaN or infinity; the SAE is unusable, train it again")
    return tensors, metadata


@torch.no_grad()
def _self_check(sae: SAE, path: Path) -> None:
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(("x_ND", "values_NK", "indices_NK", "x_hat_ND"))
    sample, _ = _read_tensors(path, shapes)
    x_ND, values_NK, indices_NK = sample["x_ND"], sample["values_NK"], sample["indices_NK"].long()
    fits = x_ND.dim() == 2 and x_ND.shape[1] == sae.d_in and values_NK.shape == indices_NK.shape
    if not fits or len(values_NK) != len(x_ND) or sample["x_hat_ND"].shape != (len(x_ND), sae.cfg.d_out):
        found = {name: tuple(tensor.shape) for name, tensor in sample.items()}
        raise ArtefactError(f"{path}: the shapes {found} do not fit an SAE of d_in {sae.d_in}")
    if indices_NK.numel() and not (0 <= int(indices_NK.min()) and int(indices_NK.max()) < sae.d_sae):
        raise ArtefactError(f"{path}: a latent index lies outside 0..{sae.d_sae - 1}")
    tolerance = TOLERANCE[sae.cfg.weights_dtype]
    expected_NF = to_dense(SparseLatents(values_NK, indices_NK), sae.d_sae)
    codes = ("codes", sae.encode(x_ND), expected_NF)
    for what, got, want in (codes, ("reconstructions", sae(x_ND), sample["x_hat_ND"])):
        size = float(torch.linalg.vector_norm(want)) or 1.0
        error = float(torch.linalg.vector_norm(got - want)) / size
        if not error <= tolerance:
            raise CheckpointMismatch(
                f"{path.parent}: the {what} of the reference sample differ by {error:.2g} (relative), at most "
                f"{tolerance:g} is allowed: weights, cfg or code are not those it was saved with"
            )
