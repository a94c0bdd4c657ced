"""Our own sparse GEMM on a GPU, every family that it has: right at every size, alone in its memory, safe in graphs.

`-k small` are the sizes for compute-sanitizer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import fused_library, fused_pack_mma, fused_pack_wgmma, gpu, reference, verify
from slidesparse.kernels.fused_library import Config, Family, FusedLibrary

pytestmark = pytest.mark.gpu
PACK: dict[Family, Callable[[torch.Tensor, str], torch.Tensor]] = {
    Family.WGMMA: fused_pack_wgmma.pack,
    Family.MMA: fused_pack_mma.pack,
}
each_family = pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
GUARD = 1024
"""Elements before and after out."""
SENTINEL = 7.0


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def library() -> FusedLibrary:
    """Skipped where it is not built."""
    fused_library.load.cache_clear()
    try:
        return fused_library.load()
    except UnsupportedHere as error:
        pytest.skip(str(error))


def listed(library: FusedLibrary, family: Family, dtype: DType, m: int, n: int, k: int) -> list[Config]:
    """Skips where this GPU has none."""
    try:
        return library.configs(torch.cuda.get_device_capability(), m, n, k, dtype.torch, family)
    except UnsupportedHere as error:
        pytest.skip(str(error))


def two_of_four(n: int, k: int, dtype: DType, generator: torch.Generator, limit: float) -> torch.Tensor:
    """Codes [n, k]: two random places of every window, values up to `limit`, some of them zeros."""
    order = torch.rand(n, k // 4, 4, generator=generator, device="cuda").argsort(dim=2)
    return torch.where(order < 2, codes((n, k // 4, 4), dtype, generator, limit).float(), 0).to(dtype.torch).flatten(1)


def codes(shape: tuple[int, ...], dtype: DType, generator: torch.Generator, limit: float) -> torch.Tensor:
    """INT8, and FP8 where the limit is that of integers whose sums float32 holds: integers. Other FP8: normal."""
    if dtype is DType.INT8 or limit <= 2:
        whole = torch.randint(-int(limit), int(limit) + 1, shape, generator=generator, device="cuda")
        return whole.float().to(dtype.torch)
    spread = torch.randn(shape, generator=generator, device="cuda") * (limit / 4.5)
    return spread.clamp(-limit, limit).to(dtype.torch)


@dataclass(frozen=True)
class Problem:
    family: Family
    dtype: DType
    x: torch.Tensor
    weight: torch.Tensor
    packed: torch.Tensor
    token_scale: torch.Tensor
    channel_scale: torch.Tensor
    bias: torch.Tensor | None
    exact: bool
    """Sums have one right value: INT8, and FP8 of small integers."""

    @staticmethod
    def random(
        family: Family, dtype: DType, m: int, n: int, k: int, seed: int, bias: bool = True, exact: bool = False
    ) -> Problem:
        generator = torch.Generator("cuda").manual_seed(seed)
        exact |= dtype is DType.INT8
        limit = 2 if exact and dtype is DType.FP8 else dtype.limit
        weight = two_of_four(n, k, dtype, generator, limit)
        return Problem(
            family,
            dtype,
            codes((m, k), dtype, generator, limit),
            weight,
            PACK[family](weight, "weight"),
            torch.rand(m, 1, generator=generator, device="cuda") / 100,
            torch.rand(n, 1, generator=generator, device="cuda") / 50,
            torch.randn(n, generator=generator, device="cuda").bfloat16() if bias else None,
            exact,
        )

    @property
    def size(self) -> tuple[int, int, int]:
        return self.x.shape[0], self.weight.shape[0], self.x.shape[1]

    def launch(self, library: FusedLibrary, config: Config, out: torch.Tensor) -> None:
        _, n, k = self.size
        scales = self.token_scale, self.channel_scale
        library.gemm(config, self.x, self.packed, *scales, self.bias, out, family=self.family, n=n, k=k)

    def run(self, library: FusedLibrary, config: Config) -> torch.Tensor:
        """Out, which held NaN before, and a check that nothing around it was written."""
        m, n, _ = self.size
        room = torch.full((m * n + 2 * GUARD,), SENTINEL, dtype=torch.bfloat16, device="cuda")
        out = verify.poison(room[GUARD:-GUARD].view(m, n))
        self.launch(library, config, out)
        around = torch.cat([room[:GUARD], room[-GUARD:]])
        assert bool((around == SENTINEL).all()), f"{config.name} writes around out, {self.size}"
        return out

    def require(self, out: torch.Tensor, config: Config) -> None:
        """Equal to the reference bit for bit where sums are exact; else within FP8's stated bound, and its norm."""
        given = self.x, self.token_scale
        what = config.name, config.group, self.size, self.bias is not None
        if self.exact:
            acc = reference.gemm(self.x, self.weight)
            expected = reference.dequantise_bias(acc, self.token_scale, self.channel_scale, self.bias)
            same = verify.check_same(out, expected, "reference")
            assert same.ok, (what, same.text)
            return
        error = math.ceil(self.size[2] / 2 / gpu.FP8_STEP) * gpu.FP8_STEP_ERROR
        check = verify.check_product(given, out, self.weight, self.channel_scale, self.bias, self.dtype, error)
        assert check.ok, (what, check.text)


