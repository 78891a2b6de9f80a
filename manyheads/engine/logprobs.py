"""Log-probabilities of tokens among raw logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.request import TokenLogprobs


class Columns(NamedTuple):
    """What `TokenLogprobs` says, of m tokens."""

    logprobs: Tensor  # [m] float32
    ranks: Tensor  # [m] int64, from 1
    top_ids: Tensor  # [m, k] int64
    top_logprobs: Tensor  # [m, k] float32

    def of(self, tokens: list[int]) -> list[TokenLogprobs]:
        """The same for the host, which waits for it."""
        rows = zip(tokens, *(column.tolist() for column in self), strict=True)
        return [
            TokenLogprobs(token, logprob, rank, list(zip(ids, values, strict=True)))
            for token, logprob, rank, ids, values in rows
        ]


def look_up(logits: Tensor, tokens: list[int], num_top: int) -> Columns:
    """Find tokens, and the `num_top` likeliest beside, in raw logits [m, V]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    values, ids = logprobs.topk(num_top, dim=-1)
    return Columns(chosen[:, 0], (logprobs > chosen).sum(dim=1) + 1, ids, values)
