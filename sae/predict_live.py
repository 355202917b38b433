"""What training on the fly will cost: the passes of the language model beside the steps of the SAEs (TRAINING 13).

Model and SAEs share one processor or one GPU, so their times are added, whether or not the model has a thread.
"""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae import predict
from sae.predict import Line, Sample, Trial
from sae.streams import SAMPLE_TOKENS, LiveStream
from sae.train import Job


class StreamTime(NamedTuple):
    """Speed of a stream, and what it gave."""

    seconds_per_token: float
    """Per token that passes the filter, of all hookpoints together."""
    x_ND: tuple[Tensor, ...]
    """float32 activations of the chunks that were timed, per hookpoint."""
    peak_bytes: int
    """Largest resident size of the process meanwhile."""


@torch.no_grad()
def time_stream(stream: LiveStream) -> StreamTime:
    """Median over some chunks, after one that warms up."""
    predict.reset_peak()
    seconds, kept = [], []
    for i in range(predict.WARM_BATCHES + 1):
        begun = time.perf_counter()
        x_ND, _, flat_n = stream.chunk(i % len(stream.counts_C))  # norms come to the CPU: nothing is under way
        seconds.append((time.perf_counter() - begun) / max(1, len(flat_n)))
        kept.append([x_nD.cpu().float() for x_nD in x_ND])
    whole = tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
    return StreamTime(statistics.median(seconds[1:]), whole, predict.peak_bytes())


def sample_of(stream: LiveStream, x_ND: Sequence[Tensor]) -> Sample:
    """Some activations that stand for what training holds of one hookpoint, or of a pair."""
    return Sample(x_ND[0], _sample_tokens(stream), x_ND[-1], key="stream")


def _sample_tokens(stream: LiveStream) -> int:
    return min(stream.n_kept, SAMPLE_TOKENS)


def sample_line(stream: LiveStream, timed: StreamTime) -> Line:
    """The stage that comes first: tokens that are computed once and held."""
    n = _sample_tokens(stream)
    held = 0 if stream.lm.device.type == "cuda" else n * sum(stream.widths) * stream.dtype.itemsize
    return Line("sample", n * timed.seconds_per_token, timed.peak_bytes + held, 0, f"{n:,} tokens that are held")


def training_line(stream: LiveStream, timed: StreamTime, jobs: Sequence[Job], trial: Trial) -> Line:
    """Training from its miniature, with the passes that fill the windows it needs."""
    cfgs = [cfg for job in jobs for cfg in job.cfgs]
    batch = cfgs[0].batch_tokens
    window = stream.window(batch)
    on_gpu = stream.lm.device.type == "cuda"
    held = stream.memory_bytes(batch)
    line = predict.training_line(cfgs, trial, 0 if on_gpu else held)
    steps = max(cfg.train_tokens // batch for cfg in cfgs)
    tokens = -(-steps * batch // window) * window
    context = stream.tokens.L
    buffer = f"buffer {window:,} tokens = {window // context:,} contexts of {context} = {window // batch} batches"
    size = window * sum(stream.widths) * stream.dtype.itemsize
    passes = f"{tokens:,} tokens through the model at {1 / timed.seconds_per_token:,.0f}/s"
    hooks = f" for {len(stream.hookpoints)} hookpoints in one pass" if len(stream.hookpoints) > 1 else ""
    note = f"{len(cfgs)} SAE(s), {steps:,} steps; {passes}{hooks}; {buffer} = {size / 1e9:.3f} GB"
    if trial.gpu_bytes:
        note += f", {(trial.gpu_bytes + held * on_gpu) / 1e9:.2f} GB on the GPU"
    return line._replace(seconds=line.seconds + tokens * timed.seconds_per_token, note=note)
