"""Log-probabilities of a prompt's own tokens, from the hidden states of its chunks, a slice of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.engine.logprobs import Columns, look_up
from manyheads.engine.step import Chunk, Request


@dataclass(frozen=True)
class Scored:
    """What a chunk says of the tokens that follow its own, on its way to the host."""

    request: Request
    first: int
    """The place in the prompt of the first of them."""
    tokens: list[int]
    columns: Columns

    def keep(self) -> None:
        """Give the request what it does not have yet; the device has been waited for."""
        known = self.request.prompt_logprobs
        # a preempted request computes its prompt again, perhaps in other chunks
        for place, entry in enumerate(self.columns.of(self.tokens), self.first):
            if place == len(known) + 1:
                known.append(entry)


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
        # NOTE: by what was launched, not by what was read: ranks that read nothing have to decide alike
        is_known = request.num_scored >= begin + len(following)
        if count is not None and following and not is_known:
            request.num_scored = begin + len(following)
            states, tokens = hidden[start : start + len(following)], torch.tensor(following, device=hidden.device)
            columns = look_up(states, logits, tokens, count, send)
            found.append(Scored(request, begin + 1, following, columns))
        start += chunk.num_inflight
    return found
