"""Neuronpedia's batch files, out and in (AUTOINTERP 7): ``<model>/<source>/{features,activations,explanations}/``.

The columns are those of Neuronpedia's own export; each folder holds ``batch-N.jsonl.gz`` of at most 1,024 features.
What we do not have (logit histograms, correlated neurons) stays empty, and nothing stands for it. Torch-free. The same
artefacts give the same bytes.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from autointerp.dataset import find_chains
from autointerp.exemplars import ExemplarTable
from autointerp.latent_stats import HISTOGRAM_BINS
from autointerp.openai_wire import whole_characters
from autointerp.records import Explanation
from autointerp.tables import read_jsonl, write_jsonl, write_parquet
from sae.errors import ArtefactError, ConfigError, DataError
from sae.manifest import artefact_dir, is_complete, key_of, read_manifest, sha256_text, writing

BATCH_FEATURES = 1_024
SHOWN_KINDS = ("top", "quantile")
IMPORTED, IMPORT_VERSION = "imported", 1
Decode = Callable[[Sequence[int]], str]


def export_neuronpedia(
    root: Path, out: Path, decode: Decode, *, model_id: str | None = None, creator_id: str = "saescope",
    type_names: Mapping[str, str] | None = None,
) -> list[Path]:
    """One folder per SAE under ``out``; returns them. ``decode``: token ids to text, of the subject's tokenizer.

    ``type_names``: explainer -> Neuronpedia's name of the method; by default ``saescope_<explainer>``, since a near
    relative is not the same method. Raises :class:`ArtefactError` if nothing was explained, :class:`ConfigError` if a
    folder is there already.
    """
    chains = find_chains(root)
    if not chains:
        raise ArtefactError(f"{root} holds no finished explanations; run: python -m evals.run_all --root {root}")
    plans = []
    for sae_id, chain in chains.items():
        cfg_file = Path(root) / "saes" / sae_id / "cfg.json"
        meta = (json.loads(cfg_file.read_text(encoding="utf-8")).get("meta") or {}) if cfg_file.is_file() else {}
        model = _safe(model_id or str(meta.get("lm") or "unknown"))
        source = source_name(sae_id, str(meta.get("hookpoint") or ""))
        folder = Path(out) / model / source
        if folder.exists():
            raise ConfigError(f"{folder} exists; choose another folder, or remove it")
        plans.append((chain, folder, {"modelId": model, "layer": source}, str(meta.get("hookpoint") or "")))
    for chain, folder, where, hookpoint in plans:
        _export_one(chain, folder, where, hookpoint, decode, creator_id, dict(type_names or {}))
    return [folder for _, folder, _, _ in plans]


def source_name(sae_id: str, hookpoint: str) -> str:
    """Neuronpedia's source id, ``<layer>-<set>``; the layer is the first number of the hookpoint."""
    number = re.search(r"\d+", hookpoint)
    return f"{number[0] if number else '0'}-{_safe(sae_id)}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.").lower() or "unknown"


