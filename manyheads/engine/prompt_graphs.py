"""Short prompts as CUDA graphs: their few tokens take the GPU less time than the host needs to launch the kernels.

A graph is for a number of tokens and of rows. The tokens of a step's chunks stand one behind the other; what is left
over is the dummy row's, which writes to the dummy page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.engine.graphs import Recorder
from manyheads.engine.step import Chunk

if TYPE_CHECKING:
    from manyheads.engine.runner import Runner

TOKENS = (32, 64, 96, 128, 192, 256, 384, 512)
"""Tokens that graphs are made for. Beyond, the GPU is busy for longer than the host."""
ROWS = (1, 4, 16)


@dataclass(frozen=True, eq=False)
class _Graph:
    """A forward pass over T tokens of at most R rows, and the tensors that it reads and writes."""

    inputs: Tensor  # [3, T] int64: the tokens, which row each belongs to (R: the dummy's), and its place in the chunk
    index: Tensor  # [R + 1] int64, slots of the row state, the dummy's last
    row_start: Tensor  # [R + 2] int32, where the rows' tokens begin
    hidden: Tensor  # [T, hidden]
    forward: torch.cuda.CUDAGraph


class PromptGraphs:
    """Captures the forward passes of prompt chunks, and replays them."""

    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self._runner, self._recorder = runner, recorder
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._rows = [rows for rows in ROWS if rows <= runner.state.num_rows] or [runner.state.num_rows]
        self._tokens = [tokens for tokens in TOKENS if tokens <= runner.state.block_table.shape[1] * runner.block_size]

    def capture(self) -> None:
        self._make([(tokens, rows) for tokens in reversed(self._tokens) for rows in self._rows])

    def _make(self, keys: list[tuple[int, int]]) -> None:
        with self._recorder.session(self._runner.device):
            for key in keys:
                self._graphs[key] = self._capture(*key)

    def serves(self, chunks: list[Chunk]) -> bool:
        return len(chunks) <= self._rows[-1] and sum(chunk.num_inflight for chunk in chunks) <= self._tokens[-1]

    def launch(self, chunks: list[Chunk]) -> Tensor:
        """[T, hidden], of the chunks' tokens and of what pads them."""
        state = self._runner.state
        count = sum(chunk.num_inflight for chunk in chunks)
        num_tokens = next(tokens for tokens in self._tokens if tokens >= count)
        num_rows = next(rows for rows in self._rows if rows >= len(chunks))
        if (num_tokens, num_rows) not in self._graphs:
            self._make([(num_tokens, num_rows)])
        graph = self._graphs[num_tokens, num_rows]
        tokens: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        starts: list[int] = []
        for i, chunk in enumerate(chunks):
            starts.append(len(tokens))
            cached, size = chunk.request.cached_len, chunk.num_inflight
            tokens += chunk.request.tokens[cached : cached + size]
            rows += [i] * size
            places += range(size)
        padding = num_tokens - count
        inputs = [tokens + [0] * padding, rows + [num_rows] * padding, [*places, *range(padding)]]
        index = [chunk.request.row or 0 for chunk in chunks]
        graph.inputs.copy_(state.tensor(inputs), non_blocking=True)
        graph.index.copy_(state.tensor(index + [state.num_rows] * (num_rows + 1 - len(chunks))), non_blocking=True)
        starts += [*[count] * (num_rows + 1 - len(chunks)), num_tokens]
        graph.row_start.copy_(state.tensor(starts, torch.int32), non_blocking=True)
        graph.forward.replay()
        return graph.hidden

    def _capture(self, num_tokens: int, num_rows: int) -> _Graph:
        runner, state = self._runner, self._runner.state
        device = runner.device
        inputs = torch.stack(
            [torch.zeros(num_tokens, dtype=torch.int64), torch.full((num_tokens,), num_rows), torch.arange(num_tokens)]
        ).to(device)
        index = torch.full((num_rows + 1,), state.num_rows, device=device)
        row_start = torch.tensor([0] * (num_rows + 1) + [num_tokens], dtype=torch.int32, device=device)

        def forward() -> Tensor:
            tokens, row, place = inputs.unbind()
            rows = index[row]
            position = state.cached_len[rows] + place
            page = state.block_table[rows, position // state.block_size]
            slots = page * state.block_size + position % state.block_size
            group = Group(
                start=0,
                stop=num_tokens,
                row_start=row_start,
                bits=torch.zeros_like(tokens),
                cached_len=state.cached_len[index],
                block_table=state.block_table[index],
                max_tokens=num_tokens,
                max_cached_len=runner.max_len,
                is_chain=True,
            )
            runner.attention.plan([group], position, slots)
            return runner.model.forward(tokens, runner.attention)

        with self._recorder.aside():
            forward()  # once without a graph: what is compiled and set up cannot be captured
            graph, hidden = self._recorder.record(forward)
        return _Graph(inputs, index, row_start, hidden, graph)