EDGES = [(1, 8, 32), (33, 96, 160), (100, 256, 96), (17, 264, 1088), (300, 520, 640)]
"""(M, N, K'): the smallest, ragged M, N beyond a padded tile, K' that no stage divides."""


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", EDGES, ids=str)
@pytest.mark.parametrize("dtype", QUANTISED)
@each_family
def test_small_sizes_in_every_way(
    library: FusedLibrary, family: Family, dtype: DType, shape: tuple[int, int, int], bias: bool
) -> None:
    for exact in {True, dtype is DType.INT8}:
        problem = Problem.random(family, dtype, *shape, seed=sum(shape), bias=bias, exact=exact)
        for config in listed(library, family, dtype, *shape):
            problem.require(problem.run(library, config), config)


@pytest.mark.parametrize("dtype", QUANTISED)
@each_family
def test_a_model_layer_in_every_way(library: FusedLibrary, family: Family, dtype: DType) -> None:
    """Many tiles, all multiprocessors busy, every M's own ways; FP8 of real ranges within its bound and norm."""
    for m in (16, 64, 512, 2048):
        problem = Problem.random(family, dtype, m, 3840, 3840, seed=m, exact=False)
        for config in listed(library, family, dtype, *problem.size):
            problem.require(problem.run(library, config), config)
            again = problem.run(library, config)
            assert torch.equal(problem.run(library, config), again), f"{config.name} is not the same twice"


@pytest.mark.parametrize("dtype", QUANTISED)
@each_family
def test_1000_random_shapes(library: FusedLibrary, family: Family, dtype: DType) -> None:
    """500 a type: a random way each, tiles walked together in a random number."""
    chance = np.random.default_rng(7)
    for number in range(500):
        m = int(2 ** chance.uniform(0, 10))
        n, k = 8 * int(2 ** chance.uniform(0, 8)), 32 * int(2 ** chance.uniform(0, 6))
        bias, exact = bool(chance.integers(2)), bool(chance.integers(2))
        problem = Problem.random(family, dtype, m, n, k, seed=number, bias=bias, exact=exact)
        configs = listed(library, family, dtype, m, n, k)
        config = replace(configs[chance.integers(len(configs))], group=int(chance.integers(1, 17)))
        problem.require(problem.run(library, config), config)


