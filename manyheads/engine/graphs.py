"""Decoding steps as CUDA graphs: one launch instead of some five hundred, whose cost the host could not hide.

A graph is for a number of rows and of nodes; a step takes the next larger number of rows, and the rest are dummy rows,
which write to the dummy page. Everything else (which rows, which tree, their lengths) is in tensors that the graph
reads. Each step is two graphs, so that the sampler can stand between them: up to the target's argmax at every node, and
from there to the next candidates.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from manyheads.engine.decode import Trees, expand, gain_sizes, settle
from manyheads.engine.memory import taken_bytes
from manyheads.engine.sampler import draw, edits_logits, node_block
from manyheads.engine.step import Request
from manyheads.models import ops
from manyheads.speculation.planner import NO_DRAFT, Draft, Planner
from manyheads.speculation.tree import Tree, TreeTensors, tree_tensors

if TYPE_CHECKING:
    from manyheads.engine.runner import Runner

T = TypeVar("T")

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Rows that graphs of roots alone are made for; beyond, steps of 64 rows."""
TREE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""The same for trees: the nodes of a step go to the rows that are surest, and to dummy rows only their roots."""


class Recorder:
    """Records graphs into one pool of memory, and on a stream of their own."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.memory_bytes = 0
        """What the graphs have taken of the device, with what their steps compute in."""

    @contextlib.contextmanager
    def session(self, device: torch.device) -> Iterator[None]:
        """Around what records: how much memory it takes."""
        torch.cuda.empty_cache()  # what is only kept for reuse is not the graphs', neither before nor after
        before = taken_bytes(device)
        yield
        torch.cuda.empty_cache()
        self.memory_bytes += taken_bytes(device) - before

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On a stream of its own, after what was launched and before what comes."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph that does again what the function does, into the tensors that it returns.

        NOTE: what the function reads is not kept alive by the graph.
        """
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # to collect another engine's graphs is not permitted while this one is recorded
        try:
            graph.capture_begin(pool=self._pool)
            result = function()
            graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph, result


@dataclass(frozen=True, eq=False)
class _Graphs:
    """The two halves of a step, and the tensors that they read and write, which a graph does not keep alive."""

    index: Tensor  # [R] int64
    tree: TreeTensors
    sizes: Tensor | None  # [sizes] int64, tokens whose gains the planner asks for
    trees: Trees
    logits: Tensor  # [T, V]
    target: Tensor  # [T] int64
    values: Tensor  # [R, …] int64, what `settle` reports
    forward: torch.cuda.CUDAGraph
    finish: torch.cuda.CUDAGraph


_Key = tuple[int, int, int]
"""Rows, nodes that a row may bring, in-flight tokens."""


class StepGraphs:
    """Captures decoding steps as they are first needed, and replays them."""

    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self._runner, self._recorder = runner, recorder
        self._graphs: dict[_Key, _Graphs] = {}
        self._drawn: dict[_Key, Tree] = {}  # what is in the graphs' tensors now

    def capture(self, planner: Planner) -> None:
        """Make the graphs of all numbers of rows, and of all drafts that the planner may choose."""
        most = self._runner.state.num_rows
        wanted: list[_Key] = []
        for num_rows in sorted({min(rows, most) for rows in ROWS}, reverse=True):
            wanted.append(self._key(num_rows, NO_DRAFT))
        for num_rows in sorted({min(rows, most) for rows in TREE_ROWS}, reverse=True):
            wanted += [self._key(num_rows, draft) for draft in planner.drafts(num_rows)]
        self._make(wanted)

    @staticmethod
    def _key(num_rows: int, draft: Draft) -> _Key:
        return num_rows, draft.tree.num_nodes, draft.num_tokens(num_rows)

    def _make(self, keys: list[_Key]) -> None:
        """Capture what is not there yet."""
        with self._recorder.session(self._runner.device):
            for key in keys:
                if key not in self._graphs:
                    self._graphs[key] = self._capture(*key)

    @staticmethod
    def serves(request: Request) -> bool:
        """Whether a decoding row wants nothing that only the eager step does."""
        params = request.params
        return params.logprobs is None and (params.greedy or params.acceptance == "exact")

    def launch(self, requests: list[Request], draft: Draft) -> tuple[Trees, Tensor]:
        """Run a step of decoding rows; `Trees` and the report of `settle`, with rows for the padding."""
        runner, state = self._runner, self._runner.state
        key = self._key(padded_rows(len(requests), state.num_rows, TREE_ROWS if draft.propose else ROWS), draft)
        if key not in self._graphs:
            self._make([key])
        graphs = self._graphs[key]
        padding = [state.num_rows] * (key[0] - len(requests))
        graphs.index.copy_(state.tensor([*(request.row or 0 for request in requests), *padding]), non_blocking=True)
        tensors = tree_tensors(draft.tree, runner.num_ranks, runner.device)
        if self._drawn.get(key) != draft.tree:
            self._drawn[key] = draft.tree
            self._write(graphs.tree, tensors)
        graphs.forward.replay()
        if any(not request.params.greedy or edits_logits(request) for request in requests):
            block = replace(node_block(requests, graphs.trees, state), tree=tensors)
            target, _ = draw(graphs.logits.float(), block, state)
            graphs.target.copy_(target)
        graphs.finish.replay()
        return graphs.trees, graphs.values

    @staticmethod
    def _write(into: TreeTensors, tensors: TreeTensors) -> None:
        for name in ("parent", "depth", "column", "bits"):
            getattr(into, name).copy_(getattr(tensors, name))
        width = tensors.path.shape[1]
        into.path[:, :width] = tensors.path
        into.path[:, width:] = tensors.path[:, -1:]

    def _capture(self, num_rows: int, num_nodes: int, num_tokens: int) -> _Graphs:
        runner, state = self._runner, self._runner.state
        device = runner.device
        index = torch.full((num_rows,), state.num_rows, device=device)
        zeros = torch.zeros(num_nodes, dtype=torch.int64, device=device)
        # as deep as the heads reach: paths of trees that are not are padded
        path = torch.zeros(num_nodes, state.num_heads + 1 if num_nodes > 1 else 1, dtype=torch.int64, device=device)
        tree = TreeTensors(zeros, zeros.clone(), zeros.clone(), torch.ones_like(zeros), path)
        sizes = gain_sizes(num_rows, num_nodes, device)

        def forward() -> tuple[Trees, Tensor, Tensor, Tensor]:
            trees = expand(state, index, tree, num_tokens, sizes)
            group = runner.group(trees.inflight, 0, num_nodes, runner.max_len)
            runner.attention.plan([group], trees.inflight.position, trees.inflight.slots)
            hidden = runner.model.forward(trees.inflight.tokens, runner.attention)
            logits = runner.model.lm_head(hidden)
            return trees, hidden, logits, ops.argmax(logits)

        def finish(trees: Trees, hidden: Tensor, target: Tensor) -> Tensor:
            values, last = settle(state, runner.cache, trees, target)
            runner.propose(index, hidden[last], num_nodes > 1)
            return values

        # once without a graph: kernels are compiled and libraries set up, which a capture cannot hold
        with self._recorder.aside():
            trees, hidden, _, target = forward()
            finish(trees, hidden, target)
            first, (trees, hidden, logits, target) = self._recorder.record(forward)
            second, values = self._recorder.record(lambda: finish(trees, hidden, target))
        return _Graphs(index, tree, sizes, trees, logits, target, values, first, second)


def padded_rows(count: int, most: int, sizes: tuple[int, ...]) -> int:
    """The number of rows of the graph that serves `count` rows where at most `most` run."""
    return min(next((rows for rows in sizes if rows >= count), -(-count // 64) * 64), most)
