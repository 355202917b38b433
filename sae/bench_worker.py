"""One trainer in a process of its own, for ``python -m sae bench``: it trains some steps whenever it is told to.

This file runs in the environments of other libraries too, as ``python -P bench_worker.py SPEC``: it imports torch,
numpy and the library it measures; of this package only :mod:`sae.bench_ours`, and that for our own trainers.
Shapes: N tokens of one batch, D channels, F latents. Orders and results are lines of JSON on stdin and stdout.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK_TOKENS = 4_096


class Trainer(Protocol):
    """What is measured: a step on a batch, and the reconstruction that the trained autoencoder gives."""

    def step(self, x_ND: Tensor) -> None:
        """One whole step: forward, backward, optimiser, everything that the library does around them."""

    def reconstruct(self, x_ND: Tensor) -> tuple[Tensor, float]:
        """(x_hat_ND, mean number of active latents); no gradient."""

    def n_dead(self) -> int:
        """Latents silent for more than ``dead_tokens``."""


class Sparsify:
    """eai-sparsify: its ``SparseCoder``, with the steps of its ``Trainer.fit`` (which wants a language model)."""

    def __init__(self, spec: dict[str, Any], sample_ND: Tensor) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        cfg = SparseCoderConfig(num_latents=spec["d_sae"], k=spec["k"])
        self.sae = SparseCoder(spec["d_in"], cfg)
        self.sae.b_dec.data = sample_ND[: spec["batch"]].mean(0)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=spec["lr"])
        self.silent_F = torch.zeros(spec["d_sae"], dtype=torch.long)
        self.spec = spec

    def step(self, x_ND: Tensor) -> None:
        sae, spec = self.sae, self.spec
        sae.set_decoder_norm_to_unit_norm()
        fired_F = torch.zeros_like(self.silent_F, dtype=torch.bool)
        out = sae(x_ND, dead_mask=self.silent_F > spec["dead_tokens"])
        fired_F[out.latent_indices.flatten()] = True
        (out.fvu + spec["aux_alpha"] * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        self.silent_F += len(x_ND)
        self.silent_F[fired_F] = 0

    @torch.no_grad()
    def reconstruct(self, x_ND: Tensor) -> tuple[Tensor, float]:
        acts, indices, _ = self.sae.encode(x_ND)
        return self.sae.decode(acts, indices), float((acts > 0).sum()) / len(x_ND)

    def n_dead(self) -> int:
        return int((self.silent_F > self.spec["dead_tokens"]).sum())


class DictionaryLearning:
    """dictionary-learning: its ``TopKTrainer``, called as its own training loop calls it."""

    def __init__(self, spec: dict[str, Any], sample_ND: Tensor) -> None:
        from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

        self.trainer = TopKTrainer(
            steps=10**9, activation_dim=spec["d_in"], dict_size=spec["d_sae"], k=spec["k"], layer=0, lm_name="none",
            dict_class=AutoEncoderTopK, lr=spec["lr"], auxk_alpha=spec["aux_alpha"], warmup_steps=0, seed=spec["seed"],
            device="cpu",
        )  # fmt: skip
        self.trainer.dead_feature_threshold = spec["dead_tokens"]
        self.n_steps = 0

    def step(self, x_ND: Tensor) -> None:
        self.trainer.update(self.n_steps, x_ND)
        self.n_steps += 1

    @torch.no_grad()
    def reconstruct(self, x_ND: Tensor) -> tuple[Tensor, float]:
        codes = self.trainer.ae.encode(x_ND)
        return self.trainer.ae.decode(codes), float((codes > 0).sum()) / len(x_ND)

    def n_dead(self) -> int:
        return int((self.trainer.num_tokens_since_fired > self.trainer.dead_feature_threshold).sum())


class SAELens:
    """sae-lens: its ``SAETrainer``, called as its own ``fit`` calls it."""

    def __init__(self, spec: dict[str, Any], sample_ND: Tensor) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        sae = TopKTrainingSAE(TopKTrainingSAEConfig(
            d_in=spec["d_in"], d_sae=spec["d_sae"], k=spec["k"], aux_loss_coefficient=spec["aux_alpha"], device="cpu",
        ))  # fmt: skip
        cfg = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=spec["batch"], lr=spec["lr"], lr_end=spec["lr"],
            dead_feature_window=-(-spec["dead_tokens"] // spec["batch"]),
        )  # fmt: skip
        self.trainer = SAETrainer(cfg, sae, data_provider=iter(()))

    def step(self, x_ND: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x_ND)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def reconstruct(self, x_ND: Tensor) -> tuple[Tensor, float]:
        codes = self.trainer.sae.encode(x_ND)
        dense = codes.to_dense() if codes.is_sparse else codes
        return self.trainer.sae.decode(codes), float((dense > 0).sum()) / len(x_ND)

    def n_dead(self) -> int:
        return int(self.trainer.dead_neurons.sum())


TRAINERS: dict[str, Any] = {"sparsify": Sparsify, "dictionary_learning": DictionaryLearning, "saelens": SAELens}


def trainer_of(spec: dict[str, Any], sample_ND: Tensor) -> Trainer:
    """The trainer that a specification names."""
    if spec["trainer"] in TRAINERS:
        return TRAINERS[spec["trainer"]](spec, sample_ND)  # type: ignore[no-any-return]
    from sae import bench_ours

    return bench_ours.trainer(spec, sample_ND)


class Data:
    """Stored activations in units in which their mean length is the root of D; the order of tokens is given."""

    def __init__(self, spec: dict[str, Any]) -> None:
        size = spec["n_stored"] * spec["d_in"]
        stored = torch.from_file(spec["activations"], size=size, dtype=getattr(torch, spec["stored_dtype"]))
        self.stored_ND = stored.view(-1, spec["d_in"])
        self.scale = float(spec["scale"])
        with np.load(spec["order"]) as order:
            self.train_TN, self.held_n, self.sample_n = (order[name] for name in ("train", "held_out", "sample"))

    def read(self, flat: np.ndarray) -> Tensor:
        """float32 [n, D]."""
        return self.stored_ND.index_select(0, torch.from_numpy(flat)).float() * self.scale


def waited_s() -> float:
    """Seconds that threads of this process stood in line for a core."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has just ended, or a kernel without the figure
            pass
    return total / 1e9