@each_family
def test_sums_beyond_24_bits_are_rounded_once(library: FusedLibrary, family: Family) -> None:
    m, n, k = 64, 64, 8192
    problem = Problem.random(family, DType.INT8, m, n, k, seed=1, bias=False)
    weight = problem.weight.new_zeros(n, k)
    weight[:, ::2] = 127 - 2 * (torch.arange(n, device="cuda")[:, None] % 2 * 127)
    x = torch.full_like(problem.x, 127)
    x[:, 0] = torch.arange(m, device="cuda")
    ones = torch.ones(m, 1, device="cuda")
    problem = replace(
        problem, x=x, weight=weight, packed=PACK[family](weight, "weight"), token_scale=ones, channel_scale=ones
    )
    assert float(reference.gemm(x, weight).abs().max()) > 2**24
    for config in listed(library, family, DType.INT8, m, n, k):
        problem.require(problem.run(library, config), config)


@each_family
def test_a_token_whose_scale_is_nan_is_nan_as_a_whole(library: FusedLibrary, family: Family) -> None:
    problem = Problem.random(family, DType.INT8, 40, 64, 128, seed=2)
    problem.token_scale[3] = float("nan")
    for config in listed(library, family, DType.INT8, *problem.size):
        out = problem.run(library, config)
        assert out[3].isnan().all()
        assert not out[torch.arange(40, device="cuda") != 3].isnan().any()


@pytest.mark.parametrize("dtype", QUANTISED)
@each_family
def test_graphs_keep_their_operands(library: FusedLibrary, family: Family, dtype: DType) -> None:
    """Captured at first sight: no launch before that would have prepared the kernel (in a fresh process)."""
    problem = Problem.random(family, dtype, 200, 512, 1024, seed=3, exact=True)
    m, n, _ = problem.size
    for config in listed(library, family, dtype, *problem.size):
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            problem.launch(library, config, out)
            problem.launch(library, config, out)
        for _ in range(2):
            problem.x.copy_(torch.cat([problem.x[-1:], problem.x[:-1]]))
            verify.poison(out)
            graph.replay()
            problem.require(out, config)


@each_family
def test_several_threads_and_streams(library: FusedLibrary, family: Family) -> None:
    problems = [Problem.random(family, DType.INT8, 64 + i, 512, 1024, seed=i) for i in range(8)]
    configs = [listed(library, family, DType.INT8, *problem.size) for problem in problems]
    outs: list[torch.Tensor | None] = [None] * len(problems)
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                outs[i] = problems[i].run(library, configs[i][i % len(configs[i])])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (problem, out) in enumerate(zip(problems, outs, strict=True)):
        assert out is not None
        problem.require(out, configs[i][i % len(configs[i])])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(65536, 37888, 64), (131072, 64, 40960)], ids=["out", "x"])
@each_family
def test_offsets_beyond_32_bits(library: FusedLibrary, family: Family, size: tuple[int, int, int]) -> None:
    """INT8: every 509th token against the reference, all others at least written."""
    m, n, k = size
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * (m * k + 2 * m * n):
        pytest.skip("needs more GPU memory")
    problem = Problem.random(family, DType.INT8, 4096, n, k, seed=4)
    scale = torch.rand(m, 1, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    problem = replace(problem, x=problem.x.repeat(m // 4096, 1), token_scale=scale)
    some = torch.arange(0, m, 509, device="cuda")
    part = replace(problem, x=problem.x[some], token_scale=problem.token_scale[some])
    config = listed(library, family, DType.INT8, m, n, k)[0]
    out = problem.run(library, config)
    part.require(out[some], config)
    assert not any(bool(rows.isnan().any()) for rows in out.split(4096))


def test_fp8_is_refused_where_there_is_none(library: FusedLibrary) -> None:
    if torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this GPU has FP8")
    problem = Problem.random(Family.MMA, DType.FP8, 16, 64, 64, seed=5)
    config = library.configs((8, 9), *problem.size, torch.float8_e4m3fn, Family.MMA)[0]
    with pytest.raises(SlideSparseError, match=r"FP8E4M3 needs compute capability 8.9 \(Ada\)"):
        problem.run(library, config)
