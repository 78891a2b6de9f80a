"""Candidates that are right at given rates, whatever they are: how fast an engine is with drafters of that quality.

Weights of the right shape and no training cost what trained ones cost, and guess nothing. So the target is made to go
on with a node's candidate of rank r as often as a table says, or with none of them; and drafters promise those rates,
from which follows what a step brings. The planner knows nothing of it: it measures, as ever. vLLM does the same with
`rejection_sample_method="synthetic"` for its chains.

A table is [depth][rank], each the share of nodes at a depth whose child of that rank is right, given that the node is.

    python benchmarks/by_chance.py MODEL --heads DRAFTER --port 8000      # arguments of `manyheads serve`

serves with what is published for the drafter's kind. All requests sample, since those that do not are drawn inside of
recordings. With several ranks, each draws for itself, and all draw the same.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from manyheads.batch import Level, OpenNodes, RowState
from manyheads.checkpoint import resolve
from manyheads.config import EngineConfig
from manyheads.engine import recorded, runner
from manyheads.engine.engine import Engine
from manyheads.engine.nodes import Nodes
from manyheads.frontend.tokenizer import REPLACEMENT, Tokenizer
from manyheads.kv_cache import KVCache
from manyheads.ops.base import Ops
from manyheads.request import EngineRequest
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE
from manyheads.speculation.eagle3 import drafter as eagle3
from manyheads.speculation.eagle3.drafter import DEPTH, Eagle3Drafter
from manyheads.speculation.medusa import drafter as medusa
from manyheads.speculation.medusa.drafter import MedusaDrafter

KINDS = ("medusa", "eagle3")
Table = list[list[float]]
CHAIN = (0.75, 0.56, 0.42, 0.31, 0.23)
"""How often published EAGLE-3 chains hold for 1 to 5 tokens (SafeAILab/EAGLE, Llama-3.1-8B)."""
MEASURED = [
    [0.528, 0.118, 0.056, 0.033, 0.022, 0.017, 0.013, 0.011, 0.008, 0.008],
    [0.491, 0.123, 0.059, 0.036, 0.024, 0.019, 0.016, 0.013, 0.009, 0.008],
    [0.489, 0.122, 0.062, 0.036, 0.023, 0.020, 0.014, 0.013, 0.009, 0.009],
    [0.490, 0.128, 0.059, 0.035, 0.025, 0.022, 0.014, 0.012, 0.012, 0.008],
    [0.496, 0.123, 0.062, 0.039, 0.025, 0.019, 0.014, 0.012, 0.009, 0.008],
]
"""A table: how often an EAGLE-3 drafter for SmolLM2-135M-Instruct is right on Spec-Bench (`accuracy` of `EAGLE-3` in
results/smollm2.json, of 2026-11-29). Not read from there, so that later drafters do not change what is compared."""
BITS = 31
"""Of a hash, what a candidate's rank is drawn with."""
STRIDE, *FACTORS = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
)  # as int64, whose products keep their lowest 64 bits


def table_of(mode: str, file: Path | None = None) -> Table:
    """What is published for a kind of drafter, `medusa` or `eagle3`; a file has a table of its own, in JSON.

    Of EAGLE-3 only the best rank is published. The second and third ones are as often right as `MEASURED` says, and
    further ones as often as there where none of these three is.
    """
    if file is not None:
        table: Table = json.loads(file.read_text())
        if not table or any(not ranks or min(ranks) < 0 or sum(ranks) > 1 for ranks in table):
            raise ValueError(f"{file}: needed are lists of rates by depth, each of which adds up to 1 at most")
        return table
    if mode == "medusa":
        return [list(ranks) for ranks in DEFAULT_ACCEPTANCE]
    eagle3 = []
    for (before, after), (best, second, third, *further) in zip(pairwise((1.0, *CHAIN)), MEASURED, strict=True):
        three = [after / before, second, third]
        left = (1 - sum(three)) / (1 - best - second - third)
        eagle3.append([*three, *(rate * left for rate in further)])
    return eagle3 + eagle3[-1:] * (DEPTH - len(eagle3))


