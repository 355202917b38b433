"""What the pages show, read from artefact folders: run summary, latents, explanations, scores. Torch-free.

Of several artefacts of one SAE the newest complete one counts. What is absent is an empty list, never an error: pages
are built from whatever a run has finished so far. What is damaged is an ArtefactError of ``read_manifest``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.records import (
    Exemplar,
    Explanation,
    Failure,
    JudgeCheck,
    LatentScore,
    ScoreItem,
    Simulation,
)
from autointerp.tables import read_jsonl, read_parquet
from evals.board import plain
from evals.effect_records import LatentEffect, read_effects
from evals.page_tokens import TokenReader, read_tokenizer
from sae.errors import ArtefactError
from sae.manifest import is_complete, read_manifest

if TYPE_CHECKING:
    import pandas as pd

PLACES = ("root", "verbose", "list", "dry_run", "force")
"""Options that say where and how loudly, not what: left out of the pages."""
VERSIONS = ("saescope", "torch", "transformers", "vllm", "python", "machine")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A line of the run summary."""

    name: str
    seconds: float
    skipped: bool = False
    """Its artefacts were there before."""
    work_seconds: float = 0.0
    """What making them took, in whichever run did."""
    note: str = ""
    status: str = ""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The run behind a board, from ``run.json`` and the manifests of the rows."""

    command: str = ""
    commits: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    failures: tuple[str, ...] = ()
    seconds: float | None = None
    peak_gb: float | None = None


@dataclass(kw_only=True)
class LatentData:
    """Everything a latent's page shows."""

    sae_id: str
    latent: int
    stats: dict[str, Any] = field(default_factory=dict)
    """Its row of the latent cache's table: n_active_*, density, pi, max_act, histogram, ..."""
    top_ids: tuple[int, ...] = ()
    """Ids of the tokens with the largest mean activation."""
    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()
    exemplars: list[Exemplar] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    scores: list[LatentScore] = field(default_factory=list)
    items: list[ScoreItem] = field(default_factory=list)
    simulations: list[Simulation] = field(default_factory=list)
    effect: LatentEffect | None = None
    """What taking it out does to the model."""
    failures: list[Failure] = field(default_factory=list)
    """Why it has no windows, or lacks a kind of them."""


@dataclass(kw_only=True)
class SaeData:
    """Everything an SAE's page shows beside its rows."""

    sae_id: str
    cfg: dict[str, Any] = field(default_factory=dict)
    """cfg.json."""
    train: "pd.DataFrame | None" = None
    """train.jsonl."""
    stats: "pd.DataFrame | None" = None
    """One row per latent."""
    latents: list[LatentData] = field(default_factory=list)
    tokens: TokenReader = field(default_factory=TokenReader)
    """Text of token ids."""
    checks: list[JudgeCheck] = field(default_factory=list)


def run_info(root: Path, results: "pd.DataFrame | None" = None) -> RunInfo:
    """From ``root/run.json`` where there is one, completed by the provenance of the rows."""
    path = Path(root) / "run.json"
    run: dict[str, Any] = {}
    if path.is_file():
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtefactError(f"{path} is damaged ({error}); delete it, the next run writes it again") from error
    made = run.get("provenance") or {}
    command = run.get("command") or made.get("command") or ""
    commits = [str(made["code_sha"])] if made.get("code_sha") else []
    versions = {name: str(made[name]) for name in VERSIONS if made.get(name)}
    presets = [str(run["preset"])] if run.get("preset") else []
    if results is not None and not results.empty:
        commits = sorted({*commits, *(str(v) for v in results["code_sha"] if plain(v) is not None)})
        presets = sorted({*presets, *map(str, results["preset"])})
        for name in ("saescope", "torch", "transformers", "vllm"):
            found = sorted({str(v) for v in results[name] if plain(v) is not None})
            if found:
                versions[name] = ", ".join(found)
    stages = tuple(
        Stage(
            name=str(s.get("name", "?")),
            seconds=float(s.get("seconds") or 0.0),
            note=str(s.get("note") or ""),
            skipped=bool(s.get("skipped") or s.get("status") == "reused"),
            status=str(s.get("status") or ""),
            work_seconds=float(s.get("work_seconds") or 0.0),
        )
        for s in run.get("stages", [])
    )
    return RunInfo(
        command=_command(command),
        commits=tuple(commits),
        presets=tuple(presets),
        versions=versions,
        machine=run.get("machine") or {},
        config={n: v for n, v in (run.get("config") or {}).items() if n not in PLACES},
        notes=run.get("notes") or {},
        stages=stages,
        failures=tuple(_failure_text(f) for f in run.get("failures", [])),
        seconds=plain(run.get("seconds")),
        peak_gb=plain(run.get("peak_gb")),
    )


