"""What a step works on, as tensors: the state of every row, the shape of a tree, and the tokens that rows bring.

These types stand below the kernels. Whoever plans a step fills them in (`engine/`), and what a device does with them is
an operation of `ops/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.request import MAX_BAD_TOKENS

MAX_NODES = 64
"""Most nodes of a tree, so that a set of nodes is the bits of an int64."""
MAX_PADDING = 1024 + 64
"""Most tokens that the dummy row may bring to a pass (`engine/record_sizes.py`, `engine/quickest.py`); attention looks
up the page of each, however long a sequence may be."""


@dataclass(frozen=True, eq=False)
class TreeTensors:
    """A tree of n nodes and depth D as tensors on a device; parents stand before their children."""

    parent: Tensor  # [n] int64, the root is its own parent
    depth: Tensor  # [n] int64
    column: Tensor  # [n] int64, index into a row's draft: its last token, then its candidates
    bits: Tensor  # [n] int64, bit j of entry i: j is i or above it
    path: Tensor  # [n, D + 1] int64, the nodes from the root down to node i by depth, padded with i itself

    @property
    def num_nodes(self) -> int:
        """How many nodes there are, the root included."""
        return self.depth.shape[0]

    @property
    def max_depth(self) -> int:
        """Depth that paths have room for: that of the deepest node, or more."""
        return self.path.shape[1] - 1

    @property
    def order(self) -> Tensor:
        """[n] int64: 0, 1, 2, …"""
        return torch.arange(self.num_nodes, device=self.depth.device)

    @property
    def ancestors(self) -> Tensor:
        """[n, n] bool, entry (i, j): j is i or above it."""
        return (self.bits[:, None] >> self.order) & 1 != 0

    @classmethod
    def blank(cls, num_nodes: int, depth: int, device: torch.device) -> TreeTensors:
        """Room for trees of so many nodes and at most this depth, to be filled by `take`."""
        zeros = torch.zeros(num_nodes, dtype=torch.int64, device=device)
        path = torch.zeros(num_nodes, depth + 1, dtype=torch.int64, device=device)
        return cls(zeros, zeros.clone(), zeros.clone(), torch.ones_like(zeros), path)

    def take(self, other: TreeTensors) -> None:
        """Become another tree of as many nodes, which is no deeper than there is room for."""
        for name in ("parent", "depth", "column", "bits"):
            getattr(self, name).copy_(getattr(other, name))
        width = other.path.shape[1]
        self.path[:, :width] = other.path
        self.path[:, width:] = other.path[:, -1:]


@dataclass(frozen=True, eq=False)
class InFlight:
    """R rows and the T tokens that they bring to a step, row after row."""

    index: Tensor  # [R] int64, slots of the row state
    row_start: Tensor  # [R + 1] int32, row r's tokens are row_start[r] … row_start[r + 1] - 1
    tokens: Tensor  # [T] int64
    position: Tensor  # [T] int64, of the tokens themselves
    slots: Tensor  # [T] int64, cache slots
    bits: Tensor  # [T] int64, bit j: the row's token j is this one or above it; 0 where rows are chains


@dataclass(frozen=True, eq=False)
class Trees:
    """Decoding rows, and which of a tree's n nodes each of them brings: its own most probable ones.

    A row's tokens are its nodes in the tree's order, so parents come before their children.
    """

    inflight: InFlight
    tree: TreeTensors
    node_tokens: Tensor  # [R, n] int64, what every node would hold
    taken: Tensor  # [R, n] bool, whether the row may accept the node
    offset: Tensor  # [R, n] int64, a node's place among its row's tokens
    row: Tensor  # [T] int64
    node: Tensor  # [T] int64
    row_slots: Tensor  # [R, n] int64, cache slots of the row's tokens by offset
    gains: Tensor | None  # [S] float32, what is expected of so many tokens, beside the roots; None for these alone

    @property
    def place(self) -> Tensor:
        """[R, n] int64, where a node stands among all tokens; its row's root where it was not taken."""
        first = self.inflight.row_start[:-1, None].to(torch.int64)
        return first + torch.where(self.taken, self.offset, 0)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What R rows gained in a step, and where their last accepted tokens stand."""

    values: Tensor
    """[R, 3 + 2 · (D + 1) + C] int64 for the host: tokens gained, tokens brought, depth of the deepest, which tokens,
    the nodes that drew them, and the candidates that were known when the step began. What stands behind the tokens
    gained, or the nodes that drew them, means nothing."""
    last: Tensor  # [R] int64, among the tokens of the step


@dataclass(frozen=True, eq=False)
class Gained:
    """The tokens that R rows computed in a step and keep, one behind the other; a dummy row behind them pads them."""

    inflight: InFlight
    """Of R + 1 rows. NOTE: tokens are those that follow, which the target drew."""
    cached_len: Tensor  # [R + 1] int64, before the step
    place: Tensor  # [T] int64, where they stand among the tokens of the step
    last: Tensor  # [R] int64, where each row's last one stands among these


@dataclass(frozen=True, eq=False)
class Level:
    """The M nodes at one depth of a drafter's template that have children.

    A node's column is 0 for the root, and 1 + its candidate for the others.
    """

    depth: int
    columns: Tensor  # [M] int64
    parents: Tensor  # [M] int64, the columns of their parents; the root is its own
    families: Tensor  # [M, K] int64, the columns of their children by rank; C + 1 pads


@dataclass(eq=False)
class Guesses:
    """What a drafter that goes on from its own guesses has guessed for R rows: of every node, by its column.

    Nodes that it goes on from are opened, depth by depth. An opened node has a place, by number, among those of its row
    (at most I), and its K/V stands so far behind the row's text. The last column is for what pads families.
    """

    cached_len: Tensor  # [R] int64
    tokens: Tensor  # [R, C + 2] int64
    chances: Tensor  # [R, C + 2] float32, that a node holds if its parent does; 0 is no guess
    worth: Tensor  # [R, C + 2] float32, that all on the way to it hold; the root's is 0 where a row declines trees
    above: Tensor  # [R, C + 2] int64, of what was opened: bit j is the node at place j, if that is this one or above it
    feature: Tensor  # [R, C + 2] int64, where its feature stands: those of roots first, then by the order of opening
    opened: Tensor  # [5, R, I] int64, by place, what `OpenNodes` says of each: slots first, which are known before
    row_start: Tensor  # [R + 1] int32, how many nodes the rows before have opened
    num_opened: int = 0
    """Of all rows."""


@dataclass(frozen=True, eq=False)
class OpenNodes:
    """The N nodes that R rows have opened, row after row, as the next pass computes them; n of them are new."""

    row_start: Tensor  # [R + 1] int32, where the rows' nodes begin
    slots: Tensor  # [N] int64, cache slots
    tokens: Tensor  # [N] int64
    source: Tensor  # [N] int64, where the parents' features stand
    position: Tensor  # [N] int64
    bits: Tensor  # [N] int64, bit j: the row's node j is this one or above it
    new_row: Tensor  # [n] int64, the rows of the new ones,
    new_which: Tensor  # [n] int64, which of their level's nodes they are,
    new_at: Tensor  # [n] int64, and which of the N


class RowState:
    """What a device keeps of each row from step to step, so that it can go on without the host.

    There is one slot for each request that may run at once, and a last one, the dummy row, that pads a step and that
    writes to the dummy page.

    Args:
        num_rows: slots, without the dummy row.
        max_len: longest sequence, in tokens.
        page_size: tokens in a page of the K/V cache.
        num_candidates: tokens that a drafter guesses for a row, C.
        vocab_size: stands for "off" in `top_k`.
        drafter: shape and type of what a drafter keeps for each row, by name.
    """

    def __init__(
        self,
        num_rows: int,
        max_len: int,
        page_size: int,
        num_candidates: int,
        vocab_size: int,
        device: torch.device,
        drafter: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
    ) -> None:
        self.num_rows, self.vocab_size, self.device, self.page_size = num_rows, vocab_size, device, page_size
        self.max_len = max_len

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((num_rows + 1, *shape), dtype=dtype, device=device)

        self.cached_len = zeros()  # [rows]
        self.drafts = zeros(1 + num_candidates)  # [rows, 1 + C]: the last token, and the candidates for the next ones
        # [rows, 1 + C]: how sure the drafter is of each, given those before it; 0 where it has not spoken
        self.chances = zeros(1 + num_candidates, dtype=torch.float32)
        self.chances[:, 0] = 1.0
        longest = max(max_len + MAX_NODES, MAX_PADDING)
        self.page_table = zeros(-(-longest // page_size))  # [rows, pages], meaningless where unused
        self.ints = zeros(4)
        self.seed, self.min_len, self.top_k, self.adapter = self.ints.unbind(1)
        # min_len: shortest sequence that a stop token may end; top_k: vocab_size is off; adapter: 0 is none;
        # temperature: 0 is greedy
        self.floats = zeros(9, dtype=torch.float32)
        self.temperature, self.top_p, self.min_p, self.epsilon, self.alpha = self.floats[:, :5].unbind(1)
        self.repetition_penalty, self.presence_penalty, self.frequency_penalty = self.floats[:, 5:8].unbind(1)
        self.speculative = self.floats[:, 8]  # 1, or 0 for a row that declines trees, as the dummy row does
        self.drafter = {name: zeros(*shape, dtype=dtype) for name, (shape, dtype) in (drafter or {}).items()}
        # token counts for penalties, there from the first request on that has some
        self.prompt_seen: Tensor | None = None  # [rows, V] bool
        self.output_count: Tensor | None = None  # [rows, V] int32
        self.tail: Tensor | None = None  # [rows, MAX_BAD_TOKENS] int64, last tokens of texts, likewise for bad runs

    @property
    def candidates(self) -> Tensor:
        """[rows, C], in the drafter's order."""
        return self.drafts[:, 1:]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is allocated."""
        tensors = [self.cached_len, self.drafts, self.chances, self.page_table, self.ints, self.floats]
        counts = [tensor for tensor in (self.prompt_seen, self.output_count, self.tail) if tensor is not None]
        return sum(tensor.nbytes for tensor in (*tensors, *self.drafter.values(), *counts))

    def slots(self, rows: Tensor, position: Tensor) -> Tensor:
        """The cache slot (page · page size + offset) of each position of a row; the two are broadcast."""
        return self.page_table[rows, position // self.page_size] * self.page_size + position % self.page_size

    def count_tokens(self) -> tuple[Tensor, Tensor]:
        """`prompt_seen` and `output_count`, allocated if they are not there yet."""
        if self.prompt_seen is None or self.output_count is None:
            shape = (self.num_rows + 1, self.vocab_size)
            self.prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.output_count = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return self.prompt_seen, self.output_count

    def last_tokens(self) -> Tensor:
        """`tail`, allocated if it is not there yet; rows that do not need it leave theirs as it is."""
        if self.tail is None:
            self.tail = torch.full((self.num_rows + 1, MAX_BAD_TOKENS), -1, device=self.device)
        return self.tail

    def tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers, on their way to the device: the host does not wait."""
        host = torch.tensor(values, dtype=dtype)
        return host if self.device.type != "cuda" else host.pin_memory().to(self.device, non_blocking=True)

    def forget_candidates(self, index: Tensor) -> None:
        """The rows move on without new candidates."""
        self.chances[:, 1:].index_fill_(0, index, 0.0)  # an assignment would copy a host's number, which no graph holds


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors one behind the other; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
