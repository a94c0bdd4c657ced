"""The mma.sp kernel itself, run on the CPU: right in every tile and at every edge, and its faults would be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import emulated_mma
import numpy as np
import pytest
import torch
from emulated_mma import CAPABILITY, EmulatedLibrary
from test_two_of_four import EIGHT_BIT, random_2_4

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import fused_pack_mma, reference
from slidesparse.kernels.fused_library import Config, Family

GUARD = 1 << 18
"""Elements before and after out."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    return emulated_mma.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))


@dataclass(frozen=True)
class Problem:
    x: torch.Tensor
    weight: torch.Tensor
    packed: torch.Tensor
    token_scale: torch.Tensor
    channel_scale: torch.Tensor
    bias: torch.Tensor | None
    expected: torch.Tensor
    family: Family = Family.MMA

    @staticmethod
    def random(m: int, n: int, k: int, dtype: DType, bias: bool, seed: int) -> Problem:
        """FP8: small integers, so that float32 holds every sum and the order of additions does not matter."""
        generator = torch.Generator().manual_seed(seed)
        weight = random_2_4(n, k, dtype, seed)
        x = torch.randint(-127, 128, (m, k), generator=generator).to(torch.int8)
        if dtype is DType.FP8:
            small = torch.randint(-3, 4, (n, k), generator=generator).float()
            weight = torch.where(weight.float() == 0, 0, small).to(dtype.torch)
            x = (x % 7 - 3).float().to(dtype.torch)
        token_scale = torch.rand(m, 1, generator=generator) / 100
        channel_scale = torch.rand(n, 1, generator=generator) / 50
        added = torch.randn(n, generator=generator).bfloat16() if bias else None
        expected = reference.dequantise_bias(reference.gemm(x, weight), token_scale, channel_scale, added)
        packed = fused_pack_mma.pack(weight)
        return Problem(x, weight, packed, token_scale, channel_scale, added, expected)

    def run(self, library: EmulatedLibrary, config: Config) -> torch.Tensor:
        """Out, and a check that nothing around it was written, nor anything beside the operands read."""
        (m, k), n = self.x.shape, self.weight.shape[0]
        room = torch.full((m * n + 2 * GUARD,), float("nan"), dtype=torch.bfloat16)
        room[:GUARD] = room[-GUARD:] = 7
        out = room[GUARD:-GUARD].view(m, n)
        scales = self.token_scale, self.channel_scale
        library.only_read([self.x, self.packed, *scales, *([] if self.bias is None else [self.bias])])
        library.gemm(config, self.x, self.packed, *scales, self.bias, out, family=self.family, n=n, k=k)
        assert bool((room[:GUARD] == 7).all() and (room[-GUARD:] == 7).all()), f"{config.name} writes around out"
        return out


EDGES = [
    (1, 8, 32),  # the smallest
    (40, 72, 96),  # half of a stage, half of a tile
    (17, 264, 1088),  # one channel group more than the padding, steps that no stage fills
    (130, 136, 640),
    (64, 64, 544),
    (16, 16, 1600),  # as many stages as the ring, and more
]


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_every_tile_at_the_edges(library: EmulatedLibrary, shape: tuple[int, int, int], dtype: DType) -> None:
    problem = Problem.random(*shape, dtype, bias=shape[0] % 2 == 0, seed=sum(shape))
    configs = library.all_configs(shape[1], shape[2], dtype.torch)
    assert len({config.index for config in configs}) == 12, "all tiles are tried"
    for seed, config in enumerate(configs):
        library.seed(seed)
        assert torch.equal(problem.run(library, config), problem.expected), config.name


