"""The page that sets two SAEs side by side: paired differences, and which latents of one stand for those of the other.

Torch-free: decoders are read as numpy. N explained latents, F latents, D width of the activation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evals.board import Board, BoardSubject
from evals.gains import Draws
from evals.latent_page import headline_text
from evals.page_board import board_data, pair_differences, same_place
from evals.page_data import SaeData
from evals.page_text import slug

MAX_DECODER = 2**26
"""Numbers in a decoder (F x D) up to which its latents are matched: above it a pair would take minutes of the build."""
MAX_MATCHED = 256
"""Explained latents of an SAE that are matched, the first by number."""


def decoder(root: Path, sae_id: str) -> "np.ndarray | None":
    """Decoder rows of unit length, float32 [F, D]; None where it is not at hand, too large or of no numpy type."""
    path = Path(root) / "saes" / sae_id / "sae.safetensors"
    if slug(sae_id) != sae_id or not path.is_file():
        return None
    from safetensors import safe_open

    with safe_open(path, "np") as weights:
        if "W_dec_FD" not in set(weights.keys()):
            return None
        part = weights.get_slice("W_dec_FD")
        if part.get_dtype() not in ("F32", "F16") or int(np.prod(part.get_shape())) > MAX_DECODER:
            return None
        rows_FD = np.asarray(weights.get_tensor("W_dec_FD"), dtype=np.float32)
    return np.asarray(rows_FD / np.maximum(np.linalg.norm(rows_FD, axis=1, keepdims=True), 1e-12))


def matches(latents: list[int], from_FD: "np.ndarray", to_FD: "np.ndarray") -> list[list[Any]]:
    """[latent, its nearest latent there, cosine] by decoder direction, the closest pairs first; ties by latent."""
    wanted = [i for i in latents if 0 <= i < len(from_FD)]
    if not wanted or not len(to_FD):
        return []
    cosine_NF = from_FD[wanted] @ to_FD.T
    best_N = cosine_NF.argmax(axis=1)
    found = [[i, int(j), round(float(cosine_NF[n, j]), 3)] for n, (i, j) in enumerate(zip(wanted, best_N, strict=True))]
    return sorted(found, key=lambda m: (-m[2], m[0]))


def _matched_pairs(root: Path, board: Board, data: Mapping[str, SaeData]) -> dict[str, list[list[Any]]]:
    """``"i-j"`` -> matches of the explained latents of subject i among all latents of j, in both directions."""
    explained = {
        s.sae_id: [x.latent for x in data[s.sae_id].latents][:MAX_MATCHED] for s in board.subjects if s.sae_id in data
    }
    loaded = {i: rows for i in explained if (rows := decoder(root, i)) is not None}
    found = {}

    def fit(a: BoardSubject, b: BoardSubject) -> bool:
        both = a.sae_id in loaded and b.sae_id in loaded and a.sae_id != b.sae_id
        return both and same_place(a, b) and loaded[a.sae_id].shape[1] == loaded[b.sae_id].shape[1]

    for i, a in enumerate(board.subjects):
        for j, b in enumerate(board.subjects):
            if fit(a, b) and (pairs := matches(explained[a.sae_id], loaded[a.sae_id], loaded[b.sae_id])):
                found[f"{i}-{j}"] = pairs
    return found


def compare_context(root: Path, board: Board, data: Mapping[str, SaeData], draws: Draws | None) -> dict[str, Any]:
    """What compare.html.j2 needs."""
    matched = _matched_pairs(root, board, data)
    sides = {int(side) for key in matched for side in key.split("-")}
    texts = {
        str(i): {str(x.latent): headline_text(x) for x in data[s.sae_id].latents}
        for i, s in enumerate(board.subjects)
        if i in sides
    }
    drawn = {"pairs": pair_differences(board, draws), "matched": matched, "texts": texts}
    return {"drawn": (board_data(board) if board.subjects else {"columns": [], "subjects": []}) | drawn}
