"""EAGLE-3 as a drafter of trees, for all rows at once.

A pass reads, for places of texts, a feature and the token that follows the place, and says what may come after that
token. The drafter keeps K/V of one layer, in the base's pages: that of place t where the base keeps its own. Places
that the base has computed take their features from the base (`observe`); they are all that stays in the cache. Then it
guesses (`propose`): each depth is a pass over the most probable nodes of all rows, whose features are what the pass
before gave for their parents. Their K/V stands behind the row's text until the text's next tokens take the places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from manyheads.attention.base import Group, Heads
from manyheads.batch import RowState
from manyheads.config import ConfigError
from manyheads.kv_cache import KVCache
from manyheads.models.config import ModelConfig
from manyheads.models.llama import Llama
from manyheads.models.parallel import shared_rows
from manyheads.models.rope import Rope
from manyheads.speculation.drafter import DrafterShape, Kept
from manyheads.speculation.eagle3.checkpoint import Eagle3Weights, read_drafter
from manyheads.speculation.eagle3.layer import Eagle3Layer
from manyheads.speculation.eagle3.template import LEAST_CHILDREN, Template
from manyheads.speculation.tree import Choice, Tree

DEPTH = 6
"""Tokens that are guessed beyond the next one, where the checkpoint has no statistics."""
ACCEPTANCE = [[0.75, 0.10, 0.04, 0.02, 0.015, 0.01, 0.008, 0.006, 0.005, 0.004]] * DEPTH
"""Acceptance by depth and rank to expect then. The first rank's is that of published chains, which hold for 1 to 5
tokens with probability 0.75, 0.56, 0.42, 0.31, 0.23 (SafeAILab/EAGLE, Llama-3.1-8B)."""


WIDER = 1.5
"""What a pass goes on from is as many nodes as have children in a tree of so many times the nodes that a row has: some
rows take more than others."""


@dataclass(frozen=True, eq=False)
class _Nodes:
    """N nodes of rows that are expanded, row after row, each after its parent."""

    row: Tensor  # [N] int64, of the K rows
    candidate: Tensor  # [N] int64
    parent: Tensor  # [N] int64, where the parent's feature stands among those that were computed

    def __add__(self, other: _Nodes) -> _Nodes:
        pairs = ((self.row, other.row), (self.candidate, other.candidate), (self.parent, other.parent))
        return _Nodes(*(torch.cat(pair) for pair in pairs))


class Eagle3Drafter:
    """One decoder layer, and a candidate for each node of a template."""

    name = "eagle3"
    passes_per_depth = 1
    prior_holds = False

    def __init__(self, layer: Eagle3Layer, model: Llama, shape: DrafterShape, prior: list[list[float]]) -> None:
        self.layer, self.model, self.shape = layer, model, shape
        self._template = Template(prior)
        self._prior = [list(ranks) for ranks in prior[: self._template.max_depth]]
        self._cache_layer = model.config.num_layers
        device = model.device
        # by depth, the nodes that have children, and these; the root first
        inner = [[-1], *(self._template.inner(depth) for depth in range(1, self._template.max_depth))]
        self._inner = [torch.tensor(candidates, device=device) for candidates in inner]
        self._families = [self._template.families(candidates, device) for candidates in inner]
        self._ancestors = self._template.ancestors(device)
        self._node_depth = torch.tensor([len(choice) for choice in self._template.choices], device=device)
        self._seen: Tensor | None = None  # what `observe` made of the rows' last tokens, for `propose` behind it

    @property
    def offered(self) -> frozenset[Choice]:
        return frozenset(self._template.choices)

    @property
    def prior(self) -> list[list[float]]:
        return self._prior

    def columns(self, tree: Tree) -> list[int]:
        return [0, *(1 + self._template.index[choice] for choice in tree.choices[1:])]

    def follow(self, candidates: list[int], tokens: list[int]) -> Iterator[list[int]]:
        node: Choice = ()
        for token in tokens:
            offered = [candidates[c] for c in self._template.children.get(node, [])]
            if len(set(offered)) < len(offered) or not offered:
                return  # it was not looked at
            yield offered
            if token not in offered:
                return
            node = (*node, offered.index(token))

    def attach(self, cache: KVCache) -> None:
        config = self.layer.config
        longest = self.model.config.max_position_embeddings
        rope = Rope(config.rope_theta, config.head_dim, config.rope_scaling).table(
            longest, config.head_dim, self.model.device, self.model.dtype
        )
        heads = Heads(num_heads=config.num_heads, eps=config.rms_norm_eps, ropes={self._cache_layer: rope})
        self._attention = self.model.ops.attention(cache, heads)

    def admit(self, state: RowState, row: int, tokens: list[int]) -> None:
        """What it knows of a text is in the cache, as what the base knows."""

    def observe(self, state: RowState, kept: Kept) -> None:
        chains = kept.chains
        starts = [0]
        for chain in chains:
            starts.append(starts[-1] + chain.following.shape[0])
        groups = [
            replace(chain.group, start=start, stop=stop)
            for chain, start, stop in zip(chains, starts, starts[1:], strict=False)
        ]
        position, slots, following, states = (
            torch.cat([getattr(chain, name) for chain in chains])
            for name in ("position", "slots", "following", "states")
        )
        self._attention.plan(groups, position, slots)
        out, normed = self.layer(self.layer.features(states), following, self._cache_layer, self._attention)
        assert kept.last is not None
        self._seen = torch.stack((out[kept.last], normed[kept.last]))

    def propose(self, state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        assert self._seen is not None
        features, normed = self._seen.unbind()
        rows, count, device = kept.index.shape[0], self.shape.num_candidates, features.device
        # the last column is for what pads families
        tokens = torch.zeros(rows, count + 1, dtype=torch.int64, device=device)
        chances = torch.zeros(rows, count + 1, device=device)
        worth = torch.zeros(rows, count + 1, device=device)  # that all on the way to a candidate hold
        order = torch.arange(rows, device=device)
        self._offer(
            self._families[0].expand(rows, -1), order, normed, state.speculative[kept.index], tokens, chances, worth
        )
        place = torch.zeros(rows, count, dtype=torch.int64, device=device)  # of a node's feature
        opened: _Nodes | None = None
        widths = self._template.widths(WIDER * nodes)
        for below, width in zip(range(1, depth), widths, strict=False):
            inner, most = self._inner[below], ceil(rows * width)
            if most == 0:
                break
            found = worth[:, inner].flatten().topk(min(most, rows * len(inner)), sorted=False).indices.sort().values
            row, which = found // len(inner), found % len(inner)
            candidate = inner[which]
            above = self._ancestors[candidate, below - 2] if below > 1 else candidate
            parent = row if below == 1 else place[row, above]
            place[row, candidate] = features.shape[0] + torch.arange(len(found), device=device)
            new = _Nodes(row, candidate, parent)
            opened = new if opened is None else opened + new
            out, normed = self._expand(state, kept.index, opened, features, tokens, len(found))
            features = torch.cat((features, out))
            self._offer(self._families[below][which], row, normed, worth[row, candidate], tokens, chances, worth)
        return tokens[:, :-1].contiguous(), chances[:, :-1].contiguous()

    def _offer(
        self,
        family: Tensor,
        row: Tensor,
        normed: Tensor,
        parents: Tensor,
        tokens: Tensor,
        chances: Tensor,
        worth: Tensor,
    ) -> None:
        """Write down the children of N nodes.

        Args:
            family: [N, K] int64, their candidates by rank.
            row: [N] int64.
            normed: [N, hidden], what a pass says of the nodes.
            parents: [N], worth of the nodes.
            tokens, chances, worth: [rows, C + 1], written to.
        """
        best, chance = self.layer.best(normed, family.shape[1])
        at = (row[:, None].expand_as(family), family)
        tokens.index_put_(at, best)
        chances.index_put_(at, chance)
        worth.index_put_(at, chance * parents[:, None])

    def _expand(
        self, state: RowState, index: Tensor, opened: _Nodes, features: Tensor, tokens: Tensor, num_new: int
    ) -> tuple[Tensor, Tensor]:
        """A pass over all nodes that were opened; what it says of the last `num_new` of them.

        Those of earlier passes are computed again: so all that a node looks at stands beside it in the pass.
        """
        rows, count = index.shape[0], self.shape.num_candidates
        order = (opened.row * count + opened.candidate).argsort()
        row, candidate = opened.row[order], opened.candidate[order]
        starts = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
        place = torch.arange(len(row), device=row.device) - starts[row]  # among the row's
        place_of = torch.zeros(rows, count, dtype=torch.int64, device=row.device)
        place_of[row, candidate] = place
        bits = torch.ones_like(place) << place
        for ancestor in self._ancestors[candidate].unbind(1):
            bits |= torch.ones_like(place) << place_of[row, ancestor]
        slot_row = index[row]
        cached_len = state.cached_len[slot_row]
        group = Group(
            start=0,
            stop=len(row),
            row_start=starts.to(torch.int32),
            bits=bits,
            cached_len=state.cached_len[index],
            page_table=state.page_table[index],
            max_tokens=min(len(row), self.shape.scratch_tokens),
            max_cached_len=state.max_len,
        )
        self._attention.plan(
            [group], cached_len + self._node_depth[candidate] - 1, state.slots(slot_row, cached_len + place)
        )
        out, normed = self.layer(
            features[opened.parent[order]], tokens[row, candidate], self._cache_layer, self._attention
        )
        back = torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=order.device))[-num_new:]
        return out[back], normed[back]

    def memory_bytes(self) -> int:
        return self.layer.memory_bytes()


class Eagle3Source:
    """A drafter as read from a checkpoint."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Raises CheckpointError or ConfigError: the folder holds none, or none for this model."""
        self._weights: Eagle3Weights = read_drafter(folder, model)
        config = self._config = self._weights.config.shared(model.num_ranks)
        own, base = (config.num_kv_heads, config.head_dim), (model.num_kv_heads, model.head_dim)
        if own != base:
            raise ConfigError(
                f"{folder}: the drafter has {own[0]} K/V heads of {own[1]}, its base {base[0]} of {base[1]}; "
                "both stand in the same pages, and have to be alike"
            )
        # two ranks at least, as many as a node that is expanded has children
        known = self._weights.accuracy or ACCEPTANCE
        self._prior = [[*ranks, *[0.0] * (LEAST_CHILDREN - len(ranks))] for ranks in known]
        template = Template(self._prior)
        numbers = {name: prod(shape) for name, shape in config.shapes.items() if len(shape) == 2}
        embedding = self._weights.embedding
        vocabulary = numbers.pop("lm_head.weight")
        vocabulary += 0 if embedding is None else shared_rows(embedding.numel(), model.num_ranks)
        self.shape = DrafterShape(
            max_depth=template.max_depth,
            num_candidates=template.num_candidates,
            layer_weights=sum(numbers.values()),
            vocabulary_weights=vocabulary,
            row_logits=self._weights.config.draft_vocab_size,
            kv_layers=1,
            base_layers=config.feature_layers(model.num_layers),
            scratch_tokens=template.num_inner,
        )

    def build(self, model: Llama, dtype: torch.dtype, device: torch.device, quantization: str | None) -> Eagle3Drafter:
        layer = Eagle3Layer(self._weights, self._config, model, dtype, device, quantization)
        return Eagle3Drafter(layer, model, self.shape, self._prior)