def test_random_shapes(library: EmulatedLibrary) -> None:
    chance = np.random.default_rng(20)
    for number in range(40):
        m, n, k = (int(chance.integers(1, most)) * unit for most, unit in ((150, 1), (30, 8), (30, 32)))
        dtype = EIGHT_BIT[number % 2]
        problem = Problem.random(m, n, k, dtype, bool(chance.integers(2)), number)
        configs = library.all_configs(n, k, dtype.torch)
        config = replace(configs[chance.integers(len(configs))], group=int(chance.integers(1, 20)))
        library.seed(number)
        assert torch.equal(problem.run(library, config), problem.expected), (m, n, k, config.name, config.group)


def test_int8_sums_at_the_ends_of_their_range(library: EmulatedLibrary) -> None:
    """Beyond 2**24 float32 no longer holds them: the one rounding is to nearest even."""
    m, n, k = 16, 16, 4096
    problem = Problem.random(m, n, k, DType.INT8, False, 3)
    weight = torch.zeros(n, k, dtype=torch.int8)
    weight[:, ::2] = torch.where(torch.arange(n)[:, None] % 2 == 0, 127, -127)
    x = torch.full((m, k), 127, dtype=torch.int8)
    x[:, 0] = torch.arange(m)
    ones = torch.ones(16, 1)
    expected = reference.dequantise_bias(reference.gemm(x, weight), ones, ones, None)
    assert float(expected.abs().max()) > 2**24
    packed = fused_pack_mma.pack(weight)
    problem = Problem(x, weight, packed, ones, ones, None, expected)
    for config in library.all_configs(n, k, torch.int8):
        assert torch.equal(problem.run(library, config), expected), config.name


def test_the_sign_of_zero_and_nan_scales(library: EmulatedLibrary) -> None:
    """No bias leaves -0 as it is; a token whose scale is NaN is NaN as a whole, and no other."""
    problem = Problem.random(24, 32, 64, DType.INT8, False, 5)
    problem.token_scale[3] = float("nan")
    problem.token_scale[4] = -0.0
    expected = reference.dequantise_bias(
        reference.gemm(problem.x, problem.weight), problem.token_scale, problem.channel_scale, None
    )
    for config in library.all_configs(32, 64, torch.int8):
        out = problem.run(library, config)
        assert out[3].isnan().all()
        others = torch.arange(24) != 3
        assert torch.equal(out[others].view(torch.int16), expected[others].view(torch.int16)), config.name


def test_ldmatrix_meets_no_bank_conflict(library: EmulatedLibrary) -> None:
    for dtype in EIGHT_BIT:
        problem = Problem.random(128, 64, 640, dtype, True, 6)
        for config in library.all_configs(64, 640, dtype.torch):
            problem.run(library, config)
    assert library.wavefronts() > 10_000
    assert library.conflicts() == 0


