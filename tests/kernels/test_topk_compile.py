"""The top-K encoder compiles for NVIDIA GPUs, on a machine without one: tensor cores, no spills, few instructions.

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
from sae_kernels import launch, topk_encode, topk_select

TOOLS = pathlib.Path(nvidia.__file__).parent / "bin"
SHARED = {90: 232_448, 80: 166_912}

def compiled(kernel, pointers, constants, capability, **options):
    """(kernel, registers, machine instructions in order); asserts that it needs no stack and fits the shared memory."""
    fixed = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = pointers.get(name, "i32") if not name.endswith("_ptr") else "*" + pointers[name[:-4]]
        signature[name] = "constexpr" if (i,) in fixed else kind
        if name.endswith("_ptr") or name in ("width", "n_candidates", "n_tiles"):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    name = f"{kernel.__name__} sm_{capability} {constants} {pointers}"
    assert made.metadata.shared <= SHARED[capability], f"{name}: {made.metadata.shared} B of shared memory"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"]); file.flush()
        usage, listing = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
    assert stack == 0, f"{name}: {stack} B of spills"
    code = re.findall(r"^\\s+/\\*[0-9a-f]{4,}\\*/\\s+(.*?);", listing, flags=re.M)
    print("compiled", name, registers, "registers, no spills,", len(code), "instructions")
    return made, registers, code

def fused(capability, element, r, whole=True):
    size = topk_encode.FUSED[2 if element == "bf16" else 4]
    return compiled(
        topk_encode._fused_kernel, {"u": element, "w": element, "b": "fp32", "out": "i32"},
        dict(BM=size.rows, BN=128, BK=size.channels, R=r, GROUP=size.group, WHOLE=whole, INTERPRETED=False), capability,
        num_warps=size.warps, num_stages=size.stages,
    )

def after_last(code, word):
    return len(code) - 1 - max(i for i, line in enumerate(code) if word in line)

for r, limit in ((4, 17.5), (8, 30.0)):
    made, registers, code = fused(90, "bf16", r)
    elements = 128 * 128 / (32 * topk_encode.FUSED[2].warps)  # per thread
    assert registers <= 128, registers
    assert after_last(code, "HGMMA") / elements <= limit, after_last(code, "HGMMA") / elements
    assert "wgmma.mma_async" in made.asm["ptx"] and "cp.async.cg" in made.asm["ptx"]
made, registers, _ = fused(80, "bf16", 4, whole=False)
assert registers <= 184 and "mma.sync" in made.asm["ptx"] and "cp.async.cg" in made.asm["ptx"]
made, registers, _ = fused(90, "fp32", 4)
assert "wgmma" not in made.asm["ptx"], "float32 is not rounded to TF32"

tensors = {"u_desc": "tensordesc<bf16[128, 64]>", "w_desc": "tensordesc<bf16[128, 64]>", "b": "fp32", "out": "i32"}
for r, limit in ((4, 17.5), (8, 30.0)):
    made, registers, code = compiled(
        topk_encode._bulk_kernel, tensors, dict(BM=128, BN=128, BK=64, R=r, GROUP=8, INTERPRETED=False), 90,
        num_warps=8, num_stages=3,
    )
    assert registers <= 128 and after_last(code, "HGMMA") / elements <= limit, registers
    assert "wgmma.mma_async" in made.asm["ptx"] and "cp.async.bulk.tensor" in made.asm["ptx"]

for r, limit in ((4, 23.0), (8, 36.0)):
    made, _, code = compiled(
        topk_select._block_kernel, {"h": "fp32", "b": "fp32", "out": "i32"},
        dict(BN=128, R=r, TILES=topk_select.BLOCK_TILES, ROWS=topk_select.BLOCK_ROWS, INTERPRETED=False), 90,
        num_warps=4,
    )
    elements = topk_select.BLOCK_TILES * 128 / (32 * 4)  # per thread and row
    start = max(i for i, line in enumerate(code) if "LDG" in line) - 4 * elements  # bias and addresses come before
    assert ".v4.b32" in made.asm["ptx"] and (len(code) - start) / elements <= limit, (len(code) - start) / elements
compiled(
    topk_select._block_kernel, {"h": "fp32", "b": "fp32", "out": "i32"},
    dict(BN=128, R=8, TILES=topk_select.BLOCK_TILES, ROWS=topk_select.BLOCK_ROWS, INTERPRETED=False), 80, num_warps=4,
)

for n_candidates, r in ((288, 8), (1_024, 4), (4_096, 4), (8_192, 8), (32_768, 4)):
    block, slices, warps = topk_select.slices(n_candidates)
    for capability in (90, 80):
        _, registers, code = compiled(
            topk_select._select_kernel, {"candidates": "i32", "values": "fp32", "indices": "i32", "flags": "i8"},
            dict(BN=128, R=r, BLOCK=block, SLICES=slices, FILL=32), capability, num_warps=warps,
        )
        assert registers <= 232, registers

for element, capability, width in (("bf16", 90, 768), ("fp32", 80, 4_096)):
    size = launch.blocks(width)
    made, _, _ = compiled(
        topk_select._values_kernel, {"u": element, "w": element, "b": "fp32", "indices": "i32", "values": "fp32"},
        dict(BN=128, ROWS=launch.ROWS, CHANNELS=size.channels), capability, num_warps=size.warps,
    )
    assert ".v4.b32" in made.asm["ptx"], "no 16-byte access"
'''


def test_the_encoder_compiles_for_gpus(tmp_path: Path) -> None:
    printed = compile_without_driver(PROGRAM, tmp_path)
    assert printed.count("compiled") == 21
