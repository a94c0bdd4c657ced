"""GPU time of steps that are one CUDA graph: events right before and behind each replay, no Python between them.

Where a step waits for the host, as in decode, the time of the step is the host's. The graph's is the GPU's alone.
"""

from __future__ import annotations

from typing import Any

import torch


class GraphTimer:
    """Times replays in this process while `on`. `install` once; the replaced method calls the genuine one."""

    def __init__(self) -> None:
        self.on = False
        self._events: list[tuple[Any, Any]] = []

    def install(self) -> GraphTimer:
        genuine = torch.cuda.CUDAGraph.replay

        def replay(graph: torch.cuda.CUDAGraph) -> None:
            if not self.on:
                genuine(graph)
                return
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            genuine(graph)
            end.record()
            self._events.append((start, end))

        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign, assignment]
        return self

    def take(self) -> list[float]:
        """Seconds of each replay since the last call, in their order; waits for the last of them."""
        events, self._events = self._events, []
        if events:
            events[-1][1].synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]
