"""``python -m sae scaling``: train a grid over width and k, measure it on held-out text, fit and plot the laws."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae import console
from sae.config import TrainConfig, require, to_dict
from sae.errors import DataError
from sae.manifest import artefact_dir, is_complete, key_of, read_manifest, writing
from sae.plugins import find
from sae.train_door import TrainDoor

if TYPE_CHECKING:
    from sae.activations import ActivationStore
    from sae.base import SAE

Rows = Sequence[Mapping[str, Any]]
KIND, STAGE_VERSION = "scaling", 1
COLUMNS = ("n", "k", "seed", "tokens", "loss", "l0", "compute", "sae_id")
CURVES = "curves.csv"


@dataclass(kw_only=True, frozen=True)
class ScalingDoor(TrainDoor):
    """Train SAEs over a grid of widths and k, fit L(n), L(n, k) and L(C) with 95 % intervals, and plot them."""

    widths: tuple[int, ...] = (576, 1152, 2304, 4608)
    """Numbers of latents."""
    ks: tuple[int, ...] = (8, 16, 32)
    """Active latents per token."""
    seeds: tuple[int, ...] = (0,)
    runs: Path | None = None
    """Fit a csv file with columns n, k, loss (and compute) instead of training."""
    paper: bool = False
    """Print the paper's own table from its constants, and stop."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=2e-4, lr_law="sqrt_width", lr_decay_share=0.0, train_tokens=499_712)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.widths and self.ks and self.seeds), "widths, ks and seeds need at least one value each")
        require(max(self.ks) <= min(self.widths), f"k {max(self.ks)} is above the smallest width {min(self.widths)}")
        require(not self.grid, "scaling makes its own grid: give --widths, --ks and --seeds instead of --grid")

    def cells(self) -> list[TrainConfig]:
        """One configuration per run."""
        return [
            replace(self.train, d_sae=n, k=k, seed=seed) for n in self.widths for k in self.ks for seed in self.seeds
        ]


# -- measuring --------------------------------------------------------------------------------------------------------
def held_out_loss(sae: "SAE", store: "ActivationStore", chunk: int = 4_096) -> tuple[float, float]:
    """(L, mean L0) on all kept tokens of a store: squared error over variance, both in normalised space, summed over
    the set in float64. Gao et al. measure the normalised error of normalised activations."""
    import numpy as np
    import torch

    kept = np.asarray(store.kept_N)
    error, square, active, total_D = 0.0, 0.0, 0.0, torch.zeros(sae.d_in, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(kept), chunk):
            x_ND = store.read(kept[start : start + chunk]).to(sae.W_dec_FD.device)
            n_ND, _ = sae.normalise(x_ND)
            codes = sae.encode_sparse(x_ND)
            error += float((n_ND - sae.decode_normalised(codes)).double().square().sum())
            square += float(n_ND.double().square().sum())
            active += float((codes.values_NK > 0).sum())
            total_D += n_ND.double().sum(0).cpu()
    variance = square / len(kept) - float((total_D / len(kept)).square().sum())
    if not variance > 0:
        raise DataError(f"the held-out activations {store.key} have no variance")
    return error / len(kept) / variance, active / len(kept)


def measure(cfg: ScalingDoor, folders: Sequence[Path], held_out: "ActivationStore") -> tuple[Rows, Rows]:
    """(one row per run, points of all training curves)."""
    from sae import checkpoint
    from sae.metric_log import read_log
    from sae.scaling import step_flops

    rows, curves = [], []
    for folder, one in zip(folders, cfg.cells(), strict=True):
        sae = checkpoint.load(folder).to(cfg.device)
        loss, l0 = held_out_loss(sae, held_out)
        per_token = step_flops(sae.d_in, sae.d_sae)
        tokens = int(sae.cfg.train_tokens or 0)
        rows.append(
            {"n": one.d_sae, "k": one.k, "seed": one.seed, "tokens": tokens, "loss": loss, "l0": l0,
             "compute": tokens * per_token, "sae_id": sae.sae_id}
        )  # fmt: skip
        for point in read_log(folder / "train.jsonl")[1:]:
            curves.append({"n": one.d_sae, "k": one.k, "compute": point["tokens"] * per_token, "loss": point["mse"]})
    return rows, curves


