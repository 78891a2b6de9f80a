"""A record is one request as the client saw it."""

from __future__ import annotations

import msgspec

UNREACHABLE = "unreachable"
CUT = "connection cut"
NO_ANSWER = "no answer in time"
STALLED = "stream stalled"
MALFORMED = "malformed stream"
ERROR_EVENT = "error in the stream"
EMPTY = "empty answer"
UNFINISHED = "unfinished at the end"
"""This is not a failure: the run ended first."""


class Record(msgspec.Struct):
    """A record's times are seconds of the monotonic clock (`sent`, `due`) or seconds since `sent` (the others)."""

    sent: float
    due: float | None = None
    """The time at which a request of an open loop should have been sent."""
    seconds: float = 0.0
    """The time until the end of the answer, or until the request failed."""
    chunks: list[float] = []
    """The times at which the pieces of text came."""
    prompt_tokens: int | None = None
    tokens: int | None = None
    """The number of output tokens."""
    counted_by: str = "usage"
    """The source of `tokens`: the server's usage, the length asked for, or the number of chunks."""
    steps: int | None = None
    """The number of decoding steps, if the server tells."""
    finish: str | None = None
    reason: str | None = None
    """The reason why it failed, or that it is unfinished; None if it was answered."""
    detail: str = ""

    @property
    def ended(self) -> float:
        """The time at which it ended, in seconds of the monotonic clock."""
        return self.sent + self.seconds

    @property
    def ok(self) -> bool:
        """Whether the request was answered to its end."""
        return self.reason is None

    @property
    def failed(self) -> bool:
        """Whether something went wrong; a request that is unfinished has not failed."""
        return self.reason is not None and self.reason != UNFINISHED

    @property
    def ttft(self) -> float | None:
        """The seconds from sending to the first text."""
        return self.chunks[0] if self.chunks else None

    @property
    def tpot(self) -> float | None:
        """The seconds per output token after the first, by the count of tokens; None for a single token.

        With several tokens in a chunk the gaps between chunks say something else: see `gaps`.
        """
        if not self.chunks or self.tokens is None or self.tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """The seconds between neighbouring chunks."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    def chunks_between(self, start: float, end: float) -> int:
        """Count the chunks that came within a window of the monotonic clock."""
        return sum(start <= self.sent + at < end for at in self.chunks)

    def tokens_between(self, start: float, end: float) -> float:
        """Return the output tokens that came within a window of the monotonic clock, taking chunks as equal."""
        if not self.chunks or not self.tokens:
            return 0.0
        return self.tokens * self.chunks_between(start, end) / len(self.chunks)
