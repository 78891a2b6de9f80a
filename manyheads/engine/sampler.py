"""The target's token at every node: greedy or sampled, under each row's own parameters.

A draw depends on the row's seed, the position in the sequence and the logits, and on nothing else: not on the other
rows, not on the tree, not on when the row was preempted. Two nodes of one depth share their noise, so the text is the
same whatever the tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.engine.state import RowState, has_penalties
from manyheads.engine.step import Request
from manyheads.medusa.tree import TreeTensors

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class NodeBlock:
    """Rows that brought trees of one shape, as the sampler sees them: R rows of n nodes, flat from `start`."""

    requests: list[Request]
    start: int
    rows: Tensor  # [R] int64, slots of the row state
    position: Tensor  # [R, n] int64, position in the sequence of the token that is to be drawn
    tokens: Tensor  # [R, n] int64, what the nodes hold
    tree: TreeTensors

    @property
    def num_nodes(self) -> int:
        return self.position.shape[1]

    @property
    def stop(self) -> int:
        return self.start + self.position.numel()


def draw(logits: Tensor, blocks: list[NodeBlock], state: RowState) -> tuple[Tensor, dict[int, Tensor]]:
    """Draw the target's token at every node.

    Args:
        logits: [N, V] float32, overwritten for rows whose parameters change them.
        blocks: the N nodes.

    Returns:
        [N] int64 tokens, and for each request with typical acceptance (by row) its nodes' distributions [n, V].
    """
    for block in blocks:
        for i, request in enumerate(block.requests):
            first = block.start + i * block.num_nodes
            _edit_logits(logits[first : first + block.num_nodes], block, i, request, state)
    target = logits.argmax(dim=-1)
    typical: dict[int, Tensor] = {}
    for block in blocks:
        sampled = [i for i, request in enumerate(block.requests) if not request.params.greedy]
        if not sampled:
            continue
        every = len(sampled) == len(block.requests)
        index = state.tensor(sampled)
        rows = block.rows[index]
        shape = (len(block.requests), block.num_nodes, logits.shape[-1])
        chosen = logits[block.start : block.stop].view(shape)
        chosen = chosen if every else chosen[index]
        chosen = chosen / state.temperature[rows][:, None, None]
        params = [block.requests[i].params for i in sampled]
        if any(p.top_p < 1 or p.min_p > 0 or 0 < p.top_k < state.vocab_size for p in params):
            chosen = _filter(chosen, state.top_k[rows], state.top_p[rows], state.min_p[rows])
        for j, i in enumerate(sampled):
            if params[j].acceptance == "typical":
                row = block.requests[i].row
                assert row is not None
                typical[row] = torch.softmax(chosen[j], dim=-1)
        # nodes of one depth share a draw of noise
        depths = torch.arange(block.tree.max_depth + 1, device=logits.device)
        noise = gumbel(state.seed[rows], block.position[index, :1] + depths, logits.shape[-1])  # [R, D + 1, V]
        perturbed = chosen + noise[:, block.tree.depth]
        target[block.start : block.stop].view(shape[:2])[index] = perturbed.argmax(dim=-1)
    return target, typical


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise from a counter: argmax(logits + noise) is a draw from softmax(logits).

    The counter (seed, position, token) is hashed twice with the finalizer of MurmurHash3 (`fmix32`).

    Args:
        seed: [R] int64.
        position: [R, P] int64.

    Returns:
        [R, P, vocab_size] float32.
    """
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    stream = _fmix32(_fmix32(low)[:, None] ^ _fmix32(high + 0x9E3779B9)[:, None] ^ _fmix32(position * 0x85EBCA6B))
    token = torch.arange(vocab_size, device=seed.device)
    bits = _fmix32(stream[..., None] ^ _fmix32(token * 0x9E3779B9 + 0x7F4A7C15))  # [R, P, V]
    uniform = ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-24  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


def _fmix32(x: Tensor) -> Tensor:
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def edits_logits(request: Request) -> bool:
    """Whether its parameters change logits before a token is chosen."""
    early_stop = request.num_output < request.params.min_tokens and bool(request.stop_ids)
    return has_penalties(request) or bool(request.params.logit_bias) or early_stop


def _edit_logits(logits: Tensor, block: NodeBlock, i: int, request: Request, state: RowState) -> None:
    """Penalties, bias and the stop tokens that come too early, in place on one row's [n, V] logits."""
    if not edits_logits(request):
        return
    params = request.params
    row = request.row
    assert row is not None
    if has_penalties(request):
        assert state.prompt_seen is not None
        assert state.output_count is not None
        # a node's count: the row's output so far, and the nodes on the way from the root (which is output already)
        below = block.tree.ancestors.clone()
        below[:, 0] = False
        count = state.output_count[row].repeat(block.num_nodes, 1)
        tokens = block.tokens[i].expand(block.num_nodes, -1)
        count.scatter_add_(1, tokens, below.to(count.dtype))
        if params.repetition_penalty != 1.0:
            seen = state.prompt_seen[row] | (count > 0)
            penalty = params.repetition_penalty
            logits.copy_(torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
        logits -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[:, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if request.num_output < params.min_tokens and request.stop_ids:
        early = block.position[i] < state.min_len[row]  # [n]
        stops = torch.tensor(sorted(request.stop_ids), device=logits.device)
        logits[:, stops] = torch.where(early[:, None], float("-inf"), logits[:, stops])


def _filter(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Tokens outside top-k, top-p (the smallest set with that mass) or min-p (that share of the largest) become -inf.

    Args:
        logits: [R, n, V]; the others [R].
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    drop = rank >= top_k[:, None, None]
    probabilities = torch.softmax(ordered.masked_fill(drop, float("-inf")), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more probable tokens
    drop = drop | (before >= top_p[:, None, None]) | (probabilities < min_p[:, None, None] * probabilities[..., :1])
    drop[..., 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
