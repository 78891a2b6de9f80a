"""Per-row state that lives on the device between steps, so that a device can advance it without the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.engine.step import Request
from manyheads.models.ops import has_kernels
from manyheads.speculation.tree import MAX_NODES


class RowState:
    """One slot for each request that may run at once, and a last one, the dummy row, that pads a step.

    Args:
        num_rows: slots, without the dummy row.
        max_len: longest sequence, in tokens.
        block_size: tokens in a page.
        num_heads, num_ranks: shape of a row's candidates.
        vocab_size: width of the token counts that penalties need (allocated when first needed).
    """

    def __init__(
        self,
        num_rows: int,
        max_len: int,
        block_size: int,
        num_heads: int,
        num_ranks: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.num_rows, self.vocab_size, self.device = num_rows, vocab_size, device
        self.block_size, self.num_heads, self.num_ranks = block_size, num_heads, num_ranks

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((num_rows + 1, *shape), dtype=dtype, device=device)

        self.cached_len = zeros()  # [rows]
        self.drafts = zeros(1 + num_heads * num_ranks)  # [rows, 1 + H · K]: the last token, and the heads' candidates
        # [rows, 1 + H · K]: how sure the heads are of each, given those before; 0 where they have not spoken
        self.chances = zeros(1 + num_heads * num_ranks, dtype=torch.float32)
        self.chances[:, 0] = 1.0
        self.block_table = zeros(-(-(max_len + MAX_NODES) // block_size))  # [rows, blocks], meaningless where unused
        self._ints = zeros(3)
        self.seed, self.min_len, self.top_k = self._ints.unbind(1)
        # min_len: shortest sequence that a stop token may end; top_k: vocab_size is off; temperature: 0 is greedy
        self._floats = zeros(9, dtype=torch.float32)
        self.temperature, self.top_p, self.min_p, self.epsilon, self.alpha = self._floats[:, :5].unbind(1)
        self.repetition_penalty, self.presence_penalty, self.frequency_penalty = self._floats[:, 5:8].unbind(1)
        self.speculative = self._floats[:, 8]  # 1, or 0 for a row that declines trees, as the dummy row does
        self.prompt_seen: Tensor | None = None  # [rows, V] bool
        self.output_count: Tensor | None = None  # [rows, V] int32

    @property
    def candidates(self) -> Tensor:
        """[rows, H · K], head by head, best first."""
        return self.drafts[:, 1:]

    def propose(self, index: Tensor, candidates: Tensor, chances: Tensor) -> None:
        """Set the candidates of rows: [R, H, K] int64, and what the heads give them, [R, H, K] float32."""
        if has_kernels(self.device):
            from manyheads.kernels import settle as kernels

            kernels.propose(self, index, candidates, chances)
            return
        self.drafts[index, 1:] = candidates.flatten(1)
        self.chances[index, 1:] = chances.flatten(1) * self.speculative[index, None]

    def forget_proposals(self, index: Tensor) -> None:
        """The rows move on without new candidates."""
        self.chances[:, 1:].index_fill_(0, index, 0.0)  # an assignment would copy a host's number, which no graph holds

    def tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers, on their way to the device: the host does not wait."""
        host = torch.tensor(values, dtype=dtype)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def admit(self, requests: list[Request]) -> None:
        """Fill the rows of admitted (or re-admitted) requests."""
        if not requests:
            return
        ints, floats = [], []
        for request in requests:
            p = request.params
            # a preempted request may have all but its last token in the cache: that one is the root then
            lengths = [request.row or 0, request.cached_len, request.tokens[-1]]
            top_k = p.top_k if p.top_k > 0 else self.vocab_size
            ints.append([*lengths, request.seed, request.prompt_len + p.min_tokens, top_k])
            typical = [p.typical_epsilon, p.typical_alpha]
            penalties = [p.repetition_penalty, p.presence_penalty, p.frequency_penalty]
            floats.append([p.temperature, p.top_p, p.min_p, *typical, *penalties, float(p.speculative)])
        values = self.tensor(ints)
        rows = values[:, 0]
        self.cached_len[rows] = values[:, 1]
        self.drafts[rows, 0] = values[:, 2]
        self._ints[rows] = values[:, 3:]
        self.forget_proposals(rows)
        self._floats[rows] = self.tensor(floats, torch.float32)
        for request in requests:
            if has_penalties(request):
                self._count(request)

    def _count(self, request: Request) -> None:
        """Which tokens a row's prompt and output hold, for its penalties."""
        if self.output_count is None or self.prompt_seen is None:
            shape = (self.num_rows + 1, self.vocab_size)
            self.prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.output_count = torch.zeros(shape, dtype=torch.int32, device=self.device)
        row = request.row
        assert row is not None
        self.prompt_seen[row] = False
        self.prompt_seen[row, self.tensor(request.tokens[: request.prompt_len])] = True
        self.output_count[row] = 0
        output = self.tensor(request.tokens[request.prompt_len :])
        self.output_count[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def sync_blocks(self, requests: list[Request]) -> None:
        """Bring the device's page tables up to date with the pages that the requests hold."""
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for request in requests:
            table = request.table
            new = table.blocks[table.num_synced :]
            if new:
                assert request.row is not None
                rows += [request.row] * len(new)
                columns += range(table.num_synced, len(table.blocks))
                blocks += new
                table.num_synced = len(table.blocks)
        if rows:
            where = self.tensor([rows, columns, blocks])
            self.block_table[where[0], where[1]] = where[2]


def has_penalties(request: Request) -> bool:
    p = request.params
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
