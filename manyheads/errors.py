"""What can go wrong with a request, whoever notices it."""

from __future__ import annotations


class RequestError(ValueError):
    """The request cannot be served as asked, which is the caller's to mend (HTTP 400). Nothing was queued."""


def require(ok: bool, message: str) -> None:
    """Raise a RequestError with this message unless all is well."""
    if not ok:
        raise RequestError(message)


class QueueFull(RuntimeError):
    """A request can't start in time, or too many wait; it would be let in after `retry_after` seconds (HTTP 429)."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(RuntimeError):
    """The engine could not start, or has died (HTTP 503)."""


class ModelError(RuntimeError):
    """The model gave logits that are not finite (HTTP 500)."""
