"""Times launch settings of the kernels on the GPU that is here and writes the best into the table of this device.

``python kernels/bench.py --tune`` calls it. Shapes: N tokens, K slots, F = d_sae, D = d_in. Settings run by turns with
the constants beside the kernels, each after it has given the same numbers. A setting replaces the constants only where
four fifths of its times are below four fifths of theirs and its median is lower by 2 % or more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import bench_common
import bench_ops
import torch
import triton
from torch import Tensor

from sae_kernels import (
    dual_grad,
    launch,
    mse,
    row_steps,
    sparse_decode,
    sparse_grad,
    threshold_encode,
    topk_encode,
    tuned,
)

Shape = tuple[int, int, int, int]
SHAPES: tuple[tuple[Shape, str], ...] = (
    ((8_192, 32, 32_768, 768), "bfloat16"), ((8_192, 64, 131_072, 4_096), "bfloat16"),
    ((8_192, 32, 32_768, 768), "float32"),
)  # fmt: skip
"""Sizes and types that are tuned if none are asked for."""
GAIN = 0.98
NEAR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Relative norm of the difference between two settings; 16-bit results are rounded after sums in another order."""
Settings = dict[str, Any]


def _settings(names: str, *rows: tuple[Any, ...]) -> tuple[Settings, ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


_GATHER = _settings(
    "channels warps rows", (512, 1, 4), (512, 2, 4), (1_024, 2, 4), (1_024, 4, 8), (2_048, 4, 4), (4_096, 8, 8)
)
CANDIDATES: dict[str, tuple[Settings, ...]] = {
    "topk_bulk": _settings(
        "rows channels warps stages group programs", (128, 64, 8, 3, 8, 0), (128, 64, 8, 3, 16, 2),
        (128, 64, 8, 3, 32, 2), (128, 64, 8, 3, 4, 2), (128, 64, 8, 4, 8, 1), (128, 32, 8, 4, 8, 2),
        (64, 64, 4, 4, 8, 0), (64, 64, 4, 3, 16, 3),
    ),
    "topk_pointers": _settings(
        "rows channels warps stages group", (128, 32, 8, 3, 8), (128, 32, 8, 2, 8), (64, 64, 4, 3, 8),
        (64, 32, 8, 2, 16), (64, 32, 4, 3, 8),
    ),
    "topk_blocks": _settings(
        "rows latents", (512, 16_384), (1_024, 32_768), (2_048, 8_192), (2_048, 16_384), (4_096, 8_192)
    ),
    "topk_path_bulk": _settings("path", ("A",), ("B",)),
    "topk_path_pointers": _settings("path", ("A",), ("B",)),
    "threshold_bulk": _settings(
        "rows channels warps stages group programs registers", (128, 64, 8, 3, 4, 2, 128), (128, 64, 8, 3, 16, 2, 128),
        (128, 64, 8, 3, 32, 2, 128), (128, 64, 8, 4, 8, 1, 255), (128, 32, 8, 4, 8, 2, 128), (64, 64, 4, 4, 8, 3, 168),
    ),
    "decode": _GATHER,
    "decode_values": _GATHER,
    "decode_error": _GATHER,
    "weight_gradients": _settings(
        "channels warps rows", (256, 1, 2), (256, 1, 8), (128, 1, 4), (512, 2, 4), (512, 1, 4), (1_024, 4, 4)
    ),
    "adam_rows": _settings("warps", (1,), (2,), (4,), (8,), (16,)),
}  # fmt: skip
"""Settings that are tried beside the constants."""


class Case(NamedTuple):
    """A kernel at one size."""

    kernel: str
    call: Callable[[], object]
    result: Callable[[], Tensor]
    """Numbers that no setting may change."""
    sizes: tuple[int, int, int]
    """D, F and K as far as the kernel depends on them, else 0."""
    dtype: torch.dtype
    """Of the rows that its settings are looked up by."""


def candidates() -> Iterator[tuple[str, str, Settings]]:
    """(kernel, type, settings) of all that is tried."""
    for kernel, tried in CANDIDATES.items():
        dtypes = ("bfloat16", "float16") if kernel.endswith("_bulk") else tuple(NEAR)
        for settings in tried:
            yield from ((kernel, dtype, settings) for dtype in dtypes)


def encoders(device: torch.device, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """The settings of both encoders that the operands can use here."""
    n, k, f, d = shape
    u_ND = torch.randn(n, d, device=device).to(dtype)
    W_FD = torch.nn.functional.normalize(torch.randn(f, d, device=device), dim=1)
    b_F = torch.zeros(f, device=device)
    prepared, some = topk_encode.prepare(W_FD, b_F, dtype=dtype), u_ND[:512].contiguous()

    def case(kernel: str, path: str, sizes: tuple[int, int, int]) -> Case:
        return Case(
            kernel, lambda: topk_encode.encode_topk(u_ND, prepared, k, path=path),
            lambda: topk_encode.encode_topk(some, prepared, k, path=path)[0].sum(1), sizes, dtype,
        )  # fmt: skip

    bulk = topk_encode.takes_bulk(u_ND)
    kind = "bulk" if bulk else "pointers"
    yield case(f"topk_{kind}", "A", (d, f, k))
    yield case("topk_blocks", "B", (d, 0, 0))
    yield case(f"topk_path_{kind}", "auto", (d, f, k))
    if bulk:
        bar_F, W_half = torch.full_like(b_F, float(torch.special.ndtri(torch.tensor(1.0 - k / f)))), W_FD.to(dtype)

        def latents() -> Tensor:
            """Number and sum of each token's latents: an entry at its bar may come or go with the order of a sum."""
            found = threshold_encode.encode_threshold(some, W_half, b_F, bar_F, path="A")
            sums_N1 = torch.nn.functional.pad(found.indices_E.cumsum(0), (1, 0))[found.offsets_N1]
            return torch.cat([found.offsets_N1.diff(), sums_N1.diff()])

        yield Case(
            "threshold_bulk", lambda: threshold_encode.encode_threshold(u_ND, W_half, b_F, bar_F, path="A"), latents,
            (d, f, 0), dtype,
        )  # fmt: skip


def decoders(device: torch.device, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Decode, both its gradients, decode with error, and the optimiser's pass."""
    n, k, f, d = shape
    values_NK, indices_NK = bench_ops.codes(n, k, f, device, hot=0.1)
    W_FD, u_ND = (torch.randn(m, d, device=device).to(dtype) for m in (f, n))
    half_NK, t_ND, b_D = values_NK.to(dtype), torch.randn(n, d, device=device), torch.zeros(d, device=device)
    work = dual_grad.worklist(values_NK, indices_NK, f)

    def case(kernel: str, call: Callable[[], Any], result: Callable[[Any], Tensor] = lambda made: made) -> Case:
        return Case(kernel, call, lambda: result(call()), (d, 0, 0), dtype)

    yield case("decode", torch.no_grad()(lambda: sparse_decode.sparse_decode(half_NK, indices_NK, W_FD)))
    yield case("decode_values", lambda: sparse_grad.values_gradient(u_ND, indices_NK, W_FD))
    yield case(
        "decode_error", lambda: mse.decode_error(values_NK, indices_NK, W_FD, b_D, t_ND),
        lambda made: torch.cat([made.sse_N[:, None], made.dot_NK], 1),
    )  # fmt: skip
    yield case(
        "weight_gradients", lambda: dual_grad.dual_gradient(work, values_NK, u_ND, values_NK, u_ND),
        lambda made: torch.cat([made.W_dec_FD[:512], made.W_enc_FD[:512], made.b_enc_F[:512, None]], 1),
    )  # fmt: skip


def optimiser(device: torch.device, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """The optimiser's pass over float32 weights and moments; ``dtype`` is that of the compute copy."""
    _, _, f, d = shape
    first = [torch.randn(64, d, device=device) for _ in range(2)] + [torch.zeros(64, d, device=device)] * 2
    state = [t.repeat(launch.cdiv(f, 64), 1) for t in first]
    copy_FD = torch.empty_like(state[0], dtype=dtype)

    def adam(state: list[Tensor] = state) -> Tensor:
        row_steps.adam_rows_(
            *state, copy_FD[: len(state[0])], rate=1e-4, step=1, betas=(0.9, 0.999), eps=1e-8, unit=True
        )
        return state[0]

    yield Case("adam_rows", adam, lambda: adam([t.clone() for t in first]), (d, 0, 0), torch.float32)


def tune(bench: bench_common.Bench, jobs: Sequence[tuple[Shape, str]]) -> tuple[list[dict], list[dict]]:
    """(entries for the table, what was measured and stays with the constants)."""
    made, kept = [], []
    for shape, dtype in jobs:
        for cases in (encoders, decoders, optimiser):
            torch.manual_seed(0)
            with ExitStack() as best_so_far:
                for case in cases(bench.device, shape, getattr(torch, dtype)):
                    with bench.guard(f"{case.kernel} at {shape}"):
                        best, note = fastest(bench, case, shape)
                        (kept if best is None else made).append(note | ({} if best is None else {"settings": best}))
                        if best is not None and "path" not in best:  # paths are compared at their best
                            best_so_far.enter_context(launch.trying(case.kernel, case.dtype, best))
            if bench.cuda:
                torch.cuda.empty_cache()
    # Of two jobs with one class of sizes the first counts, in the table as in the list.
    return [next(e for e in made if _key(e) == key) for key in dict.fromkeys(map(_key, made))], kept


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("kernel", "dtype", "d", "f", "k"))


def fastest(
    bench: bench_common.Bench, case: Case, shape: Shape
) -> tuple[Settings | None, dict[str, Any]]:
    """The best settings of a kernel, None where the constants are as good, and what its entry says."""
    dtype = str(case.dtype).removeprefix("torch.")
    want = case.result()
    calls: dict[str, Callable[[], object]] = {"constants": case.call}
    tried = {" ".join(f"{name} {value}" for name, value in s.items()): s for s in CANDIDATES[case.kernel]}
    for name, settings in tried.items():

        def call(settings: Settings = settings, what: Callable[[], object] = case.call) -> Any:
            with launch.trying(case.kernel, case.dtype, settings):
                return what()

        try:
            bench_common.near(f"{case.kernel} {name}", call(what=case.result), want, NEAR[dtype])
            call()
        except Exception as error:
            print(f"{case.kernel} {name}: left out, {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        calls[name] = call
    bench.run(f"tune_{case.kernel}", calls, shape, dtype, mode="queued", cold=True, queued=bench.cuda)
    times = {str(row["provider"]): row for row in bench.rows[-len(calls) :]}
    ms = {name: tuple(float(str(row[f"p{q}_ms"])) for q in (20, 50, 80)) for name, row in times.items()}
    name = min(ms, key=lambda name: ms[name][1])
    d, f, k = (tuned.size_class(n) for n in case.sizes)
    note: dict[str, Any] = {"kernel": case.kernel, "dtype": dtype, "d": d, "f": f, "k": k, "measured": list(shape)}
    note |= {"constants_ms": ms["constants"][1], "best_ms": ms[name][1]}
    wins = ms[name][2] < ms["constants"][0] and ms[name][1] <= GAIN * ms["constants"][1]
    return (tried[name] if wins else None), note


def run(bench: bench_common.Bench, jobs: Sequence[tuple[Shape, str]] = SHAPES, out: Path | None = None) -> Path:
    """Tune and write the table: entries of other sizes and types stay, those of these sizes are made anew."""
    device, version = launch.device_name(bench.device), triton.__version__
    path = out or tuned.user_file(device, version)
    before = tuned.read(path, device, version)
    with launch.untuned():
        made, kept = tune(bench, jobs)
    fresh = {_key(e) for e in (*made, *kept)}
    names = ("kernel", "dtype", "d", "f", "k")
    for entry in before.entries if before else ():
        old: dict[str, Any] = dict(zip(names, (entry.kernel, entry.dtype, *entry.sizes), strict=True))
        if _key(old) not in fresh:
            (kept if entry.settings is None else made).append(old | {"settings": entry.settings})
    tuned.write(
        path, device, version, made, kept, torch=torch.__version__, made=f"{datetime.now(UTC):%Y-%m-%d}"
    )
    launch.forget()
    print(f"{len(made)} settings of {len(made) + len(kept)} differ from the constants -> {path}")
    return path
