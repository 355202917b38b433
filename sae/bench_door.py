"""``python -m sae bench``: steps per second of our training and of other libraries, on the same stored activations.

Every trainer is a process of its own and waits while another one works; they take turns, a few steps each, so that a
machine that slows down slows all of them. ``--help`` needs no torch.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sae import bench_envs, console
from sae.config import TokensConfig, require
from sae.errors import ConfigError, DataError, SaescopeError, did_you_mean

if TYPE_CHECKING:
    from sae.activations import ActivationStore

COLUMNS = (
    "provider", "version", "encoder_dtype", "n_saes", "batch_tokens", "d_in", "d_sae", "k", "steps", "timed_steps",
    "p20_ms", "p50_ms", "p80_ms", "cpu_p50_ms", "tokens_per_s", "tokens_per_cpu_s", "processor_use", "got_share",
    "counts", "fvu", "l0", "n_dead", "peak_mb", "threads", "torch", "processor", "activations", "utc",
)  # fmt: skip
LEAST_GOT = 0.85
"""Share of the processor time asked for that a row must have got, or its wall time is not to be believed."""
HELD_OUT_TOKENS = 20_000
WORKER = Path(__file__).with_name("bench_worker.py")
OURS: dict[str, dict[str, Any]] = {
    "saescope": {"trainer": "saescope"},
    "saescope, bf16 product": {"trainer": "saescope", "encoder_dtype": "bfloat16"},
    "product alone": {"trainer": "product"},
    "product alone, bf16": {"trainer": "product", "encoder_dtype": "bfloat16"},
}
"""Always measured; the products are the arithmetic floor."""


@dataclass(kw_only=True, frozen=True)
class BenchDoor:
    """Measure training steps on a CPU, ours and those of other libraries, alternating, on the same activations."""

    peers: bool = False
    """Also sparsify, dictionary_learning and SAELens, each in an environment of its own (made once: minutes, 5 GB)."""
    envs: Path | None = None
    """Where these environments are or will be made; default: peers/ in the cache (SAESCOPE_CACHE)."""
    providers: tuple[str, ...] = ()
    """Of the other libraries only these."""
    many: int = 0
    """Also this many SAEs of one shape at once, which differ in their seeds."""
    activations: Path | None = None
    """A complete folder <root>/activations/<key>; by default those of the embedded model, collected if need be."""
    root: Path = Path("results")
    """Where activations are looked for and collected."""
    output: Path = Path("results/training.csv")
    """Rows are appended here."""
    steps: int = 50
    """Steps of every trainer; FVU is measured after the last one."""
    turn: int = 5
    """Steps of a turn. The first turn of each is not timed."""
    d_sae: int = 4_608
    k: int = 32
    batch_tokens: int = 4_096
    lr: float = 1e-3
    """Constant, the same for all."""
    aux_alpha: float = 1 / 32
    dead_tokens: int = 204_800
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    seed: int = 0
    verbose: bool = False

    def __post_init__(self) -> None:
        require(self.turn >= 1 and self.steps >= 2 * self.turn, "bench needs at least two turns of steps")
        known = [peer.name for peer in bench_envs.PEERS]
        for name in self.providers:
            require(name in known, f"--providers {name!r}{did_you_mean(name, known)}")
        require(self.many != 1 and self.many >= 0, "--many needs at least 2 SAEs")


# -- data -------------------------------------------------------------------------------------------------------------
def collected(cfg: BenchDoor) -> "ActivationStore":
    """The store of ``--activations``, or the default model's at its middle block, collected unless it is there."""
    from sae.train_door import open_store

    if cfg.activations is not None:
        return open_store(cfg.activations)
    from sae.activations import capture_activations
    from sae.language_model import LanguageModel
    from sae.tokens import build_tokens

    lm = LanguageModel.load("default")
    tokens = build_tokens(cfg.root, TokensConfig(train_tokens=430_080), lm.name, lm.tokenizer)["train"]
    return capture_activations(cfg.root, lm, tokens, lm.default_hookpoint())


