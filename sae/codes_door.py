"""``python -m sae codes``: progressive codes and refined activations of one SAE on stored activations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae import console
from sae.errors import ConfigError, Unsupported
from sae.manifest import artefact_dir, is_complete, key_of, read_manifest, sha256_file, writing

KIND, STAGE_VERSION = "codes", 1


@dataclass(kw_only=True, frozen=True)
class CodesDoor:
    """Measure an SAE with fewer and more active latents than it was trained for, and with the best activations."""

    sae: Path
    """Folder of a native SAE."""
    activations: Path
    """A complete folder <root>/activations/<key> of the same model and hookpoint; held-out text is better."""
    ks: tuple[int, ...] = ()
    """Numbers of active latents; default: 1, 2, 4, ... up to 4 k."""
    tokens: int = 8_192
    """Tokens that are measured, evenly spread over the kept ones."""
    root: Path = Path("results")
    """Where the result goes."""
    force: bool = False
    """Measure again."""


def measure(cfg: CodesDoor) -> dict[str, Any]:
    """Plain values of both measurements; what the architecture does not have stands under ``not_measured``."""
    from sae import checkpoint, progressive, refine
    from sae.train_door import open_store

    sae, store = checkpoint.load(cfg.sae), open_store(cfg.activations)
    if sae.d_in != store.d_in:
        raise ConfigError(f"{cfg.sae} reads {sae.d_in} channels, {cfg.activations} holds {store.d_in}")
    made = store.manifest["config"]
    meta = sae.cfg.meta
    if meta is not None and (meta.lm_revision, meta.hookpoint) != (made["lm_revision"], made["hookpoint"]):
        raise ConfigError(
            f"{cfg.sae} was trained on {meta.lm} at {meta.hookpoint}, {cfg.activations} is of {made['lm']} at "
            f"{made['hookpoint']}"
        )
    found: dict[str, Any] = {"sae_id": sae.sae_id, "not_measured": {}}
    ks = list(cfg.ks) or None
    try:
        found["progressive"] = [p._asdict() for p in progressive.measure(sae, store, ks, tokens=cfg.tokens)]
    except Unsupported as error:
        found["not_measured"]["progressive"] = str(error)
    try:
        found["refinement"] = refine.measure(sae, store, tokens=cfg.tokens)._asdict()
    except Unsupported as error:
        found["not_measured"]["refinement"] = str(error)
    return found


def show(found: dict[str, Any]) -> None:
    """Both measurements as tables."""
    points: list[dict[str, Any]] = found.get("progressive", [])
    by_code: dict[str, dict[int, dict[str, Any]]] = {}
    for point in points:
        by_code.setdefault(point["code"], {})[point["k"]] = point
    if points:
        rows = []
        for k in sorted(by_code["topk"]):
            a, b = by_code["topk"][k], by_code["threshold"][k]
            rows.append((k, f"{a['fvu']:.4f}", f"{a['l0']:.1f}", f"{b['fvu']:.4f}", f"{b['l0']:.1f}"))
        columns = ("k'", "FVU topk", "L0", "FVU threshold", "L0")
        console.table(f"progressive codes: {found['sae_id']}", columns, rows, right=range(5))
    if "refinement" in found:
        r = found["refinement"]
        l0 = f"{r['l0_before']:.1f}", f"{r['l0_after']:.1f}"
        row = (f"{r['fvu_before']:.4f}", f"{r['fvu_after']:.4f}", f"{r['shrinkage']:+.2%}", *l0)
        columns = ("FVU", "FVU refined", "shrinkage", "L0", "L0 refined")
        console.table("best activations on the same latents", columns, [row], right=range(5))
    for name, why in found["not_measured"].items():
        console.say(f"{name}: {why}")


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; errors are typed, the caller prints them."""
    import tyro

    cfg = tyro.cli(CodesDoor, args=list(arguments), prog="python -m sae codes")
    console.setup()
    from sae.checkpoint import WEIGHTS

    weights = cfg.sae / WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"{cfg.sae} holds no {WEIGHTS}: give the folder of a native SAE")
    inputs = {"sae": sha256_file(weights)[:16], "activations": str(read_manifest(cfg.activations)["key"])}
    config = {"ks": list(cfg.ks), "tokens": cfg.tokens}
    key = key_of(KIND, STAGE_VERSION, config, inputs)
    folder = artefact_dir(cfg.root, KIND, key)
    if cfg.force or not is_complete(folder):
        found = measure(cfg)
        with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as out:
            (out.path / "codes.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    show(json.loads((folder / "codes.json").read_text(encoding="utf-8")))
    console.say(str(folder))
    return 0

