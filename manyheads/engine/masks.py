"""What grammars allow at the nodes of a step, made on the host while the device computes the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.batch import RowState, Trees, TreeTensors
from manyheads.engine.matcher import Matcher, is_alone, write_nodes, write_roots
from manyheads.engine.step import Request, RowResult
from manyheads.speculation.tree import Tree, parents

LEAST_LEFT = 0.05
"""What guesses that are dropped leave to the others is taken for this at least."""


@dataclass(frozen=True, eq=False)
class Masks:
    """Which tokens M nodes may draw. It is plain data, the same for every device that computes the step's logits."""

    place: Tensor  # [M] int64, where the nodes stand among the step's
    words: Tensor
    """[M, W] int32, bit t % 32 of word t // 32 says whether token t is allowed. There may be more than the logits."""

    def apply(self, logits: Tensor) -> None:
        """Give what is forbidden a logit of -inf, in place on [T, V]."""
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        forbidden = ((self.words[..., None] >> bits) & 1 == 0).flatten(1)[:, : logits.shape[1]]
        logits[self.place] = logits[self.place].masked_fill_(forbidden, float("-inf"))


def first_masks(requests: list[Request], state: RowState) -> Masks | None:
    """Those of rows that draw a token behind their known ones, in order; None where no row has a grammar."""
    walked = [i for i, request in enumerate(requests) if request.matcher is not None]
    if not walked:
        return None
    rows = [requests[i] for i in walked]
    words = _room(state, rows, len(rows))
    _write_roots(state, rows, words.numpy())
    return Masks(state.tensor(walked), _upload(state, words))


@dataclass(eq=False)
class _Brought:
    """What a row brings to a step, by the places of its nodes among the step's."""

    request: Request
    first: int
    """Its root's."""
    nodes: list[int]
    """Of the others, those that it may accept."""
    below: dict[int, list[int]] = field(default_factory=dict)
    """For each place those of the nodes below it; -1 is the root's."""
    allowed: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    """The masks of the nodes that there is a way to."""


