"""The other binary data sets of sae-probes, which ``--tasks`` adds to sparse_probing (METRICS F). Torch-free.

The list is a data file, ``more_probe_tasks.json``: the package's 113 binary sets less those that the 61 tasks of
``probe_tasks.json`` read, and less six whose question the ``ag_*`` tasks ask of better labels. A task whose texts, or
texts of the same sentences (``shares``), are in an SAE's training text says little of that SAE: it is refused, for all
SAEs of a run alike, so that their means are over one set; ``--allow-seen`` measures it and says so.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from evals.probe_datasets import ProbeTask, RawRow, clean, read_table
from sae.errors import ConfigError, did_you_mean
from sae.manifest import canonical_json, sha256_text

MORE_FILE = Path(__file__).with_name("more_probe_tasks.json")
EVERY = "sae_probes"
"""The name of all of them."""


@lru_cache(maxsize=1)
def more_table() -> dict[str, dict[str, Any]]:
    """Entries of ``more_probe_tasks.json`` by name, in the order of the file."""
    entries = json.loads(MORE_FILE.read_text(encoding="utf-8"))["tasks"]
    return {entry["name"]: entry for entry in entries}


def more_sha256(names: Sequence[str]) -> str:
    """Hash of what the data file says of the rows of these tasks, for keys."""
    entries = [{k: v for k, v in more_table()[name].items() if k != "shares"} for name in names]
    return sha256_text(canonical_json(entries))


def named(asked: Sequence[str]) -> tuple[str, ...]:
    """The tasks that ``--tasks`` names, in the order of the file; ConfigError with near names for an unknown one."""
    table = more_table()
    for name in asked:
        if name != EVERY and name not in table:
            raise ConfigError(f"--tasks knows no {name!r}{did_you_mean(name, [EVERY, *table])}")
    return tuple(name for name in table if EVERY in asked or name in asked)


def build_more(name: str) -> ProbeTask:
    """Read and clean one of them, as METRICS C.2 says. ConfigError if unknown, MissingAsset without texts."""
    from sae.assets import probe_csv

    (name,) = named([name])
    entry = more_table()[name]
    rows = [RawRow(prompt, label) for prompt, label in read_table(probe_csv(entry["source"]))]
    return clean(name, entry["family"], rows, positive=entry["positive"], group_key=entry.get("group"))


class Admitted(NamedTuple):
    """What of ``--tasks`` is measured."""

    tasks: tuple[str, ...]
    refused: dict[str, str]
    """Task -> the table of the training text that holds its texts."""
    seen_by: dict[str, tuple[str, ...]]
    """sae_id -> tasks that are measured although its training text holds their texts (``--allow-seen``)."""
    unknown: tuple[str, ...]
    """SAEs whose file does not say what they were trained on."""

    def seen(self, sae_id: str) -> tuple[str, ...]:
        """Of one subject; SAEs trained in this run share one entry, named ""."""
        return self.seen_by.get(sae_id, self.seen_by.get("", ()))


def table_name(source: str) -> str:
    """``94_ai_gen`` of ``texts/94_ai_gen.csv.zst``: how a source of text is known here."""
    return source.replace("\\", "/").rpartition("/")[2].partition(".")[0]


def trained_table(name: str, sources: Iterable[str]) -> str | None:
    """The first table among ``sources`` of a training text that holds texts of this task."""
    entry, known = more_table()[name], {table_name(source) for source in sources}
    return next((table for table in (entry["source"], *entry.get("shares", ())) if table in known), None)


def admit(asked: Sequence[str], trained_on: Mapping[str, Sequence[str] | None], allow_seen: bool) -> Admitted:
    """Which tasks are measured, given each SAE's sources of training text (None = unknown).

    Asked for as ``sae_probes``, those seen in training are left out and listed; one asked for by its own name is a
    ConfigError. Where nothing is left, so is that.
    """
    names = named(asked)
    held = {
        sae_id: {name: table for name in names if (table := trained_table(name, sources))}
        for sae_id, sources in trained_on.items()
        if sources is not None
    }
    unknown = tuple(sorted(sae_id for sae_id, sources in trained_on.items() if sources is None))
    seen = {name: table for of_sae in held.values() for name, table in of_sae.items()}
    if allow_seen:
        return Admitted(names, {}, {s: tuple(of_sae) for s, of_sae in held.items() if of_sae}, unknown)
    if EVERY not in asked and seen:
        told = ", ".join(f"{name} (in {table})" for name, table in seen.items())
        raise ConfigError(
            f"the training text of an SAE of this run holds the texts of {told}; leave them out of --tasks, or measure "
            "them with --allow-seen, which marks them as seen"
        )
    left = tuple(name for name in names if name not in seen)
    if not left:
        raise ConfigError(
            "the training text of an SAE of this run holds the texts of every task of --tasks; give --allow-seen"
        )
    return Admitted(left, seen, {}, unknown)
