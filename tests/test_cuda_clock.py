"""How graphs are captured, on a torch.cuda made of Python that has the rules of torch's allocator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from slidesparse.measure import cuda_clock
from slidesparse.measure.cuda_clock import CudaClock, Graph

GIB = 1 << 30


class Allocator:
    """Pools of captures: how many graphs use each, and the streams that captured into it."""

    def __init__(self) -> None:
        self.uses: Counter[int] = Counter()
        self.streams: dict[int, set[int]] = {}
        self.free = 100 * GIB
        self.emptied = 0

    def graph(self) -> object:
        allocator = self

        class FakeGraph:
            pool: int | None = None

            def capture_begin(self, pool: int) -> None:
                assert pool not in allocator.uses or allocator.uses[pool] > 0, "use_count > 0 INTERNAL ASSERT FAILED"
                allocator.uses[pool] += 1
                allocator.streams.setdefault(pool, set()).add(allocator.current)
                self.pool = pool

            def capture_end(self) -> None:
                pass

            def __del__(self) -> None:
                if self.pool is not None:
                    allocator.uses[self.pool] -= 1

        return FakeGraph()

    current = 0

    def enter(self, stream: SimpleNamespace) -> nullcontext[None]:
        self.current = stream.number
        return nullcontext()

    def empty(self) -> None:
        self.emptied += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    fake, handles, streams = Allocator(), iter(range(100)), iter(range(1, 100))

    def stream() -> SimpleNamespace:
        return SimpleNamespace(number=next(streams), wait_stream=lambda other: None)

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(cuda, "CUDAGraph", fake.graph)
    monkeypatch.setattr(cuda, "Stream", stream)
    monkeypatch.setattr(cuda, "stream", fake.enter)
    monkeypatch.setattr(cuda, "current_stream", stream)
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (fake.free, 140 * GIB))
    monkeypatch.setattr(cuda, "empty_cache", fake.empty)
    cuda_clock._capture_stream.cache_clear()
    yield fake
    cuda_clock._capture_stream.cache_clear()


def captured(count: int) -> list[Graph]:
    return [CudaClock().prepare([lambda: None], brief=True) for _ in range(count)]


def test_graphs_that_live_together_share_pool_and_stream(allocator: Allocator) -> None:
    """torch hands freed memory of a pool only to captures on the same stream."""
    graphs = captured(3)
    assert len({graph.pool.handle for graph in graphs}) == 1
    assert [len(streams) for streams in allocator.streams.values()] == [1]


def test_a_pool_is_not_used_again_once_its_graphs_are_gone(allocator: Allocator) -> None:
    first = captured(2)[0].pool.handle
    assert captured(1)[0].pool.handle != first


@pytest.mark.parametrize("l2_mib", [40, 50, 126])
def test_the_smallest_kernels_of_a_plan_take_turns_beyond_the_cache(
    l2_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantise at M = 64, K = 2560: half a megabyte a set, on A100, H200 and B200."""
    properties = SimpleNamespace(L2_cache_size=l2_mib << 20)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    size = 64 * 2560 * 3
    assert cuda_clock.sets_beyond_l2(size) * size >= 2 * properties.L2_cache_size


def test_memory_of_dead_pools_is_given_back_before_it_is_missed(allocator: Allocator) -> None:
    captured(1)
    assert allocator.emptied == 0, "emptying takes time"
    allocator.free = 60 * GIB
    kept = captured(2)
    assert allocator.emptied == 1, "once for all graphs of a generation"
    del kept
