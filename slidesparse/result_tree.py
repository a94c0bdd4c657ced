"""`reports/{tag}/`: where each table lies, as in the published result trees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slidesparse.dtypes import DType
from slidesparse.plan import (
    SQUARE,
    CalibrateCell,
    Cell,
    ConvertCell,
    KernelCell,
    LinearCell,
    Phase,
    PrepareCell,
    ThroughputCell,
    TuneCell,
    Variant,
)


@dataclass(frozen=True)
class ResultTree:
    """`reports/{tag}/`: where each table lies. `tag` is without a data type."""

    root: Path
    tag: str

    def tag_with(self, dtype: DType) -> str:
        """`GB10_cc121_py312_...` -> `GB10_cc121_INT8_py312_...`."""
        head, _, tail = self.tag.partition("_py")
        return f"{head}_{dtype.value}_py{tail}"

    @property
    def prepare(self) -> Path:
        return self.root / "preparation" / "models.csv"

    @property
    def convert(self) -> Path:
        return self.root / "conversion" / "models.csv"

    def convert_layers(self, model: str) -> Path:
        """`model` is the converted checkpoint's name."""
        return self.root / "conversion" / "layers" / f"{model}.csv"

    def tune(self, model: str, dtype: DType) -> Path:
        return self.root / "tuning" / f"candidates_{model}-{dtype.suffix}.csv"

    @property
    def tuning_store(self) -> Path:
        return self.root / "tuning" / "winners.json"

    @property
    def lost_contexts(self) -> Path:
        return self.root / "tuning" / "lost_contexts.json"

    def throughput(self, phase: Phase, model: str, dtype: DType, variant: Variant) -> Path:
        folder = self.root / "throughput_benchmark_results" / phase / self.tag_with(dtype) / variant.folder
        return folder / f"{model}-{dtype.suffix}_{phase}.csv"

    def kernel(self, model: str, dtype: DType, variant: Variant) -> Path:
        name = {"cublaslt": "cuBLASLt", "cusparselt": "cuSPARSELt"}.get(variant.backend, variant.backend)
        folder = self.root / "benchmark_kernel" / name / "alg_search_results" / self.tag / dtype.value
        slug = "" if variant.sparsity is None else f"_{variant.sparsity.slug}"
        named = model if model == SQUARE else f"{model}-{dtype.suffix}"
        return folder / f"alg_search_{named}{slug}.csv"

    def linear(self, model: str, dtype: DType) -> Path:
        return self.root / "benchmark_linear" / f"linear_{model}-{dtype.suffix}.csv"

    def step_profile(self, model: str, dtype: DType) -> Path:
        return self.root / "step_profile" / f"steps_{model}-{dtype.suffix}.csv"

    @property
    def calibration(self) -> Path:
        return self.root / "calibration" / "rates.csv"

    def place(self, cell: Cell) -> tuple[Path, dict[str, object]]:
        """The table that holds a cell, and the values of the columns that find it there."""
        match cell:
            case PrepareCell():
                return self.prepare, {"model": cell.model, "dtype": cell.dtype.value}
            case ConvertCell():
                key = {"model": cell.model, "dtype": cell.dtype.value, "sparsity": str(cell.sparsity)}
                return self.convert, dict(key)
            case ThroughputCell():
                return self.throughput(cell.phase, cell.model, cell.dtype, cell.variant), {f"M_{cell.phase}": cell.m}
            case TuneCell():
                sparsity = cell.variant.sparsity
                lifted = sparsity is not None and cell.operation == "sparse_gemm"
                return self.tune(cell.model, cell.dtype), {
                    "operation": cell.operation,
                    "backend": cell.variant.backend,
                    "sparsity": "" if sparsity is None else str(sparsity),
                    "M": cell.m,
                    "N": cell.n,
                    "K": sparsity.lifted_k(cell.k) if lifted and sparsity else cell.k,
                }
            case KernelCell():
                sparsity = cell.variant.sparsity
                k = cell.k if sparsity is None else sparsity.lifted_k(cell.k)
                return self.kernel(cell.model, cell.dtype, cell.variant), {"M": cell.m, "N": cell.n, "K": k}
            case LinearCell():
                pattern = str(cell.variant.sparsity or "")
                return self.linear(cell.model, cell.dtype), {
                    "backend": cell.variant.backend,
                    "sparsity": pattern,
                    "M": cell.m,
                }
            case CalibrateCell():
                return self.calibration, {
                    "quantity": cell.quantity,
                    "dtype": cell.dtype.value if cell.dtype else "",
                    "sparse": cell.sparse,
                    "loads": cell.loads,
                }

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def report(self) -> Path:
        return self.root / "report.md"
