"""The kernels of the fused loss compile for NVIDIA GPUs, without one: wide loads, few registers, no spills.

In a process of its own, since TRITON_INTERPRET is read when the kernels are defined (KERNELS 14).
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
from sae_kernels import dual_grad, launch, mse, row_steps

TOOL = pathlib.Path(nvidia.__file__).parent / "bin" / "cuobjdump"
HALF = {"w_ptr", "r_ptr", "u_ptr", "copy_ptr"}
SCALARS = {"step_size", "new_mean", "keep_square", "new_square", "scale", "eps"}
TYPES = {"entries_ptr": "*i64", "tokens_ptr": "*i32", "bounds_ptr": "*i64", "indices_ptr": "*i32", "keys_ptr": "*i16"}

def compiled(kernel, half, capability, constants, warps):
    TYPES["keys_ptr"] = "*i16" if half == "bf16" else "*i32"  # below and above 65,536 latents
    constants = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = TYPES.get(name, "*" + half if name in HALF else "*fp32")
        if kernel is row_steps._adam_kernel and name in SCALARS:
            kind = "fp32"
        pointer = name.endswith("_ptr") or kind == "fp32"
        signature[name] = "constexpr" if (i,) in constants else kind if pointer else "i32"
        if name.endswith("_ptr") or name in ("width", "n_tokens", "n_slots"):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})

def report(made):
    """(registers, stack bytes) of a kernel; (0, 0) where the tool is missing."""
    if not TOOL.exists():
        return 0, 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"]); file.flush()
        text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return tuple(int(re.search(name + r":(\\d+)", text)[1]) for name in ("REG", "STACK"))

def cases():
    for width in (576, 768, 2304, 4096):
        size = mse.blocks(width)
        yield mse._decode_error_kernel, f"D={width}", {"ROWS": launch.ROWS, "CHANNELS": size.channels}, size.warps, 128
    sizes = {"CHUNK": launch.CHUNK, "CHANNELS": dual_grad.CHANNELS}
    for dual in (True, False):
        more = {**sizes, "DUAL": dual, "ROWS": launch.ROWS, "ADD": False, "RAGGED": not dual}
        yield dual_grad._segments_kernel, f"dual={dual}", more, 1, 72
    more = {**sizes, "DUAL": True, "ROWS": launch.ROWS, "ADD": True, "RAGGED": False}
    yield dual_grad._segments_kernel, "accumulate", more, 1, 72
    more = {**sizes, "DUAL": True, "ROWS": 2 * launch.ROWS}
    yield dual_grad._combine_kernel, "dual", more, 1, 168
    for width in (768, 4096):
        size = row_steps.blocks(width)
        yield row_steps._project_kernel, f"D={width}", {"CHANNELS": size.channels}, size.warps, 128
        for copy in (True, False):
            more = {"CHANNELS": size.channels, "COPY": copy}
            yield row_steps._renorm_kernel, f"D={width} copy={copy}", more, size.warps, 128
        more = {"CHANNELS": size.channels, "UNIT": True, "TILED": width == 768}
        yield row_steps._adam_kernel, f"D={width}", more, size.warps, 128
    more = {name: getattr(row_steps, name) for name in ("ROWS", "CHANNELS", "BLOCK")}
    yield row_steps._columns_kernel, "", more, 1, 128

for kernel, what, constants, warps, limit in cases():
    for half, capability in (("bf16", 90), ("fp32", 80)):
        made = compiled(kernel, half, capability, constants, warps)
        name = f"{kernel.__name__} {what} {half} sm_{capability}"
        registers, stack = report(made)
        assert stack == 0, f"{name}: {stack} B of spills"
        # Rows of float32 are twice the data of a step, hence of its registers.
        assert registers <= limit * (1 if half == "bf16" else 1.5), f"{name}: {registers} registers, limit {limit}"
        assert ".v4.b32" in made.asm["ptx"], f"{name}: no 16-byte access"
        assert made.metadata.shared <= 49152, f"{name}: {made.metadata.shared} B of shared memory"
        print("compiled", name, registers, "registers, no spills")
'''


def test_the_kernels_of_the_loss_compile_for_gpus(tmp_path: Path) -> None:
    printed = compile_without_driver(PROGRAM, tmp_path)
    assert printed.count("compiled") == 34, printed
