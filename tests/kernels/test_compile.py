"""The sparse decode compiles for NVIDIA GPUs, on a machine without one: machine code, wide loads, no register spills.

In a process of its own, since TRITON_INTERPRET is read when the kernels are defined.
"""

from pathlib import Path

import pytest
from no_driver import compile_without_driver

pytest.importorskip("triton.backends.nvidia")
PROGRAM = '''
import pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_kernels import launch, sparse_decode, sparse_grad

TOOL = pathlib.Path(nvidia.__file__).parent / "bin" / "cuobjdump"
FLOATS = {"values_ptr", "w_ptr", "grad_ptr", "out_ptr"}
KERNELS = (sparse_decode._decode_kernel, sparse_grad._values_kernel)

def compiled(kernel, element, capability, width, ragged):
    size = launch.blocks(width)
    constants = {"ROWS": launch.ROWS, "CHANNELS": size.channels, "RAGGED": ragged}
    constants = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "*" + element if name in FLOATS else "*i64"
        signature[name] = "constexpr" if (i,) in constants else kind if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or name == "width":
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": size.warps})

for kernel in KERNELS:
    for element, capability, width, ragged in (
        ("fp32", 90, 576, False), ("bf16", 80, 4096, False), ("bf16", 90, 768, True), ("fp16", 80, 2304, True)
    ):
        made = compiled(kernel, element, capability, width, ragged)
        name = f"{kernel.__name__} {element} sm_{capability} D={width} ragged={ragged}"
        assert ".v4.b32" in made.asm["ptx"], f"{name}: no 16-byte access"
        assert made.metadata.shared <= 49152, f"{name}: {made.metadata.shared} B of shared memory"
        registers = "?"
        if TOOL.exists():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made.asm["cubin"]); file.flush()
                text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
            assert "STACK:0 " in text, f"{name}: spills: {text}"
            registers = re.search(r"REG:(\\d+)", text)[1]
        print("compiled", name, registers, "registers, no spills")
'''


def test_all_kernels_compile_for_gpus(tmp_path: Path) -> None:
    printed = compile_without_driver(PROGRAM, tmp_path)
    assert printed.count("compiled") == 8