def specification(cfg: BenchDoor, store: "ActivationStore", folder: Path) -> dict[str, Any]:
    """What every worker is told; writes the order of the tokens. The last documents of the store are held out.

    ``DataError`` for a store that has not enough tokens for a batch and the tokens held out.
    """
    import numpy as np

    from sae.manifest import rng

    kept, documents = store.kept_N, store.doc_of_N[store.kept_N]
    ends = np.searchsorted(documents, np.arange(documents[-1] + 2) if len(documents) else [0])
    first = ends[np.searchsorted(ends, max(0, len(kept) - HELD_OUT_TOKENS), side="right") - 1]
    pool, held = kept[:first], kept[first:]
    if len(pool) < cfg.batch_tokens or not len(held):
        raise DataError(
            f"activations {store.key} hold {len(kept):,} tokens; the bench wants {HELD_OUT_TOKENS:,} of whole "
            f"documents to hold out and {cfg.batch_tokens:,} for a batch: give more text, or a smaller --batch-tokens"
        )
    batches: list[np.ndarray] = []
    while len(batches) < cfg.steps:
        order = rng("bench", cfg.seed, len(batches)).permutation(pool)
        batches += list(order[: len(order) // cfg.batch_tokens * cfg.batch_tokens].reshape(-1, cfg.batch_tokens))
    sample = rng("bench", "sample", cfg.seed).permutation(pool)[:32_768]
    np.savez(folder / "order.npz", train=np.stack(batches[: cfg.steps]), held_out=held, sample=sample)
    length = float(store.read(sample).double().norm(dim=1).mean())
    return {
        "activations": str(store.folder.absolute() / "acts_ND.bin"), "n_stored": store.n_tokens, "d_in": store.d_in,
        "stored_dtype": store.manifest["config"]["store_dtype"], "scale": store.d_in**0.5 / length,
        "order": str(folder / "order.npz"), "batch": cfg.batch_tokens, "d_sae": cfg.d_sae, "k": cfg.k, "lr": cfg.lr,
        "aux_alpha": cfg.aux_alpha, "dead_tokens": cfg.dead_tokens, "threads": cfg.threads, "seed": cfg.seed,
        "steps": cfg.steps,
    }  # fmt: skip


# -- workers ----------------------------------------------------------------------------------------------------------
class Worker:
    """A trainer in its own process; it works only while it is asked."""

    def __init__(self, name: str, python: Path, spec: dict[str, Any], folder: Path) -> None:
        self.name, self.spec = name, spec
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.waited = 0.0
        self.figures: dict[str, Any] = {}
        place = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        place.write_text(json.dumps(spec), encoding="utf-8")
        self.log = open(place.with_suffix(".log"), "w+", encoding="utf-8", errors="replace")
        threads = str(spec["threads"])
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "WANDB_MODE": "disabled"}
        if spec["trainer"] in ("saescope", "product"):
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(str, sys.path)))
        self.process = subprocess.Popen(
            [str(python), "-P", str(WORKER), str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        self.about = self._answer()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order, wait for its answer. :class:`SaescopeError` with the end of its log where the worker died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout: IO[str] | None = self.process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            tail = "\n".join(self.log.read().strip().splitlines()[-8:])
            raise SaescopeError(f"the trainer {self.name!r} ended with {self.process.returncode}:\n{tail}")
        return json.loads(line)  # type: ignore[no-any-return]

    def turn(self, first: int, count: int) -> None:
        """Some steps; those of the first turn are not kept."""
        found = self.ask(do="train", first=first, count=count)
        if first > 0:
            self.wall += found["wall_s"]
            self.processor += found["processor_s"]
            self.waited += found["waited_s"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def workers(cfg: BenchDoor, spec: dict[str, Any], folder: Path, stack: ExitStack) -> list[Worker]:
    """All that are to be measured, ready and waiting."""
    ours = dict(OURS)
    if cfg.many:
        ours[f"saescope, {cfg.many} at once"] = {"trainer": "saescope", "n_saes": cfg.many}
    planned = [(name, Path(sys.executable), options) for name, options in ours.items()]
    if cfg.peers or cfg.providers:
        envs = cfg.envs or bench_envs.default_folder()
        for peer in bench_envs.PEERS:
            if not cfg.providers or peer.name in cfg.providers:
                planned.append(
                    (peer.name, bench_envs.ensure(peer, envs), {"trainer": peer.name, "package": peer.package})
                )
    found = []
    for name, python, options in planned:
        worker = Worker(name, python, spec | options, folder)
        stack.callback(worker.close)
        found.append(worker)
    return found


# -- results ----------------------------------------------------------------------------------------------------------
def processor_name() -> str:
    """Model of the processor as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def row(worker: Worker, cfg: BenchDoor, activations: str) -> dict[str, Any]:
    """One line of the file; empty where a figure does not apply."""
    spec, wall = worker.spec, sorted(worker.wall)
    n_saes = spec.get("n_saes", 1)
    p50, cpu = statistics.median(wall), statistics.median(worker.processor)
    used, learns = sum(worker.processor), spec["trainer"] != "product"
    got = used / (used + worker.waited) if used + worker.waited > 0 else 0.0
    tokens = n_saes * cfg.batch_tokens
    return {
        "provider": worker.name, "version": worker.about["version"], "n_saes": n_saes,
        "encoder_dtype": spec.get("encoder_dtype", "float32"), "batch_tokens": cfg.batch_tokens, "d_in": spec["d_in"],
        "d_sae": cfg.d_sae, "k": cfg.k, "steps": cfg.steps, "timed_steps": len(wall),
        "p20_ms": round(1e3 * wall[len(wall) // 5], 2), "p50_ms": round(1e3 * p50, 2),
        "p80_ms": round(1e3 * wall[len(wall) * 4 // 5], 2), "cpu_p50_ms": round(1e3 * cpu, 2),
        "tokens_per_s": round(tokens / p50), "tokens_per_cpu_s": round(tokens / cpu),
        "processor_use": round(used / (cfg.threads * sum(wall)), 3), "got_share": round(got, 3),
        "counts": "yes" if got >= LEAST_GOT else "no: busy", "fvu": round(worker.figures["fvu"], 5) if learns else "",
        "l0": round(worker.figures["l0"], 2) if learns else "",
        "n_dead": worker.figures["n_dead"] if learns else "", "peak_mb": round(worker.figures["peak_mb"]),
        "threads": cfg.threads, "torch": worker.about["torch"], "processor": processor_name(),
        "activations": activations, "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Append rows; a file of other columns is left alone (``ConfigError``)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    if not new and path.read_text(encoding="utf-8").splitlines()[0].split(",") != list(COLUMNS):
        raise ConfigError(f"{path} has other columns than this bench writes; give another --output")
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def ratios(rows: Sequence[dict[str, Any]], ours: str, figure: str) -> dict[str, float]:
    """Speed of ``ours`` over that of every row, by ``tokens_per_s`` or ``tokens_per_cpu_s``."""
    base = next(found[figure] for found in rows if found["provider"] == ours)
    return {found["provider"]: base / found[figure] for found in rows}


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Two tables: figures, and our speed over that of each."""
    pairs = [(ours, figure) for ours in list(OURS)[:2] for figure in ("tokens_per_s", "tokens_per_cpu_s")]
    by = {pair: ratios(rows, *pair) for pair in pairs}
    table = []
    for found in rows:
        times = [f"{by[pair][found['provider']]:.2f}" for pair in pairs]
        spread = f"{found['p50_ms']:.1f} ({found['p20_ms']:.1f} to {found['p80_ms']:.1f})"
        table.append((
            found["provider"], f"{found['tokens_per_s']:,}", spread, f"{found['cpu_p50_ms']:.1f}",
            f"{found['processor_use']:.2f}", f"{found['got_share']:.2f}", found["fvu"], found["n_dead"], *times,
        ))  # fmt: skip
    columns = ("provider", "tokens/s", "ms a step (p20 to p80)", "cpu ms", "use", "got", "FVU", "dead", "fp32: x",
               "x by cpu", "bf16: x", "x by cpu")  # fmt: skip
    console.table("training steps; x: our speed over that of the row", columns, table, right=range(1, len(columns)))
    busy = [found["provider"] for found in rows if found["counts"] != "yes"]
    if busy:
        console.say(
            f"{', '.join(busy)}: got less than {LEAST_GOT:.0%} of the processor time asked for; other work shares the "
            "cores, so only the ratios by processor time count. Run it again on a quiet machine"
        )


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; errors are typed, the caller prints them."""
    import tyro

    cfg = tyro.cli(BenchDoor, args=list(arguments), prog="python -m sae bench")
    console.setup(cfg.verbose)
    store = collected(cfg)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        running = workers(cfg, specification(cfg, store, folder), folder, stack)
        with console.progress("steps", cfg.steps * len(running), "step") as bar:
            for first in range(0, cfg.steps, cfg.turn):
                count = min(cfg.turn, cfg.steps - first)
                for worker in running:
                    worker.turn(first, count)
                    bar.advance(count, note=worker.name)
        for worker in running:
            worker.figures = worker.ask(do="evaluate")
        rows = [row(worker, cfg, store.key) for worker in running]
    report(rows)
    write(rows, cfg.output)
    console.say(str(cfg.output))
    return 0
