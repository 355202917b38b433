"""The page that sets two SAEs side by side: paired differences, and which latents of one stand for those of the other.

Torch-free: decoders are read as numpy. N explained latents, F latents, D width of the activation.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evals.board import Board
from evals.gains import Draws
from evals.latent_page import SaeDigest
from evals.page_board import board_data, pair_differences, same_place
from evals.page_text import data_block, slug

MAX_DECODER = 2**25
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


def matches(latents: list[int], rows_ND: "np.ndarray", to_FD: "np.ndarray") -> list[list[Any]]:
    """[latent, its nearest latent there, cosine] by decoder direction, the closest pairs first; ties by latent.

    ``rows_ND``: unit decoder rows of ``latents``; ``to_FD`` those of all latents of the other SAE.
    """
    if not latents or not len(to_FD):
        return []
    cosine_NF = rows_ND @ to_FD.T
    best_N = cosine_NF.argmax(axis=1)
    found = [
        [i, int(j), round(float(cosine_NF[n, j]), 3)] for n, (i, j) in enumerate(zip(latents, best_N, strict=True))
    ]
    return sorted(found, key=lambda m: (-m[2], m[0]))


def _matched_pairs(root: Path, board: Board, digests: Mapping[str, SaeDigest]) -> dict[str, list[list[Any]]]:
    """``"i-j"`` -> matches of the explained latents of subject i among all latents of j, in both directions.

    Decoders are read twice, one at a time: twenty of them at once would not fit a small machine.
    """
    wanted: dict[int, tuple[list[int], np.ndarray]] = {}
    for i, subject in enumerate(board.subjects):
        latents = list(digests[subject.sae_id].texts) if subject.sae_id in digests else []
        if latents and (rows_FD := decoder(root, subject.sae_id)) is not None:
            kept = [n for n in latents if 0 <= n < len(rows_FD)][:MAX_MATCHED]
            wanted[i] = kept, rows_FD[kept]
    found = {}
    for j, other in enumerate(board.subjects):
        partners = [i for i in wanted if i != j and same_place(board.subjects[i], other)]
        to_FD = decoder(root, other.sae_id) if partners else None
        for i in partners:
            if to_FD is not None and to_FD.shape[1] == wanted[i][1].shape[1]:
                found[f"{i}-{j}"] = matches(*wanted[i], to_FD)
    return {key: found[key] for key in sorted(found) if found[key]}


def compare_context(board: Board) -> dict[str, Any]:
    """What compare.html.j2 needs: columns and subjects. What belongs to pairs is in the files of compare_parts."""
    drawn = board_data(board) if board.subjects else {"columns": [], "subjects": []}
    for i, subject in enumerate(drawn["subjects"]):
        subject["part"] = f"compare/{i}.js"
    return {"drawn": drawn}


def compare_parts(
    root: Path, board: Board, digests: Mapping[str, SaeDigest], draws: Draws | None
) -> Iterator[tuple[str, str]]:
    """(path, script) per subject i, read by compare.js when it is chosen: a page of all pairs would grow by the square.

    ``pairs``: differences to the subjects after it; ``matched``: its latents in others; ``texts`` of its latents, only
    of those that are in a match.
    """
    matched = _matched_pairs(root, board, digests)
    named: dict[int, set[int]] = {}
    for key, found in matched.items():
        for side, column in zip(map(int, key.split("-")), (0, 1), strict=True):
            named.setdefault(side, set()).update(pair[column] for pair in found)
    for i, subject in enumerate(board.subjects):
        texts = digests[subject.sae_id].texts if subject.sae_id in digests else {}
        part = {
            "pairs": pair_differences(board, draws, i),
            "matched": {key: found for key, found in matched.items() if key.startswith(f"{i}-")},
            "texts": {str(n): text for n, text in texts.items() if n in named.get(i, ())},
        }
        yield f"compare/{i}.js", f"saescope.receive({i},{data_block(part)});\n"
