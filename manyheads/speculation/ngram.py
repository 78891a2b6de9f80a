"""A drafter without weights: what followed the last few tokens where they stood earlier in the same text.

Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"), as a tree: the best few earlier places are branches. It needs no
heads, so it speculates for every model, and it pays where a reply repeats its prompt: summaries, answers from given
passages, code that is edited.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.batch import MAX_NODES, RowState
from manyheads.kv_cache import KVCache
from manyheads.models.llama import Llama
from manyheads.speculation.drafter import DrafterShape, Kept
from manyheads.speculation.tree import Tree

PLACES = 3
"""Earlier places that are looked at, each a branch of the tree."""
DEPTH = 12
"""Tokens that are taken from each."""
LONGEST = 4
"""Most last tokens that are compared."""
CHANCES = (0.0, 0.2, 0.45, 0.65, 0.8)
"""Of the first token after a place, by how many tokens before it are the text's last ones."""
GOES_ON = 0.85
"""Chance that a token after a place holds once the one before it did."""


class NgramDrafter:
    """PLACES chains of DEPTH candidates each: chain by chain, from its place on.

    A node whose choice begins with rank r stands on chain r, so a candidate belongs to its path.
    """

    name = "ngram"
    passes_per_depth = 0
    offered = None
    prior_holds = True

    def __init__(self, shape: DrafterShape, device: torch.device) -> None:
        self.shape = shape
        self._chances = torch.tensor(CHANCES, device=device)

    @property
    def prior(self) -> list[list[float]]:
        return [[0.3, *[0.05] * (PLACES - 1)], *[[GOES_ON]] * (DEPTH - 1)]

    def columns(self, tree: Tree) -> list[int]:
        return [0, *(1 + choice[0] * DEPTH + len(choice) - 1 for choice in tree.choices[1:])]

    def follow(self, candidates: list[int], tokens: list[int]) -> Iterator[list[int]]:
        chains = [candidates[start : start + DEPTH] for start in range(0, len(candidates), DEPTH)]
        yield [chain[0] for chain in chains]
        for depth in range(1, DEPTH):
            chains = [chain for chain in chains if chain[:depth] == tokens[:depth]]
            if not chains:
                return
            yield [chains[0][depth]]

    def attach(self, cache: KVCache) -> None:
        """It keeps no K/V."""

    def admit(self, state: RowState, row: int, tokens: list[int]) -> None:
        state.drafter["text"][row, : len(tokens)] = state.tensor(tokens, torch.int32)

    def observe(self, state: RowState, kept: Kept) -> None:
        text = state.drafter["text"]
        order = torch.arange(kept.tokens.shape[1], device=text.device)
        # the row has cached all but the last of its tokens
        position = state.cached_len[kept.index][:, None] + 1 - kept.gained + order
        # the last place of a text is nobody's
        position = torch.where(order < kept.gained, position.clamp(min=0), text.shape[1] - 1)
        tokens = kept.tokens.clamp(min=0)  # what could not be drawn must not be guessed: no model has such a token
        text.index_put_((kept.index[:, None].expand_as(position), position), tokens.to(text.dtype))

    def propose(self, state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        text = state.drafter["text"][kept.index]  # [R, L]
        end = state.cached_len[kept.index][:, None]  # [R, 1], where the last token stands
        order = torch.arange(text.shape[1], device=text.device)
        # how many tokens up to each place are the text's last ones: [R, L]
        same = torch.ones_like(text, dtype=torch.bool)
        length = torch.zeros_like(text)
        for back in range(LONGEST):
            last = text.gather(1, (end - back).clamp(min=0))
            here = text if back == 0 else F.pad(text[:, :-back], (back, 0), value=-1)
            same = same & (here == last)
            length += same
        length = torch.where(order < end, length, 0)
        # the longest first, of equals the latest
        place = (length.to(torch.int64) * text.shape[1] + order).topk(PLACES, dim=1).indices  # [R, P]
        same = length.gather(1, place)  # [R, P]
        # what stands there up to the end of the text, and then the same again
        ahead = torch.arange(DEPTH, device=text.device) % (end - place).clamp(min=1)[..., None]  # [R, P, D]
        found = text.gather(1, (place[..., None] + 1 + ahead).clamp(max=text.shape[1] - 1).flatten(1)).view_as(ahead)
        first = found[..., 0]
        again = (first[:, :, None] == first[:, None]).tril(-1).any(2)  # [R, P], a branch that a better one says already
        chances = torch.full(ahead.shape, GOES_ON, device=text.device)
        chances[..., 0] = torch.where(again, 0.0, self._chances[same.to(torch.int64)])
        found, chances = (torch.where(same[..., None] > 0, x, 0) for x in (found, chances))
        return found.flatten(1).to(torch.int64), chances.flatten(1)

    def memory_bytes(self) -> int:
        return 0


class NgramSource:
    """Nothing has to be read.

    Args:
        max_len: longest sequence, in tokens.
    """

    def __init__(self, max_len: int) -> None:
        self.shape = DrafterShape(
            max_depth=DEPTH,
            num_candidates=PLACES * DEPTH,
            token_scratch=64,
            row_state={"text": ((max_len + MAX_NODES,), torch.int32)},
        )

    def build(self, model: Llama, dtype: torch.dtype, device: torch.device, quantization: str | None) -> NgramDrafter:
        return NgramDrafter(self.shape, device)
