"""The whole fused step, forward, backward and what surrounds the optimiser, is compiled for a GPU at full scale.

The project's own wrappers are called on tensors without memory, under a driver that names a GPU; each launch compiles
its kernel with the arguments it would have there and runs nothing (KERNELS 14). In a process of its own, since
TRITON_INTERPRET is read when the kernels are defined.
"""

from pathlib import Path

import pytest
from no_driver import compile_without_driver

pytest.importorskip("triton.backends.nvidia")
PROGRAM = '''
import pathlib, re, subprocess, tempfile
import torch, triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TOOL = pathlib.Path(nvidia.__file__).parent / "bin" / "cuobjdump"

class Named(DriverBase):
    """A driver that names a GPU and has none."""

    def __init__(self):
        self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device=None: 0)
        self.get_device_capability, self.set_current_device = (lambda device=0: (9, 0)), (lambda device: None)

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_benchmarker(self):
        return None

    def map_python_to_cpp_type(self, kind):
        return kind

triton.runtime.driver.set_active(Named())
kernels, real = {}, JITFunction.run

def compile_only(self, *arguments, grid, warmup, **options):
    made = real(self, *arguments, grid=grid, warmup=True, **options)
    kernels[made.hash] = (self.__name__, made)
    return made

JITFunction.run = compile_only
from sae import ops_fused

def step(n, k, f, d, dtype, path):
    p = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in ((f, d), (f,), (f, d), (d,))]
    copies = ops_fused.ComputeCopies.of(*p[:3], dtype=dtype)
    parts = ops_fused.topk_loss(torch.empty(n, d, device="meta"), *p, k, copies=copies, path=path)
    found = torch.autograd.grad(parts.sse_N.sum(), p)
    assert [g.shape for g in found] == [q.shape for q in p]
    rows = ops_fused._kernels().row_steps
    rows.project_rows_(found[2], p[2].detach())
    rows.renorm_rows_(p[2].detach(), copies.W_dec_FD)
    triples = [(q, g, torch.empty_like(g), torch.empty_like(g)) for q, g in zip(p, found)]
    ops_fused.adam_step_(copies, triples[0], p[1], triples[2], rate=1e-3, step=3, betas=(0.9, 0.999), eps=1e-8)

step(8192, 32, 32768, 768, torch.bfloat16, "auto")
step(8192, 32, 32768, 768, torch.bfloat16, "A")
step(2048, 64, 131072, 4096, torch.bfloat16, "auto")
step(1, 1, 64, 16, torch.bfloat16, "auto")
step(512, 32, 16384, 576, torch.float32, "auto")
names = set()
for name, made in kernels.values():
    names.add(name)
    assert made.metadata.shared <= 232_448, (name, made.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"]); file.flush()
        text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(what + r":(\\d+)", text)[1]) for what in ("REG", "STACK"))
    assert stack == 0, f"{name}: spills: {text}"
    print("compiled", name, "sm_90", registers, "registers, no spills,", made.metadata.shared, "B shared")
print(len(kernels), "kernels", sorted(names))
assert {"_decode_error_kernel", "_segments_kernel", "_combine_kernel", "_columns_kernel", "_project_kernel",
        "_renorm_kernel", "_adam_kernel"} <= names, names
'''


def test_every_launch_of_the_step_compiles(tmp_path: Path) -> None:
    compile_without_driver(PROGRAM, tmp_path)
