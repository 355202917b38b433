"""No kernel is left out where kernels are compiled for GPUs without one."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "kernels" / "sae_kernels"
ALIASES = {"threshold_encode": "te"}


def test_every_kernel_is_compiled_for_gpus() -> None:
    programs = "\n".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*compile*.py"))
    found = [
        (module.stem, name)
        for module in sorted(SOURCES.glob("*.py"))
        for name in re.findall(r"^@triton\.jit\ndef (_\w+_kernel)\(", module.read_text(encoding="utf-8"), flags=re.M)
    ]
    assert len(found) >= 18 and len(set(found)) == len(found)
    missing = [pair for pair in found if f"{ALIASES.get(pair[0], pair[0])}.{pair[1]}" not in programs]
    assert not missing, f"no compile test launches {missing}"
