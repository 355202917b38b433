"""README.md of an explanation dataset: what is in it, where it came from, how far to trust it. Torch-free."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import pandas as pd

FREE = ("permissive", "share_alike")
"""Licence statuses under which windows may be published as they are."""

ABOUT = {
    "explanations": "one row per candidate explanation of a latent, or the failure to make one",
    "scores": "long table of metrics per explanation, with interval, floor and the judge's own check",
    "score_items": "one row per judged window: the judge's value and verdict, or the failure",
    "exemplars": "the windows themselves: token ids, activations, kind, split, stratum",
    "latents": "statistics of every latent of every SAE on held-out text",
}
COLUMNS = (
    ("explanations.text", "the explanation in words; null for a failure"),
    ("explanations.pattern_json", "N2G patterns keyed by token id (null = any token)"),
    ("explanations.selected", "the candidate chosen on the split calibrate, never on score"),
    ("scores.metric, group", "precision, recall, AUC, ...; `group` names a slice, empty = all windows"),
    ("scores.precision", "at the latent's true firing rate pi; precision_at_half at a rate of one half"),
    ("scores.base_rate", "pi: share of the grid windows of the split score on which the latent is active"),
    ("scores.floor", "the same metric for another latent's explanation on the same windows (shuffled)"),
    ("scores.judge_weak", "the judge failed its check on known features: shown, never ranked"),
    ("scores.accuracy", "intruder: share of trials in which the silent window of five was found; base_rate = chance"),
    ("score_items.verdict", "null if the item failed; failures are never counted as answers"),
    ("score_items.mask", "fuzzing: the tokens shown marked; a positive window is judged under right and wrong marks"),
    ("score_items.positive", "fuzzing: the marks are right; intruder: false, for the item is the silent window"),
    ("exemplars.kind", "positive: top, quantile, random_positive; silent: silent and three hard kinds, by stratum; "
     "embedding_near: silent windows that read like the latent's own, in no pooled metric"),
    ("exemplars.stratum_share", "share of this stratum among all silent windows of the split"),
    ("exemplars.peak", "position of the peak (random_positive: of the drawn token) in the window; -1 if silent"),
    ("latents.pi", "as base_rate; unsuffixed strengths (max_act, histogram, ...) are of the split explain"),
)


class Licence(NamedTuple):
    """What is known of one text source."""

    source: str
    licence: str
    status: str
    """permissive, share_alike, non_commercial or not_stated."""


def licence_of(source: str) -> Licence:
    """Licence by the leading number of a file of the default texts; any other source is not_stated."""
    data = json.loads(resources.files("autointerp").joinpath("licences.json").read_text(encoding="utf-8"))
    number = re.fullmatch(r"(\d+)_\w+", source)  # names of default tables carry no suffix; a user's files do
    for group in data["groups"]:
        if number and int(number[1]) in group["files"]:
            return Licence(source, group["licence"], group["status"])
    return Licence(source, data["otherwise"]["licence"], data["otherwise"]["status"])


def model_licence(name: str) -> str:
    """Of the embedded model; of any other it is not stated here."""
    data = json.loads(resources.files("autointerp").joinpath("licences.json").read_text(encoding="utf-8"))
    return str(data["models"].get(name, "see its own card"))


def blocked(sources: Sequence[str]) -> list[Licence]:
    """Sources whose texts are non-commercial or of unstated licence."""
    return [found for s in sorted(set(sources)) if (found := licence_of(s)).status not in FREE]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "_none_\n"

    def cell(value: Any) -> str:
        if isinstance(value, float):
            value = "" if pd.isna(value) else f"{value:.3g}"
        return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def _header(names: Sequence[str]) -> str:
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in names)
    return f"---\npretty_name: Explanations of SAE latents\nlicense: other\nconfigs:\n{configs}---\n"


def _saes(cfgs: Mapping[str, Mapping[str, Any]], tables: Mapping[str, pd.DataFrame]) -> str:
    rows = []
    for sae_id in sorted(cfgs):
        cfg = cfgs[sae_id]
        meta = cfg.get("meta") or {}
        mine = tables["explanations"][tables["explanations"]["sae_id"] == sae_id]
        rows.append((
            sae_id, meta.get("lm", "unknown"), model_licence(str(meta.get("lm"))),
            str(meta.get("lm_revision", "unknown"))[:16], meta.get("hookpoint", "unknown"),
            cfg.get("architecture", ""), cfg.get("d_sae", ""), mine["latent"].nunique(), len(mine),
            int(mine["failure_code"].notna().sum()),
        ))
    head = ("SAE", "language model", "its licence", "revision", "hookpoint", "architecture", "latents", "explained",
            "texts", "failed")  # fmt: skip
    return _table(head, rows)


def _counts(tables: Mapping[str, pd.DataFrame]) -> str:
    return _table(("table", "rows", "one row is"), [(n, len(t), ABOUT[n]) for n, t in tables.items()])


def _windows(exemplars: pd.DataFrame) -> str:
    counts = exemplars.groupby(["split", "kind"], sort=True).size()
    return _table(("split", "kind", "windows"), [(*index, n) for index, n in counts.items()])  # type: ignore[misc]


def _makers(tables: Mapping[str, pd.DataFrame]) -> str:
    texts = tables["explanations"]
    keys = ["explainer", "explainer_version", "llm", "llm_revision", "prompt_sha256"]
    rows = [
        (*("" if pd.isna(v) else str(v)[:16] for v in index), len(group))
        for index, group in texts.groupby(keys, dropna=False, sort=True)  # type: ignore[misc]
    ]
    return _table((*keys, "texts"), rows)


def _judges(checks: pd.DataFrame) -> str:
    names = ["judge", "scorer", "auc", "ci_low", "ci_high", "wrong_auc", "n"]
    rows = [(*(c[n] for n in names), "weak" if c["weak"] else "") for c in checks.to_dict("records")]
    return _table(("judge", "scorer", "AUC", "low", "high", "AUC, wrong text", "items", ""), rows)


def _floors(scores: pd.DataFrame) -> str:
    if scores.empty:
        return _table((), [])
    whole = scores[(scores["group"] == "") & (scores["floor_kind"] == "")].astype({"value": float, "floor": float})
    rows = []
    for (explainer, scorer, metric), group in whole.groupby(["explainer", "scorer", "metric"], sort=True):
        rows.append((explainer, scorer, metric, group["value"].mean(), group["floor"].mean(),
                     int(group["value"].notna().sum()), int(group["value"].isna().sum())))
    return _table(("explainer", "scorer", "metric", "mean", "floor (shuffled)", "latents", "undefined"), rows)


def _licences(sources: Sequence[str], windows: Mapping[str, int]) -> str:
    return _table(
        ("source file", "windows", "licence (not verified)", "status"),
        [(found.source, windows[found.source], found.licence, found.status) for found in map(licence_of, sources)],
    )


def card(
    tables: Mapping[str, pd.DataFrame],
    checks: pd.DataFrame,
    cfgs: Mapping[str, Mapping[str, Any]],
    artefacts: Mapping[str, Mapping[str, str]],
) -> str:
    """The whole README.md. ``cfgs``: cfg.json by sae_id; ``artefacts``: by sae_id the keys the tables came from."""
    windows = tables["exemplars"]["source"].value_counts().sort_index()
    sources = [str(s) for s in windows.index]
    keys = [(sae_id, kind, key) for sae_id in sorted(artefacts) for kind, key in sorted(artefacts[sae_id].items())]
    parts = [
        _header(list(tables)),
        "# Explanations of SAE latents\n\nMade by `saescope`. A latent is one coordinate of a sparse autoencoder's "
        "code; the tables say on which text it is active, how that was put into words, and how well the words predict "
        "it on text that the explainer never saw.\n",
        "## Tables\n\n" + _counts(tables) + "\nRead one with `pandas.read_parquet(\"scores\")` or "
        "`datasets.load_dataset(folder, \"scores\")`.\n",
        "## SAEs\n\n" + _saes(cfgs, tables),
        "## Explainers\n\n" + _makers(tables),
        "## Judges and their check\n\nBefore it scores, a judge is tried on invented descriptions with fitting and "
        "unfitting windows, and again under wrong descriptions. Below an AUC of 0.75, or less than 0.15 above the "
        "wrong descriptions, it is weak: its scores are shown and never ranked.\n\n" + _judges(checks),
        "## Scores beside their floor\n\nMeans over latents; the floor is the same metric when the explanations "
        "are permuted among latents. Undefined values are counted, never read as 0.\n\n" + _floors(tables["scores"]),
        "## Windows\n\nSplits are by document and disjoint; explainers see `explain`, choices and calibration use "
        "`calibrate`, scores use `score`.\n\n" + _windows(tables["exemplars"]),
        "## Columns\n\n" + _table(("column", "meaning"), COLUMNS),
        "## Texts and licences\n\nThe windows are short quotations from these files. Statuses are as far as known and "
        "**not verified**; `non_commercial` and `not_stated` texts need a further look before they are published.\n\n"
        + _licences(sources, windows.to_dict()),
        "## Repeat it\n\n`python -m autointerp score --client replay --llm MODEL` (and `explain`) on the folder that "
        "this was exported from answers every request from its `replies.sqlite`: no key, no server, the same bytes. A "
        "request that was never answered is an error, not a call.\n",
        "## Where it came from\n\n" + _table(("SAE", "artefact", "key"), keys)
        + "\n`manifest.json` holds the sha256 of every file, the versions and the command.\n",
    ]
    return "\n".join(parts)
