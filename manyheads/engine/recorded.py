"""Steps that are recorded once for each shape and replayed (CUDA graphs), each on tensors that stay where they are.

A decoding step is for a number of rows and of nodes; the next larger number of rows is taken, and the rest are dummy
rows, which write to the dummy page. Which rows, which tree and their lengths are data. It is two recordings, so that
the sampler can stand between them. A forward pass over chunks is for a number of tokens and of rows, likewise padded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.batch import Trees, TreeTensors
from manyheads.engine.graphs import Recorded, Recorder
from manyheads.engine.sampler import draw, edits_logits, nodes_of
from manyheads.engine.step import Chunk, Request
from manyheads.engine.step_run import ChunkRows, DecodingRows, StepRun, chunk_numbers, gain_sizes
from manyheads.speculation.planner import NO_DRAFT, Draft, Planner
from manyheads.speculation.tree import Tree

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Rows that steps of roots alone are recorded for; beyond, steps of 64 rows."""
TREE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""The same for trees: the nodes of a step go to the rows that are surest, and to dummy rows only their roots."""
CHUNK_TOKENS = (32, 64, 96, 128, 192, 256, 384, 512)
"""Tokens of chunks that passes are recorded for. Beyond, the GPU is busy for longer than the host."""
CHUNK_ROWS = (1, 4, 16)

_Key = tuple[int, int, int, int]
"""Rows, nodes that a row may bring, in-flight tokens, and passes of the drafter."""


@dataclass(frozen=True, eq=False)
class _Step:
    """A decoding step, and the tensors that it reads and writes."""

    rows: DecodingRows
    trees: Trees
    logits: Tensor  # [T, V]
    target: Tensor  # [T] int64
    forward: Recorded[tuple[Trees, Tensor, Tensor, Tensor]]
    finish: Recorded[Tensor]


class RecordedSteps:
    """Records steps at start-up or as they are first needed, and replays them.

    Args:
        run: the step.
        recorder: of its graphs.
    """

    def __init__(self, run: StepRun, recorder: Recorder) -> None:
        self.run, self.recorder = run, recorder
        self._steps: dict[_Key, _Step] = {}
        self._chunks: dict[tuple[int, int], tuple[Tensor, ChunkRows, Recorded[Tensor]]] = {}
        self._trees: dict[_Key, Tree] = {}  # what stands in the steps' tree tensors now
        state = run.state
        self._chunk_rows = [rows for rows in CHUNK_ROWS if rows <= state.num_rows] or [state.num_rows]
        self._chunk_tokens = [
            tokens for tokens in CHUNK_TOKENS if tokens <= state.page_table.shape[1] * state.page_size
        ]

    def record_steps(self, planner: Planner) -> None:
        """Record steps of all numbers of rows, and of all drafts that the planner may choose."""
        most = self.run.state.num_rows
        wanted: list[tuple[_Key, Draft]] = []
        for num_rows in sorted({min(rows, most) for rows in ROWS}, reverse=True):
            wanted.append((self._key(num_rows, NO_DRAFT), NO_DRAFT))
        for num_rows in sorted({min(rows, most) for rows in TREE_ROWS}, reverse=True):
            wanted += [(self._key(num_rows, draft), draft) for draft in planner.drafts(num_rows)]
        self._make_steps(wanted)

    def record_chunks(self) -> None:
        """Record forward passes over all numbers of tokens and rows."""
        self._make_chunks((tokens, rows) for tokens in reversed(self._chunk_tokens) for rows in self._chunk_rows)

    @staticmethod
    def serves(request: Request) -> bool:
        """Whether a decoding row wants nothing that only the eager step does."""
        params = request.params
        return params.logprobs is None and (params.greedy or params.acceptance == "exact")

    def serves_chunks(self, chunks: list[Chunk]) -> bool:
        """Whether there is a pass for so many rows and tokens."""
        few = len(chunks) <= self._chunk_rows[-1]
        return few and sum(chunk.num_inflight for chunk in chunks) <= self._chunk_tokens[-1]

    def decode(self, requests: list[Request], draft: Draft, tree: TreeTensors) -> tuple[Trees, Tensor]:
        """Run a step of decoding rows; its trees, and `Outcome.values`, with rows for the padding.

        Args:
            tree: of the draft.
        """
        state = self.run.state
        key = self._key(padded_rows(len(requests), state.num_rows, TREE_ROWS if draft.propose else ROWS), draft)
        if key not in self._steps:
            self._make_steps([(key, draft)])
        step = self._steps[key]
        padding = [state.num_rows] * (key[0] - len(requests))
        step.rows.index.copy_(state.tensor([*(request.row for request in requests), *padding]), non_blocking=True)
        if self._trees.get(key) != draft.tree:
            self._trees[key] = draft.tree
            step.rows.tree.take(tree)
        step.forward.replay()
        if any(not request.params.greedy or edits_logits(request) for request in requests):
            nodes = nodes_of(requests, step.trees, state, draft.tree.max_depth)
            target, _ = draw(step.logits.float(), nodes, state)
            step.target.copy_(target)
        return step.trees, step.finish.replay()

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """[T, hidden], of the chunks' tokens and of what pads them."""
        state = self.run.state
        count = sum(chunk.num_inflight for chunk in chunks)
        num_tokens = next(tokens for tokens in self._chunk_tokens if tokens >= count)
        num_rows = next(rows for rows in self._chunk_rows if rows >= len(chunks))
        if (num_tokens, num_rows) not in self._chunks:
            self._make_chunks([(num_tokens, num_rows)])
        numbers_there, rows, recorded = self._chunks[num_tokens, num_rows]
        numbers, starts = chunk_numbers(chunks, num_tokens, num_rows)
        padding = num_rows + 1 - len(chunks)
        index = [*(chunk.request.row for chunk in chunks), *[state.num_rows] * padding]
        numbers_there.copy_(state.tensor(numbers), non_blocking=True)
        rows.index.copy_(state.tensor(index), non_blocking=True)
        starts += [*[count] * (padding - 1), num_tokens]
        rows.row_start.copy_(state.tensor(starts, torch.int32), non_blocking=True)
        return recorded.replay()

    def _key(self, num_rows: int, draft: Draft) -> _Key:
        return num_rows, draft.tree.num_nodes, draft.num_tokens(num_rows), draft.passes

    def _make_steps(self, wanted: list[tuple[_Key, Draft]]) -> None:
        """Record what is not there yet."""
        with self.recorder.session():
            for key, draft in wanted:
                if key not in self._steps:
                    self._steps[key] = self._record_step(key[0], draft)

    def _make_chunks(self, keys: Iterable[tuple[int, int]]) -> None:
        with self.recorder.session():
            for key in keys:
                self._chunks[key] = self._record_chunks(*key)

    def _record_step(self, num_rows: int, draft: Draft) -> _Step:
        run, num_nodes = self.run, draft.tree.num_nodes
        device, drafter = run.state.device, run.drafter
        # as deep as the drafter reaches: paths of trees that are not are padded
        reach = drafter.shape.max_depth if drafter is not None and num_nodes > 1 else 0
        rows = DecodingRows(
            index=torch.full((num_rows,), run.state.num_rows, device=device),
            tree=TreeTensors.blank(num_nodes, reach, device),
            num_tokens=draft.num_tokens(num_rows),
            depth=draft.tree.max_depth,
            max_cached_len=run.state.max_len,
            sizes=gain_sizes(num_rows, draft, device),
        )

        def forward() -> tuple[Trees, Tensor, Tensor, Tensor]:
            hidden, trees = run.forward(None, rows)
            assert trees is not None
            logits = run.model.lm_head(hidden)
            return trees, hidden, logits, run.ops.argmax(logits)

        with self.recorder.aside():
            trees, hidden, _, target = forward()
            run.finish(rows, trees, hidden, target)
            first = self.recorder.record(forward)
            trees, hidden, logits, target = first.result
            second = self.recorder.record(lambda: run.finish(rows, trees, hidden, target))
        return _Step(rows, trees, logits, target, first, second)

    def _record_chunks(self, num_tokens: int, num_rows: int) -> tuple[Tensor, ChunkRows, Recorded[Tensor]]:
        """A pass, its rows, and what their tokens, rows and places lie in, [3, T]."""
        state = self.run.state
        device = state.device
        numbers = torch.zeros(3, num_tokens, dtype=torch.int64, device=device)
        numbers[1], numbers[2] = num_rows, torch.arange(num_tokens)
        tokens, row, place = numbers.unbind()
        starts = torch.tensor([0] * (num_rows + 1) + [num_tokens], dtype=torch.int32)
        rows = ChunkRows(
            tokens=tokens,
            row=row,
            place=place,
            index=torch.full((num_rows + 1,), state.num_rows, device=device),
            row_start=starts.to(device),
            max_tokens=num_tokens,
            max_cached_len=state.max_len,
        )

        def forward() -> Tensor:
            return self.run.forward(rows, None)[0]

        with self.recorder.aside():
            forward()
            return numbers, rows, self.recorder.record(forward)


def padded_rows(count: int, most: int, sizes: tuple[int, ...]) -> int:
    """The number of rows of the recording that serves `count` rows where at most `most` run."""
    return min(next((rows for rows in sizes if rows >= count), -(-count // 64) * 64), most)
