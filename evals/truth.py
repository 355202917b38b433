"""A known dictionary and data made from it, against which SAEs are scored (METRICS J).

G true directions, D dimensions, N held-out tokens. ``truth.safetensors`` holds `directions` [G, D], `bias` [D],
`x` [N, D] and `codes` [N, G], all float32; SynthSAEBench data (arXiv 2602.14687) are written in the same form.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae.errors import ArtefactError, DataError
from sae.manifest import sha256_file

if TYPE_CHECKING:
    import torch

FILE = "truth.safetensors"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the data really consist of: x = codes @ directions + bias + noise."""

    directions_GD: "torch.Tensor"
    bias_D: "torch.Tensor"
    x_ND: "torch.Tensor"
    codes_NG: "torch.Tensor"
    """Non-negative; 0 = silent."""
    key: str

    def __post_init__(self) -> None:
        """DataError for shapes that do not fit, negative or non-finite codes, or a direction of length 0."""
        g, d = self.directions_GD.shape
        n = len(self.x_ND)
        shapes = {"bias": (self.bias_D, (d,)), "x": (self.x_ND, (n, d)), "codes": (self.codes_NG, (n, g))}
        for name, (tensor, wanted) in shapes.items():
            if tuple(tensor.shape) != wanted:
                raise DataError(f"truth: {name} is {tuple(tensor.shape)}; {g} directions of {d} ask for {wanted}")
        for name, tensor in (("directions", self.directions_GD), ("x", self.x_ND), ("codes", self.codes_NG)):
            if not bool(tensor.isfinite().all()):
                raise DataError(f"truth: {name} holds NaN or infinite numbers")
        if bool((self.codes_NG < 0).any()):
            raise DataError("truth: codes must not be negative")
        if bool((self.directions_GD.norm(dim=1) == 0).any()):
            raise DataError("truth: a direction has length 0")

    @staticmethod
    def open(path: Path) -> "Truth":
        """A file, or the folder that holds `truth.safetensors`. ArtefactError if a tensor is missing."""
        from safetensors.torch import load_file

        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise ArtefactError(f"there is no {path}; a known dictionary is a file {FILE}")
        tensors = load_file(path)
        missing = sorted({"directions", "bias", "x", "codes"} - tensors.keys())
        if missing:
            raise ArtefactError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors))}")
        parts = {name: tensors[name].float() for name in ("directions", "bias", "x", "codes")}
        return Truth(directions_GD=parts["directions"], bias_D=parts["bias"], x_ND=parts["x"],
                     codes_NG=parts["codes"], key=sha256_file(path)[:16])  # fmt: skip

    def save(self, folder: Path) -> Path:
        """Write `truth.safetensors`; returns its path."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / FILE
        named = {"directions": self.directions_GD, "bias": self.bias_D, "x": self.x_ND, "codes": self.codes_NG}
        save_file({name: t.contiguous() for name, t in named.items()}, path)
        return path


def best_reconstruction(truth: Truth, rows: np.ndarray) -> np.ndarray:
    """[n, D] what the true dictionary makes of tokens ``rows``: non-negative least squares on the true support."""
    from scipy.optimize import nnls

    directions = truth.directions_GD.double().numpy()
    bias = truth.bias_D.double().numpy()
    x_nD = truth.x_ND.double().numpy()[rows] - bias
    out = np.tile(bias, (len(rows), 1))
    for i, row in enumerate(rows):
        support = np.flatnonzero(truth.codes_NG[row].numpy() > 0)
        if len(support):
            a, _ = nnls(directions[support].T, x_nD[i])
            out[i] += a @ directions[support]
    return out
