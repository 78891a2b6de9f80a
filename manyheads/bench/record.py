"""One request as the client saw it."""

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
"""Not a failure: the run ended first."""


class Record(msgspec.Struct):
    """Times are seconds of the monotonic clock (`sent`, `due`) or seconds since `sent` (the others)."""

    sent: float
    due: float | None = None
    """When an open-loop request should have been sent."""
    seconds: float = 0.0
    """Until the end of the answer, or until it failed."""
    chunks: list[float] = []
    """When each piece of text came."""
    prompt_tokens: int | None = None
    tokens: int | None = None
    """Output tokens."""
    counted_by: str = "usage"
    """Where `tokens` is from: the server's usage, the length asked for, or the number of chunks."""
    steps: int | None = None
    """Decoding steps, where the server tells."""
    finish: str | None = None
    reason: str | None = None
    """Why it failed; None if it did not."""
    detail: str = ""

    @property
    def ended(self) -> float:
        """Monotonic seconds."""
        return self.sent + self.seconds

    @property
    def ok(self) -> bool:
        return self.reason is None

    @property
    def failed(self) -> bool:
        return self.reason is not None and self.reason != UNFINISHED

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first text."""
        return self.chunks[0] if self.chunks else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first, from the count of tokens; None for a single token.

        With several tokens in a chunk the gaps between chunks say something else: see `gaps`.
        """
        if not self.chunks or self.tokens is None or self.tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring chunks."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    def chunks_between(self, start: float, end: float) -> int:
        """Chunks that came within a window of the monotonic clock."""
        return sum(start <= self.sent + at < end for at in self.chunks)

    def tokens_between(self, start: float, end: float) -> float:
        """Output tokens that came within a window of the monotonic clock; a request's chunks are taken as equal."""
        if not self.chunks or not self.tokens:
            return 0.0
        return self.tokens * self.chunks_between(start, end) / len(self.chunks)
