"""Python side of `csrc/`: cuBLASLt and cuSPARSELt GEMMs on torch tensors, through a C interface.

out[m, n] = x[m, k] * w[n, k]^T. Every error is one line with library, call, shape and status.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from slidesparse.errors import SlideSparseError, UnsupportedHere

ABI_VERSION = 1
LIBRARY = "libslidesparse_gemm.so"
WORKSPACE_LIMIT = 64 << 20
"""Bytes of scratch memory that an algorithm may ask for, dense or sparse."""
MAX_DENSE_ALGORITHMS = 64
MAX_SPARSE_ALGORITHMS = 512

TYPES = {
    torch.int8: 0,
    torch.float8_e4m3fn: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.float32: 5,
}
PLAIN, SCALED, SCALED_BIAS = 0, 1, 2
UNSUPPORTED = -2
"""What a function returns where the library says that it does not support this here."""


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int32) for name in ("input", "output", "epilogue", "device")),
    )


class _Algorithm(ctypes.Structure):
    _fields_ = (
        ("opaque", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("alg_id", "split_k", "tile", "stages", "cluster")),
        ("waves", ctypes.c_float),
    )


@dataclass(frozen=True)
class GemmAlgorithm:
    """One algorithm of a library for one problem. `opaque` makes it usable again in another process."""

    alg_id: int
    split_k: int
    workspace: int
    opaque: bytes
    tile: int
    stages: int
    cluster: int

    def _as_c(self) -> _Algorithm:
        out = _Algorithm(workspace=self.workspace, alg_id=self.alg_id, split_k=self.split_k)
        ctypes.memmove(out.opaque, self.opaque, 64)
        return out


@dataclass(frozen=True)
class Problem:
    """Shape, types and epilogue of one GEMM."""

    m: int
    n: int
    k: int
    input: torch.dtype
    output: torch.dtype
    epilogue: int = PLAIN

    def _as_c(self) -> _Problem:
        types = TYPES[self.input], TYPES[self.output]
        return _Problem(self.m, self.n, self.k, *types, self.epilogue, torch.cuda.current_device())


class GemmLibrary:
    """The loaded library. Use `load()`.

    Methods raise SlideSparseError (UnsupportedHere where that is what the library says).
    """

    def __init__(self, path: Path, cublaslt: Path | None, cusparselt: Path | None) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            raise SlideSparseError(f"{error}; run `python -m slidesparse.kernels.build` on this machine") from None
        self._c.ss_error.restype = ctypes.c_char_p
        self._c.ss_cublaslt_version.restype = ctypes.c_size_t
        found = self._c.ss_abi_version()
        if found != ABI_VERSION:
            raise SlideSparseError(f"{path}: interface version {found}, expected {ABI_VERSION}; build csrc again")
        self._call("ss_open", *(str(p).encode() if p else None for p in (cublaslt, cusparselt)))
        self.paths = {"cublaslt": cublaslt, "cusparselt": cusparselt}

    def versions(self) -> dict[str, int]:
        """Versions that the loaded libraries report of themselves."""
        versions = {}
        if self.paths["cublaslt"]:
            versions["cublaslt"] = int(self._c.ss_cublaslt_version())
        if self.paths["cusparselt"]:
            versions["cusparselt"] = int(self._c.ss_cusparselt_version())
        return versions

    # -- dense ----------------------------------------------------------------------------------------

    def dense_algorithms(self, problem: Problem) -> list[GemmAlgorithm]:
        """What cuBLASLt offers, its own favourite first."""
        found, room = ctypes.c_int(0), (_Algorithm * MAX_DENSE_ALGORITHMS)()
        limit = ctypes.c_size_t(WORKSPACE_LIMIT)
        self._call("ss_dense_algorithms", problem, limit, room, MAX_DENSE_ALGORITHMS, ctypes.byref(found))
        return list(_algorithms(room, found.value))

    def dense_gemm(
        self,
        problem: Problem,
        algorithm: GemmAlgorithm,
        x: torch.Tensor,
        w: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
        scale_token: torch.Tensor | None = None,
        scale_channel: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """x [M, K], w [N, K] -> out [M, N]; with SCALED, float32 scales [M] and [N] (and bfloat16 bias [N])."""
        scales = (_pointer(tensor) for tensor in (scale_token, scale_channel, bias))
        self._call(
            "ss_dense_gemm", problem, ctypes.byref(algorithm._as_c()), _pointer(x), _pointer(w), *scales,
            _pointer(out), _pointer(workspace), ctypes.c_size_t(workspace.numel()), _stream(),
        )  # fmt: skip

    # -- sparse ---------------------------------------------------------------------------------------

    def sparse_algorithms(self, problem: Problem) -> list[GemmAlgorithm]:
        """Every algorithm and split-K of cuSPARSELt that takes this problem within `WORKSPACE_LIMIT`.

        Split-K asks for its partial sums: 7 GB for a large product, where it does not pay anyway.
        """
        found, room = ctypes.c_int(0), (_Algorithm * MAX_SPARSE_ALGORITHMS)()
        self._call("ss_sparse_algorithms", problem, room, MAX_SPARSE_ALGORITHMS, ctypes.byref(found))
        return [algorithm for algorithm in _algorithms(room, found.value) if algorithm.workspace <= WORKSPACE_LIMIT]

    def compress(self, problem: Problem, w: torch.Tensor) -> torch.Tensor:
        """2:4 weight [N, K'] -> cuSPARSELt's compressed form, uint8. It serves every M and algorithm."""
        size, scratch = ctypes.c_size_t(0), ctypes.c_size_t(0)
        self._call("ss_sparse_compressed_bytes", problem, ctypes.byref(size), ctypes.byref(scratch))
        compressed = torch.empty(size.value, dtype=torch.uint8, device=w.device)
        room = torch.empty(max(scratch.value, 16), dtype=torch.uint8, device=w.device)
        self._call("ss_sparse_compress", problem, _pointer(w), _pointer(compressed), _pointer(room), _stream())
        torch.cuda.current_stream().synchronize()  # the scratch memory goes when this function returns
        return compressed

    def sparse_gemm(
        self,
        problem: Problem,
        algorithm: GemmAlgorithm,
        x: torch.Tensor,
        compressed: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """x [M, K'], compressed weight -> out [M, N]."""
        self._call(
            "ss_sparse_gemm", problem, ctypes.byref(algorithm._as_c()), _pointer(x), _pointer(compressed),
            _pointer(out), _pointer(workspace), ctypes.c_size_t(workspace.numel()), _stream(),
        )  # fmt: skip

    def plans_cached(self) -> int:
        return int(self._c.ss_plans_cached())

    def _call(self, name: str, *arguments: object) -> None:
        converted = [ctypes.byref(a._as_c()) if isinstance(a, Problem) else a for a in arguments]
        code = getattr(self._c, name)(*converted)
        if code != 0:
            raise (UnsupportedHere if code == UNSUPPORTED else SlideSparseError)(self._c.ss_error().decode())


@lru_cache(maxsize=1)
def load(folder: Path | None = None) -> GemmLibrary:
    """The library built from csrc/, with the best cuBLASLt and cuSPARSELt installed.

    Raises:
        UnsupportedHere: not built, or a library is missing (says which, and what to do).
    """
    path = (folder or Path(__file__).parent / "lib") / LIBRARY
    if not path.exists():
        raise UnsupportedHere(f"{path}: not built; run `python -m slidesparse.kernels.build`")
    return GemmLibrary(path, cublaslt_path(), cusparselt_path())


def loaded_versions() -> dict[str, str]:
    """What the libraries say of themselves, once loaded; empty where there is no GPU or they are not to be had: a cell
    that needs them will say why."""
    if not torch.cuda.is_available():
        return {}
    try:
        versions = load().versions()
    except SlideSparseError:
        return {}
    found = {}
    if "cublaslt" in versions:  # cublasLt.h: major * 10000 + minor * 100 + patch
        v = versions["cublaslt"]
        found["libcublasLt"] = f"{v // 10000}.{v // 100 % 100}.{v % 100}"
    if "cusparselt" in versions:  # cusparseLt.h: major * 1000 + minor * 100 + patch
        v = versions["cusparselt"]
        found["libcusparseLt"] = f"{v // 1000}.{v // 100 % 10}.{v % 100}"
    return found


def cublaslt_path() -> Path:
    """The cuBLASLt that PyTorch brings (one build a process). Raises UnsupportedHere if there is none."""
    return _installed("nvidia.cu13", "lib/libcublasLt.so.13") or _missing("cuBLASLt", "nvidia-cublas")


def cusparselt_path() -> Path:
    """nvidia-cusparselt-cu12 if installed (0.8.1, faster on Hopper), else PyTorch's own."""
    for package, file in (
        ("nvidia.cusparselt", "lib/libcusparseLt.so.0"),
        ("nvidia.cu13", "lib/libcusparseLt.so.0"),
    ):
        found = _installed(package, file)
        if found:
            return found
    return _missing("cuSPARSELt", "nvidia-cusparselt-cu12")


def _installed(package: str, file: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / file).exists():
            return Path(folder) / file
    return None


def _missing(library: str, package: str) -> Path:
    raise UnsupportedHere(f"{library} is not installed; install {package}")


def _algorithms(room: ctypes.Array[_Algorithm], count: int) -> Iterator[GemmAlgorithm]:
    for a in room[:count]:
        yield GemmAlgorithm(a.alg_id, a.split_k, a.workspace, bytes(a.opaque), a.tile, a.stages, a.cluster)


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