FAULTS = {
    "copies are not waited for": ("wait_copies<T::Stages - 3>", "wait_copies<T::Stages - 1>"),
    "nobody waits for the last reader": (
        "    __syncthreads();\n    fetch<T>(w, shared + reading",
        "    fetch<T>(w, shared + reading",
    ),
    "stages are not free yet": ("  __syncthreads();  // the stages are free\n", ""),
    "reads tokens that are not there": ("k < p.k && (there >> i & 1)", "k < p.k"),
    "K beyond its end": ("k < p.k && (there >> i & 1)", "there >> i & 1"),
    "copies steps that are not packed": ("stage * T::WarpsK + weight_step(i) < p.steps", "true"),
    "multiplies steps that are not packed": ("stage * T::WarpsK + w.k < p.steps", "true"),
    "writes channels that are not there": ("token < p.m && channel < p.n", "token < p.m"),
    "sums of others are not waited for": ("  __syncthreads();\n  if (w.k > 0) return", "  if (w.k > 0) return"),
    "finished tile is not whole": ("  __syncwarp();\n", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault: str, tmp_path: Path) -> None:
    """Else nothing above says anything."""
    broken = emulated_mma.build(tmp_path, FAULTS[fault])

    def fails(problem: Problem, config: Config) -> bool:
        try:
            return not torch.equal(problem.run(broken, config), problem.expected)
        except (SlideSparseError, AssertionError):
            return True

    problems = [Problem.random(37, 40, k, DType.INT8, True, k) for k in (1088, 160)]
    assert any(fails(each, config) for each in problems for config in broken.all_configs(40, 1088, torch.int8))


# -- host side -------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object], kind: type[SlideSparseError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "size", "dtype", "reason"),
    [
        ((7, 5), (16, 64, 64), torch.int8, r"mma.sp needs compute capability 8.0 \(Ampere\), this is 7.5"),
        ((8, 6), (16, 64, 64), torch.float8_e4m3fn, r"FP8E4M3 needs compute capability 8.9 \(Ada\), this is 8.6"),
        ((8, 6), (16, 60, 64), torch.int8, "M=16 N=60 K=64 INT8: N must be a multiple of 8"),
        ((8, 6), (16, 64, 48), torch.int8, "M=16 N=64 K=48 INT8: K must be a multiple of 32"),
        ((8, 6), (16, 0, 64), torch.int8, "N=0 .*M must be 0 to 2.30, N 8 to"),
        ((8, 6), (16, 64, 133_152), torch.int8, "more than 133144 products may not fit in int32"),
        ((8, 6), (16, 64, 64), torch.bfloat16, "BF16: only INT8 and FP8E4M3"),
    ],
)
def test_what_it_cannot_do_has_a_reason(
    library: EmulatedLibrary,
    capability: tuple[int, int],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    reason: str,
) -> None:
    refused(lambda: library.configs(capability, *size, dtype, Family.MMA), UnsupportedHere, reason)


def test_names_are_unique_and_tiles_fit_the_tokens(library: EmulatedLibrary) -> None:
    for m in (1, 16, 17, 64, 200, 512, 2048, 32768):
        for n, k in ((8, 32), (2560, 6912), (13824, 2560)):
            configs = library.configs((8, 0), m, n, k, torch.int8, Family.MMA)
            assert len({config.name for config in configs}) == len(configs)
            assert 2 <= len(configs) <= 16
            assert all(config.tokens == 16 or config.tokens < 2 * m for config in configs)
            assert m < 1024 or max(config.channels * config.tokens for config in configs) == 256 * 128
            assert configs == library.configs((12, 1), m, n, k, torch.int8, Family.MMA), "one table for all"


def test_a_config_of_another_table_is_refused(library: EmulatedLibrary) -> None:
    problem = Problem.random(8, 8, 32, DType.INT8, False, 1)
    config = library.configs(CAPABILITY, 8, 8, 32, torch.int8, Family.MMA)[0]
    for wrong in (
        replace(config, index=99),
        replace(config, tokens=config.tokens * 2),
        replace(config, split_k=2),
        replace(config, group=0),
        replace(config, cluster_tokens=2),
    ):
        refused(lambda wrong=wrong: problem.run(library, wrong), SlideSparseError, f"^fused GEMM {config.name}: ")  # type: ignore[misc]


def test_operands_are_looked_at(library: EmulatedLibrary) -> None:
    problem = Problem.random(8, 8, 64, DType.INT8, False, 1)
    config = library.configs(CAPABILITY, 8, 8, 64, torch.int8, Family.MMA)[0]
    odd = torch.zeros(8 * 64 + 8, dtype=torch.int8)[8:].view(8, 64)
    refused(lambda: replace(problem, x=odd).run(library, config), SlideSparseError, "must be aligned to 16 bytes")


def test_no_tokens_are_no_launch(library: EmulatedLibrary) -> None:
    config = library.configs(CAPABILITY, 1, 8, 32, torch.int8, Family.MMA)[0]
    problem = Problem.random(1, 8, 32, DType.INT8, False, 1)
    none, out = problem.x[:0], torch.empty(0, 8, dtype=torch.bfloat16)
    scales = problem.token_scale[:0], problem.channel_scale
    library.gemm(config, none, problem.packed, *scales, None, out, family=Family.MMA, n=8, k=32)
