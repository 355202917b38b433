"""Latent cache, explanations, detection and fuzzing against delphi 0.1.3: same model, tokens, SAE, latents, by turns.

``python scripts/bench_delphi.py --threads 2`` after ``tests/crosscheck/delphi_env.sh``, which makes its environment.
``cache``: from token ids to every nonzero activation on disk, ours by two stages (activations, latents), delphi's by
one pass. ``judge``: from that cache to a text, detection and fuzzing of each latent, with 20 windows shown, 20 active
and 20 silent ones judged, five a request as delphi does (and ten, our default), by a server in a process of its own
that answers at once. Left out on our side, since delphi has none of it: shuffled explanations, hard negatives, the
judge's check. Wall times are printed only where both got their processor; processor time always.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "crosscheck")]

import delphi_case as case  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from by_turns import Spent, compare, timed  # noqa: E402

SPLITS = {"explain": 96, "calibrate": 32, "score": 64}
"""Rows of 128 tokens of each; delphi reads them as one text."""
IN_FLIGHT = 10
"""Latents that delphi works on at once (its library's default) and requests of ours."""


def make_tokens(root: Path, lm: Any, part: float) -> dict[str, Any]:
    """The first rows of the default mix, packed as always."""
    from sae.config import TokensConfig
    from sae.tokens import build_tokens

    rows = {split: case.BATCH_ROWS * max(1, round(n * part / case.BATCH_ROWS)) for split, n in SPLITS.items()}
    sizes = {f"{split}_tokens": n * case.L for split, n in rows.items()}  # delphi drops a batch that is not full
    cfg = TokensConfig(context_tokens=case.L, train_tokens=case.L, test_tokens=case.L, **sizes)
    made = build_tokens(root, cfg, lm.name, lm.tokenizer)
    return {split: made[split] for split in SPLITS}


def make_sae(found: dict[str, np.ndarray]) -> Any:
    """TopK with the weights that delphi is given."""
    from streamed import synthetic_sae

    sae: Any = synthetic_sae(case.F, case.D, case.K).sae
    with torch.no_grad():
        sae.W_dec_FD.copy_(torch.from_numpy(found["W"]))
        (sae.W_enc_FD if hasattr(sae, "W_enc_FD") else sae.W_enc_DF.T).copy_(torch.from_numpy(found["W"]))
        sae.b_dec_D.copy_(torch.from_numpy(found["b"]))
    return sae


class Ours:
    """Both stages in this process, each time into a fresh folder."""

    def __init__(self, folder: Path, dtype: str, part: float) -> None:
        from sae.activations import capture_activations
        from sae.language_model import LanguageModel

        self.folder, self.dtype = folder, dtype
        self.lm = LanguageModel.load("default", dtype=dtype)
        self.tokens = make_tokens(folder / "text", self.lm, part)
        first = capture_activations(folder / "first", self.lm, self.tokens["explain"], case.PLACE)
        self.weights = case.weights(first.read(first.kept_N).float().numpy())
        self.sae = make_sae(self.weights)
        self.median = first.norm_median
        self.latents: Any = None

    def cache(self) -> Any:
        """Activations of the three splits, then the latent cache."""
        from autointerp.latent_cache import build_latents
        from sae.activations import capture_activations

        root = self.folder / "ours"
        shutil.rmtree(root, ignore_errors=True)
        kind: Any = self.dtype
        stores = {
            split: capture_activations(root, self.lm, tokens, case.PLACE, store_dtype=kind, norm_median=self.median)
            for split, tokens in self.tokens.items()
        }
        self.latents = build_latents(root, self.sae, stores)
        return self.latents

    def chosen(self, n: int) -> list[int]:
        """The first eligible latents with windows enough for both."""
        from autointerp.exemplars import sample_latents

        return [int(i) for i in sample_latents(self.latents, n, 0, self.exemplars()).latents]

    @staticmethod
    def exemplars() -> Any:
        from autointerp.config import ExemplarConfig

        least = (2 * case.SHOWN, 5, 2 * case.POSITIVE)  # delphi draws what it shows and what it judges from one heap
        return ExemplarConfig(explain_silent=0, explain_random=0, calibrate_positive=0, calibrate_silent=0,
                              score_positive=case.POSITIVE, score_silent=case.SILENT, score_hard=0, min_windows=least)

    def judge(self, latents: list[int], url: str, per_request: int) -> Any:
        """(explanations, results), written as the stages write them."""
        from autointerp.client import open_client
        from autointerp.exemplars import build_exemplars
        from autointerp.explainers.highlighted import PLUGIN as HIGHLIGHTED
        from autointerp.interfaces import ExplainContext, ScoreContext
        from autointerp.pipeline import explain, make_jobs, open_explanations
        from autointerp.records import LatentScore, ScoreItem
        from autointerp.scorers.detection import PLUGIN as DETECTION
        from autointerp.scorers.fuzzing import PLUGIN as FUZZING
        from autointerp.tables import write_parquet

        root = self.folder / "judged"
        shutil.rmtree(root, ignore_errors=True)
        table = build_exemplars(root, self.latents, latents, self.exemplars())
        client = open_client("openai", replies=root / "replies.sqlite", model="m", base_url=url, concurrency=IN_FLIGHT)
        asked = ExplainContext(client=client, tokenizer=self.lm.tokenizer, hookpoint=case.PLACE)
        found = open_explanations(explain(root, table, [HIGHLIGHTED()], asked))
        jobs = [job for job in make_jobs(found, table, 0) if not job.floor_kind]
        scoring = ScoreContext(client=client, tokenizer=self.lm.tokenizer, hookpoint=case.PLACE)
        scorers = [scorer(per_request=per_request) for scorer in (DETECTION, FUZZING)]
        results = [result for scorer in scorers for result in scorer.score_many(jobs, scoring)]
        write_parquet(root / "scores.parquet", [s for r in results for s in r.scores], LatentScore)
        write_parquet(root / "items.parquet", [i for r in results for i in r.items], ScoreItem)
        client.close()
        return found, results


class Delphi:
    """The peer in its own environment."""

    def __init__(self, folder: Path, ours: Ours, threads: int) -> None:
        from sae.model_files import cache_dir, resolve

        self.python = cache_dir() / "crosscheck" / "delphi" / "bin" / "python"
        if not self.python.exists():
            sys.exit(f"{self.python} is not there; tests/crosscheck/delphi_env.sh makes delphi's environment")
        self.folder, self.threads = folder, threads
        ids = np.concatenate([np.asarray(t.tokens_BL) for t in ours.tokens.values()]).astype(np.int64)
        np.save(folder / "ids.npy", ids)
        np.savez(folder / "sae.npz", **ours.weights)
        self.n_tokens = ids.size
        self.work = {"lm": str(resolve("default").source), "ids": str(folder / "ids.npy"), "dtype": ours.dtype,
                     "sae": str(folder / "sae.npz"), "latents": str(folder / "delphi"), "threads": threads}

    def run(self, what: str, **more: Any) -> dict[str, Any]:
        """One timed run in a process of its own; its words are shown where it fails."""
        given, out = self.folder / "work.json", self.folder / "out.json"
        given.write_text(json.dumps(self.work | more))
        path = f"{ROOT / 'tests/support'}:{ROOT / 'tests/crosscheck'}"
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = os.environ | threads | offline | {"PYTHONPATH": path}
        command = [str(self.python), str(ROOT / "tests/crosscheck/time_delphi.py"), what, str(given), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"delphi failed ({what}):\n{done.stderr[-3000:]}")
        return dict(json.loads(out.read_text()))


def bytes_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def their_entries(folder: Path, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, activations) of delphi's files on the tokens that we keep, by number."""
    from safetensors.numpy import load_file

    numbers, values = [], []
    for file in sorted((folder / case.PLACE).glob("*.safetensors")):
        data, first = load_file(file), int(file.stem.split("_")[0])
        row, position, latent = data["locations"].astype(np.int64).T
        numbers.append(case.entries(row, position, latent + first))
        values.append(data["activations"].astype(np.float64))
    number, value = np.concatenate(numbers), np.concatenate(values)
    fine = kept[number // case.F]
    order = np.argsort(number[fine])
    return number[fine][order], value[fine][order]


def our_entries(cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers, activations, tokens kept) of our cache, the splits one after the other."""
    numbers, values, kept, before = [], [], [], 0
    for split in SPLITS:
        for latent in range(case.F):
            flat, value = cache.entries(latent, split)
            numbers.append(case.entries(0, flat.astype(np.int64) + before, latent))
            values.append(value)
        kept.append(cache.keep(split))
        before += kept[-1].size
    number = np.concatenate(numbers)
    order = np.argsort(number)
    return number[order], np.concatenate(values)[order], np.concatenate(kept)


def bench_cache(ours: Ours, delphi: Delphi, repeats: int) -> None:
    spent: tuple[list[Spent], list[Spent]] = ([], [])
    for _ in range(repeats):
        shutil.rmtree(delphi.work["latents"], ignore_errors=True)
        theirs = delphi.run("cache")
        cache, own = timed(ours.cache)
        spent[0].append(own)
        spent[1].append(Spent(**theirs["spent"]))
    n = delphi.n_tokens
    what = f"latent cache, {n:,} tokens, {ours.dtype}, {delphi.threads} threads"
    for line in compare(what, *spent, "delphi", per=n / 1e3, unit="a thousand tokens"):
        print(line, flush=True)
    stores, whole = bytes_of(ours.folder / "ours" / "activations"), bytes_of(cache.folder)
    lists = sum(f.stat().st_size for f in cache.folder.iterdir() if f.name.split(".")[1] in ("flat", "value", "keep"))
    text = sum(t.tokens_BL.nbytes for t in ours.tokens.values())
    print(f"disk: {(lists + text) / n:.1f} bytes a token and {(whole - lists) / case.F:.0f} a latent (statistics, "
          f"neighbours) against {theirs['bytes'] / n:.1f} a token of delphi; beside ours lie {stores / n:.0f} a token "
          "of activations, which evaluations read too")  # fmt: skip
    number, value, kept = our_entries(cache)
    number_2, value_2 = their_entries(Path(delphi.work["latents"]), kept)
    both, mine, other = np.intersect1d(number, number_2, assume_unique=True, return_indices=True)
    off = np.abs(value[mine] - value_2[other]) / value_2[other]
    print(f"nonzeros on the {int(kept.sum()):,} tokens kept: {number.size:,} and {number_2.size:,}, {both.size:,} in "
          f"both; values differ by {np.median(off):.1e} (median) and {np.quantile(off, 0.99):.1e} (99 %)")  # fmt: skip


def bench_judge(ours: Ours, delphi: Delphi, n_latents: int, repeats: int) -> None:
    from zero_latency import ZeroLatency

    latents = ours.chosen(n_latents)
    if not latents:
        sys.exit("no latent has windows enough to be judged; give a larger --part, or --skip-judge")
    print(f"{len(latents)} latents")
    spent: dict[int, list[Spent]] = {case.PER_REQUEST: [], 10: []}
    peer: list[Spent] = []
    with ZeroLatency(case.ANSWER) as server:
        ours.judge(latents[:1], server.url, 10)  # imports, prompt files
        for _ in range(repeats):
            server.taken()
            theirs = delphi.run("judge", chosen=latents, url=server.url, out=str(delphi.folder / "judged_delphi"),
                                concurrent=IN_FLIGHT)  # fmt: skip
            asked = {"delphi": server.taken()}
            peer.append(Spent(**theirs["spent"]))
            for per_request, own in spent.items():
                (found, results), took = timed(lambda p=per_request: ours.judge(latents, server.url, p))
                asked[f"ours, {per_request} a request"] = server.taken()
                own.append(took)
    if theirs["latents"] != len(latents) or theirs["unread"]:
        sys.exit(f"delphi scored {theirs['latents']} of {len(latents)} latents, {theirs['unread']} answers unread")
    items = [item for r in results for item in r.items]
    failed = sum(e.failure is not None for e in found) + sum(i.failure is not None for i in items)
    print(f"verdicts: {len(items)} of ours ({failed} failures), {theirs['verdicts']} of delphi")
    for who, (requests, chars) in asked.items():
        print(f"{who}: {requests / len(latents):.1f} requests and {chars / len(latents):,.0f} characters a latent")
    for per_request, own in spent.items():
        for line in compare(f"client, {per_request} windows a request", own, peer, "delphi (5)", per=len(latents),
                            unit="a latent"):  # fmt: skip
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model, both sides")
    parser.add_argument("--part", type=float, default=1.0, help="of the 192 rows of text")
    parser.add_argument("--latents", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-judge", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Path(folder), args.dtype, args.part)
        delphi = Delphi(Path(folder), ours, args.threads)
        bench_cache(ours, delphi, args.repeats)
        if not args.skip_judge:
            bench_judge(ours, delphi, args.latents, args.repeats)


if __name__ == "__main__":
    main()
