"""docs/probe-tasks.md tells the origin of all 61 tasks, and of the 65 of ``--tasks sae_probes``, as the data files do.

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
MORE = """
# 65 more: `--tasks sae_probes`

The other binary data sets of `sae-probes` 0.4.2 (of its 113, those that no task above reads), for `sparse_probing`
alone, cleaned, grouped and split in the same way: `--tasks sae_probes` for all, or names of some. They are read from
the pinned wheel (sha256 in `sae/assets.py`, fetched through pip or given with `python -m sae assets --wheel`), never
shipped. The package is MIT; its texts have licences of their own, below as far as known, **not verified**, the sources
as the package names them. None is copied into results, which hold numbers alone.

A task is *seen* if an SAE of the run was trained on its table, or on one that shares sentences with it (its `cfg.json`
says on which). `sae_probes` leaves seen tasks out, for all SAEs of the run, and lists them in `run.json`; one asked for
by name stops the run. `--allow-seen` measures them, and the rows' manifests list them under `seen`. *Seen by default*:
in the default training text. The others were compared with it: no run of ten words in common in more than 0.5 % of
their prompts. The three `temp_cat` tasks and `cancer_cat_Colon_Cancer` have fewer than 60 rows of a class on a side
once cleaned (`too_few_rows`).

| task | family | source | positive | group besides near-duplicates | seen by default | licence of the texts |
|---|---|---|---|---|---|---|
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


def licence(source: str) -> str:
    known = json.loads((ROOT / "autointerp" / "licences.json").read_text(encoding="utf-8"))
    number = int(source.partition("_")[0])
    found = next((g for g in known["groups"] if number in g["files"]), known["otherwise"])
    return str(found["licence"])


def more_text() -> str:
    """The second table."""
    data = json.loads((ROOT / "evals" / "more_probe_tasks.json").read_text(encoding="utf-8"))
    mix = json.loads((ROOT / "sae" / "default_mix.json").read_text(encoding="utf-8"))
    numbers = {entry["file"].partition("_")[0] for entry in mix["files"]}
    lines = []
    for entry in data["tasks"]:
        tables = [t for t in (entry["source"], *entry.get("shares", ())) if t.partition("_")[0] in numbers]
        cells = [entry["name"], entry["family"], entry["source"], ", ".join(entry["positive"]),
                 entry.get("group", "–"), tables[0] if tables else "", licence(entry["source"])]  # fmt: skip
        lines.append("| " + " | ".join(c.replace("_", "\\_") for c in cells) + " |")
    out = "\n".join(f"- {e['source']}: {e['why']}".replace("_", "\\_") for e in data["left_out"])
    return f"{MORE}{chr(10).join(lines)}\n\nLeft out, since the tasks `ag_*` ask the same better:\n{out}\n"


def test_the_page_is_the_data_file() -> None:
    tasks = json.loads((ROOT / "evals" / "probe_tasks.json").read_text(encoding="utf-8"))["tasks"]
    counts: dict[str, int] = {}
    for entry in tasks:
        counts[kind(entry)] = counts.get(kind(entry), 0) + 1
    tail = ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda p: (-p[1], p[0])))
    text = HEAD + "\n".join(map(line, tasks)) + f"\n\n{len(tasks)} tasks: {tail}.\n" + more_text()
    if os.environ.get("SAESCOPE_WRITE_GOLDENS"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text
    assert len(tasks) == 61 and counts["missing"] == 2 and counts["analogue"] == 11 and counts["generated"] == 1
    assert all(entry.get("source") or entry.get("transform") or "missing" in entry for entry in tasks)