def chain_rates(table: Table, count: int) -> list[float]:
    """How often a chain of the best candidates holds for 1, 2, … `count` tokens."""
    rates = [1.0]
    for depth in range(count):
        rates.append(rates[-1] * table[min(depth, len(table) - 1)][0])
    return rates[1:]


class ByChance:
    """Makes the engines that this process builds from now on accept by a table; the last one is the one that runs.

    Args:
        table: None takes what is published for the kind of the engine's drafter.
        others: tokens of which one is drawn where no candidate is right; none are all that there are.
    """

    def __init__(self, table: Table | None = None, others: Sequence[int] = ()) -> None:
        self.table, self._others = table, torch.tensor(others, dtype=torch.int64)
        self._promised = torch.empty(0)  # [1 + C], by column of a row's draft; the last one is what pads families
        self._children = torch.empty(0)  # [1 + C, K + 1] int64: the columns of a column's children by rank; 0 is none
        self._bounds = torch.empty(0)  # [1 + C, K] int64: numbers below it, of 2^31, choose a rank or one before it

    def install(self) -> None:
        """Let drafters promise what the table says, and the target keep the promise."""
        for kind in (MedusaDrafter, Eagle3Drafter):
            self._replace_attach(kind)
        self._replace_reader(medusa, "read_heads", "medusa")
        self._replace_reader(eagle3, "read_drafter", "eagle3")
        propose, guess = MedusaDrafter.propose, Eagle3Drafter.guess

        def propose_by_chance(drafter: MedusaDrafter, *args: Any) -> tuple[Tensor, Tensor]:
            candidates, chances = propose(drafter, *args)
            return candidates, self._promised[:-1].expand_as(chances).contiguous()

        def guess_by_chance(
            drafter: Eagle3Drafter, level: Level, nodes: OpenNodes | None, normed: Tensor
        ) -> tuple[Tensor, Tensor]:
            tokens, _ = guess(drafter, level, nodes, normed)
            family = level.families if nodes is None else level.families[nodes.new_which]
            return tokens, self._promised[family - 1].expand(tokens.shape).contiguous()

        MedusaDrafter.propose = propose_by_chance  # type: ignore[method-assign,assignment]
        Eagle3Drafter.guess = guess_by_chance  # type: ignore[method-assign,assignment]
        recorded.draw = runner.draw = self._draw  # type: ignore[attr-defined]

    def _replace_attach(self, kind: Any) -> None:
        attach = kind.attach

        def attach_by_chance(drafter: Any, cache: KVCache) -> None:
            attach(drafter, cache)
            self._take(drafter, cache.data.device)

        kind.attach = attach_by_chance

    def _replace_reader(self, module: Any, name: str, kind: str) -> None:
        """What a checkpoint knows of its own guesses says nothing: trees begin with the table's rates."""
        read = getattr(module, name)

        def read_by_chance(*args: Any) -> Any:
            return replace(read(*args), accuracy=self._table(kind))

        setattr(module, name, read_by_chance)

    def _table(self, kind: str) -> Table:
        return self.table or table_of(kind)

    def _take(self, drafter: Any, device: torch.device) -> None:
        table = self._table(drafter.name)
        columns = _columns(drafter)
        width = max(len(children) for _, children in columns)
        promised = torch.zeros(len(columns))
        at = torch.zeros(len(columns), width + 1, dtype=torch.int64)
        weights = torch.zeros(len(columns), width, dtype=torch.float64)
        for column, (depth, children) in enumerate(columns):
            rates = torch.tensor(table[min(depth, len(table) - 1)][: len(children)])
            at[column, : len(children)] = torch.tensor(children, dtype=torch.int64)
            weights[column, : len(rates)] = rates.double()
            promised[at[column, : len(rates)] - 1] = rates
        bounds = (weights.cumsum(dim=1) * 2**BITS).round().to(torch.int64)
        self._promised, self._children, self._bounds = (x.to(device) for x in (promised, at, bounds))
        self._others = self._others.to(device)

    def _draw(self, logits: Tensor, nodes: Nodes, state: RowState, ops: Ops) -> tuple[Tensor, dict[int, Tensor]]:
        """What `sampler.draw` gives: a token for each node, here one of its candidates or any other, by chance.

        Not the same one every time: what a model with experts reads depends on how many tokens there are. As the
        sampler's, a draw depends on the row's seed and the position, so all ranks that share a model draw the same.
        """
        # nodes that a row did not bring stand at its root, which is written last
        column = torch.zeros_like(nodes.row)
        column[nodes.place.flatten()] = nodes.tree.column.expand_as(nodes.place).flatten()
        column.index_fill_(0, nodes.place[:, 0], 0)  # NOTE: an assignment would wait for the device
        row = nodes.rows[nodes.row]
        bits = hashed(state.seed[row], nodes.first[nodes.row] + nodes.depth)
        rank = (self._bounds[column] <= (bits & (2**BITS - 1))[:, None]).sum(dim=1)
        child = self._children[column, rank]
        other = bits >> BITS
        if len(self._others):
            other = self._others[other % len(self._others)]
        return torch.where(child > 0, state.drafts[row, child], other % logits.shape[-1]), {}


