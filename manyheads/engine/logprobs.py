"""Log-probabilities of tokens among raw logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.batch import RowState
from manyheads.engine.step import Request
from manyheads.request import TokenLogprobs

AT_ONCE = 256
"""Tokens that are looked up at a time: it takes some times the memory of their logits."""


class Columns(NamedTuple):
    """What `TokenLogprobs` says, of m tokens."""

    logprobs: Tensor  # [m] float32
    ranks: Tensor  # [m] int64, from 1
    top_ids: Tensor  # [m, k] int64
    top_logprobs: Tensor  # [m, k] float32

    def first(self, count: int, num_top: int) -> Columns:
        """The same of the first tokens, and of the likeliest."""
        ids, values = (top[:count, :num_top] for top in (self.top_ids, self.top_logprobs))
        return Columns(self.logprobs[:count], self.ranks[:count], ids, values)

    def of(self, tokens: list[int]) -> list[TokenLogprobs]:
        """The same for the host, which waits for it."""
        rows = zip(tokens, *(column.tolist() for column in self), strict=True)
        return [
            TokenLogprobs(token, logprob, rank, list(zip(ids, values, strict=True)))
            for token, logprob, rank, ids, values in rows
        ]


def look_up(
    source: Tensor,
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    num_top: int,
    send: Callable[[Tensor], Tensor],
) -> Columns:
    """Find tokens, and the `num_top` likeliest beside, some at a time.

    Args:
        source: [m, …], what logits are made of.
        logits: makes [n, V] of n of these, raw, of any type.
        tokens: [m] int64, m > 0.
        send: sends a tensor to the host.
    """
    slices = (slice(start, start + AT_ONCE) for start in range(0, len(tokens), AT_ONCE))
    parts = [_look_up(logits(source[part]), tokens[part], num_top) for part in slices]
    return Columns(*(send(torch.cat(column)) for column in zip(*parts, strict=True)))


def _look_up(logits: Tensor, tokens: Tensor, num_top: int) -> Columns:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])
    values, ids = logprobs.topk(num_top, dim=-1)
    return Columns(chosen[:, 0], (logprobs > chosen).sum(dim=1) + 1, ids, values)


def of_rows(
    requests: Sequence[Request],
    raw: Tensor,
    values: Tensor,
    width: int,
    most: int,
    place: Tensor,
    state: RowState,
    send: Callable[[Tensor], Tensor],
    asks: bool,
) -> dict[int, Columns]:
    """What a step's rows say of the tokens that they gained, for those that want it: by their places among the
    requests, of as many tokens as a row may gain, or has, and as many likeliest ones as any of them wants. What stands
    behind the tokens that it has means nothing.

    Args:
        raw: [T, V], of the step's nodes.
        values, width: as `Drawn`'s, on the device; there may be more rows than requests.
        most: tokens that a row may gain, `width` at most.
        place: [R, n] int64, where nodes stand among the T.
        send: sends a tensor to the host.
        asks: whether the device may be asked how many tokens rows gained: a CPU, which one need not wait for.
    """
    which = {i: request.params.logprobs for i, request in enumerate(requests) if request.params.logprobs is not None}
    if not which:
        return {}
    index = state.tensor(list(which))
    of = values[index]
    tokens, nodes = (of[:, start : start + most] for start in (3, 3 + width))
    tokens, nodes = tokens.clamp(0, raw.shape[1] - 1), nodes.clamp(0, place.shape[1] - 1)
    places, counts = place[index].gather(1, nodes), [most] * len(which)
    if asks:
        counts = of[:, 0].tolist()
        there = torch.arange(most, device=of.device) < of[:, :1]
        tokens, places = tokens[there], places[there]
    tokens, places = tokens.flatten(), places.flatten()
    found = look_up(places, lambda at: raw[at], tokens, max(which.values()), send)
    columns = (torch.split(column, counts) for column in found)
    return {i: Columns(*row) for i, row in zip(which, zip(*columns, strict=True), strict=True)}
