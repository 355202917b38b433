"""Latents as the stages of autointerp and evals lay them out on disk, through the writers that those stages use."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd
import synthetic_latents as synthetic
from synthetic_results import TOPK

from autointerp.records import LatentScore, ScoreItem, Simulation
from autointerp.tables import write_jsonl, write_parquet
from evals.page_data import LatentData
from sae.manifest import Writer, writing

KINDS = ("exemplars", "explanations", "effects", "scores")


def write_artefacts(root: Path, latents: Sequence[LatentData], *, key: str, made: str) -> None:
    """exemplars/, explanations/, effects/ and scores/ of latents of one SAE; latent 99 is a latent without windows."""
    root.mkdir(exist_ok=True)

    numbers = [x.latent for x in latents]

    def stage(kind: str, inputs: dict[str, str]) -> AbstractContextManager[Writer]:
        config = {"latents": numbers} if kind == "exemplars" else {}
        return writing(root / kind / key, kind=kind, key=key, stage_version=1, config=config, inputs=inputs)

    with stage("exemplars", {"latents": "0" * 16}) as out:
        rows = pd.DataFrame([e.to_dict() for x in latents for e in x.exemplars])
        rows = rows.assign(
            neighbour=rows["neighbour"].astype("Int64"), stratum_share=rows["stratum_share"].astype("Float64")
        )
        rows.to_parquet(out.path / "exemplars.parquet", index=False)
        failed = {"code": "no_hard_negative", "stage": "exemplars", "detail": "decoder_near"}
        pd.DataFrame([{"latent": n, **failed} for n in numbers]).to_parquet(out.path / "failures.parquet", index=False)
        stats = [{"latent": n, "density": 0.1} for n in numbers]
        if 99 not in numbers:
            stats.append({"latent": 99, "density": 0.0})
        pd.DataFrame(stats).to_parquet(out.path / "latents.parquet", index=False)
        out.counts["sae_id"] = latents[0].sae_id
    with stage("explanations", {"exemplars": key}) as out:
        write_jsonl(out.path / "explanations.jsonl", [e for x in latents for e in x.explanations])
        tokens = {str(n): [[" judge"], [" cat"]] for n in numbers}
        (out.path / "output_tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    with stage("effects", {"exemplars": key}) as out:
        write_jsonl(out.path / "effects.jsonl", [x.effect for x in latents if x.effect is not None])
        out.counts["sae_id"] = latents[0].sae_id
    with stage("scores", {"explanations": key, "exemplars": key}) as out:
        write_parquet(out.path / "scores.parquet", [s for x in latents for s in x.scores], LatentScore)
        write_parquet(out.path / "items.parquet", [i for x in latents for i in x.items], ScoreItem)
        write_parquet(out.path / "simulations.parquet", [s for x in latents for s in x.simulations], Simulation)
        write_jsonl(out.path / "judges.jsonl", synthetic.site_data(1)[TOPK].checks)
    for kind in KINDS:
        path = root / kind / key / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["provenance"]["created_at"] = made
        path.write_text(json.dumps(manifest), encoding="utf-8")


def renumbered(latent: LatentData, number: int) -> LatentData:
    """The same latent under another number, with windows of its own (as records, not shared)."""
    from dataclasses import replace

    mine = {e.exemplar_id: f"{number}-{e.exemplar_id}" for e in latent.exemplars}
    return LatentData(
        sae_id=latent.sae_id,
        latent=number,
        exemplars=[replace(e, latent=number, exemplar_id=mine[e.exemplar_id]) for e in latent.exemplars],
        explanations=[
            replace(e, latent=number, text=e.text and f"{e.text} {number}") for e in latent.explanations
        ],
        scores=[replace(s, latent=number) for s in latent.scores],
        items=[replace(i, exemplar_id=mine[i.exemplar_id]) for i in latent.items],
        simulations=[replace(s, exemplar_id=mine[s.exemplar_id]) for s in latent.simulations],
        effect=latent.effect and replace(latent.effect, latent=number),
    )
