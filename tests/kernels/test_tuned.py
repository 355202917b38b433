"""Launch settings of a device: looked up by class of sizes, refused where they cannot be, ignored where the file is
damaged; with any of them the kernels give the same numbers."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
launch = pytest.importorskip("sae_kernels.launch")
tuned = pytest.importorskip("sae_kernels.tuned")
bench_tune = pytest.importorskip("bench_tune")
import triton  # noqa: E402

from sae import ops, ops_fused  # noqa: E402
from sae_kernels import dual_grad, mse, sparse_decode, threshold_encode, topk_encode  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
runs = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or Triton's interpreter"
)
NAME = "Some GPU 80GB"
GATHER = {"channels": 16, "warps": 2, "rows": 8}
BULK = {"rows": 128, "channels": 64, "warps": 8, "stages": 3, "group": 8, "programs": 2}


def entry(kernel: str, settings: object, d: int = 64, f: int = 0, k: int = 0, dtype: str = "float32") -> dict:
    return {"kernel": kernel, "dtype": dtype, "d": d, "f": f, "k": k, "settings": settings}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file of a device that has no shipped table; every tensor seems to lie on that device."""
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "device_name", lambda device: NAME)
    launch.forget()
    yield tuned.user_file(NAME, triton.__version__)
    launch.forget()


def put(path: Path, *entries: dict, device: str = NAME, version: str = triton.__version__) -> None:
    tuned.write(path, device, version, entries)
    launch.forget()


