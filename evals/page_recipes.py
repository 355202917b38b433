"""SAEs that differ in nothing but the seed of their training, as one line of the leaderboard. Torch-free."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.board import Board, BoardSubject, Column
from evals.compare_names import TRAINED_ALIKE
from evals.page_text import number, visible
from evals.seed_noise import Spread, spread_of
from sae.manifest import canonical_json

SEED = re.compile(r"\.s(\d+)-[0-9a-f]{4,}$")
"""The training seed in an sae_id (FORMATS)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """At least two SAEs with training seeds of their own and all else equal."""

    title: str
    members: tuple[BoardSubject, ...]
    """By training seed."""


def training_seed(subject: BoardSubject, train: Mapping[str, Any]) -> int | None:
    """From the SAE's configuration, else from its name; None where neither tells."""
    if isinstance(train.get("seed"), int):
        return int(train["seed"])
    found = SEED.search(subject.sae_id)
    return int(found.group(1)) if found else None


def find_recipes(board: Board, trains: Mapping[str, Mapping[str, Any]]) -> list[Recipe]:
    """Recipes in the order of their first SAE on the board. ``trains``: sae_id -> training configuration.

    Where configurations are not at hand the fields of the rows decide; a seed that then comes twice (two penalties of
    an architecture without k) says that they do not, and the SAEs stay single.
    """
    groups: dict[str, list[tuple[int, BoardSubject]]] = {}
    for subject in board.saes:
        train = trains.get(subject.sae_id, {})
        seed = training_seed(subject, train)
        if seed is not None:
            rest = {n: v for n, v in train.items() if n != "seed"}
            key = canonical_json([*(subject.fields[f] for f in TRAINED_ALIKE), rest])
            groups.setdefault(key, []).append((seed, subject))
    kept = [
        tuple(s for _, s in sorted(group, key=lambda p: p[0]))
        for group in groups.values()
        if 1 < len(group) == len({seed for seed, _ in group})
    ]
    titles = _titles(board, kept)
    return [Recipe(title=t, members=m) for t, m in zip(titles, kept, strict=True)]


def _titles(board: Board, groups: Sequence[tuple[BoardSubject, ...]]) -> list[str]:
    """``topk, k 32``, without k ``relu, L0 47``; with what else differs on this board. No title comes twice."""
    several = [n for n in ("d_sae", "train_tokens", "hookpoint", "lm") if len({s.fields[n] for s in board.saes}) > 1]
    l0 = board.columns_of("l0")[0]
    titles: list[str] = []
    for members in groups:
        fields = members[0].fields
        parts = [str(fields["architecture"])]
        mean = spread(board, members, l0).value
        if fields["k"] is not None:
            parts.append(f"k {fields['k']}")
        elif mean is not None:
            parts.append(f"L0 {mean:.0f}")
        parts += [
            f"{fields[n]:,} {unit}"
            for n, unit in (("d_sae", "latents"), ("train_tokens", "tokens"))
            if n in several and fields[n] is not None
        ]
        parts += [str(fields[n]) for n in ("hookpoint", "lm") if n in several]
        title = visible(", ".join(parts))
        same = sum(t == title or t.startswith(f"{title} #") for t in titles)
        titles.append(f"{title} #{same + 1}" if same else title)
    return titles


def spread(board: Board, members: Sequence[BoardSubject], column: Column) -> Spread:
    """Mean, deviation and range over the seeds."""
    cells = [board.cells[s.sae_id, column.id] for s in members]
    return spread_of([c.value for c in cells], next((c.reason for c in cells if c.value is None), ""))


def recipe_data(board: Board, recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """As board.js draws them: title, places of the members, per column [mean, smallest, largest] or [reason]."""
    places = {s.sae_id: i for i, s in enumerate(board.subjects)}

    def cell(found: Spread) -> list[Any]:
        if found.value is None:
            return [visible(found.reason)]
        return [float(f"{v:.6g}") for v in (found.value, found.low, found.high) if v is not None]

    return [
        {
            "title": r.title,
            "members": [places[s.sae_id] for s in r.members],
            "cells": [cell(spread(board, r.members, c)) for c in board.columns],
        }
        for r in recipes
    ]


def counted(words: Sequence[str]) -> str:
    """``front 2, undecided 1``; one word alone where all agree and nothing for none."""
    kinds = [w for w in dict.fromkeys(words) if w]
    if len(kinds) == 1 and all(words):
        return kinds[0]
    return ", ".join(f"{kind} {sum(w == kind for w in words)}" for kind in kinds)


def gain_cells(board: Board, recipe: Recipe, columns: Sequence[Column]) -> list[dict[str, Any] | None]:
    """Per column the mean gain over the random SAE, its deviation over seeds, and the seeds' verdicts."""
    out: list[dict[str, Any] | None] = []
    for column in columns:
        gains = [board.gains.get((s.sae_id, column.id)) for s in recipe.members]
        found = spread_of([g.value if g is not None else None for g in gains], "no value")
        if found.value is None:
            out.append(None)
            continue
        words = [g.verdict for g in gains if g is not None]
        out.append({
            "value": number(found.value, column.spec.digits),
            "sd": number(found.sd, column.spec.digits),
            "verdict": words[0] if len(set(words)) == 1 else "undecided",
            "says": ", ".join(f"{w} {words.count(w)} of {len(words)}" for w in dict.fromkeys(words) if w),
        })  # fmt: skip
    return out