class TreeWalk:
    """Grammars of rows that decode: walks the trees that the device has chosen with the rows' matchers.

    Those have to be where the texts are by when masks are made, and not when the step is launched.

    Args:
        requests: those of the step that decode, in order.
        state: of the rows.
    """

    def __init__(self, requests: list[Request], state: RowState) -> None:
        self._state = state
        self._rows = {request: i for i, request in enumerate(requests) if request.matcher is not None}
        self.foreseen: list[RowResult] = []
        """What rows are sure to gain, of texts that are known to go on beyond it."""
        self._roots: dict[Request, NDArray[np.int32]] = {}  # [W] each, of texts that were known before
        self._sent: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    @classmethod
    def of(cls, requests: list[Request], state: RowState) -> TreeWalk | None:
        """None where no row has a grammar."""
        return cls(requests, state) if any(request.matcher is not None for request in requests) else None

    def drop(self, tree: TreeTensors) -> None:
        """Take the chance from the candidates for the next token that the grammar forbids, so that they and what stands
        below them get no nodes; the others get what is theirs then. Of rows that have to be read nothing is known."""
        state = self._state
        known = [request for request in self._rows if request.unread == 0]
        if tree.num_nodes == 1 or not known:
            return
        rows = state.tensor([request.row for request in known])[:, None]
        words = _room(state, known, len(known))
        _write_roots(state, known, words.numpy())
        self._roots = dict(zip(known, words.numpy(), strict=True))
        allowed = _bits(_upload(state, words), state.drafts[rows, tree.column])  # [G, n]
        is_first = tree.depth == 1
        chances = state.chances[rows, tree.column]
        left = 1 - torch.where(is_first & ~allowed, chances, 0.0).sum(1, keepdim=True)
        kept = (chances * allowed / left.clamp(min=LEAST_LEFT)).clamp(max=1.0)
        state.chances[rows, tree.column] = torch.where(is_first, kept, chances)

    def send(self, trees: Trees) -> None:
        """Have the host told which nodes rows bring, before the device begins with the forward pass."""
        taken = trees.taken[trees.row, trees.node]
        told = torch.stack((trees.row, trees.node, trees.inflight.tokens, taken.to(torch.int64)))
        if told.device.type == "cpu":
            self._sent = told
            return
        self._sent = torch.empty(told.shape, dtype=told.dtype, pin_memory=True).copy_(told, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def masks(self, tree: Tree) -> Masks:
        """What may be drawn at each node of the rows that has a way to it; what the others draw is never looked at."""
        if self._copied is not None:
            self._copied.synchronize()
        assert self._sent is not None
        bounds = np.searchsorted(self._sent[0].numpy(), np.arange(max(self._rows.values()) + 2)).tolist()
        _, node, tokens, taken = self._sent.tolist()
        brought: list[_Brought] = []
        for request, i in self._rows.items():
            first, stop = bounds[i : i + 2]
            brought.append(_Brought(request, first, [at for at in range(first + 1, stop) if taken[at]]))
        brought.sort(key=lambda row: row.request not in self._roots)
        rows, known = [row.request for row in brought], len(self._roots)
        room = _room(self._state, rows, len(rows) + sum(len(row.nodes) for row in brought))
        words = room.numpy()
        if known:
            np.stack([self._roots[request] for request in rows[:known]], out=words[:known])
        _write_roots(self._state, rows[known:], words[known : len(rows)])
        places = [row.first for row in brought]
        self._walk(tree, brought, node, tokens, places, words)
        for row, root in zip(brought, words, strict=False):
            if sure := _sure(row, root, tokens):
                depth = max((len(tree.choices[node[at]]) for at in row.nodes), default=0)
                self.foreseen.append(RowResult(row.request, sure, drafted_depth=depth, num_drafted=len(row.nodes)))
        return Masks(self._state.tensor(places), _upload(self._state, room[: len(places)]))

    @staticmethod
    def _walk(
        tree: Tree,
        brought: Sequence[_Brought],
        node: Sequence[int],
        tokens: Sequence[int],
        places: list[int],
        words: NDArray[np.int32],
    ) -> None:
        """Go down the trees of rows, and write what may come behind their nodes.

        Args:
            node, tokens: what stands where.
            places: of the roots; those of the nodes that there is a way to are added.
            words: room for the masks of all places, the roots' in the first of it.
        """
        walkers: list[Matcher] = []
        early_stops: list[Iterable[int]] = []
        for row, root in zip(brought, words, strict=False):
            matcher = row.request.matcher
            if not row.nodes or matcher is None:
                continue
            row.below = _below(tree, {node[at]: at for at in row.nodes})
            begin = len(places)
            found, depths = matcher.walk(row.below, tokens, root, words[begin:])
            places += found
            walkers += [matcher] * len(found)
            early_stops += [_early_stops(row.request, depth) for depth in depths]
            row.allowed = dict(zip(found, words[begin:], strict=False))
        if walkers:
            write_nodes(walkers, words[len(brought) : len(places)], early_stops)


def _sure(row: _Brought, root: NDArray[np.int32], tokens: Sequence[int]) -> list[int]:
    """What of a chain a row draws: as much as its tree holds, and one token more. Nothing if the chain ends with that,
    if more is to be told of the step than its tokens, or if its rule accepts not even what is certain.

    Args:
        root: the mask of the row's root.
        tokens: what stands at each place.
    """
    request = row.request
    params = request.params
    assert request.matcher is not None
    chain = request.matcher.chain
    threshold = np.float32(min(params.typical_epsilon, params.typical_alpha))  # as the device has it
    accepts = params.acceptance == "exact" or threshold < 1
    is_told_more = params.logprobs is not None or params.return_steps
    drawn: list[int] = []
    place, mask = -1, root
    for forced in chain if accepts and not is_told_more else ():
        if not is_alone(mask, forced):
            return []
        drawn.append(forced)
        following = [other for other in row.below.get(place, ()) if tokens[other] == forced]
        if not following:
            return drawn if len(drawn) < len(chain) else []
        place = following[0]
        if place not in row.allowed:
            return []
        mask = row.allowed[place]
    return []


def _below(tree: Tree, places: dict[int, int]) -> dict[int, list[int]]:
    """For each place of a row's nodes the places of those below it; -1 is the root's.

    Args:
        places: by node, without the root.
    """
    parent = parents(tree)
    below: dict[int, list[int]] = {}
    for node, place in places.items():
        below.setdefault(places.get(parent[node], -1), []).append(place)
    return below


def _write_roots(state: RowState, requests: Sequence[Request], words: NDArray[np.int32]) -> None:
    """Write what may follow the known tokens of rows with grammars: [G, W]."""
    matchers = [request.matcher for request in requests if request.matcher is not None]
    early_stops = [_early_stops(request, 0) for request in requests]
    write_roots(matchers, words, early_stops, by_threads=state.device.type == "cuda")  # a CPU's cores have a step to do


def _early_stops(request: Request, depth: int) -> Iterable[int]:
    """Tokens that may not end a text yet where a node of such depth draws one."""
    return request.stop_ids if request.num_output + depth < request.params.min_tokens else ()


def _room(state: RowState, requests: Sequence[Request], num_masks: int) -> Tensor:
    """[N, W] int32, room for masks where the device can fetch them."""
    num_words = next(request.matcher.vocabulary.num_words for request in requests if request.matcher is not None)
    return torch.empty(num_masks, num_words, dtype=torch.int32, pin_memory=state.device.type == "cuda")


def _upload(state: RowState, words: Tensor) -> Tensor:
    """Masks on their way to the device."""
    return words.to(state.device, non_blocking=True)


def _bits(words: Tensor, tokens: Tensor) -> Tensor:
    """Whether tokens [R, n] are allowed by masks [R, W]: [R, n] bool."""
    return (words.gather(1, tokens >> 5) >> (tokens & 31)) & 1 != 0
