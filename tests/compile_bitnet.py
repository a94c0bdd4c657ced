"""A program of its own, because Triton's interpreter cannot be left: machine code of every fused BitNet kernel for
three generations of GPUs, a line each: capability, operation, bytes of shared memory, bytes spilled to local memory.
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


def main() -> None:
    kernel = triton_bitnet._norm_quantise_lift
    pointers = {name: "*fp32" if name == "scale_ptr" else "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
    for capability in (80, 90, 120):
        for operation, k in (("norm", 2560), ("add", 2560), ("gate", 6912)):
            launch = triton_bitnet.launches(k)[0]
            dtype = DType.INT8 if capability == 80 else DType.FP8
            constants = {
                "OPERATION": operation, "WIDE": False, **_sizes(k, dtype, Sparsity(8)), "PTX": True,
                "WORDS": launch.words, "TILES": triton.cdiv(k, 4 * launch.words), "EARLY": capability >= 90,
            }  # fmt: skip
            source = ASTSource(
                kernel,
                {**pointers, "eps": "fp32", **dict.fromkeys(constants, "constexpr")},
                {(kernel.arg_names.index(name),): value for name, value in constants.items()},
                {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))},
            )
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
            print(capability, operation, made.metadata.shared, spilled(made.asm["cubin"]))


def spilled(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


if __name__ == "__main__":
    main()
