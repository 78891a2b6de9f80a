"""Decoding steps as CUDA graphs: one launch instead of some five hundred, whose cost the host could not hide.

A graph is for a number of rows and of nodes; a step takes the next larger number of rows, and the rest are dummy rows,
which write to the dummy page. Everything else (which rows, which tree, their lengths) is in tensors that the graph
reads. Each step is two graphs, so that the sampler can stand between them: up to the target's argmax at every node, and
from there to the next candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.engine.decode import InFlight, advance, expand
from manyheads.engine.sampler import NodeBlock, draw, edits_logits
from manyheads.engine.step import Request
from manyheads.medusa.tree import Tree, TreeTensors, tree_tensors
from manyheads.medusa.verify import agrees, longest_path

if TYPE_CHECKING:
    from manyheads.engine.runner import Runner

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Rows that graphs are made for; beyond, steps of 64 rows."""


@dataclass(frozen=True, eq=False)
class _Graphs:
    """The two halves of a step, and the tensors that they read and write."""

    index: Tensor  # [R] int64
    tree: TreeTensors
    inflight: InFlight
    logits: Tensor  # [R · n, V]
    target: Tensor  # [R · n] int64
    values: Tensor  # [R, …] int64, what `advance` returns
    forward: torch.cuda.CUDAGraph
    finish: torch.cuda.CUDAGraph


class StepGraphs:
    """Captures decoding steps as they are first needed, and replays them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._graphs: dict[tuple[int, int, bool], _Graphs] = {}
        self._trees: dict[tuple[int, int, bool], Tree] = {}  # what is in the graphs' tensors now
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, sizes: tuple[int, ...], max_inflight: int) -> None:
        """Make the graphs of all numbers of rows, for trees of these sizes up to so many in-flight tokens."""
        most = self._runner.state.num_rows
        for num_rows in sorted({min(rows, most) for rows in ROWS}, reverse=True):
            for size in sizes:
                if num_rows * size <= max_inflight or size == 1:
                    self._get(num_rows, size, propose=size > 1)

    def _get(self, num_rows: int, num_nodes: int, propose: bool) -> _Graphs:
        key = (num_rows, num_nodes, propose)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    @staticmethod
    def serves(request: Request) -> bool:
        """Whether a decoding row wants nothing that only the eager step does."""
        params = request.params
        return params.logprobs is None and (params.greedy or params.acceptance == "exact")

    def launch(self, requests: list[Request], tree: Tree, propose: bool) -> tuple[Tensor, Tensor]:
        """Run a step of rows that bring the same tree; their slots [R], and the report [R, …] of `advance`."""
        state = self._runner.state
        key = (padded_rows(len(requests), state.num_rows), tree.num_nodes, propose)
        graphs = self._get(*key)
        padding = [state.num_rows] * (key[0] - len(requests))
        graphs.index.copy_(state.tensor([*(request.row or 0 for request in requests), *padding]), non_blocking=True)
        if self._trees.get(key) != tree:
            self._trees[key] = tree
            self._write(graphs.tree, tree)
        graphs.forward.replay()
        if any(not request.params.greedy or edits_logits(request) for request in requests):
            count = len(requests) * tree.num_nodes
            inflight = graphs.inflight
            rows = slice(0, len(requests))
            block = NodeBlock(
                requests,
                0,
                graphs.index[rows],
                inflight.position[rows] + 1,
                inflight.tokens[rows],
                tree_tensors(tree, self._runner.num_ranks, self._runner.device),
            )
            target, _ = draw(graphs.logits[:count].float(), [block], state)
            graphs.target[:count].copy_(target)
        graphs.finish.replay()
        return graphs.index[: len(requests)], graphs.values[: len(requests)]

    def _write(self, into: TreeTensors, tree: Tree) -> None:
        tensors = tree_tensors(tree, self._runner.num_ranks, self._runner.device)
        for name in ("parent", "depth", "column", "bits"):
            getattr(into, name).copy_(getattr(tensors, name))
        width = tensors.path.shape[1]
        into.path[:, :width] = tensors.path
        into.path[:, width:] = tensors.path[:, -1:]

    def _capture(self, num_rows: int, num_nodes: int, propose: bool) -> _Graphs:
        runner, state = self._runner, self._runner.state
        device = runner.device
        index = torch.full((num_rows,), state.num_rows, device=device)
        zeros = torch.zeros(num_nodes, dtype=torch.int64, device=device)
        width = state.num_heads + 1 if num_nodes > 1 else 1
        path = torch.zeros(num_nodes, width, dtype=torch.int64, device=device)
        tree = TreeTensors(zeros, zeros.clone(), zeros.clone(), torch.ones_like(zeros), path)
        made: dict[str, Tensor] = {}

        def forward() -> InFlight:
            inflight = expand(state, index, tree)
            group = Group(0, num_rows, tree, state.cached_len[index], state.block_table[index], runner.max_len)
            runner.attention.plan([group], inflight.position.flatten(), inflight.slots.flatten())
            made["hidden"] = runner.model.forward(inflight.tokens.flatten(), runner.attention)
            made["logits"] = runner.model.lm_head(made["hidden"])
            made["target"] = made["logits"].argmax(dim=-1)
            return inflight

        def finish(inflight: InFlight) -> None:
            target = made["target"].view(num_rows, num_nodes)
            verdict = longest_path(inflight.tokens, target, agrees(inflight.tokens, target, tree), tree)
            made["values"] = advance(state, runner.cache, inflight, verdict)
            state.cached_len[state.num_rows].zero_()  # the dummy row stays where it is
            if propose and runner.heads is not None:
                first = torch.arange(0, num_rows * num_nodes, num_nodes, device=device)
                proposals = runner.heads.candidates(made["hidden"][first + verdict.last], runner.num_ranks)
                state.candidates[index] = proposals.flatten(1)

        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # once without a graph: kernels are compiled and libraries set up, which a capture cannot hold
            finish(forward())
            first.capture_begin(pool=self._pool)
            inflight = forward()
            first.capture_end()
            second.capture_begin(pool=self._pool)
            finish(inflight)
            second.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Graphs(index, tree, inflight, made["logits"], made["target"], made["values"], first, second)


def padded_rows(count: int, most: int) -> int:
    """The number of rows of the graph that serves `count` rows where at most `most` run."""
    return min(next((rows for rows in ROWS if rows >= count), -(-count // 64) * 64), most)
