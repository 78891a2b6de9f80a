"""Repetition, presence and frequency penalties of what stands in rows' texts, at all nodes of a step at once."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.batch import RowState
from manyheads.engine.nodes import Nodes
from manyheads.engine.state import has_penalties

AT_ONCE = 128
"""Nodes that a GPU penalizes at a time: it takes some times the memory of their logits."""


def penalize(logits: Tensor, nodes: Nodes, state: RowState) -> None:
    """Penalize, in place, what rows have in their texts and a node has above it; other rows' logits stay.

    Repetition: Keskar et al. 2019, section 4.1, prompts included; presence and frequency: OpenAI's API, output alone.

    Args:
        logits: [T, V] float32.
    """
    which = [has_penalties(request) for request in nodes.requests]
    if not any(which):
        return
    if logits.device.type == "cpu":
        concerned = torch.zeros(len(nodes.rows), dtype=torch.bool)
        concerned[: len(which)] = torch.tensor(which)
        few(logits, nodes, state, concerned)
    else:
        all_of_them(logits, nodes, state)


def few(logits: Tensor, nodes: Nodes, state: RowState, concerned: Tensor) -> None:
    """Look at the tokens in texts alone, of which there are far fewer than in a vocabulary. How many, has to be known.

    Args:
        concerned: [R] bool, the rows that have penalties.
    """
    prompt_seen, output_count = state.count_tokens()
    chosen = concerned.nonzero()[:, 0]  # [P]
    slots = nodes.rows[chosen]
    at = concerned[nodes.row].nonzero()[:, 0]  # [N], the nodes of these rows
    of = torch.searchsorted(chosen, nodes.row[at])  # [N], whose they are, of the P
    # what nodes hold, at each node that they are above, or are
    is_above, held = _paths(nodes, at)
    node, depth = is_above.nonzero().unbind(1)
    token, slot = held[node, depth], slots[of[node]]
    alike = ((held[node] == token[:, None]) & is_above[node]).sum(dim=1)
    above = at[node], token
    new_above = _penalized(logits[above], output_count[slot, token] + alike, torch.tensor(True), slot, state)
    # what stands in texts, at each node of their rows
    row, tokens = (prompt_seen[slots] | (output_count[slots] > 0)).nonzero().unbind(1)
    sizes = torch.bincount(row, minlength=len(chosen))
    first, size = (sizes.cumsum(0) - sizes)[of], sizes[of]
    node = torch.repeat_interleave(size)
    token = tokens[torch.arange(len(node)) + (first - size.cumsum(0) + size)[node]]
    text, slot = (at[node], token), slots[of[node]]
    logits[text] = _penalized(logits[text], output_count[slot, token], torch.tensor(True), slot, state)
    logits[above] = new_above  # in place of what the text alone has made of them


def all_of_them(logits: Tensor, nodes: Nodes, state: RowState) -> None:
    """Look at every token of a vocabulary, some nodes at a time: nothing waits for the device. Rows without penalties
    have some that do nothing."""
    prompt_seen, output_count = state.count_tokens()
    slots = nodes.rows[nodes.row]
    is_above, tokens = _paths(nodes, torch.arange(len(logits), device=logits.device))
    for start in range(0, len(logits), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        count = output_count[slots[part]].scatter_add_(1, tokens[part], is_above[part].to(output_count.dtype))
        seen = prompt_seen[slots[part]] | (count > 0)
        logits[part] = _penalized(logits[part], count, seen, slots[part, None], state)


def _penalized(logits: Tensor, count: Tensor, seen: Tensor, slots: Tensor, state: RowState) -> Tensor:
    """Logits of tokens that an output has so often, and a text or not."""
    repetition = state.repetition_penalty[slots]
    seen = seen & (repetition > 0)  # a dummy row's is 0
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    frequency, presence = state.frequency_penalty[slots], state.presence_penalty[slots]
    return logits - (frequency * count + presence * (count > 0))


def _paths(nodes: Nodes, at: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D + 1]: whether there is a node on the way from the root (which is output already) to these nodes, the nodes
    themselves included, and what it holds."""
    path = nodes.tree.path[nodes.node[at]]
    depth = torch.arange(path.shape[1], device=path.device)
    return (depth > 0) & (depth <= nodes.depth[at, None]), nodes.node_tokens[nodes.row[at, None], path]
