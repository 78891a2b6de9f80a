"""Tokens that a row must not draw: all but the allowed ones, and those that would end a bad run of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.batch import RowState, TreeTensors
from manyheads.engine.step import Request
from manyheads.request import SamplingParams

BAN = 1e5
"""So much is taken from the logit of a token that must not be drawn: no logits and no noise make up for it."""


def has_bans(params: SamplingParams) -> bool:
    """Whether some tokens must not be drawn."""
    return bool(params.allowed_token_ids or params.bad_token_ids)


def needs_tail(params: SamplingParams) -> bool:
    """Whether it depends on the tokens before which ones those are."""
    return any(len(run) > 1 for run in params.bad_token_ids)


def ban_tokens(logits: Tensor, request: Request, node_tokens: Tensor, tree: TreeTensors, state: RowState) -> None:
    """Take what a row's parameters ban far below all else, in place.

    It stays finite: if no other token is left (a grammar may forbid the rest), one is drawn all the same. A token that
    is not allowed is worse than one that ends a bad run.

    Args:
        logits: [n, V], at the nodes of the row's tree.
        node_tokens: [n] int64, what the nodes hold; the root holds the last token of the row's text.
    """
    params = request.params
    if params.allowed_token_ids:
        others = torch.full((logits.shape[-1],), 2 * BAN, device=logits.device)
        logits -= others.index_fill_(0, state.tensor(list(params.allowed_token_ids)), 0.0)
    if params.bad_token_ids:
        runs = params.bad_token_ids
        before = _before(max(map(len, runs)) - 1, request, node_tokens, tree, state)  # [n, L]
        width = before.shape[1]
        wanted = state.tensor([[-1] * (width - len(run) + 1) + list(run[:-1]) for run in runs]).view(len(runs), width)
        ends = ((before[:, None] == wanted) | (wanted < 0)).all(dim=-1)  # [n, runs]: the next token would end it
        last = state.tensor([run[-1] for run in runs]).expand(len(before), -1)
        cost = torch.where(ends, BAN, 0.0)
        logits -= torch.zeros_like(logits).scatter_reduce_(1, last, cost, "amax")


def _before(width: int, request: Request, node_tokens: Tensor, tree: TreeTensors, state: RowState) -> Tensor:
    """[n, width] int64: the last tokens of the text that ends with each node, the node's own the last of them."""
    if width == 0:
        return node_tokens[:, None][:, :0]
    back = torch.arange(width - 1, -1, -1, device=node_tokens.device)
    depth = tree.depth[:, None] - back  # of the node above which holds the token; below 0 it stands in the text
    above = node_tokens[tree.path.gather(1, depth.clamp(min=0))]
    tail = state.last_tokens()[request.row]
    return torch.where(depth >= 0, above, tail[depth.clamp(max=0) - 1])


def fill_tail(state: RowState, request: Request) -> None:
    """Write the last tokens of a row that begins."""
    tail = state.last_tokens()
    known = request.tokens[-tail.shape[1] :]
    tail[request.row] = state.tensor([-1] * (tail.shape[1] - len(known)) + known)


def move_tails(state: RowState, requests: list[Request], rows: Tensor, emitted: Tensor, gained: Tensor) -> None:
    """Add what rows gained to their last tokens; arguments as of `state.count_output`."""
    which = [i for i, request in enumerate(requests) if needs_tail(request.params)]
    if not which:
        return
    tail = state.last_tokens()
    chosen = state.tensor(which)
    text = torch.cat((tail[rows[chosen]], emitted[chosen]), dim=1)
    at = torch.arange(tail.shape[1], device=state.device) + gained[chosen]
    tail[rows[chosen]] = text.gather(1, at)
