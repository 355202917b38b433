"""Figures of the evaluation suite: processor seconds on one thread, alternating in one process where two are compared.

``OMP_NUM_THREADS=1 python scripts/bench_evals.py [probes] [tasks] [eight] [stream]``; no argument: all.
``stream`` takes ``--latents`` and ``--tokens`` (131,072 and 1,000,000 for the full size: about ten minutes, 3 GB).
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
import torch  # noqa: E402


def spent(work: Callable[[], Any]) -> float:
    """Processor seconds of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def sparse_task(n: int, width: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [width, n] with k of ``width`` latents active per row, and balanced labels."""
    g = torch.Generator().manual_seed(seed)
    h = torch.zeros(width, n)
    rows = torch.arange(n).repeat_interleave(k)
    h[torch.randint(width, (n * k,), generator=g), rows] = torch.rand(n * k, generator=g) + 0.5
    return h, (torch.arange(n) % 2).float()


def probes(n: int = 1000, width: int = 256, rounds: int = 5) -> None:
    """One latent at a time: our batched Newton steps against scikit-learn's LogisticRegression."""
    from sklearn.linear_model import LogisticRegression

    from evals.probes import RIDGE, fit_probes

    g = torch.Generator().manual_seed(0)
    y = (torch.arange(n) % 2).float()
    dense = torch.randn(width, n, generator=g) + torch.linspace(0, 1, width)[:, None] * (2 * y - 1)
    for name, h in (("dense", dense), ("sparse", sparse_task(n, width, 8, 1)[0])):
        few = h[:64].double().numpy()
        columns = [((c - c.mean()) / max(c.std(), 1e-9))[:, None] for c in few]

        def theirs(columns: list[np.ndarray] = columns) -> None:
            for c in columns:
                LogisticRegression(C=1 / RIDGE).fit(c, y.numpy())

        fit_probes(h, y), theirs()
        mine, peer = [], []
        for _ in range(rounds):
            mine.append(spent(lambda h=h: fit_probes(h, y)) / width)
            peer.append(spent(theirs) / len(columns))
        a, b = statistics.median(mine), statistics.median(peer)
        print(f"1-d probes, {name}, n {n}: {a * 1e6:.0f} us ({min(mine) * 1e6:.0f} to {max(mine) * 1e6:.0f}) against "
              f"{b * 1e6:.0f} us of scikit-learn ({min(peer) * 1e6:.0f} to {max(peer) * 1e6:.0f}): {b / a:.1f} x")


def tasks(latents: int = 32_768, n_tasks: int = 61, n: int = 500, measured: int = 3, share: int = 4) -> None:
    """``n_tasks`` tasks x ``latents`` latents after collection, scaled up from a share of both."""
    from evals.probes import fit_probes

    width, seconds = latents // share, 0.0
    for seed in range(measured):
        h, y = sparse_task(n, width, max(1, 32 // share), seed)
        seconds += spent(lambda h=h, y=y: fit_probes(h, y))
    whole = seconds * share * n_tasks / measured
    print(f"{n_tasks} tasks x {latents:,} latents, {n} train rows, 32 active: {whole / 60:.1f} minutes of one core, "
          f"{whole / 120:.1f} of two (scaled from {measured} tasks x {width:,})")


def eight(n_saes: int = 8, rows: int = 16) -> None:
    """Reconstruction and downstream loss (preset tiny: 1,024 and 2,048 tokens) of eight SAEs in one run against eight
    runs of one, on the embedded model; each run captures its activations first."""
    from memory_store import context, memory_store, topk_subject

    from evals.measure import select
    from sae.language_model import LanguageModel

    lm = LanguageModel.load("default", dtype="float32")
    place = lm.default_hookpoint()
    evaluations = select(("reconstruction", "downstream_loss"))
    first = memory_store(lm, place, rows=rows, L=128)
    subjects = [topk_subject(lm, place, first, d_sae=4_608, k=32, seed=s) for s in range(n_saes)]

    def run(chosen: list[Any]) -> None:
        store, shared = memory_store(lm, place, rows=rows, L=128), {}
        for evaluation in evaluations:
            for subject in chosen:
                evaluation.run(context(lm, place, store, subject, Path("nowhere"), shared))

    run(subjects[:1])
    together = spent(lambda: run(subjects))
    alone = statistics.median(spent(lambda s=s: run([s])) for s in subjects[:3])
    print(f"eight SAEs together {together:.1f} s, one alone {alone:.1f} s: {n_saes * alone / together:.2f} x less than "
          f"eight times one; each further SAE {(together - alone) / (n_saes - 1):.1f} s")


def stream(latents: int, tokens: int, d_in: int = 576, k: int = 32) -> None:
    """Reconstruction of a synthetic SAE over synthetic tokens: seconds and peak memory beyond the SAE."""
    from streamed import reconstruct_streamed

    made = reconstruct_streamed(latents, tokens, d_in=d_in, k=k)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"reconstruction, F {latents:,}, {tokens:,} tokens, D {d_in}, k {k}: {made.processor_s:.0f} s of processor "
          f"time, peak {peak:.2f} GB, of it {made.sae_gb:.2f} GB the SAE and {made.before_gb:.2f} GB before; fvu "
          f"{made.fvu:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("which", nargs="*", default=[], choices=["probes", "tasks", "eight", "stream", []])
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=65_536)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = options.which or ["probes", "tasks", "eight", "stream"]
    for name in chosen:
        if name == "stream":
            stream(options.latents, options.tokens)
        else:
            {"probes": probes, "tasks": tasks, "eight": eight}[name]()


if __name__ == "__main__":
    main()
