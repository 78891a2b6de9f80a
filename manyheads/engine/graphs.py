"""Recording of callables as CUDA graphs: one launch instead of some five hundred, whose cost the host could not hide.

It knows nothing of what it records. Whoever records reads and writes tensors that stay where they are.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from manyheads.engine.memory import taken_bytes

T = TypeVar("T")


class Recorded(Generic[T]):
    """A callable that was recorded. NOTE: what it reads is not kept alive by the graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: T) -> None:
        self._graph, self.result = graph, result

    def replay(self) -> T:
        """Do it again, into the tensors of `result`, which the next graph to run may overwrite."""
        self._graph.replay()
        return self.result


class Recorder:
    """Records graphs into one pool of memory, and on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.tell: Callable[[str], None] = lambda what: None
        """Called for each graph."""
        self.memory_bytes = 0
        """What the graphs have taken of the device, with what their steps compute in."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around what records: how much memory it takes."""
        torch.cuda.empty_cache()  # what is only kept for reuse is not the graphs', neither before nor after
        before = taken_bytes(self._device)
        yield
        torch.cuda.empty_cache()
        # what other processes take of the device counts as well, and some may have ended meanwhile
        self.memory_bytes += max(0, taken_bytes(self._device) - before)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the recorder's stream, after what was launched and before what comes."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], T]) -> Recorded[T]:
        """A graph that does again what the function does. The function ran before: kernels are compiled and libraries
        set up, which a capture cannot hold."""
        self.tell("graph")
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # to collect another engine's graphs is not permitted while this one is recorded
        try:
            # other threads may ask the device for things meanwhile, as those do that look after NCCL's work
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            result = function()
            graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return Recorded(graph, result)
