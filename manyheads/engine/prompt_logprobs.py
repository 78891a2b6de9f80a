"""Log-probabilities of a prompt's own tokens, from the hidden states of its chunks, a slice of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.engine.step import Chunk, Request
from manyheads.request import TokenLogprobs

SLICE = 256
"""Logits of so many tokens are held at once: those of a whole chunk would take gigabytes with a large vocabulary."""


@dataclass(frozen=True)
class Scored:
    """What a chunk says of the tokens that follow its own, on its way to the host."""

    request: Request
    first: int
    """The place in the prompt of the first of them."""
    tokens: list[int]
    logprobs: Tensor  # [m] float32
    ranks: Tensor  # [m] int64, from 1
    top_ids: Tensor  # [m, k] int64
    top_logprobs: Tensor  # [m, k] float32

    def keep(self) -> None:
        """Give the request what it does not have yet; the device has been waited for."""
        known = self.request.prompt_logprobs
        columns = (self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        entries = zip(self.tokens, *(column.tolist() for column in columns), strict=True)
        # a preempted request computes its prompt again, perhaps in other chunks
        for place, (token, logprob, rank, ids, values) in enumerate(entries, self.first):
            if place == len(known) + 1:
                known.append(TokenLogprobs(token, logprob, rank, list(zip(ids, values, strict=True))))


def score(
    chunks: list[Chunk], hidden: Tensor, logits: Callable[[Tensor], Tensor], send: Callable[[Tensor], Tensor]
) -> list[Scored]:
    """Score the tokens that follow those of chunks, where requests ask for that.

    Args:
        chunks: planned, with the lengths that they had before the step.
        hidden: [T, hidden], of their tokens and perhaps more.
        logits: [N, hidden] → [N, V] float32.
        send: sends a tensor to the host.
    """
    found: list[Scored] = []
    start = 0
    for chunk in chunks:
        request, begin = chunk.request, chunk.request.cached_len
        following = request.tokens[begin + 1 : min(begin + chunk.num_inflight + 1, request.prompt_len)]
        count = request.params.prompt_logprobs
        is_known = len(request.prompt_logprobs) >= begin + len(following)
        if count is not None and following and not is_known:
            states = hidden[start : start + len(following)]
            parts = [
                _score(logits(states[i : i + SLICE]), following[i : i + SLICE], count)
                for i in range(0, len(following), SLICE)
            ]
            columns = (send(torch.cat(column)) for column in zip(*parts, strict=True))
            found.append(Scored(request, begin + 1, following, *columns))
        start += chunk.num_inflight
    return found


def _score(logits: Tensor, tokens: list[int], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns of `Scored` for some tokens, from raw logits [m, V] at those before them."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    values, ids = logprobs.topk(count, dim=-1)
    return chosen[:, 0], (logprobs > chosen).sum(dim=1) + 1, ids, values