# -- fitting ----------------------------------------------------------------------------------------------------------
def fit_all(rows: Rows, curves: Rows) -> dict[str, Any]:
    """Every law that the runs carry; what they do not carry stands under ``not_fitted`` with its reason."""
    from sae import scaling

    found: dict[str, Any] = {"fits": {}, "not_fitted": {}}

    def attempt(name: str, make: Any) -> None:
        try:
            found["fits"][name] = make().row()
        except DataError as error:
            found["not_fitted"][name] = str(error)

    for k in sorted({int(row["k"]) for row in rows}):
        mine = [row for row in rows if int(row["k"]) == k]
        attempt(f"L(n), k={k}", lambda mine=mine: scaling.fit_power([r["n"] for r in mine], [r["loss"] for r in mine]))
    columns = [[row[name] for row in rows] for name in ("n", "k", "loss")]
    attempt("L(n, k)", lambda: scaling.fit_width_sparsity(*columns))
    for k in sorted({int(row["k"]) for row in curves}):
        mine = [row for row in curves if int(row["k"]) == k]
        best = scaling.frontier([row["compute"] for row in mine], [row["loss"] for row in mine])
        attempt(f"L(C), k={k}", lambda best=best: scaling.fit_power(*best))
    return found


def panels(rows: Rows, curves: Rows, found: Mapping[str, Any]) -> list[Any]:
    """Measured points and fitted curves: over width, and over compute where there are training curves."""
    from sae import scaling
    from sae.scaling_plot import Panel, Series, spread

    fits = found["fits"]
    over_n, over_c = [], []
    for k in sorted({int(row["k"]) for row in rows}):
        mine = [row for row in rows if int(row["k"]) == k]
        x, y = [float(r["n"]) for r in mine], [float(r["loss"]) for r in mine]
        at = spread(min(x), max(x)) if len(set(x)) > 1 else []
        line: list[float] = []
        if at and "L(n, k)" in fits:
            line = list(scaling.WidthSparsityLaw(**fits["L(n, k)"]["constants"])(at, k))
        elif at and f"L(n), k={k}" in fits:
            line = list(scaling.PowerLaw(**fits[f"L(n), k={k}"]["constants"])(at))
        over_n.append(Series(f"k = {k}", x, y, at if line else [], line))
        best = [row for row in curves if int(row["k"]) == k]
        if best:
            c, loss = scaling.frontier([row["compute"] for row in best], [row["loss"] for row in best])
            name, at = f"L(C), k={k}", spread(float(c[0]), float(c[-1])) if len(c) > 1 else []
            line = list(scaling.PowerLaw(**fits[name]["constants"])(at)) if name in fits and at else []
            over_c.append(Series(f"k = {k}", list(c), list(loss), at if line else [], line))
    result = [Panel("held-out L over width", "latents n", over_n)]
    return result + ([Panel("L over compute (frontier of training)", "FLOP", over_c)] if over_c else [])


def read_runs(path: Path) -> tuple[Rows, Rows]:
    """(rows, points of compute and loss) of a csv file with columns n, k, loss and perhaps compute."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [dict(row) for row in csv.DictReader(file)]
        found = [{name: float(row[name]) for name in ("n", "k", "loss")} for row in rows]
        at_cost = [row for row in rows if row.get("compute")]
        curves = [{name: float(row[name]) for name in ("k", "compute", "loss")} for row in at_cost]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: expected a csv file with numbers in the columns n, k, loss: {error!r}") from error
    if not found:
        raise DataError(f"{path} has no rows")
    return found, curves


# -- the door ---------------------------------------------------------------------------------------------------------
def print_paper() -> None:
    """The table of TRAINING 12 from the paper's constants."""
    from sae.scaling import PAPER_C, PAPER_NK

    ks = (32, 64, 128, 256, 512)
    rows = [(f"{n:,}", *(f"{float(PAPER_NK(n, k)):.3f}" for k in ks)) for n in (32_768, 131_072, 16_777_216)]
    console.table("L(n, k), Gao et al.", ("n", *(f"k={k}" for k in ks)), rows, right=range(1, 6))
    powers = range(-9, -4)
    row = [f"{float(PAPER_C(10.0**p)):.3f}" for p in powers]
    console.table("L(C), C as a share of GPT-4's compute", [f"1e{p}" for p in powers], [row], right=range(5))


