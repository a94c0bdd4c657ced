"""The Hopper kernel itself, run on the CPU: right in every tile, cluster and split, and its faults would be seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import emulated_wgmma
import numpy as np
import pytest
import torch
from emulated_wgmma import EmulatedLibrary
from test_fused_emulated import Problem, refused
from test_two_of_four import EIGHT_BIT

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import fused_pack_wgmma, reference
from slidesparse.kernels.fused_library import Config, Family


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return emulated_wgmma.build_gpu(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def library(gpu: list[Path], tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    return emulated_wgmma.build(tmp_path_factory.mktemp("emulated") / "whole", gpu)


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))


def packed(problem: Problem) -> Problem:
    return replace(problem, packed=fused_pack_wgmma.pack(problem.weight, "weight"), family=Family.WGMMA)


def made(m: int, n: int, k: int, dtype: DType, bias: bool, seed: int) -> Problem:
    return packed(Problem.random(m, n, k, dtype, bias, seed))


def shared(config: Config, channels: int, tokens: int, **other: int) -> Config:
    return replace(config, cluster_channels=channels, cluster_tokens=tokens, **other)


def right(library: EmulatedLibrary, problem: Problem, config: Config, seed: int) -> None:
    library.seed(seed)
    assert torch.equal(problem.run(library, config), problem.expected), (config, seed)


CLUSTERS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_every_tile_in_every_cluster(library: EmulatedLibrary, cluster: tuple[int, int], dtype: DType) -> None:
    """Ragged everywhere, more stages than the ring has, and a cluster that reaches beyond tokens and channels."""
    m, n, k = 217, 328, 1120
    problem = made(m, n, k, dtype, cluster[0] == 2, sum(cluster))
    tiles = library.all_tiles(n, k, dtype.torch)
    assert len(tiles) == 11, "all tiles are tried"
    library.gpu(4)
    several = False
    for seed, tile in enumerate(tiles):
        right(library, problem, shared(tile, *cluster, head_start=seed % 4, group=1 + seed % 3), seed)
        blocks = -(-n // tile.channels) * -(-m // tile.tokens)
        several |= blocks > library.launched_blocks()
    assert several, "blocks walk over several tiles"


EDGES = [
    (1, 8, 32),  # the smallest: half of a step, one stage, shorter than any head start
    (33, 72, 160),
    (300, 136, 256),
    (64, 512, 128),
]


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_every_head_start_at_the_edges(library: EmulatedLibrary, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    library.gpu(2)
    for number, dtype in enumerate(EIGHT_BIT):
        problem = made(m, n, k, dtype, number == 0, sum(shape))
        for seed, tile in enumerate(library.all_tiles(n, k, dtype.torch)):
            for head_start in range(seed % 2, 4, 2):
                cluster = (2, 1) if (seed + number) % 3 == 0 else (1, 1)
                right(library, problem, shared(tile, *cluster, head_start=head_start), seed)


@pytest.mark.parametrize("split", [2, 3, 4, 5, 6, 8])
def test_every_split(library: EmulatedLibrary, split: int) -> None:
    """Shares of K and of the tokens that are as equal as they get, the shortest among them; the GPU is smaller than the
    launch."""
    library.gpu(8)
    tried = set()
    for m, n, k in ((37, 264, 128 * split), (130, 72, 256 * split + 416)):
        for seed, dtype in enumerate(EIGHT_BIT):
            problem = made(m, n, k, dtype, m == 37, m + split)
            for tile in library.all_tiles(n, k, dtype.torch):
                long_enough = k // 128 // split >= (2 if tile.channels == 256 else 1)
                if tile.tokens <= 128 and tile.tokens // 8 >= split and long_enough:
                    right(library, problem, replace(tile, split_k=split, head_start=0 if m == 37 else 2), seed)
                    tried.add((tile.channels, tile.tokens))
    assert len(tried) == (6 if split > 4 else 7)


def test_random_problems(library: EmulatedLibrary) -> None:
    chance = np.random.default_rng(90)
    for number in range(16):
        dtype = EIGHT_BIT[number % 2]
        m, n, k = (int(chance.integers(1, most)) * unit for most, unit in ((260, 1), (50, 8), (40, 32)))
        problem = made(m, n, k, dtype, bool(chance.integers(2)), number)
        tiles = library.all_tiles(n, k, dtype.torch)
        tile = tiles[chance.integers(len(tiles))]
        cluster = CLUSTERS[chance.integers(len(CLUSTERS))]
        library.gpu(int(chance.choice([4, 6, 8])))
        other = {"group": int(chance.integers(1, 9)), "head_start": int(chance.integers(0, tile.stages))}
        right(library, problem, shared(tile, *cluster, **other), number)


def test_what_is_offered_runs(library: EmulatedLibrary) -> None:
    library.gpu(8)
    for m, n, k in ((40, 264, 1088), (257, 72, 160)):
        problem = made(m, n, k, DType.INT8, True, m)
        configs = library.configs(emulated_wgmma.CAPABILITY, m, n, k, torch.int8, Family.WGMMA)
        assert len({config.name for config in configs}) == len(configs) > 8
        for config in configs:
            right(library, problem, config, m)


def test_int8_sums_at_the_ends_of_their_range(library: EmulatedLibrary) -> None:
    """Beyond 2**24 float32 no longer holds them: the one rounding is to nearest even, after all of K."""
    m, n, k = 16, 16, 4096
    weight = torch.zeros(n, k, dtype=torch.int8)
    weight[:, ::2] = torch.where(torch.arange(n)[:, None] % 2 == 0, 127, -127)
    x = torch.full((m, k), 127, dtype=torch.int8)
    x[:, 0] = torch.arange(m)
    ones = torch.ones(16, 1)
    expected = reference.dequantise_bias(reference.gemm(x, weight), ones, ones, None)
    assert float(expected.abs().max()) > 2**24
    problem = packed(Problem(x, weight, x, ones, ones, None, expected))
    library.gpu(8)
    for tile in library.all_tiles(n, k, torch.int8):
        right(library, problem, tile, tile.index)
        if tile.tokens <= 64:
            right(library, problem, replace(tile, split_k=4), tile.index)


def test_the_sign_of_zero_and_nan_scales(library: EmulatedLibrary) -> None:
    """No bias leaves -0 as it is; a token whose scale is NaN is NaN as a whole, and no other."""
    problem = made(24, 32, 512, DType.INT8, False, 5)
    problem.token_scale[3] = float("nan")
    problem.token_scale[4] = -0.0
    sums = reference.gemm(problem.x, problem.weight)
    expected = reference.dequantise_bias(sums, problem.token_scale, problem.channel_scale, None)
    others = torch.arange(24) != 3
    for tile in library.all_tiles(32, 512, torch.int8):
        for split in (1, 2) if tile.tokens <= 128 else (1,):
            out = problem.run(library, replace(tile, split_k=split))
            assert out[3].isnan().all()
            assert torch.equal(out[others].view(torch.int16), expected[others].view(torch.int16)), tile.name


# -- faults ----------------------------------------------------------------------------------------------------------


EACH = "  for (int i = 0; i < T::Blocks; ++i)"
RELEASE = "  if (k > 0) w.release();"
TAIL_RELEASE = "    if (k == 0 && !alone) w.release();"
UNDER_WAY = "w.under_way(w.until_under_way);"
MEET = "  warpgroup_sync(1 + w.warpgroup);"
WAIT_FREE = "barrier_wait(shared.empty(slot.index), slot.parity);"
FENCED = "  fence();\n#pragma unroll\n" + EACH + " issue(w, w.slot.index, i, d[i], metadata[i], k > 0);"
WAITED = "  commit();\n  wait<1>();\n#pragma unroll\n" + EACH + " pin_all<T>(d[i]);"
TAIL_ISSUE = "issue(w, slots[k], 1, d[1], metadata[k][1], k > 0 || !alone);"
LAST_STAGES = "(T::kTail > 0 ? T::kTail : 1)"
FAULTS: dict[str, emulated_wgmma.Fault] = {
    # stages
    "stages are not released": [(RELEASE, "")],
    "the last stages of a tile are not released": [(LAST_STAGES, LAST_STAGES + " - 1")],
    "the stage before the last ones is not released": [(TAIL_RELEASE, "")],
    "a stage is released while it is read": [(RELEASE, "w.release();"), (TAIL_RELEASE, "")],
    "the last stages are released after the first block": [(TAIL_RELEASE, "if (k > 0 || !alone) w.release();")],
    "a stage is released before the wait": [(WAITED, WAITED.replace("wait<1>", "wait<2>"))],
    "copies do not wait for a free stage": [(WAIT_FREE, "")],
    "copies wait for the other phase": [(WAIT_FREE, "barrier_wait(shared.empty(slot.index), slot.parity ^ 1);")],
    "the parity stays": [("parity ^= 1;", "")],
    "fewer bytes are announced than come": [
        ("barrier_expect(full, T::kStage);", "barrier_expect(full, T::kStage - 16);")
    ],
    "a short tile does not end the head start": [(UNDER_WAY, "")],
    # clusters
    "a free stage is asked of itself alone": [("p.split > 1 ? rank.all : lane + rank.token * p.cx", "rank.all")],
    "a free stage has too few arrivals": [("kMultiplying * 4 * (p.cx + p.ct - 1)", "kMultiplying * 4")],
    "weights go to other blocks": [("same_channels |= 1 << (rank.channel + t * p.cx);", "same_channels |= 1 << t;")],
    "tokens go nowhere else": [
        ("same_tokens |= 1 << (c + rank.token * p.cx);", "same_tokens = uint16_t(1 << rank.all);")
    ],
    "weights beyond the last are loaded": [("at.block < p.row_blocks ? at.block : 0", "at.block")],
    "barriers are not shown to others": [("barriers_ready();", "")],
    "others begin before the barriers are there": [
        ("if (p.cx * p.ct > 1)\n    cluster_sync();", "if (p.cx * p.ct > 1 && !FAULT)\n    cluster_sync();")
    ],
    "warps begin before the barriers of their own block are there": [("    block_sync();", "")],
    "a block leaves while others send to it": [
        ("cluster_sync();  // no block", "if (!FAULT) cluster_sync();  // no block")
    ],
    # wgmma
    "stages share their metadata registers": [
        ("multiply_stage(w, d, odd, k + 1);", "multiply_stage(w, d, even, k + 1);")
    ],
    "registers are not fenced": [(FENCED, FENCED.replace("  fence();", ""))],
    "sums are read before they are made": [("  wait<0>();", "wait<1>();")],
    "sums of the first block are read before they are made": [
        ("  commit();\n  wait<1>();\n  pin_all<T>(d[0]);", "commit();")
    ],
    "sums of the tile before stay": [("k ? 1 : add", "1")],
    "the second step has the tokens of the first": [("of_tokens + 4 * k", "of_tokens")],
    "the last stages of the second block are all one": [(TAIL_ISSUE, TAIL_ISSUE.replace("slots[k]", "slots[0]"))],
    # epilogue
    "stores are not published": [("  publish();", "")],
    "a chunk is sent before it is whole": [(MEET, "")],
    "a ring of one": [("w.chunk = w.chunk + 1 == kRing ? 0 : w.chunk + 1;", "w.chunk = 0;")],
    "a chunk may wait longer": [("stores_read<kRing - 2>();", "stores_read<kRing - 1>();")],
    "the block ends before its stores": [("if (w.thread == 0) stores_read<0>();", "")],
    "chunks are not swizzled": [("piece ^ (token & 7)", "piece")],
    "scales are not waited for": [("copies_done();", "")],
    "scales of tokens that are not there": [("token + i < p.m", "true")],
    # split
    "sums come where stages are read": [("warpgroups_sync(1 + kMultiplying);", "")],
    "sums of others are not waited for": [
        ("cluster_sync();\n  const int lane", "if (!FAULT) cluster_sync();\n  const int lane"),
        ("if (T::kSplits && p.split > 1) cluster_sync();", "if (T::kSplits && p.split > 1 && !FAULT) cluster_sync();"),
    ],
}


@pytest.fixture(scope="module")
def faulty(gpu: list[Path], tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    tiles = "2, 64", "1, 64"
    return emulated_wgmma.build(tmp_path_factory.mktemp("emulated") / "faulty", gpu, list(FAULTS.values()), tiles)


@pytest.fixture(scope="module")
def attempts(faulty: EmulatedLibrary) -> list[tuple[Problem, Config, int]]:
    """Few ways to run it, which go wrong with any of the faults. And the sizes of the GPU."""
    large = made(200, 328, 1120, DType.INT8, True, 1)
    short, shortest = made(130, 136, 160, DType.FP8, False, 2), made(40, 136, 32, DType.FP8, False, 2)
    many = made(1000, 72, 480, DType.INT8, False, 3)
    two, one = faulty.all_tiles(328, 1120, torch.int8)
    ways = [(1, 1), (2, 1), (2, 2)]
    return [
        *((large, shared(two, *cluster, head_start=2), 4) for cluster in ways),
        (large, replace(one, split_k=2, head_start=0), 8),
        (shortest, shared(one, 2, 1, head_start=3), 2),
        (short, shared(two, 2, 1, head_start=3), 2),
        (many, shared(two, 1, 1, head_start=0), 1),
    ]


def failures(library: EmulatedLibrary, attempts: list[tuple[Problem, Config, int]]) -> Iterator[str]:
    for seed in range(3):
        for problem, config, blocks in attempts:
            library.gpu(blocks)
            library.seed(seed)
            try:
                if not torch.equal(problem.run(library, config), problem.expected):
                    yield "wrong"
            except (SlideSparseError, AssertionError) as error:
                yield str(error)


def test_without_a_fault_nothing_is_seen(faulty: EmulatedLibrary, attempts: list[tuple[Problem, Config, int]]) -> None:
    faulty.fault(0)
    assert list(failures(faulty, attempts)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(
    faulty: EmulatedLibrary, attempts: list[tuple[Problem, Config, int]], fault: str
) -> None:
    """Else nothing above says anything."""
    faulty.fault(1 + list(FAULTS).index(fault))
    seen = next(failures(faulty, attempts), None)
    assert seen is not None
    print(f"{fault}: {seen}")


# -- host side -------------------------------------------------------------------------------------------------------


def test_other_gpus_are_refused(library: EmulatedLibrary) -> None:
    for capability in ((8, 0), (10, 0)):
        reason = r"wgmma needs compute capability 9.0 \(Hopper\)"
        refused(lambda c=capability: library.configs(c, 8, 8, 32, torch.int8, Family.WGMMA), UnsupportedHere, reason)  # type: ignore[misc]


def test_a_config_of_another_table_or_that_cannot_run_is_refused(library: EmulatedLibrary) -> None:
    problem = made(8, 8, 256, DType.INT8, False, 1)
    tiles = library.all_tiles(8, 256, torch.int8)
    large, small = tiles[0], tiles[-1]
    for wrong, reason in (
        (replace(small, index=99), "no kernel of this number"),
        (replace(small, tokens=64), "sizes are not those of this kernel"),
        (replace(small, group=0), "a size below 1"),
        (replace(small, cluster_channels=4, split_k=4), "at most 8 blocks"),
        (replace(large, split_k=2), "this tile cannot be split so"),
        (replace(small, split_k=4), "this tile cannot be split so"),  # more shares than stages
        (replace(small, split_k=2, cluster_channels=2), "this tile cannot be split so"),
        (replace(small, cluster_tokens=4), "parts of a tile are not whole"),
        (replace(small, head_start=small.stages), "the head start is longer than the stages"),
    ):
        refused(lambda wrong=wrong: problem.run(library, wrong), SlideSparseError, f"^fused GEMM .*{reason}$")  # type: ignore[misc]


def test_a_bias_between_words_is_refused(library: EmulatedLibrary) -> None:
    """It is copied two channels at a time."""
    problem = made(8, 8, 32, DType.INT8, True, 1)
    config = library.all_tiles(8, 32, torch.int8)[-1]
    for first, reason in ((1, "bias must be aligned to 4 bytes"), (2, None)):
        room = torch.zeros(16, dtype=torch.bfloat16)
        room[first : first + 8] = problem.bias
        moved = replace(problem, bias=room[first : first + 8])
        if reason is None:
            right(library, moved, config, 1)
        else:
            refused(lambda moved=moved: moved.run(library, config), SlideSparseError, reason)  # type: ignore[misc]


def test_a_gpu_without_room_for_a_cluster(library: EmulatedLibrary) -> None:
    problem = made(8, 8, 256, DType.INT8, False, 1)
    config = shared(library.all_tiles(8, 256, torch.int8)[-1], 2, 1)
    library.gpu(1)
    refused(lambda: problem.run(library, config), UnsupportedHere, "no room for clusters of 2")


def test_no_tokens_are_no_launch(library: EmulatedLibrary) -> None:
    problem = made(1, 8, 32, DType.INT8, False, 1)
    config = library.configs(emulated_wgmma.CAPABILITY, 1, 8, 32, torch.int8, Family.WGMMA)[0]
    none, out = problem.x[:0], torch.empty(0, 8, dtype=torch.bfloat16)
    scales = problem.token_scale[:0], problem.channel_scale
    library.gemm(config, none, problem.packed, *scales, None, out, family=Family.WGMMA, n=8, k=32)