def train(trainer: Trainer, data: Data, first: int, count: int) -> dict[str, Any]:
    """``count`` steps from step ``first`` on: wall and processor seconds of each, and time spent waiting for a core."""
    wall, processor, waited = [], [], waited_s()
    for step in range(first, first + count):
        x_ND = data.read(data.train_TN[step])
        begun, used = time.perf_counter(), time.process_time()
        trainer.step(x_ND)
        wall.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
    return {"wall_s": wall, "processor_s": processor, "waited_s": waited_s() - waited}


def evaluate(trainer: Trainer, data: Data) -> dict[str, Any]:
    """FVU and L0 on the tokens held out: sums in float64 over all of them, baseline their mean."""
    x = data.read(data.held_n)
    mean_D, error, variance, active = x.double().mean(0), 0.0, 0.0, 0.0
    for x_ND in x.split(CHUNK_TOKENS):
        y_ND, l0 = trainer.reconstruct(x_ND)
        error += float((x_ND.double() - y_ND.double()).square().sum())
        variance += float((x_ND.double() - mean_D).square().sum())
        active += l0 * len(x_ND)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"fvu": error / variance, "l0": active / len(x), "n_dead": trainer.n_dead(), "peak_mb": peak}


def main() -> None:
    """Answer each line of stdin with one of stdout until ``end`` or the end of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    data = Data(spec)
    trainer = trainer_of(spec, data.read(data.sample_n))
    package = spec.get("package")
    ready = {"torch": str(torch.__version__), "version": version(package) if package else ""}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "end":
            return
        found = evaluate(trainer, data) if order["do"] == "evaluate" else train(
            trainer, data, order["first"], order["count"]
        )  # fmt: skip
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