def print_fits(found: Mapping[str, Any]) -> None:
    """One row per constant with its interval."""
    rows = []
    for name, fit in found["fits"].items():
        for constant, value in fit["constants"].items():
            interval = " … ".join(f"{end:.4g}" for end in fit["intervals"][constant])
            rows.append((name, constant, f"{value:.4g}", interval, fit["n_runs"], f"{fit['error']:.2%}"))
    console.table("fits", ("law", "constant", "value", "95 % interval", "runs", "rms error"), rows, right=(2, 3, 4, 5))
    for name, why in found["not_fitted"].items():
        console.say(f"{name} is not fitted: {why}")


def write_result(
    root: Path, config: Mapping[str, Any], inputs: Mapping[str, str], rows: Rows, curves: Rows, force: bool
) -> Path:
    """``scaling/<key>/``: runs.csv, curves.csv, fits.json, scaling.svg."""
    from sae import scaling_plot

    key = key_of(KIND, STAGE_VERSION, config, inputs)
    folder = artefact_dir(root, KIND, key)
    if is_complete(folder) and not force:
        return folder
    found = fit_all(rows, curves)
    with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as out:
        for name, table in (("runs.csv", rows), (CURVES, curves)):
            with open(out.path / name, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(table[0]) if table else list(COLUMNS))
                writer.writeheader()
                writer.writerows(table)
        (out.path / "fits.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        scaling_plot.save(panels(rows, curves, found), out.path / "scaling.svg")
        out.counts.update(runs=len(rows), fits=sorted(found["fits"]))
    return folder


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; errors are typed, the caller prints them."""
    import tyro

    cfg = tyro.cli(ScalingDoor, args=list(arguments), prog="python -m sae scaling")
    console.setup(cfg.verbose)
    if cfg.paper:
        print_paper()
        return 0
    if cfg.runs is not None:
        from sae.manifest import sha256_file

        rows, curves = read_runs(cfg.runs)
        inputs = {"runs": sha256_file(cfg.runs)[:16]}
        folder = write_result(cfg.root, {"runs": cfg.runs.name}, inputs, rows, curves, cfg.force)
    else:
        trained = train_and_measure(cfg)
        if trained is None:
            return 0
        folder = trained
    print_fits(json.loads((folder / "fits.json").read_text(encoding="utf-8")))
    console.say(str(folder / "scaling.svg"))
    return 0


def train_and_measure(cfg: ScalingDoor) -> Path | None:
    """Train the cells from one stream and measure them on the split test; None with ``--plan``."""
    from sae import checkpoint, train_door
    from sae.activations import capture_activations
    from sae.errors import ConfigError
    from sae.tokens import build_tokens

    if cfg.activations is not None:
        raise ConfigError("scaling measures on held-out text: give --model and --texts instead of --activations")
    if cfg.hookpoint_out is not None:
        raise ConfigError("scaling is for autoencoders: leave --hookpoint-out out")
    if len(cfg.hookpoints) > 1:
        raise ConfigError(f"scaling laws are of one hookpoint, got {', '.join(cfg.hookpoints)}")
    if not find("sae.architectures", cfg.train.architecture).uses_k:
        raise ConfigError(f"architecture {cfg.train.architecture!r} takes no k: scaling needs one that does, e.g. topk")
    cells = cfg.cells()
    found = train_door.subject(cfg)
    train_door.print_prediction(train_door.predict(cfg, cells, found))
    if cfg.plan:
        return None
    folders = train_door.run(cfg, cells, found)
    assert found.lm is not None
    sets = build_tokens(cfg.root, replace(cfg.tokens, text=cfg.texts), found.lm.name, found.lm.tokenizer)
    meta = checkpoint.load(folders[0]).cfg.meta
    assert meta is not None
    median = meta.token_filter["norm_median"]
    hookpoint = found.hookpoints[0]
    held_out = capture_activations(
        cfg.root, found.lm, sets["test"], hookpoint, filter_cfg=cfg.filter, norm_median=median,
    )  # fmt: skip
    rows, curves = measure(cfg, folders, held_out)
    inputs = {"test": held_out.key} | {f.name: str(read_manifest(f)["key"]) for f in folders}
    config = {"widths": cfg.widths, "ks": cfg.ks, "seeds": cfg.seeds, "train": to_dict(cfg.train)}
    return write_result(cfg.root, config, inputs, rows, curves, cfg.force)