def _export_one(
    chain: Mapping[str, Path],
    folder: Path,
    where: Mapping[str, str],
    hookpoint: str,
    decode: Decode,
    creator: str,
    type_names: Mapping[str, str],
) -> None:
    table = ExemplarTable.open(chain["exemplars"])
    stats = pd.read_parquet(chain["latents"] / "latents.parquet")
    stats = stats.set_index("latent") if "latent" in stats else stats
    said = read_jsonl(chain["explanations"] / "explanations.jsonl", Explanation)
    shown = chain["explanations"] / "output_tokens.json"
    output_tokens = json.loads(shown.read_text(encoding="utf-8")) if shown.is_file() else {}
    created = str(read_manifest(chain["explanations"])["provenance"]["created_at"])
    common = {**where, "creatorId": creator}
    for number, start in enumerate(range(0, len(table.latents), BATCH_FEATURES)):
        latents = table.latents[start : start + BATCH_FEATURES]
        features = [
            {**common, **_feature(i, stats.loc[i], output_tokens.get(str(i), ((), ())), hookpoint)} for i in latents
        ]
        wanted = set(latents)
        texts = [e for e in said if e.latent in wanted and e.text is not None and e.failure is None]
        rows = {
            "features": features,
            "activations": [
                {**common, **row, "createdAt": created}
                for i in latents
                for row in _activations(table, i, decode, where)
            ],
            "explanations": [
                {**where, "authorId": creator, **_explanation(e, type_names, where), "createdAt": created}
                for e in texts
            ],
        }
        for name, lines in rows.items():
            _write(folder / name / f"batch-{number}.jsonl.gz", lines)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open(path, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        file.write(text.encode("utf-8"))


def _feature(latent: int, stats: Any, tokens: Sequence[Sequence[str]], hookpoint: str) -> dict[str, Any]:
    """One line of `features`; the histogram is of active tokens, equal bins on (0, max]."""
    largest = float(stats["max_act"])
    near = zip(stats.get("nearest", ()), stats.get("nearest_cosine", ()), strict=True)
    nearest = [(int(i), round(float(c), 4)) for i, c in near]
    return {
        "index": str(latent),
        "maxActApprox": round(largest, 4),
        "frac_nonzero": float(stats["density"]),
        "freq_hist_data_bar_heights": [int(n) for n in stats["histogram"]],
        "freq_hist_data_bar_values": [round((i + 0.5) * largest / HISTOGRAM_BINS, 4) for i in range(HISTOGRAM_BINS)],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "pos_str": list(tokens[0]),
        "pos_values": [],
        "neg_str": list(tokens[1]),
        "neg_values": [],
        "topkCosSimIndices": [i for i, _ in nearest],
        "topkCosSimValues": [c for _, c in nearest],
        "vector": [],
        "hasVector": False,
        "hookName": hookpoint,
    }


def _activations(
    table: ExemplarTable, latent: int, decode: Decode, where: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Windows of all splits of the kinds top and quantile; a quantile window carries its bin."""
    shown = [e for split in ("explain", "calibrate", "score") for e in table.exemplars(latent, split)]
    shown = [e for e in shown if e.kind in SHOWN_KINDS]
    peaks: dict[tuple[str, int], list[float]] = {}
    for e in shown:
        if e.group >= 0:
            peaks.setdefault((e.split, e.group), []).append(max(e.acts))
    for e in shown:
        peak = e.acts.index(max(e.acts))
        inside = peaks.get((e.split, e.group), [])
        yield {
            "id": _identifier(where, "activation", e.exemplar_id),
            "index": str(latent),
            "tokens": [decode([t]) for t in e.token_ids],
            "values": [round(float(a), 4) for a in e.acts],
            "maxValue": round(float(e.acts[peak]), 4),
            "maxValueTokenIndex": peak,
            "minValue": round(float(min(e.acts)), 4),
            "binMin": round(min(inside), 4) if inside else None,
            "binMax": round(max(inside), 4) if inside else None,
            "binContains": None,
            "qualifyingTokenIndex": peak,
            "dataSource": e.source,
            "dataIndex": e.doc_id,
        }


def _explanation(e: Explanation, type_names: Mapping[str, str], where: Mapping[str, str]) -> dict[str, Any]:
    chosen = "selected on the split calibrate" if e.selected else ""
    return {
        "id": _identifier(where, "explanation", e.explanation_id),
        "index": str(e.latent),
        "description": e.text,
        "typeName": type_names.get(e.explainer, f"saescope_{e.explainer}"),
        "explanationModelName": e.llm or "",
        "notes": "; ".join(part for part in (e.role, chosen, "hedged" if e.hedged else "") if part),
        "embedding": None,
    }


def _identifier(where: Mapping[str, str], kind: str, name: str) -> str:
    return "saes" + sha256_text("/".join((where["modelId"], where["layer"], kind, name)))[:24]


def read_explanations(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``explanations/batch-*.jsonl[.gz]`` of one source, in the order of the files. :class:`DataError` names a
    bad line; :class:`ArtefactError` where there are no such files."""
    files = sorted(
        (f for f in (Path(folder) / "explanations").glob("batch-*.jsonl*") if f.suffix in (".gz", ".jsonl")),
        key=lambda f: (int(re.search(r"batch-(\d+)", f.name)[1]), f.name),  # type: ignore[index]
    )
    if not files:
        raise ArtefactError(f"{folder} holds no explanations/batch-N.jsonl.gz")
    rows = []
    for path in files:
        raw = path.read_bytes()
        try:
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append(_row(line, path, number))
    return rows


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        index, text = int(row["index"]), row["description"]
        if index < 0 or not isinstance(text, str):
            raise ValueError("index or description is of the wrong kind")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}, line {number}: not an explanation ({error})") from error
    return {**row, "index": index}


def import_explanations(root: Path, folder: Path, exemplars: ExemplarTable) -> Path:
    """Explanations of one Neuronpedia source as an artefact ``explanations/<key>/``, to be scored like any other.

    Only latents with exemplars count; of several texts of a latent the first is selected. Texts are kept as they are,
    equal ones of different latents too. :class:`DataError` if none is about these latents.
    """
    rows = read_explanations(folder)
    wanted = set(exemplars.latents)
    found: list[Explanation] = []
    seen: dict[int, int] = {}
    for row in rows:
        latent, text = row["index"], " ".join(whole_characters(row["description"]).split())
        if latent not in wanted or not text:
            continue
        n = seen[latent] = seen.get(latent, -1) + 1
        found.append(
            Explanation(
                explanation_id=f"{exemplars.sae_id}/{latent}/{IMPORTED}/{n}", sae_id=exemplars.sae_id, latent=latent,
                explainer=IMPORTED, explainer_version=IMPORT_VERSION, text=text, candidate=n, selected=n == 0,
                llm=row.get("explanationModelName") or None,
            )  # fmt: skip
        )
    if not found:
        raise DataError(f"{folder}: none of its {len(rows)} explanations is about the {len(wanted)} sampled latents")
    found.sort(key=lambda e: (e.latent, e.candidate))
    content = sha256_text(json.dumps([e.to_dict() for e in found], sort_keys=True))
    config, inputs = {"importer": IMPORT_VERSION, "content": content}, {"exemplars": exemplars.key}
    key = key_of("explanations", IMPORT_VERSION, config, inputs)
    target = artefact_dir(root, "explanations", key)
    if not is_complete(target):
        with writing(
            target, kind="explanations", key=key, stage_version=IMPORT_VERSION, config=config, inputs=inputs
        ) as out:
            write_jsonl(out.path / "explanations.jsonl", found)
            write_parquet(out.path / "explanations.parquet", found, Explanation)
            out.counts.update(sae_id=exemplars.sae_id, latents=len(seen), explanations=len(found), failed=0)
    return target
