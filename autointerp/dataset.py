"""The explanation dataset: exemplars, explanations and scores of all SAEs, joined into parquet tables with a card.

AUTOINTERP 7. Torch-free: reads the files that the stages left, nothing else. One folder of zstd parquet per table;
rows are sorted, so the same artefacts give the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.dataset_card import blocked, card
from autointerp.records import Explanation, JudgeCheck, LatentScore, Record, ScoreItem
from autointerp.tables import read_jsonl, read_parquet
from sae.errors import ArtefactError, ConfigError, DataError
from sae.manifest import artefact_dir, canonical_json, is_complete, key_of, read_manifest, writing

KIND, STAGE_VERSION = "dataset", 1
TABLES = ("explanations", "scores", "score_items", "exemplars", "latents")

Chain = dict[str, Path]
"""Folders of one SAE: exemplars, latents, and explanations and scores where there are any."""


def export(root: Path, out: Path, *, force: bool = False, check_licences: bool = False) -> Path:
    """Write the dataset of everything under ``root`` to ``out``; returns ``out``.

    Per SAE the newest scores count, with the explanations, exemplars and latent statistics they were made from. A
    dataset of the same artefacts is left alone. Raises :class:`ArtefactError` if nothing was explained,
    :class:`ConfigError` if ``out`` holds something else, and with ``check_licences`` :class:`DataError` if windows come
    from texts whose licence is non-commercial or not stated.
    """
    root, out = Path(root), Path(out)
    chains = find_chains(root)
    if not chains:
        raise ArtefactError(f"{root} holds no finished explanations; run: python -m evals.run_all --root {root}")
    keys = {sae_id: {kind: path.name for kind, path in chain.items()} for sae_id, chain in chains.items()}
    inputs = {f"{sae_id}.{kind}": key for sae_id, found in sorted(keys.items()) for kind, key in sorted(found.items())}
    key = key_of(KIND, STAGE_VERSION, {"tables": TABLES}, inputs)
    if check_licences:
        _check_licences(chains)
    if _holds(out, key) and not force:
        return out
    checks, tables = _read_all(chains)
    cfgs = {sae_id: _cfg(root, sae_id) for sae_id in chains}
    config = {"tables": list(TABLES)}
    with writing(out, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as writer:
        for name, table in tables.items():
            (writer.path / name).mkdir()
            table.to_parquet(writer.path / name / f"{name}.parquet", index=False, compression="zstd")
        (writer.path / "README.md").write_text(card(tables, checks, cfgs, keys), encoding="utf-8")
        writer.counts |= {"saes": len(chains), **{name: len(table) for name, table in tables.items()}}
    return out


def _holds(out: Path, key: str) -> bool:
    """Whether ``out`` is already the dataset ``key``; :class:`ConfigError` if it is anything but a dataset."""
    if is_complete(out):
        manifest = read_manifest(out)
        if manifest["kind"] == KIND:
            return bool(manifest["key"] == key)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is no dataset of saescope; choose an empty or new folder")
    return False


def _complete(root: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Complete artefacts of a kind, oldest first."""
    found = [(f, read_manifest(f)) for f in sorted((root / kind).glob("*")) if f.is_dir() and is_complete(f)]
    yield from sorted(found, key=lambda item: (str(item[1]["provenance"]["created_at"]), item[0].name))


def find_chains(root: Path) -> dict[str, Chain]:
    """Per SAE the newest scores and what they were made from; without scores, the newest explanations."""
    chains: dict[str, Chain] = {}
    behind: dict[str, tuple[str, Chain]] = {}
    for folder, manifest in _complete(Path(root), "explanations"):
        exemplars = artefact_dir(root, "exemplars", str(manifest["inputs"]["exemplars"]))
        made_from = read_manifest(exemplars)
        sae_id = str(made_from["counts"]["sae_id"])
        latents = artefact_dir(root, "latents", str(made_from["inputs"]["latents"]))
        behind[folder.name] = (sae_id, {"explanations": folder, "exemplars": exemplars, "latents": latents})
        chains[sae_id] = behind[folder.name][1]
    for folder, manifest in _complete(Path(root), "scores"):
        key = str(manifest["inputs"]["explanations"])
        if key in behind:
            sae_id, chain = behind[key]
            chains[sae_id] = chain | {"scores": folder}
    return {sae_id: chains[sae_id] for sae_id in sorted(chains)}


def _check_licences(chains: Mapping[str, Chain]) -> None:
    columns = (pd.read_parquet(c["exemplars"] / "exemplars.parquet", columns=["source"]) for c in chains.values())
    sources = {str(s) for column in columns for s in column["source"].unique()}
    if found := blocked(sorted(sources)):
        listed = "; ".join(f"{f.source}: {f.licence}" for f in found)
        raise DataError(
            f"the windows come from texts that are non-commercial or of unstated licence ({listed}); "
            "look them up, then pass --accept-licences"
        )


