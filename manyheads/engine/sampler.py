"""The target's token at every node: greedy or sampled, under each row's own parameters.

A draw depends on the row's seed, the position in the sequence and the logits, and on nothing else: not on the other
rows, not on the tree, not on when the row was preempted. Two nodes of one depth share their noise, so the text is the
same whatever the tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.batch import RowState, Trees, TreeTensors
from manyheads.engine.bans import ban_tokens, has_bans
from manyheads.engine.masks import Masks, first_masks
from manyheads.engine.nodes import Nodes
from manyheads.engine.penalties import penalize
from manyheads.engine.state import has_penalties
from manyheads.engine.step import Request
from manyheads.ops.base import Ops


def nodes_of(
    requests: list[Request], trees: Trees, state: RowState, max_depth: int, masks: Masks | None = None
) -> Nodes:
    """What the sampler needs to know of decoding rows whose trees are so deep at most."""
    index = trees.inflight.index
    return Nodes(
        requests=requests,
        rows=index,
        row=trees.row,
        node=trees.node,
        depth=trees.tree.depth[trees.node],
        max_depth=max_depth,
        first=state.cached_len[index] + 1,
        node_tokens=trees.node_tokens,
        place=trees.place,
        tree=trees.tree,
        masks=masks,
    )


def last_nodes(requests: list[Request], index: Tensor, root: TreeTensors, state: RowState) -> Nodes:
    """The same for rows whose prompts are computed, in order: each draws at its last token."""
    order = torch.arange(len(requests), device=index.device)
    return Nodes(
        requests=requests,
        rows=index,
        row=order,
        node=torch.zeros_like(order),
        depth=torch.zeros_like(order),
        max_depth=0,
        first=state.cached_len[index],
        node_tokens=state.drafts[index, :1],
        place=order[:, None],
        tree=root,
        masks=first_masks(requests, state),
    )


def draw(logits: Tensor, nodes: Nodes, state: RowState, ops: Ops) -> tuple[Tensor, dict[int, Tensor]]:
    """Draw the target's token at every node.

    Args:
        logits: [T, V] float32, overwritten for rows whose parameters or grammars change them or leave some out.

    Returns:
        [T] int64 tokens (-1 where the logits are not finite), and for each request with typical acceptance (by its
        place among them) the distributions of its tree's nodes, [n, V].
    """
    penalize(logits, nodes, state)
    for i, request in enumerate(nodes.requests):
        if _edits_row(request):
            edited = logits[nodes.place[i]]
            _edit_logits(edited, nodes, i, request, state)
            # nodes that the row did not bring write to its root, and must write what the root does
            absent = (nodes.place[i] == nodes.place[i, 0])[:, None]
            logits[nodes.place[i]] = torch.where(absent, edited[:1], edited)
    if nodes.masks is not None:
        nodes.masks.apply(logits)
    sampled = {i: request.params for i, request in enumerate(nodes.requests) if not request.params.greedy}
    if not sampled:
        return ops.argmax(logits), {}
    temperature, seed = state.temperature[nodes.rows], state.seed[nodes.rows]
    scaled = logits
    typical = [i for i, params in sampled.items() if params.acceptance == "typical"]
    filtered = any(p.top_p < 1 or p.min_p > 0 or 0 < p.top_k < state.vocab_size for p in sampled.values())
    if typical or filtered:
        scaled = logits / torch.where(temperature > 0, temperature, 1.0)[nodes.row, None]
    if filtered:
        everything = ((state.top_k, state.vocab_size), (state.top_p, 1.0), (state.min_p, 0.0))
        limits = (torch.where(temperature > 0, x[nodes.rows], all_of_it)[nodes.row] for x, all_of_it in everything)
        dropped = scaled < ops.cutoff(scaled, *limits)[:, None]
        for x in (logits, scaled):
            x.masked_fill_(dropped, float("-inf"))
    distributions = {i: torch.softmax(scaled[nodes.place[i]], dim=-1) for i in typical}
    target = ops.draw(logits, temperature, seed, nodes.first, nodes.row, nodes.depth, nodes.max_depth)
    return target, distributions


def edits_logits(request: Request) -> bool:
    """Whether its parameters change logits before a token is chosen."""
    return has_penalties(request) or _edits_row(request)


def _edits_row(request: Request) -> bool:
    return bool(request.params.logit_bias) or has_bans(request.params) or _stops_are_early(request)


def _stops_are_early(request: Request) -> bool:
    """Whether stop tokens are to be kept from a row's tree; a grammar's masks do that themselves."""
    return request.num_output < request.params.min_tokens and bool(request.stop_ids) and request.matcher is None


def _edit_logits(logits: Tensor, nodes: Nodes, i: int, request: Request, state: RowState) -> None:
    """Bias, bans and the stop tokens that come too early, in place on one row's [n, V] logits."""
    params = request.params
    row = request.row
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[:, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if has_bans(params):
        ban_tokens(logits, request, nodes.node_tokens[i], nodes.tree, state)
    if _stops_are_early(request):
        early = nodes.first[i] + nodes.tree.depth < state.min_len[row]  # [n]
        stops = torch.tensor(sorted(request.stop_ids), device=logits.device)
        logits[:, stops] = torch.where(early[:, None], float("-inf"), logits[:, stops])
