"""Per-row state that lives on the device between steps, so that a device can advance it without the host."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.engine.step import Request
from manyheads.medusa.tree import MAX_NODES


class RowState:
    """One slot for each request that may run at once.

    Args:
        num_rows: slots.
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
        self.block_size = block_size

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        max_blocks = -(-(max_len + MAX_NODES) // block_size)
        self.last_token = ints(num_rows)  # [rows], the root of the row's next tree
        self.cached_len = ints(num_rows)  # [rows]
        self.candidates = ints(num_rows, max(num_heads, 1), num_ranks)  # [rows, heads, ranks]
        self.block_table = ints(num_rows, max_blocks)  # [rows, max_blocks], 0 (the dummy page) where unused
        self.seed = ints(num_rows)  # [rows]
        self.min_len = ints(num_rows)  # [rows], shortest sequence that a stop token may end
        self.temperature = floats(num_rows)  # [rows], 0 is greedy
        self.top_p = floats(num_rows)
        self.top_k = ints(num_rows)  # [rows], vocab_size is off
        self.min_p = floats(num_rows)
        self.repetition_penalty = floats(num_rows)
        self.presence_penalty = floats(num_rows)
        self.frequency_penalty = floats(num_rows)
        self.epsilon = floats(num_rows)
        self.alpha = floats(num_rows)
        self.prompt_seen: Tensor | None = None  # [rows, V] bool
        self.output_count: Tensor | None = None  # [rows, V] int32
        self._written: list[list[int]] = [[] for _ in range(num_rows)]  # block_table, as the host wrote it

    def assign(self, request: Request) -> None:
        """Fill the row of an admitted (or re-admitted) request."""
        row, params = request.row, request.params
        assert row is not None
        self.cached_len[row] = request.cached_len
        self.last_token[row] = request.tokens[-1]  # the root, if a preempted request has all but this one in the cache
        self.block_table[row] = 0
        self._written[row] = []
        self.seed[row] = request.seed
        self.min_len[row] = request.prompt_len + params.min_tokens
        self.temperature[row] = params.temperature
        self.top_p[row] = params.top_p
        self.top_k[row] = params.top_k if params.top_k > 0 else self.vocab_size
        self.min_p[row] = params.min_p
        self.repetition_penalty[row] = params.repetition_penalty
        self.presence_penalty[row] = params.presence_penalty
        self.frequency_penalty[row] = params.frequency_penalty
        self.epsilon[row] = params.typical_epsilon
        self.alpha[row] = params.typical_alpha
        if has_penalties(request):
            if self.output_count is None or self.prompt_seen is None:
                shape = (self.num_rows, self.vocab_size)
                self.prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
                self.output_count = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.prompt_seen[row] = False
            self.prompt_seen[row, torch.tensor(request.tokens[: request.prompt_len], device=self.device)] = True
            self.output_count[row] = 0
            self.count_output(row, request.tokens[request.prompt_len :])

    def count_output(self, row: int, tokens: list[int]) -> None:
        """Add output tokens to a row's counts, for its penalties."""
        assert self.output_count is not None
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        self.output_count[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def sync_blocks(self, request: Request) -> None:
        """Bring the device's page table up to date with the pages the request holds."""
        row, blocks = request.row, request.table.blocks
        assert row is not None
        written = self._written[row]
        if written == blocks:
            return
        known = min(len(written), len(blocks))
        if written[:known] != blocks[:known]:  # pages were given back and others taken
            known = 0
        if len(blocks) > known:
            self.block_table[row, known : len(blocks)] = torch.tensor(blocks[known:], device=self.device)
        self._written[row] = list(blocks)


def has_penalties(request: Request) -> bool:
    p = request.params
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
