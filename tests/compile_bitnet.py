"""A program of its own, because Triton's interpreter cannot be left: machine code of the fused BitNet kernels.

A line each: capability, operation, K, pattern, weights, bytes of shared memory, bytes spilled to local memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slidesparse.dtypes import DType
from slidesparse.kernels import triton_bitnet
from slidesparse.kernels.triton_activations import _sizes
from slidesparse.pattern import Sparsity

SHAPES = (("norm", 2560), ("add", 2560), ("gate", 6912))
PATTERNS = (None, *(Sparsity(length) for length in (4, 6, 10, 12, 14, 16, None)))


def main() -> None:
    for capability in (80, 90, 120):
        for operation, k in SHAPES:
            line(capability, operation, k, Sparsity(8))
    for sparsity in PATTERNS:
        line(90, "add", 2560, sparsity)
    line(90, "norm", 2048, Sparsity(None))
    line(90, "gate", 6912, Sparsity(8), wide=True)


def line(capability: int, operation: str, k: int, sparsity: Sparsity | None, wide: bool = False) -> None:
    kernel = triton_bitnet._norm_quantise_lift
    floats = ("scale_ptr", *(("weight_ptr",) if wide else ()))
    pointers = {name: "*fp32" if name in floats else "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
    launch = triton_bitnet.launches(k)[0]
    constants = {
        "OPERATION": operation, "WIDE": wide, **_sizes(k, DType.INT8 if capability == 80 else DType.FP8, sparsity),
        "PTX": True, "WORDS": launch.words, "TILES": triton.cdiv(k, 4 * launch.words), "EARLY": capability >= 90,
    }  # fmt: skip
    source = ASTSource(
        kernel,
        {**pointers, "eps": "fp32", **dict.fromkeys(constants, "constexpr")},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    spilt = spilled(made.asm["cubin"])
    print(capability, operation, k, sparsity, "float32" if wide else "bfloat16", made.metadata.shared, spilt)


def spilled(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


if __name__ == "__main__":
    main()
