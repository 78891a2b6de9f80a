"""How often a drafter is right, and what trees would make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.batch import MAX_NODES
from manyheads.speculation.medusa.checkpoint import STATISTICS
from manyheads.speculation.medusa.export import write_json
from manyheads.speculation.tree import grow
from manyheads.train.base import Base, half_precision, send
from manyheads.train.dataset import Batch
from manyheads.train.drafter import TrainedDrafter
from manyheads.train.progress import Progress

NUM_RANKS = 10
CHUNK = 1024
"""Tokens whose logits, of one depth, exist at once."""


@torch.no_grad()
def right_ranks(
    base: Base, drafter: TrainedDrafter, data: Batch, rows: int = 8, progress: Progress | None = None
) -> Tensor:
    """The rank of the right token among the candidates of each depth, [N, depth] int64, for every place in the answers.

    NUM_RANKS where it is not among the first so many; -1 where the answer is over, and where a drafter that follows the
    path would not be asked, since the token before was not among its candidates. So many `rows` go through the base at
    once.
    """
    device, vocab_size = base.device, len(base.projection)
    found: list[Tensor] = []
    with (progress or Progress(quiet=True)).task("measuring", len(data.tokens)) as advance:
        for index in torch.split(torch.arange(len(data.tokens)), rows):
            batch = data.take(index)
            targets = batch.ahead(drafter.depth)[..., 1:].flatten(0, 1)  # [N, depth]
            use = (targets[:, 0] >= 0).nonzero()[:, 0]
            targets = send(drafter.place(targets[use], vocab_size), device)
            result = torch.full_like(targets, -1)
            guesses = drafter.guesses(base, batch, use)
            for part in torch.split(torch.arange(len(use), device=device), CHUNK):
                for d in range(drafter.depth):
                    with half_precision(device):
                        logits = guesses(d, part)
                    best = logits.topk(min(NUM_RANKS, logits.shape[-1])).indices
                    hit = best == targets[part, d, None]
                    rank = torch.where(hit.any(-1), hit.int().argmax(-1), NUM_RANKS)
                    result[part, d] = torch.where(targets[part, d] == -1, -1, rank)
            if drafter.follows_path:
                lost = (result == NUM_RANKS).cummax(dim=1).values
                result[:, 1:][lost[:, :-1]] = -1
            found.append(result.cpu())
            advance(len(index), "")
    return torch.cat(found)


def accuracy_table(ranks: Tensor) -> list[list[float]]:
    """[depth][rank]: share of the places that count, by their rank not being -1, at which the candidate is right."""
    columns = [column[column >= 0] for column in ranks.T]
    counts = [torch.bincount(known, minlength=NUM_RANKS + 1)[:NUM_RANKS] / max(1, len(known)) for known in columns]
    return [[round(share, 5) for share in row.tolist()] for row in counts]


def write_statistics(folder: Path, ranks: Tensor, source: str) -> list[list[float]]:
    """Put the accuracies beside the drafter, where the planner starts from them."""
    accuracy = accuracy_table(ranks)
    value = {"accuracy": accuracy, "tokens": int((ranks[:, 0] >= 0).sum()), "source": source}
    write_json(folder / STATISTICS, value, indent=1)
    return accuracy


def tokens_per_step(ranks: Tensor, accuracy: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Tokens a step of the best trees of 1 … 64 nodes.

    `promised` is what the accuracies say, each depth on its own; `measured` counts how deep each place's right path
    lies in the tree, at every place of the answers alike. A greedy reply is such an answer.
    """
    tree, probabilities = grow([list(row) for row in accuracy], MAX_NODES)
    # a node adds a token at every place whose right path goes through it
    gained = Counter(tuple(path[:depth]) for path in ranks.tolist() for depth in range(len(path) + 1))
    measured = accumulate(gained[choice] for choice in tree.choices)
    return [
        {"nodes": n, "promised": round(p, 4), "measured": round(m / max(1, len(ranks)), 4)}
        for n, (p, m) in enumerate(zip(accumulate(probabilities), measured, strict=True), 1)
    ]
