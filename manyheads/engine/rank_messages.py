"""What rank 0 tells the other ranks, so that they do what its runner does: no tensors, and nothing that they know.

The others keep a copy of every request that runs, as far as a runner reads it, by the row that it has; and follow its
grammar by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from manyheads.engine.compiler import Compiler
from manyheads.engine.grammars import matcher_of
from manyheads.engine.runner import Runner
from manyheads.engine.step import Chunk, Request, StepPlan
from manyheads.speculation.draft import Draft


class RowNews(msgspec.Struct, array_like=True, frozen=True):
    """What has come to a request since it was last told of."""

    row: int
    tokens: list[int]
    """Behind those that are known."""
    cached_len: int
    unread: int
    has_candidates: bool
    is_extended: bool
    num_synced: int
    """Its pages, from this one on, are"""
    pages: list[int]


class Launch(msgspec.Struct, array_like=True, frozen=True, tag="launch"):
    """`Runner.launch`."""

    admitted: list[Request]
    news: list[RowNews]
    """Of the other requests in the step."""
    chunks: list[tuple[int, int, bool]]
    """Row, tokens, and whether it is the last one."""
    decoding: list[int]
    """Rows."""
    draft: Draft
    companions: list[tuple[int, list[int]]]
    """As `StepPlan.companions`."""


class Followed(msgspec.Struct, array_like=True, frozen=True, tag="followed"):
    """What `Runner.launch` calls in the middle, for those who wait for it."""

    tokens: list[tuple[int, list[int]]]
    """Of rows with grammars, which came since they were last told of."""


class Put(msgspec.Struct, array_like=True, frozen=True, tag="put"):
    """`Runner.put`."""

    requests: list[Request]


class Rewind(msgspec.Struct, array_like=True, frozen=True, tag="rewind"):
    """`Runner.rewind`."""

    rows: list[int]


class Clear(msgspec.Struct, array_like=True, frozen=True, tag="clear"):
    """`Runner.clear`."""


class RecordSteps(msgspec.Struct, array_like=True, frozen=True, tag="record_steps"):
    """`Runner.record_steps`."""

    wanted: list[tuple[int, Draft]]


class RecordPasses(msgspec.Struct, array_like=True, frozen=True, tag="record_passes"):
    """`Runner.record_passes`."""

    max_tokens: int
    max_inflight: int
    instead: dict[int, int]


Message = Launch | Followed | Put | Rewind | Clear | RecordSteps | RecordPasses


class Teller:
    """Rank 0's: it makes messages of plans, and remembers what it has told."""

    def __init__(self) -> None:
        self._told: dict[int, int] = {}  # tokens of the request in each row

    def launch(self, plan: StepPlan) -> Launch:
        """Of a step that is about to be launched."""
        self._tell(plan.admitted)
        new = {request.row for request in plan.admitted}
        running = [*(chunk.request for chunk in plan.chunks), *plan.decoding]
        return Launch(
            admitted=_without_matchers(plan.admitted),
            news=[self._news(request) for request in running if request.row not in new],
            chunks=[(chunk.request.row, chunk.num_inflight, chunk.is_last) for chunk in plan.chunks],
            decoding=[request.row for request in plan.decoding],
            draft=plan.draft,
            companions=plan.companions,
        )

    def followed(self, plan: StepPlan) -> Followed:
        """Of a step in whose middle the one before was read."""
        rows = [(r.row, r.tokens[self._told[r.row] :]) for r in plan.decoding if r.matcher is not None]
        for row, tokens in rows:
            self._told[row] += len(tokens)
        return Followed(rows)

    def put(self, requests: list[Request]) -> Put:
        """Of rows that are filled outside of a step."""
        self._tell(requests)
        return Put(_without_matchers(requests))

    def _tell(self, requests: list[Request]) -> None:
        for request in requests:
            self._told[request.row] = len(request.tokens)

    def _news(self, request: Request) -> RowNews:
        row, table = request.row, request.table
        known, self._told[row] = self._told[row], len(request.tokens)
        return RowNews(
            row=row,
            tokens=request.tokens[known:],
            cached_len=request.cached_len,
            unread=request.unread,
            has_candidates=request.has_candidates,
            is_extended=request.is_extended,
            num_synced=table.num_synced,
            pages=table.pages[table.num_synced :],
        )


class Follower:
    """Another rank's: it does with its runner what the messages say.

    Args:
        receive: waits for the next message.
    """

    def __init__(self, runner: Runner, compiler: Compiler, receive: Callable[[], Message]) -> None:
        self._runner, self._compiler, self._receive = runner, compiler, receive
        self._requests: dict[int, Request] = {}  # by row

    def follow(self, message: Message) -> None:
        """Do the same as rank 0."""
        runner = self._runner
        match message:
            case Launch():
                runner.launch(self._plan(message), self._follow)
            case Followed():
                raise RuntimeError("no step is being launched")
            case Put(requests):
                self._take(requests)
                runner.put(requests)
            case Rewind(rows):
                runner.rewind([self._requests[row] for row in rows])
            case Clear():
                runner.clear()
            case RecordSteps(wanted):
                runner.record_steps(wanted)
            case RecordPasses(max_tokens, max_inflight, instead):
                runner.record_passes(max_tokens, max_inflight, instead)

    def _follow(self) -> None:
        message = self._receive()
        assert isinstance(message, Followed), "rank 0 is in the middle of a step"
        for row, tokens in message.tokens:
            self._go_on(self._requests[row], tokens)

    @staticmethod
    def _go_on(request: Request, tokens: list[int]) -> None:
        request.tokens += tokens
        if request.matcher is not None:
            request.matcher.take(tokens, 0)

    def _plan(self, message: Launch) -> StepPlan:
        self._take(message.admitted)
        for news in message.news:
            request, table = self._requests[news.row], self._requests[news.row].table
            self._go_on(request, news.tokens)
            request.cached_len, request.unread = news.cached_len, news.unread
            request.has_candidates, request.is_extended = news.has_candidates, news.is_extended
            table.pages[news.num_synced :] = news.pages
            table.num_synced = news.num_synced
        return StepPlan(
            chunks=[Chunk(self._requests[row], size, is_last) for row, size, is_last in message.chunks],
            decoding=[self._requests[row] for row in message.decoding],
            draft=message.draft,
            admitted=message.admitted,
            companions=message.companions,
        )

    def _take(self, requests: list[Request]) -> None:
        for request in requests:
            self._requests[request.row] = request
            if request.params.grammar is not None:
                compiled = self._compiler.start(request.params.grammar).result()
                request.matcher = matcher_of(request, compiled, self._compiler.vocabulary)


def _without_matchers(requests: list[Request]) -> list[Request]:
    return [request if request.matcher is None else replace(request, matcher=None) for request in requests]
