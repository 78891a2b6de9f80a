"""Decoding steps as CUDA graphs: one launch instead of some five hundred, whose cost the host could not hide.

A graph is for a number of rows and of nodes; a step takes the next larger number of rows, and the rest are dummy rows,
which write to the dummy page. Everything else (which rows, which tree, their lengths) is in tensors that the graph
reads. Each step is two graphs, so that the sampler can stand between them: up to the target's argmax at every node, and
from there to the next candidates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from manyheads.engine.decode import Trees, advance, expand, last_token, verify
from manyheads.engine.memory import taken_bytes
from manyheads.engine.sampler import draw, edits_logits, node_block
from manyheads.engine.step import Request
from manyheads.medusa.planner import SIZES, Draft, Planner
from manyheads.medusa.tree import Tree, TreeTensors, tree_tensors

if TYPE_CHECKING:
    from manyheads.engine.runner import Runner

T = TypeVar("T")

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Rows that graphs are made for; beyond, steps of 64 rows."""


@dataclass(frozen=True, eq=False)
class _Graphs:
    """The two halves of a step, and the tensors that they read and write, which a graph does not keep alive."""

    index: Tensor  # [R] int64
    tree: TreeTensors
    sizes: Tensor | None  # [sizes] int64, where the gains stand that the planner asks for
    trees: Trees
    logits: Tensor  # [T, V]
    target: Tensor  # [T] int64
    values: Tensor  # [R, …] int64, what `advance` returns
    gains: Tensor | None  # [sizes] float32
    forward: torch.cuda.CUDAGraph
    finish: torch.cuda.CUDAGraph


_Key = tuple[int, int, int]
"""Rows, nodes that a row may bring, in-flight tokens."""


class StepGraphs:
    """Captures decoding steps as they are first needed, and replays them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.memory_bytes = 0
        """What the graphs have taken of the device, with what their steps compute in."""
        self._graphs: dict[_Key, _Graphs] = {}
        self._drawn: dict[_Key, Tree] = {}  # what is in the graphs' tensors now
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, planner: Planner, max_inflight: int) -> None:
        """Make the graphs of all numbers of rows, and of all drafts up to so many in-flight tokens."""
        most = self._runner.state.num_rows
        wanted: list[_Key] = []
        for num_rows in sorted({min(rows, most) for rows in ROWS}, reverse=True):
            drafts = (planner.draft(size) for size in SIZES)
            wanted += [self._key(num_rows, d) for d in drafts if d.num_tokens(num_rows) <= max(max_inflight, num_rows)]
        self._make(wanted)

    @staticmethod
    def _key(num_rows: int, draft: Draft) -> _Key:
        return num_rows, draft.tree.num_nodes, draft.num_tokens(num_rows)

    def _make(self, keys: Iterable[_Key]) -> None:
        """Capture what is not there yet, and measure it."""
        torch.cuda.empty_cache()  # what is only kept for reuse is not the graphs', neither before nor after
        before = taken_bytes(self._runner.device)
        for key in keys:
            if key not in self._graphs:
                self._graphs[key] = self._capture(*key)
        torch.cuda.empty_cache()
        self.memory_bytes += taken_bytes(self._runner.device) - before

    @staticmethod
    def serves(request: Request) -> bool:
        """Whether a decoding row wants nothing that only the eager step does."""
        params = request.params
        return params.logprobs is None and (params.greedy or params.acceptance == "exact")

    def launch(self, requests: list[Request], draft: Draft) -> tuple[Trees, Tensor, Tensor | None]:
        """Run a step of decoding rows; `Trees`, the report of `advance` and the gains, with rows for the padding."""
        runner, state = self._runner, self._runner.state
        key = self._key(padded_rows(len(requests), state.num_rows), draft)
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
        return graphs.trees, graphs.values, graphs.gains

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
        sizes = None
        if num_nodes > 1:
            sizes = torch.tensor([min(int(size * num_rows), num_rows * num_nodes) - 1 for size in SIZES], device=device)

        def forward() -> tuple[Trees, Tensor, Tensor, Tensor, Tensor | None]:
            trees = expand(state, index, tree, num_tokens)
            group = runner.group(trees.inflight, 0, num_nodes, runner.max_len)
            runner.attention.plan([group], trees.inflight.position, trees.inflight.slots)
            hidden = runner.model.forward(trees.inflight.tokens, runner.attention)
            logits = runner.model.lm_head(hidden)
            return trees, hidden, logits, logits.argmax(dim=-1), trees.gains[sizes] if sizes is not None else None

        def finish(trees: Trees, hidden: Tensor, target: Tensor) -> Tensor:
            verdict = verify(trees, target)
            values = advance(state, runner.cache, trees, verdict)
            state.cached_len[state.num_rows].zero_()  # the dummy row stays where it is
            runner.propose(index, hidden[last_token(trees, verdict)], num_nodes > 1)
            state.chances[state.num_rows, 1:].zero_()  # and brings nothing
            return values

        # once without a graph: kernels are compiled and libraries set up, which a capture cannot hold
        with self._aside():
            trees, hidden, _, target, _ = forward()
            finish(trees, hidden, target)
            first, (trees, hidden, logits, target, gains) = self._record(forward)
            second, values = self._record(lambda: finish(trees, hidden, target))
        return _Graphs(index, tree, sizes, trees, logits, target, values, gains, first, second)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On a stream of its own, after what was launched and before what comes."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph that does again what the function does, into the tensors that it returns."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        result = function()
        graph.capture_end()
        return graph, result


def padded_rows(count: int, most: int) -> int:
    """The number of rows of the graph that serves `count` rows where at most `most` run."""
    return min(next((rows for rows in ROWS if rows >= count), -(-count // 64) * 64), most)
