"""What this machine can attain: from the rates that task 10 measured to times and speed-ups. The only place of it.

One product [M, K] x [K, N], dense or with a pattern whose lifted K is K', cannot be faster than its arithmetic and its
memory traffic (roofline: Williams, Waterman and Patterson, CACM 52, 2009), each at the rate measured on this machine:

    seconds(dense)  = max(2 M N K  / dense rate,  bytes(dense)  / copy bandwidth)
    seconds(sparse) = max(2 M N K' / sparse rate, bytes(sparse) / copy bandwidth)
    bytes(dense)    = M K  b + N K b            + M N o
    bytes(sparse)   = M K' b + N (K'/2 b + K'/8) + M N o

b: bytes of an operand, o: bytes of an output; the compressed weight has K'/2 values and as many 2-bit indices a row. A
sparse rate counts 2 M N K' operations, as if the operand were dense. Rates are those with loads: a GEMM has to
fetch its operands while it multiplies. Where arithmetic bounds both sides the speed-up that can be attained is

    (sparse rate / dense rate) * K / K'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd

from slidesparse.dtypes import DType
from slidesparse.pattern import Sparsity
from slidesparse.report import compare

COPY, TENSOR_CORES = "copy", "tensor cores"
"""Values of `CalibrationRow.quantity`."""
OUTPUT_BYTES = {"int32": 4, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Output types as paths name them: `... INT8 -> int32`."""
_OUTPUT = re.compile(r"-> (\w+)")


def output_bytes(dtype: str, path: str = "") -> int:
    """Bytes of one output: of the type that the path names, else int32 for INT8 and a 16-bit type for the others."""
    named = [OUTPUT_BYTES[name] for name in _OUTPUT.findall(path) if name in OUTPUT_BYTES]
    return named[-1] if named else 4 if DType(dtype) is DType.INT8 else 2


def gemm_bytes(dtype: str, m: int, n: int, k: int, sparsity: Sparsity | None, out: int) -> int:
    """Bytes that one product reads and writes at least; `k` is the K before lifting, `out` bytes of an output."""
    item = DType(dtype).torch.itemsize
    if sparsity is None:
        return m * k * item + n * k * item + m * n * out
    lifted = sparsity.lifted_k(k)
    return m * lifted * item + n * (lifted // 2 * item + lifted // 8) + m * n * out


@dataclass(frozen=True)
class Attainable:
    """Measured rates: `copy` in GB/s, `tensor` in TOPS by (type, sparse), with loads. None and {}: not measured."""

    copy: float | None = None
    tensor: Mapping[tuple[str, bool], float] = field(default_factory=dict)

    @classmethod
    def of(cls, calibration: pd.DataFrame) -> Attainable:
        """From rows of `CalibrationRow`; one that failed, was skipped or was not checked counts as not measured."""
        if calibration.empty:
            return cls()
        done = calibration[compare.checked(calibration) & (calibration["rate"] > 0)]
        copies = done.loc[done["quantity"] == COPY, "rate"]
        cores = done[(done["quantity"] == TENSOR_CORES) & done["loads"]]
        rates = zip(cores["dtype"], cores["sparse"], cores["rate"], strict=True)
        return cls(
            float(copies.iloc[-1]) if len(copies) else None,
            {(str(dtype), bool(sparse)): float(rate) for dtype, sparse, rate in rates},
        )

    def __bool__(self) -> bool:
        return self.copy is not None or bool(self.tensor)

    def speedup(self, dtype: str, sparsity: Sparsity, shapes: Iterable[tuple[int, int]]) -> float | None:
        """Bound of the speed-up over products of shapes (N, K) together, where arithmetic bounds both sides."""
        dense, sparse = self.tensor.get((dtype, False)), self.tensor.get((dtype, True))
        work = [(n * k, n * sparsity.lifted_k(k)) for n, k in shapes]
        if dense is None or sparse is None or not work:
            return None
        return sparse / dense * sum(plain for plain, _ in work) / sum(lifted for _, lifted in work)

    def microseconds(
        self, dtype: str, sparsity: Sparsity | None, m: int, n: int, k: int, path: str = ""
    ) -> float | None:
        """Shortest time of one product (see above) in µs; `path` names the output's type. None: a rate is missing."""
        rate = self.tensor.get((dtype, sparsity is not None))
        if rate is None or self.copy is None:
            return None
        operations = 2 * m * n * (k if sparsity is None else sparsity.lifted_k(k))
        moved = gemm_bytes(dtype, m, n, k, sparsity, output_bytes(dtype, path))
        return max(operations / (rate * 1e6), moved / (self.copy * 1e3))

    def roofline(self, moved: int, operations: int = 0, dtype: str = "") -> float | None:
        """Shortest time in µs of bytes moved and of dense operations of a type, whichever takes longer.

        None: a rate is missing.
        """
        if self.copy is None:
            return None
        memory = moved / (self.copy * 1e3)
        if not operations:
            return memory
        rate = self.tensor.get((dtype, False))
        return None if rate is None else max(operations / (rate * 1e6), memory)
