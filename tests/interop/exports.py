"""What saescope exports to a library, and a fingerprint of it; ``exports.py OUT`` writes the files for ``check_*.py``.

``goldens/exports.json`` holds the fingerprints of the exports that each library loaded and ran with the values of the
golden (``make interop``). The test suite writes them again and compares, so that it needs no library.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sae.convert import convert
from sae.errors import Unsupported

GOLDENS = Path(__file__).parent / "goldens"
RECORD = GOLDENS / "exports.json"
LIBRARIES = ("saelens", "dictionary_learning", "sparsify", "llamascopium", "circuit_tracer")


def cases() -> list[Path]:
    """Folders with a golden, of all libraries; those that need an option to be read are left out."""
    found = sorted(p.parent for p in GOLDENS.glob("*/*/golden.safetensors"))
    return [p for p in found if p.name != "batchtopk_uncalibrated"]


def source(case: Path) -> Path:
    """What is loaded: the folder, or the one file of a format that has no folder."""
    return next(case.glob("samples_*.pt"), case)


def write(out: Path, to: str) -> list[str]:
    """Export every golden SAE that ``to`` can hold as ``out/<library>__<case>``; returns the names."""
    names = []
    for case in cases():
        name = f"{case.parent.name}__{case.name}"
        try:
            convert(source(case), out / name, to, force=True)
        except Unsupported:
            continue
        names.append(name)
    return names


def fingerprint(folder: Path) -> dict[str, Any]:
    """Configurations word for word; of every tensor shape, norm and two sums that see order."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
            continue
        if path.suffix == ".yaml":
            found[path.name] = path.read_text()
            continue
        values = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        found[path.name] = {name: _facts(tensor) for name, tensor in sorted(values.items())}
    return found


def _facts(tensor: torch.Tensor) -> list[Any]:
    flat = tensor.double().reshape(-1)
    waves = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 0.7)
    return [list(tensor.shape), str(tensor.dtype), float(flat.norm()), float(flat.sum()), float(flat @ waves)]


def golden_of(name: str) -> Path:
    """The golden of an export of :func:`write`."""
    return GOLDENS / name.replace("__", "/", 1) / "golden.safetensors"


def main(out: Path, record: bool) -> None:
    """Write all exports, or (``record``) collect what the libraries found on them."""
    collected: dict[str, Any] = json.loads(RECORD.read_text()) if record and RECORD.is_file() else {}
    for to in LIBRARIES:
        if not record:
            print(to, len(write(out / to, to)))
        elif (out / to / "checked.json").is_file():
            checked = json.loads((out / to / "checked.json").read_text())
            collected[to] = {
                "library": checked["library"], "version": checked["version"],
                "exports": {name: fingerprint(out / to / name) for name in sorted(checked["same"])},
            }  # fmt: skip
    if record:
        RECORD.write_text(json.dumps(collected, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--record" in sys.argv)
