"""EAGLE-3 as a drafter of trees, for all rows at once.

A pass reads, for places of texts, a feature and the token that follows the place, and says what may come after that
token. The drafter keeps K/V of one layer, in the base's pages: that of place t where the base keeps its own. Places
that the base has computed take their features from the base (`observe`); they are all that stays in the cache. Then it
guesses (`propose`): each depth is a pass over the most probable nodes of all rows, whose features are what the pass
before gave for their parents. Their K/V stands behind the row's text until the text's next tokens take the places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from manyheads.attention.base import Group, Heads
from manyheads.batch import Guesses, Level, OpenNodes, RowState, joined
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
        self._levels = [self._template.level(depth, device) for depth in range(self._template.max_depth)]
        # what `observe` made of the rows' last tokens, for `propose` behind it: features, and what a pass says of them
        self._seen: tuple[Tensor, Tensor] | None = None

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
            joined([getattr(chain, name) for chain in chains]) for name in ("position", "slots", "following", "states")
        )
        self._attention.plan(groups, position, slots)
        assert kept.last is not None
        features = self.layer.features(states)
        self._seen = self.layer(features, None, following, self._cache_layer, self._attention, kept.last)

    def propose(self, state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        assert self._seen is not None
        seen, normed = self._seen
        ops, rows = self.layer.ops, kept.index.shape[0]
        counts = self._counts(rows, depth, nodes)
        most = self.shape.scratch_tokens if counts else 0
        guesses = ops.begin_guesses(state, kept.index, self.shape.num_candidates, most)
        self._offer(guesses, self._levels[0], None, normed)
        if counts:
            self._go_on(state, kept.index, guesses, counts, seen)
        return guesses.tokens[:, 1:-1], guesses.chances[:, 1:-1]

    def _go_on(self, state: RowState, index: Tensor, guesses: Guesses, counts: list[int], seen: Tensor) -> None:
        """Passes, each over the nodes that were opened before and so many more.

        Args:
            seen: [R, hidden], the roots' features.
        """
        ops, rows, page_table = self.layer.ops, len(seen), state.page_table[index]
        # of roots, then of each pass's new nodes
        features = seen.new_empty(rows + sum(counts), seen.shape[1])
        features[:rows] = seen
        for level, count in zip(self._levels[1:], counts, strict=False):
            known = rows + guesses.num_opened
            opened = ops.open_nodes(guesses, level, count)
            normed = self._pass(state, guesses, opened, features, known, page_table)
            self._offer(guesses, level, opened, normed)

    def _counts(self, rows: int, depth: int, nodes: float) -> list[int]:
        """How many nodes of all rows each pass opens, up to the first that opens none."""
        widths = self._template.widths(WIDER * nodes)[: depth - 1]
        levels = self._levels[1:]
        counts = [
            min(ceil(rows * width), rows * len(level.columns)) for width, level in zip(widths, levels, strict=False)
        ]
        return counts[: counts.index(0)] if 0 in counts else counts

    def _pass(
        self, state: RowState, guesses: Guesses, opened: OpenNodes, features: Tensor, known: int, page_table: Tensor
    ) -> Tensor:
        """A pass over all nodes that were opened; what it says of the new ones, whose features go behind those known.

        K/V of earlier ones are computed again: so all that a node looks at stands beside it in the pass.
        """
        count = len(opened.tokens)
        group = Group(
            start=0,
            stop=count,
            row_start=opened.row_start,
            bits=opened.bits,
            cached_len=guesses.cached_len,
            page_table=page_table,
            max_tokens=min(count, self.shape.scratch_tokens),
            max_cached_len=state.max_len,
        )
        self._attention.plan([group], opened.position, opened.slots)
        room = features[known : known + len(opened.new_at)]
        places = features, opened.source, opened.tokens
        _, normed = self.layer(*places, self._cache_layer, self._attention, opened.new_at, room)
        return normed

    def _offer(self, guesses: Guesses, level: Level, nodes: OpenNodes | None, normed: Tensor) -> None:
        tokens, chances = self.guess(level, nodes, normed)
        self.layer.ops.offer_children(guesses, level, nodes, tokens, chances, self.layer.token_map)

    def guess(self, level: Level, nodes: OpenNodes | None, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The best tokens behind n nodes and their chances, [n, K] int64 (of the draft vocabulary) and float32.

        Args:
            nodes: whose new ones are meant; None for the roots of all rows.
            normed: [n, hidden], what a pass says of them.
        """
        return self.layer.best(normed, level.families.shape[1])

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
        # two ranks at least, as many as a node that is opened has children
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
            nodes_within=template.nodes_within,
        )

    def build(self, model: Llama, dtype: torch.dtype, device: torch.device, quantization: str | None) -> Eagle3Drafter:
        layer = Eagle3Layer(self._weights, self._config, model, dtype, device, quantization)
        return Eagle3Drafter(layer, model, self.shape, self._prior)
