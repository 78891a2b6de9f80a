"""Where a text ends."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.engine.step import Request
from manyheads.request import FinishReason


@dataclass(frozen=True)
class Gain:
    """What of the tokens that a row drew is its text's, with those that have to follow, and how it ends with them."""

    tokens: list[int]
    reason: FinishReason | None
    """None if it goes on."""
    stop_token: int | None
    """The last of the tokens, if that ends it."""


def gain(request: Request, drawn: list[int], is_drawing: bool = False) -> Gain:
    """See which tokens a request gains of those that its row drew, after as many steps as it says.

    Args:
        is_drawing: its row draws in a step that was launched since; what has to follow is drawn there.
    """
    tokens, is_whole = drawn, False
    room = request.room
    if request.matcher is not None:
        # log-probabilities are computed where tokens are drawn
        most = room if request.params.logprobs is None and not is_drawing else 0
        # NOTE: not beyond the end, or the matchers of other ranks, which are told the text, would be elsewhere
        end = next((i for i, token in enumerate(drawn, 1) if token in request.stop_ids), len(drawn))
        tokens, is_whole = request.matcher.take(drawn[: min(end, room)], most)
    reason: FinishReason | None = None
    stop_token: int | None = None
    if is_whole and len(tokens) <= room:
        reason = "stop"
    elif len(tokens) >= room:
        tokens, reason = tokens[:room], "length"
    for i, token in enumerate(tokens):
        if token in request.stop_ids:
            tokens, reason, stop_token = tokens[: i + 1], "stop", token
            break
    if reason is None and request.num_steps == request.params.max_steps:
        reason = "length"
    return Gain(tokens, reason, stop_token)
