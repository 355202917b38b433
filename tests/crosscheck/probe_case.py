"""The five data sets, activations and codes of the probing cross-check, with no cleaning: rows as the files have them.

Activations are made by us (sae-probes takes them from its cache), codes by the SAE of ``case.py``. N rows, D channels.
"""

from typing import Any

import numpy as np

DATASETS = ("117_us_state_FL", "118_us_state_CA", "125_world_country_Italy", "130_temp_cat_Frequency",
            "154_athlete_sport_football")
KS = (1, 2, 5, 16)
MAX_TOKENS = 64
MAX_ROWS = 5_000
"""sae-probes reads as many rows of a file by default."""
BATCH_ROWS = 250


def table(name: str) -> tuple[list[str], np.ndarray]:
    """(prompts, labels): labels numbered in their sorted order, as scikit-learn's LabelEncoder does."""
    from evals.probe_datasets import read_table
    from sae.assets import probe_csv

    rows = read_table(probe_csv(name))
    return [prompt for prompt, _ in rows], np.unique([label for _, label in rows], return_inverse=True)[1]


def activations(lm: Any, hookpoint: str, prompts: list[str]) -> np.ndarray:
    """float32 [N, D] at the last token of the last MAX_TOKENS tokens, the row's first token before them."""
    from evals.probe_activations import last_token_activations
    from sae.tokens import prefix_id

    prefix = prefix_id(lm.tokenizer)
    ids = lm.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return last_token_activations(lm, hookpoint, [[prefix, *row[-(MAX_TOKENS - 1) :]] for row in ids])


def split(y: np.ndarray, n_rows: int, size: int, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Train and test rows of sae-probes' "normal" setting: as many of each class, drawn without a look at duplicates.

    ``n_rows``: rows with activations; ``size``: rows of the file. Restated from sae-probes 0.4.2, utils_data.
    """
    n_train = min(size - 100, 1024)
    n_test = n_rows - n_train - 1
    r = np.random.RandomState(seed)
    sides: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    rest = []
    for label in (1, 0):
        rows = np.flatnonzero(y == label)
        take = int(np.ceil(0.5 * n_train)) if label else n_train - int(np.ceil(0.5 * n_train))
        chosen = r.choice(rows, size=take, replace=False)
        sides["train"].append(chosen)
        rest.append(np.setdiff1d(rows, chosen))
    for label, rows in zip((1, 0), rest, strict=True):
        take = int(np.ceil(0.5 * n_test)) if label else n_test - int(np.ceil(0.5 * n_test))
        sides["test"].append(r.choice(rows, size=take, replace=False))
    return r.permutation(np.concatenate(sides["train"])), r.permutation(np.concatenate(sides["test"]))