def _cfg(root: Path, sae_id: str) -> dict[str, Any]:
    path = root / "saes" / sae_id / "cfg.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _read_all(chains: Mapping[str, Chain]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """(judge checks, the tables), all SAEs one after another."""
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in (*TABLES, "checks")}
    for sae_id, chain in chains.items():
        texts = read_jsonl(chain["explanations"] / "explanations.jsonl", Explanation)
        seed = read_manifest(chain["explanations"])["config"].get("seed")
        parts["explanations"].append(_explanations(texts, seed, chain["explanations"].name))
        if "scores" in chain:
            checks = read_jsonl(chain["scores"] / "judges.jsonl", JudgeCheck)
            scores = read_parquet(chain["scores"] / "scores.parquet", LatentScore)
            items = read_parquet(chain["scores"] / "items.parquet", ScoreItem)
            parts["checks"].append(_frame(checks, JudgeCheck))
            parts["scores"].append(_scores(scores, checks, chain["scores"].name))
            parts["score_items"].append(_items(items, sae_id))
        parts["exemplars"].append(_exemplars(chain["exemplars"], sae_id))
        latents = pd.read_parquet(chain["latents"] / "latents.parquet").reset_index()
        parts["latents"].append(latents.assign(sae_id=sae_id))
    empty = {"scores": _scores([], [], ""), "score_items": _items([], ""), "checks": _frame([], JudgeCheck)}
    tables = {n: _join(found) if found else empty[n] for n, found in parts.items()}
    checks_table = tables.pop("checks").drop(columns=["detail"])
    checks_table = checks_table.drop_duplicates(["judge", "scorer"]).sort_values(["scorer", "judge"])
    order = {
        "explanations": ["sae_id", "latent", "explainer", "candidate"],
        "scores": ["sae_id", "latent", "explainer", "scorer", "floor_kind", "metric", "group", "explanation_id"],
        "score_items": ["sae_id", "scorer", "explanation_id", "exemplar_id"],
        "latents": ["sae_id", "latent"],
    }
    for name, columns in order.items():  # exemplars are sorted already
        tables[name] = tables[name].sort_values(columns, kind="stable", ignore_index=True)
    return checks_table, {name: _sae_id_first(tables[name]) for name in TABLES}


def _join(found: list[pd.DataFrame]) -> pd.DataFrame:
    # A column that is empty in one SAE and filled in another must not lose its type.
    kept = [f for f in found if len(f)] or found[:1]
    return pd.concat([f.dropna(axis=1, how="all") if len(kept) > 1 else f for f in kept], ignore_index=True).reindex(
        columns=list(dict.fromkeys(c for f in kept for c in f.columns))
    )


def _sae_id_first(table: pd.DataFrame) -> pd.DataFrame:
    return table[["sae_id", *(c for c in table.columns if c != "sae_id")]]


def _frame(records: "list[Any]", kind: type[Record]) -> pd.DataFrame:
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    return pd.DataFrame([r.to_dict() for r in records], columns=names)


def _with_failures(table: pd.DataFrame) -> pd.DataFrame:
    """``failure`` becomes failure_code and failure_detail; null where there is none."""
    failures = table.pop("failure")
    table["failure_code"] = pd.Series([f["code"] if f else None for f in failures], dtype="string", index=table.index)
    details = [f["detail"] if f else None for f in failures]
    table["failure_detail"] = pd.Series(details, dtype="string", index=table.index)
    return table


def _explanations(texts: list[Explanation], seed: Any, key: str) -> pd.DataFrame:
    table = _with_failures(_frame(texts, Explanation))
    patterns = [canonical_json(p) if p is not None else None for p in table.pop("pattern")]
    table["pattern_json"] = pd.Series(patterns, dtype="string", index=table.index)
    for name in ("text", "llm", "llm_revision", "prompt_sha256"):
        table[name] = table[name].astype("string")
    for name in ("calibrate_score", "margin"):
        table[name] = table[name].astype("Float64")
    return table.assign(seed=seed, explanations_key=key)


def _scores(scores: list[LatentScore], checks: list[JudgeCheck], key: str) -> pd.DataFrame:
    """Scores with the judge's check and, beside each true value, the shuffled floor on the same windows."""
    table = _frame(scores, LatentScore)
    for name in ("value", "ci_low", "ci_high", "value_worst", "base_rate"):
        table[name] = table[name].astype("Float64")
    table["null_reason"] = table["null_reason"].astype("string")
    same = ["latent", "explainer", "scorer", "metric", "group"]
    shuffled = table[table["floor_kind"] == "shuffled"].drop_duplicates(same).set_index(same)["value"]
    places = pd.MultiIndex.from_frame(table[same])
    table["floor"] = shuffled.reindex(places).to_numpy(dtype=float, na_value=float("nan"))
    table.loc[table["floor_kind"] != "", "floor"] = float("nan")
    table["floor"] = table["floor"].astype("Float64")
    checked = {(c.scorer, c.judge): c for c in checks}  # a scorer may have rows of several judges (patterns, texts)
    found = [checked.get(pair) for pair in zip(table["scorer"], table["judge"], strict=True)]
    table["judge_auc"] = pd.array([c.auc if c else None for c in found], dtype="Float64")
    table["judge_wrong_auc"] = pd.array([c.wrong_auc if c else None for c in found], dtype="Float64")
    table["judge_weak"] = pd.array([c.weak if c else None for c in found], dtype="boolean")
    return table.assign(scores_key=key)


def _items(items: list[ScoreItem], sae_id: str) -> pd.DataFrame:
    table = _with_failures(_frame(items, ScoreItem))
    table["value"] = table["value"].astype("Float64")
    table["verdict"] = table["verdict"].astype("boolean")
    table["positive"] = table["positive"].astype("bool")
    table["mask"] = [np.array(m, dtype=np.int32) for m in table["mask"]]  # a type even where no list has a member
    return table.assign(sae_id=sae_id)


def _exemplars(folder: Path, sae_id: str) -> pd.DataFrame:
    table = pd.read_parquet(folder / "exemplars.parquet").rename(columns={"row": "seq"})
    table["length"] = [len(ids) for ids in table["token_ids"]]
    at_peak = [float(a[p]) if p >= 0 else None for a, p in zip(table["acts"], table["peak"], strict=True)]
    table["peak_act"] = pd.array(at_peak, dtype="Float64")
    return table.assign(sae_id=sae_id)