def rows(d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(3, d, dtype=dtype, device=DEVICE)


def test_settings_are_found_by_kernel_type_and_class_of_sizes(cache: Path) -> None:
    far, near = dict(BULK, group=32), dict(BULK, group=16)
    put(
        cache, entry("decode", GATHER, d=1_024), entry("topk_bulk", far, d=1_024, f=2**17, k=64, dtype="bfloat16"),
        entry("topk_bulk", near, d=1_024, f=2**15, k=32, dtype="bfloat16"),
    )  # fmt: skip
    assert launch.tuned("decode", rows(768)) == launch.tuned("decode", rows(1_024)) == GATHER
    assert launch.tuned("decode", rows(512)) is launch.tuned("decode", rows(1_025)) is None
    assert launch.tuned("decode", rows(768, torch.float16)) is None
    assert launch.tuned("decode_error", rows(768)) is None
    half = rows(768, torch.bfloat16)
    nearest = ((32_768, 32, near), (20_000, 20, near), (10**6, 64, far), (131_072, 32, far), (65_536, 32, near))
    for f, k, found in nearest:
        assert launch.tuned("topk_bulk", half, f, k) == found, (f, k)


def test_where_the_constants_were_measured_best_they_hold(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = entry("topk_bulk", BULK, d=1_024, f=2**17, k=64, dtype="bfloat16")
    kept = {name: value for name, value in (far | {"f": 2**15}).items() if name != "settings"}
    tuned.write(cache, NAME, triton.__version__, [far], [kept])
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tuned, "shipped_file", lambda device: shipped)
    put(shipped, far)
    half = rows(768, torch.bfloat16)
    assert launch.tuned("topk_bulk", half, 2**17, 64) == BULK
    assert launch.tuned("topk_bulk", half, 2**15, 64) is None, "not the settings of another size, nor the package's"


def test_the_user_comes_before_the_package_but_not_in_deterministic_mode(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tuned, "shipped_file", lambda device: shipped)
    put(shipped, entry("decode", dict(GATHER, rows=4)), entry("decode_values", GATHER), version="0.0")
    assert launch.tuned("decode", rows(64))["rows"] == 4
    put(cache, entry("decode", GATHER))
    assert launch.tuned("decode", rows(64)) == GATHER, "the user's"
    assert launch.tuned("decode_values", rows(64)) == GATHER, "the user's table has none"
    torch.use_deterministic_algorithms(True)
    try:
        assert launch.tuned("decode", rows(64))["rows"] == 4
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"format": 2, "entries": []}', b'{"format": 1}',
    b'{"format": 1, "entries": [7]}',
])  # fmt: skip
def test_a_damaged_file_is_ignored_with_one_warning(
    damage: bytes, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(cache, entry("decode", GATHER))
    assert launch.tuned("decode", rows(64)) == GATHER
    cache.write_bytes(damage)
    launch.forget()
    with caplog.at_level(logging.WARNING, "sae_kernels"):
        for _ in range(3):
            assert launch.tuned("decode", rows(64)) is launch.tuned("decode_values", rows(64)) is None
    assert len(caplog.records) == 1 and str(cache) in caplog.text and "--tune" in caplog.text


@pytest.mark.parametrize(("kernel", "change", "error"), [
    ("decode", {"channels": 48}, "channels of decode must be one of"),
    ("decode", {"channels": 10**9}, "channels of decode must be one of"),
    ("decode", {"warps": 3}, "warps"), ("decode", {"warps": True}, "warps"), ("decode", {"warps": 2.0}, "warps"),
    ("decode", {"rows": 0}, "rows"), ("decode", {"extra": 1}, "extra"), ("decode", None, "settings of decode are"),
    ("no_kernel", {}, "no kernel 'no_kernel'"), (["decode"], {}, "no kernel"),
    ("topk_bulk", {"stages": 5, "channels": 128}, "of shared memory"),
    ("topk_bulk", {"rows": 256, "warps": 4}, "128 sums"),
    ("topk_blocks", {"rows": 4_096, "latents": 65_536}, "blocks of more"), ("topk_path_bulk", {"path": "D"}, "path"),
])  # fmt: skip
def test_impossible_settings_are_refused_by_all_doors(
    kernel: str, change: dict | None, error: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bases = {"topk_bulk": BULK, "decode": GATHER, "topk_path_bulk": {"path": "A"}}
    wrong = 5 if change is None else bases.get(kernel if isinstance(kernel, str) else "", {}) | change
    dtype = "bfloat16" if str(kernel).startswith("topk") else "float32"
    with pytest.raises(ValueError, match=error):
        tuned.check(kernel, dtype, wrong)
    with pytest.raises(ValueError, match=error), launch.trying(kernel, getattr(torch, dtype), wrong):
        pass
    good, bad = entry("decode", GATHER), entry(kernel, wrong, dtype=dtype)
    put(cache, good)
    with pytest.raises(ValueError, match=error):
        tuned.write(cache, NAME, triton.__version__, [good, bad])
    assert launch.tuned("decode", rows(64)) == GATHER, "what could not be read again was not written"
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    cache.write_text(json.dumps(json.loads(cache.read_text()) | {"entries": [good, bad]}))
    launch.forget()
    assert launch.tuned("decode", rows(64)) is None, "a file that is wrong in one entry is not believed in another"
    assert error.split("'")[0] in caplog.text


def test_tables_of_another_device_or_triton_are_not_used(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(cache, entry("decode", GATHER), device="Another GPU")
    assert launch.tuned("decode", rows(64)) is None and "Another GPU" in caplog.text
    put(cache, entry("decode", GATHER), version="3.0.0")
    assert launch.tuned("decode", rows(64)) is None and "3.0.0" in caplog.text
    assert tuned.user_file(NAME, "3.0.0") != cache != tuned.user_file("Another GPU", triton.__version__)


def test_an_unknown_device_and_a_processor_have_the_constants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "nothing"))
    launch.forget()
    assert launch.device_name(torch.device("cpu")) == "" and launch.tuned("decode", torch.empty(3, 64)) is None
    monkeypatch.setattr(launch, "device_name", lambda device: "Unheard-of GPU")
    for d in (1, 16, 576, 4_096, 16_384):
        assert launch.gather("decode", rows(d)) == (*launch.blocks(d), launch.ROWS)
    launch.forget()


def test_shipped_tables_can_be_read() -> None:
    found = sorted(Path(tuned.__file__).with_name("tuned_tables").glob("*.json"))
    assert found
    for path in found:
        table = tuned.parse(path.read_text(encoding="utf-8"))
        assert tuned.shipped_file(table.device) == path and table.entries


def operands(d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(d)
    n, k, f = 4, 2, 40
    made = {
        "u": torch.randn(n, d, generator=g).to(dtype), "W": (torch.randn(f, d, generator=g) / d**0.5).to(dtype),
        "b": torch.randn(f, generator=g) * 0.1, "values": torch.rand(n, k, generator=g) + 0.1,
        "indices": torch.randint(f, (n, k), generator=g),
    }  # fmt: skip
    made["indices"][:, 0] = 3  # one latent of every token
    return {name: t.to(DEVICE) for name, t in made.items()}


def results(d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What every tuned kernel computes, in forms that do not depend on the order of slots."""
    t = operands(d, dtype)
    values, W = t["values"].to(dtype).requires_grad_(), t["W"].clone().requires_grad_()
    y = sparse_decode.sparse_decode(values, t["indices"], W)
    grad_values, grad_W = torch.autograd.grad(y, (values, W), t["u"])
    error = mse.decode_error(t["values"], t["indices"], t["W"], torch.zeros(d, device=DEVICE), t["u"].float())
    work = dual_grad.worklist(t["values"], t["indices"], len(W))
    dual = dual_grad.dual_gradient(work, t["values"], t["u"], t["values"], t["u"])
    prepared = topk_encode.prepare(t["W"], t["b"])
    codes = topk_encode.encode_topk(t["u"], prepared, 1, path="A" if dtype == torch.float32 else "auto")
    found = {"y": y, "grad_values": grad_values, "grad_W": grad_W}
    found |= {"sse": error.sse_N, "dot": error.dot_NK, "r": error.r_ND}
    found |= {"dual_dec": dual.W_dec_FD, "dual_enc": dual.W_enc_FD, "dual_b": dual.b_enc_F}
    found["topk"] = ops.to_dense(ops.SparseLatents(codes[0], codes[1].long()), len(W))
    if dtype != torch.float32:
        above = threshold_encode.encode_threshold(t["u"], t["W"], t["b"], torch.full_like(t["b"], 1.0), path="A")
        found |= {"above": above.values_E, "latents": above.indices_E.float()}
    return {name: t.detach().double() for name, t in found.items()}


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_setting_changes_a_number(dtype: torch.dtype, cache: Path) -> None:
    d, kind = 48, str(dtype).removeprefix("torch.")
    want = results(d, dtype)
    small = {"rows": 64, "channels": 32, "warps": 4, "stages": 2, "group": 2}
    made = [entry(name, GATHER, dtype=kind) for name in ("decode", "decode_values", "decode_error")]
    made.append(entry("weight_gradients", dict(GATHER, channels=128), dtype=kind))
    made.append(entry("topk_pointers", small, dtype=kind))
    made.append(entry("topk_blocks", {"rows": 256, "latents": 4_096}, dtype=kind))
    if dtype != torch.float32:
        made.append(entry("topk_path_pointers", {"path": "B"}, dtype=kind))
        made.append(entry("threshold_bulk", {**small, "programs": 1, "registers": 255}, dtype=kind))
    put(cache, *made)
    assert launch.gather("decode", rows(d, dtype)) == (16, 3, 2, 8), "another launch than by the constants"
    got = results(d, dtype)
    limit = 1e-5 if dtype == torch.float32 else 2e-2  # KERNELS 10: as between a kernel and its reference
    for name, wanted in want.items():
        assert got[name].shape == wanted.shape, name
        assert float((got[name] - wanted).abs().max()) <= limit * float(wanted.abs().max()), name
    again = results(d, dtype)
    assert all(torch.equal(got[name], again[name]) for name in got), "equal settings, equal bits"


@runs
def test_the_optimiser_takes_its_warps_from_the_table(cache: Path) -> None:
    made = []
    for warps in (None, 1, 16):
        if warps is not None:
            put(cache, entry("adam_rows", {"warps": warps}))
        torch.manual_seed(0)
        W, b, D = (torch.nn.Parameter(t.to(DEVICE)) for t in (torch.randn(6, 48), torch.zeros(6), torch.randn(6, 48)))
        copies = ops_fused.ComputeCopies.of(W, b, D)
        triples = [(p, torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)) for p in (W, D)]
        ops_fused.adam_step_(copies, triples[0], b, triples[1], rate=1e-2, step=1, betas=(0.9, 0.999), eps=1e-8)
        made.append(torch.cat([W, D]).detach())
    for other in made[1:]:
        assert torch.allclose(other, made[0], atol=1e-6)


def test_every_candidate_of_the_tuner_is_possible() -> None:
    seen = set()
    for kernel, dtype, settings in bench_tune.candidates():
        tuned.check(kernel, dtype, settings)
        seen.add(kernel)
    assert seen == set(tuned.FIELDS), "no kernel of the tables is left out"
