"""A made-up board of SAEs with several training seeds, for tests of the leaderboard page."""

from pathlib import Path

from synthetic_results import info, write_row_folder

from evals.page_data import SaeData

PREFIX = "smollm2-135m.layers.15"
RANDOM = "baseline.random_sae.0a1b2c3d"
TOPK = tuple(f"{PREFIX}.topk-f4608-k32.s{i}-{i}aaaaaaa" for i in range(3))
RELU_LOW = tuple(f"{PREFIX}.relu-f4608.s{i}-{i}bbbbbbb" for i in range(2))
RELU_HIGH = tuple(f"{PREFIX}.relu-f4608.s{i}-{i}ccccccc" for i in range(2))
SINGLE = f"{PREFIX}.batchtopk-f4608-k32.s0-dddddddd"
L1 = {**dict.fromkeys(RELU_LOW, 0.2), **dict.fromkeys(RELU_HIGH, 0.1)}
# (L0, FVU, dead share or why there is none)
NUMBERS: dict[str, tuple[float, float, float | str]] = {
    TOPK[0]: (32.0, 0.30, 0.01),
    TOPK[1]: (32.0, 0.32, 0.02),
    TOPK[2]: (32.0, 0.34, "too_few_tokens"),
    RELU_LOW[0]: (30.0, 0.50, 0.1),
    RELU_LOW[1]: (34.0, 0.52, 0.1),
    RELU_HIGH[0]: (60.0, 0.40, 0.1),
    RELU_HIGH[1]: (64.0, 0.44, 0.1),
    SINGLE: (33.0, 0.35, 0.0),
    RANDOM: (32.0, 0.90, 0.0),
}


def write_recipes(root: Path) -> dict[str, SaeData]:
    """Rows below ``root``; the SAEs' configurations, as the pages read them."""
    for sae_id, (l0, fvu, dead) in NUMBERS.items():
        name = "topk" if sae_id == RANDOM else sae_id.split(".")[3].split("-")[0]
        subject = info(sae_id, architecture=name, k=None if name == "relu" else 32)
        found = dead if isinstance(dead, str) else (dead, 0.001)
        cells = {("l0", ""): (l0, 0.1), ("fvu", ""): (fvu, 0.005), ("dead_frac", ""): found}
        write_row_folder(root, subject, "reconstruction", cells, created_at="2026-11-25T10:00:00Z")
    return {
        i: SaeData(sae_id=i, cfg={"train": {"seed": int(i.split(".s")[-1][0]), "l1": L1.get(i)}})
        for i in NUMBERS
        if i != RANDOM
    }
