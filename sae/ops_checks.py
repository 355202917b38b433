"""Operands of the operations, looked at before anything is computed; errors name every shape and type.

Shapes: N tokens, D = d_in, F = d_sae, K slots, E entries. Nothing here waits for a GPU but :func:`in_range`.
"""

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")


def found(**operands: Tensor | None) -> str:
    """Shape, type and device of each operand."""
    given = {name: t for name, t in operands.items() if t is not None}
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype} on {t.device}" for name, t in given.items())


def implementation(name: str) -> None:
    """``ValueError`` for an ``impl`` that does not exist."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")


def encoder(n_ND: Tensor, b_pre_D: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor) -> None:
    """``ValueError`` or ``TypeError`` unless n [N, D], b_pre [D] or None, W_enc [F, D], b_enc [F] of one type."""
    fits = n_ND.dim() == 2 and W_enc_FD.dim() == 2 and n_ND.shape[1:] == W_enc_FD.shape[1:] and 0 not in W_enc_FD.shape
    fits = fits and b_enc_F.shape == W_enc_FD.shape[:1] and (b_pre_D is None or b_pre_D.shape == n_ND.shape[1:])
    given = [t for t in (n_ND, b_pre_D, W_enc_FD, b_enc_F) if t is not None]
    if fits and len({t.dtype for t in given}) == 1 and len({t.device for t in given}) == 1:
        return
    kind = TypeError if fits and len({t.dtype for t in given}) > 1 else ValueError
    raise kind(
        "the encoder wants n [N, D], b_pre [D] or none, W_enc [F, D] and b_enc [F], not empty, of one type and on one "
        f"device; got {found(n=n_ND, b_pre=b_pre_D, W_enc=W_enc_FD, b_enc=b_enc_F)}"
    )


def decoder(values: Tensor, indices: Tensor, W_dec_FD: Tensor) -> None:
    """``ValueError`` or ``TypeError`` unless values and indices have one shape, W_dec is [F, D] of their type."""
    # The text is made where it is needed: it takes as long as everything else here.
    kind: type[Exception] = ValueError
    if values.shape != indices.shape or W_dec_FD.dim() != 2 or 0 in W_dec_FD.shape:
        rule = "values and indices of one shape and W_dec [F, D], not empty"
    elif not values.device == indices.device == W_dec_FD.device:
        rule = "its operands on one device"
    elif values.dtype != W_dec_FD.dtype or not values.is_floating_point():
        kind, rule = TypeError, "values and W_dec of one float type"
    elif indices.dtype not in (torch.int64, torch.int32):
        kind, rule = TypeError, "int32 or int64 indices"
    else:
        return
    raise kind(f"the decoder wants {rule}; got {found(values=values, indices=indices, W_dec=W_dec_FD)}")


def offsets(offsets_N1: Tensor, n_entries: int) -> None:
    """``ValueError`` or ``TypeError`` unless int64 [N + 1]; on a CPU they must also rise from 0 to E."""
    if offsets_N1.dim() != 1 or len(offsets_N1) == 0:
        raise ValueError(f"offsets must be [N + 1], got {tuple(offsets_N1.shape)}")
    if offsets_N1.dtype != torch.int64:
        raise TypeError(f"offsets must be int64, got {offsets_N1.dtype}")
    if offsets_N1.device.type == "cpu":
        ends = (int(offsets_N1[0]), int(offsets_N1[-1]))
        if ends != (0, n_entries) or bool((offsets_N1.diff() < 0).any()):
            raise ValueError(
                f"offsets {tuple(offsets_N1.shape)} must rise from 0 to the {n_entries} entries; they begin with "
                f"{ends[0]} and end with {ends[1]}"
            )


def in_range(values: Tensor, indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Values and indices with all indices in 0..F - 1: an empty slot (value 0) may name anything, and becomes 0.

    ``ValueError`` for an active one that names no latent. Waits for the device once.
    """
    if indices.numel() == 0:
        return values, indices
    low, high = (int(x) for x in indices.aminmax())
    if low >= 0 and high < n_latents:
        return values, indices
    outside = (indices < 0) | (indices >= n_latents)
    wrong = outside & (values != 0)
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} of the {indices.numel()} indices {tuple(indices.shape)} name no latent of the "
            f"{n_latents}: they lie between {low} and {high}"
        )
    return torch.where(outside, 0.0, values).to(values.dtype), torch.where(outside, 0, indices)
