"""What other libraries wrote and computed, read and computed by saescope: indices equal, values to 1e-5.

The files under ``goldens/`` were made by the libraries themselves (``make interop``); none is needed here.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae import loading
from sae.plugins import names
from sae.portable import ImportOptions, naive_forward

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(p.parent for p in GOLDENS.glob("*/*/golden.safetensors"))
UNCALIBRATED = ImportOptions(activation="topk")


def source(case: Path) -> Path:
    """What is loaded: the folder, or the one file of a format that has no folder."""
    return next(case.glob("samples_*.pt"), case)


def options(case: Path) -> ImportOptions:
    return UNCALIBRATED if case.name == "batchtopk_uncalibrated" else ImportOptions()


def name(case: Path) -> str:
    return f"{case.parent.name}/{case.name}"


def close(got: Tensor, want: Tensor) -> None:
    error = float(torch.linalg.vector_norm(got.double() - want.double()) / torch.linalg.vector_norm(want.double()))
    assert error <= 1e-5, error


def test_there_are_goldens_of_every_library():
    libraries = {"saelens", "dictionary_learning", "sparsify", "llamascopium", "circuit_tracer", "e2e_sae"}
    assert {c.parent.name for c in CASES} == libraries and len(CASES) >= 49
    size = sum(p.stat().st_size for p in GOLDENS.rglob("*") if p.is_file())
    assert size < 1_000_000


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_recipe_is_that_of_the_library(case: Path):
    """The naive forward pass of what was read, straight from the tensors, without any class of ours."""
    golden = load_file(case / "golden.safetensors")
    p = loading.read(source(case), options(case))
    found = naive_forward(p, golden["x_ND"])
    z_NF = torch.from_numpy(found.z_NF)
    if p.gate_scale == "decoder_norm" and p.format == "saelens":
        z_NF = z_NF * torch.linalg.vector_norm(p.W_dec_FD.double(), dim=1)  # SAELens shows the gated values
    assert torch.equal(z_NF != 0, golden["z_NF"] != 0)
    close(z_NF, golden["z_NF"])
    close(torch.from_numpy(found.x_hat_ND), golden["x_hat_ND"])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_our_class_gives_the_same(case: Path):
    golden = load_file(case / "golden.safetensors")
    sae = loading.load(source(case), options=options(case))
    z_NF, want_NF = sae.encode(golden["x_ND"]), golden["z_NF"]
    p = loading.read(source(case), options(case))
    if p.gate_scale == "decoder_norm" and p.format == "llamascopium":
        want_NF = want_NF * torch.linalg.vector_norm(p.W_dec_FD, dim=1)  # ours have unit decoder rows (E3)
    assert torch.equal(z_NF != 0, want_NF != 0)
    assert int((want_NF != 0).sum()) > 0
    close(z_NF, want_NF)
    close(sae(golden["x_ND"]), golden["x_hat_ND"])
    assert not any(p.requires_grad for p in sae.parameters())


def test_every_architecture_of_ours_is_met():
    met = {loading.load(source(c), options=options(c)).cfg.architecture for c in CASES}
    assert met == set(names("sae.architectures"))
