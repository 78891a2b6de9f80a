"""What grammars allow at the nodes of a step, made on the host while the device computes the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.batch import RowState, Trees, TreeTensors
from manyheads.engine.matcher import is_alone
from manyheads.engine.step import Request, RowResult
from manyheads.speculation.tree import Tree, parents

LEAST_LEFT = 0.05
"""What guesses that are dropped leave to the others is taken for this at least."""


@dataclass(frozen=True, eq=False)
class Masks:
    """Which tokens M nodes may draw. It is plain data, the same for every device that computes the step's logits."""

    place: Tensor  # [M] int64, where the nodes stand among the step's
    words: Tensor  # [M, W] int32, bit t % 32 of word t // 32 says whether token t is allowed

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
    return _masks(state, walked, _roots([requests[i] for i in walked]))


class TreeWalk:
    """Grammars of rows that decode: walks the trees that the device has chosen with the rows' matchers.

    Those have to be where the texts are by when masks are made, and not when the step is launched.

    Args:
        requests: those of the step that decode, in order.
        state: of the rows.
    """

    def __init__(self, requests: list[Request], state: RowState) -> None:
        self._state = state
        self._rows = [i for i, request in enumerate(requests) if request.matcher is not None]
        self._requests = [requests[i] for i in self._rows]
        self.foreseen: list[RowResult] = []
        """What rows are sure to gain, of texts that are known to go on beyond it."""
        self._roots: dict[Request, NDArray[np.int32]] = {}  # [W] each, as far as they are known
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
        known = [request for request in self._requests if request.unread == 0]
        if tree.num_nodes == 1 or not known:
            return
        rows = state.tensor([request.row for request in known])[:, None]
        words = _upload(state, self._roots_of(known))
        allowed = _bits(words, state.drafts[rows, tree.column])  # [G, n]
        is_first = tree.depth == 1
        chances = state.chances[rows, tree.column]
        left = 1 - torch.where(is_first & ~allowed, chances, 0.0).sum(1, keepdim=True)
        kept = (chances * allowed / left.clamp(min=LEAST_LEFT)).clamp(max=1.0)
        state.chances[rows, tree.column] = torch.where(is_first, kept, chances)

    def _roots_of(self, requests: list[Request]) -> NDArray[np.int32]:
        """[R, W], what may follow the texts of such requests."""
        new = [request for request in requests if request not in self._roots]
        if new:
            self._roots |= zip(new, _roots(new), strict=True)
        return np.stack([self._roots[request] for request in requests])

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
        row, node, token, taken = self._sent.numpy()
        tokens = token.tolist()
        places: list[int] = []
        words: list[NDArray[np.int32]] = []
        for request, i, root in zip(self._requests, self._rows, self._roots_of(self._requests), strict=True):
            first, stop = np.searchsorted(row, (i, i + 1)).tolist()
            places.append(first)
            words.append(root[None])
            brought = slice(first + 1, stop)
            at = [first + 1 + k for k, holds in enumerate(taken[brought].tolist()) if holds]
            below: dict[int, list[int]] = {}
            allowed = {-1: root}  # by place
            if at:
                below = _below(tree, dict(zip(node[at].tolist(), at, strict=True)))
                assert request.matcher is not None
                found, masks = request.matcher.walk(below, tokens, partial(_early_stops, request))
                places += found
                words.append(masks)
                allowed |= zip(found, masks, strict=True)
            if sure := _sure(request, below, tokens, allowed):
                depth = max((len(tree.choices[n]) for n in node[at].tolist()), default=0)
                self.foreseen.append(RowResult(request, sure, drafted_depth=depth, num_drafted=len(at)))
        return _masks(self._state, places, np.concatenate(words))


def _sure(
    request: Request, below: dict[int, list[int]], tokens: list[int], allowed: dict[int, NDArray[np.int32]]
) -> list[int]:
    """What of a chain a row draws: as much as its tree holds, and one token more. Nothing if the chain ends with that,
    if more is to be told of the step than its tokens, or if its rule accepts not even what is certain.

    Args:
        below, tokens: as of `Matcher.walk`.
        allowed: the mask of each place that there is a way to; -1 is the root's.
    """
    params = request.params
    assert request.matcher is not None
    threshold = np.float32(min(params.typical_epsilon, params.typical_alpha))  # as the device has it
    accepts = params.acceptance == "exact" or threshold < 1
    is_told_more = params.logprobs is not None or params.return_steps
    drawn: list[int] = []
    place = -1
    for forced in request.matcher.chain if accepts and not is_told_more else ():
        if place not in allowed or not is_alone(allowed[place], forced):
            return []
        drawn.append(forced)
        following = [other for other in below.get(place, ()) if tokens[other] == forced]
        if not following:
            return drawn if len(drawn) < len(request.matcher.chain) else []
        place = following[0]
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


def _roots(requests: Sequence[Request]) -> NDArray[np.int32]:
    """[G, W], what may follow the known tokens of rows with grammars."""
    matchers = [request.matcher for request in requests if request.matcher is not None]
    words = np.empty((len(requests), matchers[0].num_words), dtype=np.int32)
    for request, matcher, out in zip(requests, matchers, words, strict=True):
        matcher.write(out, _early_stops(request, 0))
    return words


def _early_stops(request: Request, depth: int) -> Iterable[int]:
    """Tokens that may not end a text yet where a node of such depth draws one."""
    return request.stop_ids if request.num_output + depth < request.params.min_tokens else ()


def _masks(state: RowState, places: list[int], words: NDArray[np.int32]) -> Masks:
    return Masks(state.tensor(places), _upload(state, words))


def _upload(state: RowState, words: NDArray[np.int32]) -> Tensor:
    """The words that a device's logits need, on their way to it."""
    host = torch.from_numpy(np.ascontiguousarray(words[:, : -(-state.vocab_size // 32)]))
    return host if state.device.type != "cuda" else host.pin_memory().to(state.device, non_blocking=True)


def _bits(words: Tensor, tokens: Tensor) -> Tensor:
    """Whether tokens [R, n] are allowed by masks [R, W]: [R, n] bool."""
    return (words.gather(1, tokens >> 5) >> (tokens & 31)) & 1 != 0