def _command(command: Any) -> str:
    """argv as typed: ``["run_all.py", "--preset", "quick"]`` -> ``python -m evals.run_all --preset quick``."""
    words = command.split() if isinstance(command, str) else [str(w) for w in command]
    if words and Path(words[0]).name == "study.py":
        words = ["python", "scripts/study.py", *words[1:]]
    elif words and words[0].endswith(".py"):
        words = ["python", "-m", "evals." + Path(words[0]).stem, *words[1:]]
    return " ".join(words)


def _failure_text(failure: Any) -> str:
    return ": ".join(str(v) for v in failure.values() if v) if isinstance(failure, Mapping) else str(failure)


def artefacts(root: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Complete folders ``root/kind/*`` with their manifests, oldest first."""
    found = []
    for folder in sorted((Path(root) / kind).glob("*")):
        if folder.is_dir() and is_complete(folder):
            manifest = read_manifest(folder)
            found.append(
                (str((manifest.get("provenance") or {}).get("created_at") or ""), folder.name, folder, manifest)
            )
    yield from ((folder, manifest) for _, _, folder, manifest in sorted(found, key=lambda f: f[:2]))


def sae_of(manifest: Mapping[str, Any]) -> str:
    """The sae_id that an artefact's manifest names; "" if none."""
    for part in ("config", "inputs", "counts"):
        value = (manifest.get(part) or {}).get("sae_id")
        if value:
            return str(value)
    return ""


class SiteData(Mapping[str, SaeData]):
    """Everything beside the rows, by sae_id, ascending; an SAE without artefacts is absent.

    An SAE is read when it is asked for and forgotten when the next one is: a site of twenty SAEs with ten thousand
    explained latents each must not need the memory of all.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._saes = {f.name: f for f in sorted((self.root / "saes").glob("*")) if is_complete(f)}
        self._caches = {
            str(_json(folder / "cache.json")["sae_id"]): folder for folder, _ in artefacts(self.root, "latents")
        }
        self._chains = chains_of(self.root)
        self._ids = sorted({*self._saes, *self._caches, *self._chains})
        self._last: SaeData | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __contains__(self, sae_id: object) -> bool:
        return sae_id in self._ids

    def __getitem__(self, sae_id: str) -> SaeData:
        if sae_id not in self._ids:
            raise KeyError(sae_id)
        if self._last is None or self._last.sae_id != sae_id:
            self._last = None  # before the next one is read: never two at once
            self._last = self._read(sae_id)
        return self._last

    def _read(self, sae_id: str) -> SaeData:
        sae = SaeData(sae_id=sae_id)
        if sae_id in self._saes:
            _read_sae(self._saes[sae_id], sae)
        if sae_id in self._caches:
            sae.stats = _table(self._caches[sae_id], "latents")
        found = self._chains.get(sae_id)
        if found is not None:
            latents = _exemplars(found["exemplars"]) if "exemplars" in found else {}
            _add_texts(sae, latents, found)
            for number, effect in (read_effects(found["effects"]) if "effects" in found else {}).items():
                latents.setdefault(number, LatentData(sae_id=sae_id, latent=number)).effect = effect
            sae.latents = [latents[i] for i in sorted(latents)]
            for latent in sae.latents:
                _add_stats(latent, sae)
        if sae.latents:
            sae.tokens = find_tokens(self.root, sae)
        return sae


def load_site_data(root: Path) -> dict[str, SaeData]:
    """The same, all of it in memory."""
    return dict(SiteData(root))


def find_tokens(root: Path, sae: SaeData) -> TokenReader:
    """The tokenizer of the SAE's language model: the model of ``run.json`` if it is the same, else found by name."""
    name = str((sae.cfg.get("meta") or {}).get("lm", ""))
    model = str(run_info(root).config.get("model", ""))
    same = not name or model in ("default", name) or Path(model).name == Path(name).name
    return read_tokenizer([model, name] if same else [name])


def chains_of(root: Path) -> dict[str, dict[str, Path]]:
    """Per sae_id its newest scores, the explanations they are of, and the exemplars behind those.

    Without scores the newest explanations count, without these the newest exemplars.
    """
    exemplars = {f.name: (sae_of(m), f) for f, m in artefacts(root, "exemplars")}
    explanations = {f.name: (m, f) for f, m in artefacts(root, "explanations")}
    chains: dict[str, dict[str, Path]] = {}
    for sae_id, folder in exemplars.values():
        chains[sae_id] = {"exemplars": folder}

    def owner(manifest: Mapping[str, Any]) -> str:
        return exemplars.get(_input(manifest, "exemplars"), (sae_of(manifest), None))[0]

    def chain(manifest: Mapping[str, Any], folder: Path) -> dict[str, Path]:
        links = {"explanations": folder}
        behind = exemplars.get(_input(manifest, "exemplars"))
        return links | ({"exemplars": behind[1]} if behind else {})

    for manifest, folder in explanations.values():
        chains.setdefault(owner(manifest), {}).update(chain(manifest, folder))
    for folder, manifest in artefacts(root, "scores"):
        texts = explanations.get(_input(manifest, "explanations"))
        if texts is not None:
            chains.setdefault(owner(texts[0]), {}).update(chain(*texts) | {"scores": folder})
    for folder, manifest in artefacts(root, "effects"):
        links = chains.get(sae_of(manifest), {})
        if "exemplars" in links and links["exemplars"].name == _input(manifest, "exemplars"):
            links["effects"] = folder
    return {sae_id: links for sae_id, links in chains.items() if sae_id}


def _input(manifest: Mapping[str, Any], name: str) -> str:
    return str((manifest.get("inputs") or {}).get(name, ""))


def _exemplars(folder: Path) -> dict[int, LatentData]:
    """The content of ``exemplars/<key>/`` as ``autointerp.exemplars.ExemplarTable`` reads it, which needs torch."""
    import pandas as pd

    sae_id = sae_of(read_manifest(folder))
    wanted = [int(i) for i in pd.read_parquet(folder / "latents.parquet", columns=["latent"])["latent"]]
    found = {i: LatentData(sae_id=sae_id, latent=i) for i in wanted}
    for row in pd.read_parquet(folder / "exemplars.parquet").to_dict("records"):
        values: dict[str, Any] = {}
        for name, value in row.items():
            values[str(name)] = value.tolist() if hasattr(value, "tolist") else None if value is pd.NA else value
        for name in ("token_ids", "acts"):
            values[name] = tuple(values[name])
        found[values["latent"]].exemplars.append(Exemplar(**values))
    for row in pd.read_parquet(folder / "failures.parquet").to_dict("records"):
        failure = Failure(code=row["code"], stage=row["stage"], detail=row["detail"])
        found[int(row["latent"])].failures.append(failure)
    return found


def _add_texts(sae: SaeData, latents: dict[int, LatentData], found: Mapping[str, Path]) -> None:
    """Explanations, scores, verdicts and simulations to the latents that they are about."""
    if "explanations" not in found:
        return

    def of(latent: int) -> LatentData:
        return latents.setdefault(latent, LatentData(sae_id=sae.sae_id, latent=latent))

    for explanation in read_jsonl(found["explanations"] / "explanations.jsonl", Explanation):
        of(explanation.latent).explanations.append(explanation)
    output = found["explanations"] / "output_tokens.json"
    if output.is_file():
        for number, (promoted, suppressed) in _json(output).items():
            entry = of(int(number))
            entry.promoted, entry.suppressed = tuple(map(str, promoted)), tuple(map(str, suppressed))
    if "scores" not in found:
        return
    scores = found["scores"]
    sae.checks = read_jsonl(scores / "judges.jsonl", JudgeCheck)
    for score in read_parquet(scores / "scores.parquet", LatentScore):
        of(score.latent).scores.append(score)
    # A shuffled floor judges another latent's text on these windows: the window says whose page it belongs to.
    owner = {e.exemplar_id: entry for entry in latents.values() for e in entry.exemplars}
    for item in read_parquet(scores / "items.parquet", ScoreItem):
        if item.exemplar_id in owner:
            owner[item.exemplar_id].items.append(item)
    for simulation in read_parquet(scores / "simulations.parquet", Simulation):
        if simulation.exemplar_id in owner:
            owner[simulation.exemplar_id].simulations.append(simulation)


def _add_stats(latent: LatentData, sae: SaeData) -> None:
    if sae.stats is None or latent.latent not in sae.stats.index:
        return
    latent.stats = dict(sae.stats.loc[latent.latent])
    ids = latent.stats.get("top_tokens")
    latent.top_ids = () if ids is None else tuple(int(i) for i in ids)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); delete its folder and run its stage again") from error
    return dict(content)


def _table(folder: Path, stem: str) -> "pd.DataFrame | None":
    import pandas as pd

    path = folder / f"{stem}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def _read_sae(folder: Path, sae: SaeData) -> None:
    import pandas as pd

    if (folder / "cfg.json").is_file():
        sae.cfg = _json(folder / "cfg.json")
    log = folder / "train.jsonl"
    if log.is_file():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        sae.train = pd.DataFrame([json.loads(line) for line in lines])
