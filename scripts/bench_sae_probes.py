"""k-sparse probing of one SAE against sae-probes 0.4.2: same model, texts, rows, split, SAE and k, by turns.

``python scripts/bench_sae_probes.py --threads 2`` after ``make crosscheck``, which makes the peers' environment. From
the texts of five small data sets of the package to the AUC of every k: tokens, the activation at the last one, codes,
choice of latents, probes. Our cleaning is undone (rows as the files have them, sae-probes' split, whole texts up to
its 1,024 tokens behind the first token that it puts there), so that AUCs can be compared. Strength is chosen on three
folds by us, on the last 100 training rows by sae-probes. Wall times are printed only where both got their processor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "crosscheck")]

import embedded_case as case  # noqa: E402
import numpy as np  # noqa: E402
import probe_case  # noqa: E402
import torch  # noqa: E402
from by_turns import Spent, compare, timed  # noqa: E402

MAX_TOKENS = 1_024
FIRST = 1
"""Id that TransformerLens puts before each text: the model's BOS, which its own tokenizer does not add."""


class Ours:
    """Data sets as sae-probes reads them, and our stages on them."""

    def __init__(self, names: list[str]) -> None:
        from sae.language_model import LanguageModel

        self.lm = LanguageModel.load("default", dtype="float32")
        self.tables = {name: probe_case.table(name) for name in names}
        self.weights: dict[str, np.ndarray] = {}

    @property
    def n_texts(self) -> int:
        return sum(len(prompts) for prompts, _ in self.tables.values())

    def activations(self) -> dict[str, np.ndarray]:
        """float32 [N, D] of each data set, at the last token."""
        from evals.probe_activations import last_token_activations

        texts = [text for prompts, _ in self.tables.values() for text in prompts]
        ids = self.lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [[FIRST, *row[-(MAX_TOKENS - 1) :]] for row in ids]
        x_ND, found, start = last_token_activations(self.lm, case.HOOKPOINT, rows), {}, 0
        for name, (prompts, _) in self.tables.items():
            found[name] = x_ND[start : start + len(prompts)]
            start += len(prompts)
        return found

    def probes(self, x: dict[str, np.ndarray]) -> dict[str, tuple[list[int], list[float]]]:
        """(latents chosen, AUC for every k) of each data set."""
        from autointerp.rates import auc
        from evals.probe_activations import TaskSplit
        from evals.sparse_probes import SparseFeatures, best_columns, probe_k

        made = {}
        for name, (_, label_N) in self.tables.items():
            n = len(label_N)
            values, indices = case.encode(self.weights, torch.from_numpy(x[name]))
            features = SparseFeatures(values.numpy().astype(np.float64), indices.numpy(), case.F)
            train, test = probe_case.split(label_N, min(n, probe_case.MAX_ROWS), n)
            best = best_columns(features.scores(label_N, [TaskSplit(name, 0, train, test)])[0], max(probe_case.KS))
            z_NK, folds, found = features.take(best), np.arange(len(train)) % 3, []
            for k in probe_case.KS:
                logit = probe_k(z_NK[train, :k], label_N[train], folds, z_NK[test, :k])[0]
                found.append(float(auc(logit[label_N[test] > 0], logit[label_N[test] == 0]) or 0.0))
            made[name] = ([int(i) for i in best], found)
        return made


def theirs(folder: Path, work: dict[str, Any], python: Path) -> dict[str, Any]:
    """One timed run of the peer in a process of its own; its words are shown where it fails."""
    (folder / "work.json").write_text(json.dumps(work))
    path = f"{ROOT / 'tests/support'}:{ROOT / 'tests/crosscheck'}:{ROOT}"
    threads = {name: str(work["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    files = [str(folder / name) for name in ("work.json", "out.json")]
    command = [str(python), str(ROOT / "tests/crosscheck/time_sae_probes.py"), *files]
    environment = os.environ | threads | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"sae-probes failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    if found["first"] != FIRST:
        sys.exit(f"sae-probes puts {found['first']} before a text, expected {FIRST}: another release of its libraries?")
    return found


def agreement(ours: dict[str, tuple[list[int], list[float]]], found: dict[str, Any]) -> None:
    """Print AUCs side by side, and how many of the chosen latents are the same."""
    gaps = []
    for name, (chosen, auc) in ours.items():
        same = len(set(chosen) & set(found["chosen"][name]))
        gaps.append(np.subtract(auc, found["auc"][name]))
        both = " ".join(f"{a:.4f}/{b:.4f}" for a, b in zip(auc, found["auc"][name], strict=True))
        print(f"{name}: AUC ours/theirs at k {probe_case.KS}: {both}; {same} of {len(chosen)} latents the same")
    first = np.abs([gap[0] for gap in gaps]).max()
    print(f"mean difference {np.mean(gaps):+.4f}, mean size {np.mean(np.abs(gaps)):.4f}, at k 1 at most {first:.1e}")


def main() -> None:
    from sae.model_files import cache_dir, resolve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--names", nargs="+", default=list(probe_case.DATASETS), help="data sets of the package")
    args = parser.parse_args()
    python = cache_dir() / "crosscheck" / "sae_bench" / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python} is not there; `make crosscheck` makes the environment of the peers")
    torch.set_num_threads(args.threads)
    ours = Ours(args.names)
    spent: dict[str, tuple[list[Spent], list[Spent]]] = {"activations": ([], []), "probes": ([], [])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours.weights = case.fit_sae(np.concatenate(list(ours.activations().values())))  # the untimed first pass, too
        np.savez(folder / "sae.npz", **ours.weights)
        work = {"lm": str(resolve("default").source), "sae": str(folder / "sae.npz"), "names": args.names,
                "ks": list(probe_case.KS), "threads": args.threads}  # fmt: skip
        for _ in range(args.repeats):
            found = theirs(folder, work, python)
            x, made = timed(ours.activations)
            rows, probed = timed(lambda x=x: ours.probes(x))
            for stage, own, peer in (("activations", made, "made"), ("probes", probed, "probed")):
                spent[stage][0].append(own)
                spent[stage][1].append(Spent(**found[peer]))
    for stage, (own, peers) in spent.items():
        what = f"{stage} of {ours.n_texts:,} texts, {args.threads} threads"
        print("\n".join(compare(what, own, peers, "sae-probes", per=1, unit="in all")), flush=True)
    agreement(rows, found)


if __name__ == "__main__":
    main()
