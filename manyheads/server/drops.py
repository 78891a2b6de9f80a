"""What the server gets rid of is counted, and told in the log without filling it."""

from __future__ import annotations

import logging
import time
from collections import Counter

import prometheus_client

LOG_SECONDS = 60.0
"""A kind of message is written at most once in so long."""
GATHER_SECONDS = 1.0
"""A message waits so long for more of its kind."""
_log = logging.getLogger(__name__)


class Drops:
    """Drops are the connections and requests that the server gave up, by reason.

    `/metrics` has the numbers; the log has a line a minute of each kind.
    """

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        self._total = prometheus_client.Counter(
            "manyheads_connections_dropped", "Connections that the server gave up", ["reason"], registry=registry
        )
        for reason in ("headers", "body", "write", "idle", "room", "refused"):
            self._total.labels(reason)
        self._unsaid: Counter[str] = Counter()
        self._due: dict[str, float] = {}
        """Not before these times (of `time.monotonic`) is a message written."""

    def count(self, reason: str, text: str | None = None) -> None:
        """Count one; the log will have `text` (a %-format) with the number of those since the last such line."""
        self._total.labels(reason).inc()
        if text is not None:
            self.tell(text)

    def tell(self, text: str) -> None:
        """Count something for the log alone."""
        self._unsaid[text] += 1
        if self._unsaid[text] == 1:
            self._due[text] = max(self._due.get(text, 0.0), time.monotonic() + GATHER_SECONDS)

    def write(self) -> None:
        """Write to the log what has been counted and is due. To be called now and then."""
        now = time.monotonic()
        for text, number in list(self._unsaid.items()):
            if now >= self._due[text]:
                _log.warning(text, number)
                self._due[text] = now + LOG_SECONDS
                del self._unsaid[text]


class OncePerMinute(logging.Filter):
    """This filter lets a warning through at most once a minute: uvicorn writes one for every malformed request."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is written."""
        if record.levelno != logging.WARNING:
            return True
        now = time.monotonic()
        if now - self._said.get(str(record.msg), -LOG_SECONDS) < LOG_SECONDS:
            return False
        self._said[str(record.msg)] = now
        return True
