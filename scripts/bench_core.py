"""Reconstruction and downstream loss against SAEBench's core evaluation: same model, tokens, SAE; processor seconds.

``OMP_NUM_THREADS=1 python scripts/bench_core.py PEER.json`` after ``tests/crosscheck/time_core.py`` in the peers'
environment (it writes PEER.json). Ours counts the pass that captures the activations, as theirs does.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
import torch  # noqa: E402


def main(peer_file: str) -> None:
    from memory_store import MemoryStore, MemoryTokens, context, info
    from streamed import synthetic_sae

    from evals.base import SAESubject
    from evals.measure import select
    from sae.language_model import LanguageModel

    peer = json.loads(Path(peer_file).read_text())
    torch.set_num_threads(1)
    # as tests/crosscheck/time_core.py draws them; preset tiny reads 1,024 tokens
    ids = np.random.default_rng(3).integers(1_000, 40_000, size=(peer["rows"], 128)).astype(np.int64)
    ids[:, 0] = 0
    lm = LanguageModel.load("default", dtype="float32")
    place = "layers.15"
    docs = np.repeat(np.arange(len(ids))[:, None], ids.shape[1], axis=1)
    subject: Any = synthetic_sae(4_608, 576, 32)
    r = np.random.default_rng(4)
    w_dec = r.standard_normal((4_608, 576)).astype(np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    with torch.no_grad():
        subject.sae.W_dec_FD.copy_(torch.from_numpy(w_dec))
        target = subject.sae.W_enc_FD if hasattr(subject.sae, "W_enc_FD") else subject.sae.W_enc_DF.T
        target.copy_(torch.from_numpy(w_dec))
    subject = SAESubject(subject.sae, info(lm, place, "core", d_in=576, d_sae=4_608, k=32))
    evaluations = select(("reconstruction", "downstream_loss"))

    def run() -> dict[str, float]:
        x = lm.capture(torch.from_numpy(ids), [place])[place].float().reshape(-1, 576)
        keep = np.ones(ids.shape, dtype=bool)
        keep[:, 0] = False
        store = MemoryStore(MemoryTokens(ids.astype(np.uint16), docs), x, keep.ravel())
        rows: dict[str, float] = {}
        for evaluation in evaluations:
            for row in evaluation.run(context(lm, place, store, subject, Path("nowhere"))).rows:
                rows[row.metric] = row.value  # type: ignore[assignment]
        return rows

    rows, seconds = run(), []
    for _ in range(3):
        begun = time.process_time()
        rows = run()
        seconds.append(time.process_time() - begun)
    mine, theirs = statistics.median(seconds), statistics.median(peer["processor_s"])
    m = peer["metrics"]
    print(f"{ids.size:,} tokens: {mine:.1f} s ({min(seconds):.1f} to {max(seconds):.1f}) against {theirs:.1f} s of "
          f"SAEBench's core ({min(peer['processor_s']):.1f} to {max(peer['processor_s']):.1f}): {theirs / mine:.2f} x")
    print(f"CE clean {rows['ce_clean']:.4f} against {m['ce_loss_without_sae']:.4f}, with the SAE "
          f"{rows['ce_clean'] + rows['delta_ce']:.4f} against {m['ce_loss_with_sae']:.4f}, L0 {rows['l0']} against "
          f"{m['l0']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
