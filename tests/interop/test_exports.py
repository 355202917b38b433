"""What the libraries loaded and ran with the values of the golden is what saescope still exports.

The record is made by the libraries in their own environments (``make interop``, ``check_exports.py``).
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from sae.convert import convert

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("interop_exports", HERE / "exports.py")
assert SPEC is not None and SPEC.loader is not None
exports = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(exports)
RECORD: dict[str, Any] = json.loads(exports.RECORD.read_text())
ALL = [(to, name) for to, found in RECORD.items() for name in found["exports"]]


def alike(got: Any, want: Any) -> None:
    """Equal, numbers to 1e-5 (foldings may round the last bit otherwise on another machine)."""
    if isinstance(want, dict):
        assert set(got) == set(want)
        for name in want:
            alike(got[name], want[name])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            alike(a, b)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
    else:
        assert got == want


@pytest.mark.parametrize(("to", "name"), ALL, ids=lambda v: v)
def test_an_export_is_what_the_library_ran(to: str, name: str, tmp_path: Path):
    convert(exports.source(exports.golden_of(name).parent), tmp_path / name, to)
    alike(exports.fingerprint(tmp_path / name), RECORD[to]["exports"][name])


def test_every_library_ran_every_export_of_its_format(tmp_path: Path):
    """No export was left out of the record because it failed there."""
    assert set(RECORD) == set(exports.LIBRARIES)
    for to in exports.LIBRARIES:
        assert sorted(exports.write(tmp_path / to, to)) == sorted(RECORD[to]["exports"]), to
        assert {n.split("__")[0] for n in RECORD[to]["exports"]} >= {to}, "its own goldens come back to it"
