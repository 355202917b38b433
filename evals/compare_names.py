"""Which SAEs a name of ``python -m evals.compare`` means: one, or the training seeds of one recipe. Torch-free."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from evals.results import PLACE
from sae.errors import ConfigError, did_you_mean
from sae.manifest import is_complete, read_manifest

if TYPE_CHECKING:
    import pandas as pd

TRAINED_ALIKE = (*PLACE, "architecture", "d_in", "d_sae", "k", "train_tokens")
LISTED_RECIPES = 6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """SAEs that are equal but for the seed of their training; often one."""

    name: str
    sae_ids: tuple[str, ...]


def find_cell(root: Path, results: "pd.DataFrame", text: str) -> Cell:
    """The SAEs meant by ``text``: ids, parts of ids between separators, globs, several with commas.

    A part that fits SAEs and floors means the SAEs: the floor of a model with random weights has the name of the SAE
    that it copies in its own. ConfigError if nothing fits, or if what fits differs in more than the training seed.
    """
    floors = set(map(str, results.loc[results["kind"] == "baseline", "sae_id"]))
    known = sorted(set(map(str, results["sae_id"])))
    found: list[str] = []
    for pattern in filter(None, text.split(",")):
        hits = _matching(known, pattern)
        if not hits:
            raise ConfigError(
                f"no subject is called {pattern!r}{did_you_mean(pattern, known)}; "
                f"python -m evals.leaderboard --root {root} lists them"
            )
        hits = [h for h in hits if h not in floors] or hits
        found += [h for h in hits if h not in found]
    if not found:
        raise ConfigError("a name is empty; give a sae_id, a part of one, or a glob")
    _require_one_recipe(text, {i: _identity(root, results, i) for i in found})
    return Cell(name=text if len(found) > 1 else found[0], sae_ids=tuple(sorted(found)))


def _require_one_recipe(text: str, identities: Mapping[str, Mapping[str, str]]) -> None:
    """ConfigError that lists the recipes as they can be named, if there are several."""
    recipes: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for sae_id, identity in identities.items():
        recipes.setdefault(tuple(sorted(identity.items())), []).append(sae_id)
    if len(recipes) == 1:
        return
    names = sorted({name for identity in identities.values() for name in identity})
    wrong = [n for n in names if len({identity.get(n) for identity in identities.values()}) > 1]
    told = []
    for ids in list(recipes.values())[:LISTED_RECIPES]:
        values = ", ".join(f"{n} {identities[ids[0]].get(n, 'unknown')}" for n in wrong[:3])
        told.append(f"{','.join(re.split(r'[-.]', i)[-1] for i in ids)} ({ids[0]}{', ...' * (len(ids) > 1)}: {values})")
    rest = f" and {len(recipes) - len(told)} more" if len(recipes) > len(told) else ""
    raise ConfigError(
        f"{text!r} fits several subjects that differ in more than the training seed ({', '.join(wrong)}); "
        f"name one of: {'; '.join(told)}{rest}"
    )


def _matching(known: Sequence[str], pattern: str) -> list[str]:
    if pattern in known:
        return [pattern]
    if any(c in pattern for c in "*?["):
        return [i for i in known if fnmatch(i, pattern) or fnmatch(i, f"*.{pattern}")]
    # "topk" must not find batchtopk, nor "k4" find k48; a beginning of a hash may be given
    part = r"(?<![a-z0-9_])" + re.escape(pattern)
    whole = [i for i in known if re.search(part + r"(?![a-z0-9_])", i)]
    return whole or [i for i in known if re.search(part, i)]


def _identity(root: Path, results: "pd.DataFrame", sae_id: str) -> dict[str, str]:
    """What training seeds of one cell share: the configuration of the training where it lies there, and row fields."""
    row = results[results["sae_id"] == sae_id].iloc[0]
    identity = {name: str(row[name]) for name in TRAINED_ALIKE}
    folder = Path(root) / "saes" / sae_id
    if is_complete(folder):
        manifest = read_manifest(folder)
        config = {k: v for k, v in manifest.get("config", {}).items() if k not in ("seed", "sae_id")}
        identity |= {f"train.{k}": str(v) for k, v in config.items()}
        identity |= {f"train.{k}": str(v) for k, v in manifest.get("inputs", {}).items()}
    return identity
