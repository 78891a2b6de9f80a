"""What stands between the passes of a drafter that goes on from its own guesses, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.batch import Guesses, Level, OpenNodes, RowState


def begin_guesses(state: RowState, index: Tensor, num_candidates: int, most: int) -> Guesses:
    """As `Ops.begin_guesses`."""
    rows, width, device = index.shape[0], num_candidates + 2, index.device
    tokens, above, feature = torch.zeros(3, rows, width, dtype=torch.int64, device=device).unbind()
    chances, worth = torch.zeros(2, rows, width, device=device).unbind()
    worth[:, 0] = state.speculative[index]
    feature[:, 0] = torch.arange(rows, device=device)
    cached_len = state.cached_len[index]
    opened = torch.zeros(5, rows, most, dtype=torch.int64, device=device)
    opened[0] = state.slots(index[:, None], cached_len[:, None] + torch.arange(most, device=device))
    row_start = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    return Guesses(cached_len, tokens, chances, worth, above, feature, opened, row_start)


def open_nodes(guesses: Guesses, level: Level, count: int) -> OpenNodes:
    """As `Ops.open_nodes`."""
    rows, size = guesses.worth.shape[0], level.columns.shape[0]
    before, total = rows + guesses.num_opened, guesses.num_opened + count
    order = torch.arange(before + count, device=guesses.worth.device)
    # stable: of equals the first
    ranked = guesses.worth[:, level.columns].flatten().sort(descending=True, stable=True).indices
    found = ranked[:count].sort().values
    row, which = found // size, found % size
    column, parent = level.columns[which], level.parents[which]
    new_at = guesses.row_start[1:][row] + order[:count]
    starts = guesses.row_start + torch.searchsorted(row, order[: rows + 1])
    place = new_at - starts[row]
    bits = guesses.above[row, parent] | (1 << place)
    position = guesses.cached_len[row] + (level.depth - 1)
    source = guesses.feature[row, parent]
    guesses.opened[1:, row, place] = torch.stack((guesses.tokens[row, column], source, position, bits))
    guesses.above[row, column] = bits
    guesses.feature[row, column] = order[before:]
    every = torch.searchsorted(starts[1:], order[:total], right=True)
    slots, token, source, position, bits = guesses.opened[:, every, order[:total] - starts[every]].unbind()
    guesses.row_start, guesses.num_opened = starts.to(torch.int32), total
    return OpenNodes(guesses.row_start, slots, token, source, position, bits, row, which, new_at)


def offer_children(
    guesses: Guesses,
    level: Level,
    nodes: OpenNodes | None,
    tokens: Tensor,
    chances: Tensor,
    token_map: Tensor | None,
) -> None:
    """As `Ops.offer_children`."""
    if nodes is None:
        row, family = torch.arange(len(tokens), device=tokens.device), level.families
        worth = guesses.worth[:, 0]
    else:
        row, family = nodes.new_row, level.families[nodes.new_which]
        worth = guesses.worth[row, level.columns[nodes.new_which]]
    at = (row[:, None], family)
    guesses.tokens[at] = tokens if token_map is None else token_map[tokens]
    guesses.chances[at] = chances
    guesses.worth[at] = chances * worth[:, None]
