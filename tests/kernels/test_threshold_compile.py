"""The threshold encoder compiles for NVIDIA GPUs, on a machine without one: tensor cores, no spills, few instructions.

In a process of its own, since TRITON_INTERPRET is read when the kernels are defined.
"""

from pathlib import Path

import pytest
from no_driver import compile_without_driver

pytest.importorskip("triton.backends.nvidia")
PROGRAM = '''
import pathlib, re, subprocess, tempfile
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_kernels import launch, threshold_encode as te

TOOLS = pathlib.Path(nvidia.__file__).parent / "bin"
TYPES = {"u": "bf16", "w": "bf16", "h": "fp32", "b": "fp32", "bar": "fp32", "words": "i32", "counts": "i64",
         "offsets": "i64", "indices": "i64", "values": "fp32"}

def compiled(kernel, constants, capability, types=(), **options):
    """(kernel, registers, machine instructions in order); asserts that it needs no stack."""
    kinds = TYPES | dict(types)
    fixed = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "*" + kinds[name[:-4]] if name.endswith("_ptr") else kinds.get(name, "i32")
        signature[name] = "constexpr" if (i,) in fixed else kind
        if name.endswith("_ptr") or name in ("width", "n_words"):
            attributes[i,] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, fixed, attributes), target=GPUTarget("cuda", capability, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"]); file.flush()
        usage, listing = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
    name = f"{kernel.__name__} sm_{capability} {constants}"
    assert stack == 0, f"{name}: {stack} B of spills"
    code = re.findall(r"^\\s+/\\*[0-9a-f]{4,}\\*/\\s+(.*?);", listing, flags=re.M)
    print("compiled", name, registers, "registers, no spills,", len(code), "instructions")
    return made, registers, code

size = te.FUSED
for element in ("bf16", "fp16"):
    types = {"u_desc": f"tensordesc<{element}[{size.rows}, {size.channels}]>",
             "w_desc": f"tensordesc<{element}[{size.latents}, {size.channels}]>"}
    made, registers, code = compiled(
        te._bulk_kernel, dict(BM=size.rows, BN=size.latents, BK=size.channels, GROUP=size.group, INTERPRETED=False), 90,
        types, num_warps=size.warps, num_stages=size.stages, maxnreg=size.registers,
    )
    assert size.programs * registers * 32 * size.warps <= 65_536, f"{registers}: programs do not run side by side"
    assert size.programs * made.metadata.shared <= 232_448, made.metadata.shared
    assert "wgmma.mma_async" in made.asm["ptx"] and "cp.async.bulk.tensor" in made.asm["ptx"]
    last = max(i for i, line in enumerate(code) if "HGMMA" in line)
    per_element = (len(code) - 1 - last) / (size.rows * size.latents / (32 * size.warps))
    assert per_element <= 9.0, per_element  # top-K at R = 4: 16.2

for capability in (90, 80):
    made, registers, code = compiled(te._bits_kernel, dict(WORDS=te.WORDS), capability, num_warps=4)
    assert registers <= 64 and len(code) / (te.WORDS / 4) <= 25, (registers, len(code))
    for walk in (8, 256, te.MAX_WALK):
        warps = min(4, max(1, walk // 256))
        for kernel in (te._count_kernel, te._walk_kernel):
            _, registers, _ = compiled(kernel, dict(WALK=walk), capability, num_warps=warps)
            assert registers <= 96, registers
    for element in ("bf16", "fp32"):
        made, registers, _ = compiled(
            te._values_kernel, dict(ROWS=launch.ROWS, CHANNELS=te.CHANNELS), capability,
            {"u": element, "w": element}, num_warps=1,
        )
        assert registers <= 96 and ".v4.b32" in made.asm["ptx"], registers
'''


def test_the_threshold_encoder_compiles_for_gpus(tmp_path: Path) -> None:
    printed = compile_without_driver(PROGRAM, tmp_path)
    assert printed.count("compiled") == 20
