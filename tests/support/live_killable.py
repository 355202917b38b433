"""Training on the fly in a process of its own that a test may kill, and the same in the test's process.

Run as a script: ROOT MODEL TOKENS PREFETCH.
"""

import sys
from pathlib import Path

import torch

from sae.config import FilterConfig, StreamConfig, SubjectMeta, TrainConfig
from sae.language_model import LanguageModel
from sae.resume import Keeper
from sae.streams import LiveStream
from sae.tokens import TokenSet
from sae.train import Job, train_jobs

HOOKPOINTS = ("layers.0", "layers.1.mlp")
TOPK = TrainConfig(
    architecture="topk", d_sae=48, k=3, batch_tokens=64, train_tokens=64 * 60, lr=5e-3, lr_warmup_steps=2, aux_k=8,
    dead_tokens=512, ema_decay=0.9,
)  # fmt: skip
BATCHTOPK = TrainConfig(
    architecture="batchtopk", d_sae=32, k=3, batch_tokens=64, train_tokens=64 * 45, lr=5e-3, lr_warmup_steps=2, aux_k=8,
    dead_tokens=512, seed=1,
)  # fmt: skip


def stream(
    lm: LanguageModel, tokens: TokenSet, hookpoints: tuple[str, ...] = HOOKPOINTS, *, prefetch: str = "off",
    buffer_tokens: int = 1_024,
) -> LiveStream:  # fmt: skip
    """A buffer of 16 batches over a text of a few passes."""
    cfg = StreamConfig(source="live", buffer_tokens=buffer_tokens, prefetch=prefetch)  # type: ignore[arg-type]
    return LiveStream(lm, tokens, hookpoints, FilterConfig(norm_multiple=1.3), cfg, batch_rows=4)


def meta(hookpoint: str) -> SubjectMeta:
    """A subject to name."""
    return SubjectMeta(
        lm="tiny", lm_revision="0", hookpoint=hookpoint, lm_dtype="float32", context_length_tokens=32, lm_slug="tiny"
    )


def train(root: Path, live: LiveStream, keeper: Keeper | None = None) -> list[Path]:
    """Two SAEs at each hookpoint of a stream."""
    jobs = [Job(store, [TOPK, BATCHTOPK], meta(store.hookpoint)) for store in live.stores]
    return [folder for folders in train_jobs(root, jobs, keeper=keeper) for folder in folders]


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, model, token_folder, thread = sys.argv[1:]
    subject = LanguageModel.load(model, dtype="float32")
    train(
        Path(where), stream(subject, TokenSet.open(Path(token_folder)), prefetch=thread), Keeper(every_steps=1)
    )
