"""Events around replays of CUDA graphs, on a stand-in for torch's graphs and events whose clock is a list."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slidesparse.measure.engines.graph_timer import GraphTimer


class Gpu:
    """What was handed to it, in order; `now` is its clock, in ms."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    device = Gpu()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            device.done.append("event")
            self.at = device.now

        def synchronize(self) -> None:
            device.done.append("waited")

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class CUDAGraph:
        def __init__(self, ms: float) -> None:
            self.ms = ms

        def replay(self) -> None:
            device.done.append("graph")
            device.now += self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    return device


def graphs(*ms: float) -> list[Callable[[], None]]:
    return [torch.cuda.CUDAGraph(one).replay for one in ms]  # type: ignore[arg-type]


def test_replays_are_timed_while_it_is_on(gpu: Gpu) -> None:
    timer = GraphTimer().install()
    for number, replay in enumerate(graphs(5.0, 2.0, 3.0, 7.0)):
        timer.on = number in (1, 2)
        gpu.now += 100  # the host, between steps
        replay()
    assert timer.take() == pytest.approx([2e-3, 3e-3])
    assert gpu.done == ["graph", *["event", "graph", "event"] * 2, "graph", "waited"]


def test_what_was_taken_is_not_taken_again(gpu: Gpu) -> None:
    timer = GraphTimer().install()
    timer.on = True
    (replay,) = graphs(4.0)
    replay()
    assert len(timer.take()) == 1
    assert timer.take() == []
    replay()
    assert timer.take() == pytest.approx([4e-3])
