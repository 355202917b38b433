"""Every defect of a peer that the design lists has tests, and they exist (docs/peers-defects.md)."""

import re
from pathlib import Path

HERE = Path(__file__).parent
TABLE = (HERE.parents[1] / "docs" / "peers-defects.md").read_text(encoding="utf-8")


def test_every_test_of_the_table_exists() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "::" in line]
    assert len(rows) == 16
    for row in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", row)
        assert named, row
        for module, test in named:
            assert f"def {test}(" in (HERE / f"{module}.py").read_text(encoding="utf-8"), (module, test)
