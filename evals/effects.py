"""What taking one latent out does to the model's next words, for the latents that have a page.

Where ablation sparsity (METRICS E) draws random positions, this looks where a latent is strongest: at the peak of a few
of its strongest windows its contribution is taken out of the residual (the SAE's error is kept), and the layers above
run again. The logit lens says what a decoder row points at; this says what the model then does.
D = d_in, L tokens of a row, T tokens from the peak on, V vocabulary, S windows.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autointerp.records import EXPLAIN, Exemplar, Failure
from autointerp.tables import write_jsonl
from evals.effect_records import FILE, LatentEffect
from sae.console import track
from sae.errors import Unsupported
from sae.manifest import artefact_dir, is_complete, key_of, writing

if TYPE_CHECKING:
    from autointerp.exemplars import ExemplarTable
    from evals.base import SAESubject
    from sae.activations import ActivationStore
    from sae.language_model import LanguageModel
    from sae.upper import UpperRunner

KIND, STAGE_VERSION = "effects", 1
T_POSITIONS = 8
LISTED = 8
"""Raised and lowered tokens that are kept."""


def strongest(exemplars: Sequence[Exemplar], wanted: int) -> list[Exemplar]:
    """The ``wanted`` strongest top windows, at most one per document, strongest first."""
    found: dict[str, Exemplar] = {}
    top = [e for e in exemplars if e.kind == "top" and e.peak >= 0]
    for e in sorted(top, key=lambda e: (-e.acts[e.peak], e.exemplar_id)):
        found.setdefault(e.doc_id, e)
    return list(found.values())[:wanted]


def next_tokens(ids_L: np.ndarray, doc_L: np.ndarray, p: int, T: int) -> np.ndarray:
    """Ids of the tokens after p ... p+T-1 that are of p's document; int64, at most T."""
    after = np.arange(p + 1, min(p + T, len(ids_L) - 1) + 1)
    same = np.cumprod(doc_L[after] == doc_L[p]).astype(bool)
    return np.asarray(ids_L[after[same]], dtype=np.int64)


class _Window:
    """One window's row, with the latent's contribution at its peak."""

    def __init__(self, store: "ActivationStore", e: Exemplar) -> None:
        L = store.tokens.L
        self.p = e.start + e.peak
        self.T = min(T_POSITIONS, L - self.p)
        self.x_LD = store.read(np.arange(e.row * L, (e.row + 1) * L)).float()
        self.ids_L = np.asarray(store.tokens.tokens_BL[e.row], dtype=np.int64)
        self.doc_L = np.asarray(store.doc_of_N[e.row * L : (e.row + 1) * L])


def _measure(window: _Window, contribution_D: Any, upper: "UpperRunner", device: Any) -> dict[str, Any]:
    """delta_V of the probabilities at the peak, KL there, and the sum and number of rises of the loss."""
    import torch

    from evals.suite.ablation_sparsity import Ablator

    ablator = Ablator(upper, window.x_LD, torch.from_numpy(window.ids_L), window.p, window.T, device)
    here = window.x_LD[window.p].to(device)
    log_GTV = ablator.logits(torch.stack([here, here - contribution_D.to(here)])).float().log_softmax(dim=-1).cpu()
    p_GV = log_GTV[:, 0].exp()
    targets = torch.from_numpy(next_tokens(window.ids_L, window.doc_L, window.p, window.T))
    log_GN = log_GTV[:, torch.arange(len(targets)), targets]
    return {
        "delta_V": (p_GV[0] - p_GV[1]).double().numpy(),
        "kl": float((p_GV[0].double() * (log_GTV[0, 0] - log_GTV[1, 0]).double()).sum()),
        "rise": float((log_GN[0] - log_GN[1]).double().sum()),
        "n": len(targets),
    }


def effect_of(
    subject: "SAESubject", latent: int, windows: Sequence[Exemplar], store: "ActivationStore", upper: "UpperRunner",
    lm: "LanguageModel",
) -> LatentEffect:
    """Take one latent out at the peak of each window. A window on which it is not active is counted, not averaged."""
    found, failed = [], Counter[str]()
    for e in windows:
        window = _Window(store, e)
        active = subject.contributions(window.x_LD[window.p])
        mine = (active.indices_A == latent).nonzero()
        if not len(mine):
            failed["no_active_latent"] += 1
            continue
        found.append(_measure(window, active.vectors_AD[int(mine[0, 0])], upper, lm.device))
    base: dict[str, Any] = {"sae_id": subject.info.sae_id, "latent": latent, "n_windows": len(found)}
    base["failures"] = dict(failed)
    if not found:
        code = "no_active_latent" if windows else "too_few_positive"
        return LatentEffect(**base, failure=Failure(code=code, stage=KIND, detail="no window with the latent active"))
    delta_V = np.mean([f["delta_V"] for f in found], axis=0)[: len(lm.tokenizer)]
    n = sum(f["n"] for f in found)
    order = np.argsort(-delta_V, kind="stable")

    def named(ids: np.ndarray) -> tuple[tuple[str, float], ...]:
        return tuple((lm.tokenizer.decode([int(i)]), float(f"{delta_V[i]:.4g}")) for i in ids)

    return LatentEffect(
        **base,
        n_tokens=n,
        loss_rise=sum(f["rise"] for f in found) / n if n else None,
        kl=float(np.mean([f["kl"] for f in found])),
        raised=named(order[:LISTED]),
        lowered=named(order[::-1][:LISTED]),
    )


def build_effects(
    root: Path, subject: "SAESubject", table: "ExemplarTable", store: "ActivationStore", lm: "LanguageModel",
    hookpoint: str, *, windows: int, force: bool = False,
) -> Path:
    """``effects/<key>/`` of every latent of ``table``, from its windows of the split explain; a complete one is kept.

    ``store``: activations of that split. :class:`Unsupported` unless the language model is in float32.
    """
    import torch

    if lm.dtype != torch.float32:
        raise Unsupported(f"effects of latents need float32 (noise looks like an effect), the LM is in {lm.dtype}")
    config = {"windows": windows, "T": T_POSITIONS, "listed": LISTED}
    inputs = {"exemplars": table.key, "sae": subject.info.sae_sha256, "activations": store.key}
    key = key_of(KIND, STAGE_VERSION, config, inputs)
    folder = artefact_dir(root, KIND, key)
    if is_complete(folder) and not force:
        return folder
    with writing(folder, kind=KIND, key=key, stage_version=STAGE_VERSION, config=config, inputs=inputs) as out:
        upper, found = lm.upper(hookpoint), []
        with torch.inference_mode():
            for latent in track(table.latents, f"Effects {table.sae_id[-24:]}", unit="latents"):
                chosen = strongest(table.exemplars(latent, EXPLAIN), windows)
                found.append(effect_of(subject, latent, chosen, store, upper, lm))
        write_jsonl(out.path / FILE, found)
        failures = Counter(f.failure.code for f in found if f.failure is not None)
        out.counts |= {"sae_id": table.sae_id, "n_latents": len(found), "failures": dict(sorted(failures.items()))}
    return folder