def whole_tokens(folder: Path) -> list[int]:
    """The tokens of a folder's tokenizer that are text by themselves. A server holds back the others, of which bytes of
    characters are some, and ids that an enlarged model has beyond its tokenizer's: so gaps of streams would be longer
    than any model makes them."""
    tokenizer = Tokenizer.load(folder)
    ids = sorted(set(tokenizer.hf.get_vocab().values()) - tokenizer.special_ids)
    return [token for token in ids if (text := tokenizer.decode([token])) and REPLACEMENT not in text]


def hashed(seed: Tensor, position: Tensor) -> Tensor:
    """A number of 63 bits for each pair of int64 numbers: the finalizer of MurmurHash3 (`fmix64`) of both."""
    bits = seed ^ (position * STRIDE)
    for factor in FACTORS:
        bits = (bits ^ (bits >> 33)) * factor
    return bits ^ (bits >> 33)  # not negative: the sign is shifted to where it stands already


def _columns(drafter: Any) -> list[tuple[int, list[int]]]:
    """For each column of a row's draft, the depth of its node, and the columns of the node's children by rank."""
    if isinstance(drafter, Eagle3Drafter):
        template = drafter._template
        return [(len(choice), [1 + c for c in template.children.get(choice, [])]) for choice in ((), *template.choices)]
    depths, count = drafter.shape.max_depth, drafter.shape.num_candidates
    ranks = count // depths
    below = [list(range(1 + depth * ranks, 1 + (depth + 1) * ranks)) for depth in range(depths)] + [[]]
    return [(0, below[0])] + [(depth, below[depth]) for depth in range(1, depths + 1) for _ in range(ranks)]


def build(config: EngineConfig, progress: Callable[[str], None]) -> Engine:
    """An engine that accepts by chance, for the engine process of a server."""
    from changes import Changes

    from manyheads.engine.build import build_engine

    Changes(by_chance=True, tokenizer=str(resolve(config.tokenizer or config.model))).install()
    engine = build_engine(config, progress)
    add = engine.add_request

    def add_sampled(message: EngineRequest) -> None:
        params = msgspec.structs.replace(message.params, temperature=1.0)
        add(msgspec.structs.replace(message, params=params))

    engine.add_request = add_sampled  # type: ignore[method-assign]
    return engine


if __name__ == "__main__":
    from manyheads import cli
    from manyheads.server import run

    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    run.serve = functools.partial(run.serve, build="by_chance:build")
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
