"""Reconstruction and downstream loss against SAEBench's core evaluation: same model, tokens, SAE, machine, by turns.

``python scripts/bench_core.py --threads 2`` after ``make crosscheck``, which makes the peers' environment. Ours counts
the pass that captures the activations, as theirs does; both have one untimed pass before. Texts: the first rows of the
split test of the default mix, packed as always; positions with token 0 (first of a row, between documents) are left out
by both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "crosscheck")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

PLACE, D, F, K, L = "layers.15", 576, 4_608, 32, 128


def real_rows(lm: Any, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, document numbers), both [n_rows, L]."""
    from evals.run_config import quick
    from sae.tokens import build_tokens

    with tempfile.TemporaryDirectory() as folder:
        tokens = build_tokens(Path(folder), quick().tokens_config(), lm.name, lm.tokenizer)["test"]
        assert tokens.L == L and len(tokens.tokens_BL) >= n_rows
        return tokens.tokens_BL[:n_rows].astype(np.int64), np.array(tokens.doc_ids_BL()[:n_rows])


def subject_of(lm: Any) -> Any:
    """TopK with the weights that the peer is given (tests/crosscheck/time_core.py: unit rows, encoder = decoder)."""
    from memory_store import info
    from streamed import synthetic_sae

    from evals.base import SAESubject

    sae: Any = synthetic_sae(F, D, K).sae
    w_dec = np.random.default_rng(4).standard_normal((F, D)).astype(np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    with torch.no_grad():
        sae.W_dec_FD.copy_(torch.from_numpy(w_dec))
        (sae.W_enc_FD if hasattr(sae, "W_enc_FD") else sae.W_enc_DF.T).copy_(torch.from_numpy(w_dec))
    return SAESubject(sae, info(lm, PLACE, "core", d_in=D, d_sae=F, k=K))


class Ours:
    """Capture, reconstruction and downstream loss, from token ids to rows."""

    def __init__(self, lm: Any, ids: np.ndarray, docs: np.ndarray) -> None:
        from evals.measure import select

        self.lm, self.ids, self.docs, self.subject = lm, ids, docs, subject_of(lm)
        self.evaluations = select(("reconstruction", "downstream_loss"))
        lm.logits(torch.from_numpy(ids[:1]))

    def __call__(self) -> dict[str, float]:
        from dataclasses import replace

        from memory_store import MemoryStore, MemoryTokens, context

        parts = [self.lm.capture(torch.from_numpy(self.ids[i : i + 8]), [PLACE])[PLACE] for i in
                 range(0, len(self.ids), 8)]
        tokens = MemoryTokens(self.ids.astype(np.uint16), self.docs)
        store = MemoryStore(tokens, torch.cat(parts).reshape(-1, D), (self.ids != 0).ravel())
        rows: dict[str, float] = {}
        for evaluation in self.evaluations:
            ctx = replace(context(self.lm, PLACE, store, self.subject, Path("nowhere")), preset="quick")
            for row in evaluation.run(ctx).rows:
                rows[row.metric] = row.value  # type: ignore[assignment]
        return rows


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{name}: {a:.1f} s ({min(ours):.1f} to {max(ours):.1f}) against {b:.1f} s ({min(theirs):.1f} to "
          f"{max(theirs):.1f}) of SAEBench's core: {b / a:.2f} x")


def main() -> None:
    from sae.language_model import LanguageModel
    from sae.model_files import cache_dir, resolve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32, help="rows of 128 tokens, a multiple of 8; quick reads 32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    peer = cache_dir() / "crosscheck" / "sae_bench" / "bin" / "python"
    if not peer.exists():
        sys.exit(f"{peer} is not there; `make crosscheck` makes the environment of the peers")
    torch.set_num_threads(args.threads)
    lm = LanguageModel.load("default", dtype="float32")
    ids, docs = real_rows(lm, args.rows)
    ours, seconds = Ours(lm, ids, docs), {"processor_s": ([], []), "wall_s": ([], [])}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/ids.npy", ids)
        for _ in range(args.repeats):
            command = [peer, ROOT / "tests/crosscheck/time_core.py", resolve("default").source, f"{folder}/out.json",
                       f"{folder}/ids.npy", str(args.threads)]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            theirs = json.loads(Path(f"{folder}/out.json").read_text())
            begun = time.process_time(), time.monotonic()
            rows = ours()
            spent = time.process_time() - begun[0], time.monotonic() - begun[1]
            for name, own in zip(("processor_s", "wall_s"), spent, strict=True):
                seconds[name][0].append(own)
                seconds[name][1].append(theirs[name])
    for name, (own, peers) in seconds.items():
        report(f"{ids.size:,} tokens, {args.threads} threads, {name}", own, peers)
    m = theirs["metrics"]
    print(f"CE clean {rows['ce_clean']:.4f} against {m['ce_loss_without_sae']:.4f}, with the SAE "
          f"{rows['ce_clean'] + rows['delta_ce']:.4f} against {m['ce_loss_with_sae']:.4f}, L0 {rows['l0']} against "
          f"{m['l0']}")


if __name__ == "__main__":
    main()
