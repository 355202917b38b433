"""docs/probe-tasks.md tells the origin of all 61 tasks as the data file has them.

``SAESCOPE_WRITE_GOLDENS=1 python -m pytest tests/evals/test_probe_table.py`` writes it anew.
"""

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "probe-tasks.md"
HEAD = """# The 61 probe tasks and where their texts come from

Gao et al. (arXiv 2406.04093, Table 1) name the tasks and publish no texts. Files are those of `sae-probes` 0.4.2,
cleaned as METRICS C.2 says. *Native*: the paper's own data set. *Rebuilt*: its data set, but the file's labels or
negatives were made anew. *Analogue*: another data set for the same question. *Generated*: made here. A task that is
missing is listed in every result and never imputed; `--task-csv` accepts it. The twelve of preset `quick` are marked.

| task | family | kind | source | positive | group besides near-duplicates | quick | note |
|---|---|---|---|---|---|---|---|
"""
REBUILT = ("quail", "openbookqa", "social_iqa", "one_against_rest")


def kind(entry: dict[str, Any]) -> str:
    if "missing" in entry:
        return "missing"
    if entry.get("analogue"):
        return "analogue"
    transform = entry.get("transform", "")
    return "generated" if transform == "base64" else "rebuilt" if transform in REBUILT else "native"


def line(entry: dict[str, Any]) -> str:
    made = {"base64": "documents of the split test", "languages": "message catalogues"}
    source = entry.get("source") or made.get(entry.get("transform", ""), "–")
    cells = [
        entry["name"], entry["family"], kind(entry), source,
        ", ".join(entry.get("positive") or []) or ("right option" if kind(entry) == "rebuilt" else "–"),
        entry.get("group", "–"), "yes" if entry.get("quick") else "", entry.get("missing") or entry.get("note", ""),
    ]  # fmt: skip
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("_", "\\_") for c in cells) + " |"


def test_the_page_is_the_data_file() -> None:
    tasks = json.loads((ROOT / "evals" / "probe_tasks.json").read_text(encoding="utf-8"))["tasks"]
    counts: dict[str, int] = {}
    for entry in tasks:
        counts[kind(entry)] = counts.get(kind(entry), 0) + 1
    tail = ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda p: (-p[1], p[0])))
    text = HEAD + "\n".join(map(line, tasks)) + f"\n\n{len(tasks)} tasks: {tail}.\n"
    if os.environ.get("SAESCOPE_WRITE_GOLDENS"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text
    assert len(tasks) == 61 and counts["missing"] == 2 and counts["analogue"] == 11 and counts["generated"] == 1
    assert all(entry.get("source") or entry.get("transform") or "missing" in entry for entry in tasks)
