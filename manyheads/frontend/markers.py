"""Markers are texts that mean something (a stop string, a tag), in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable


def certain(buffer: str, markers: Iterable[str]) -> int:
    """Count the characters at a buffer's beginning that cannot be part of a marker, whatever comes next.

    Args:
        buffer: holds no whole marker.
        markers: none of them is empty.
    """
    return min((_start(buffer, marker) for marker in markers), default=len(buffer))


def _start(buffer: str, marker: str) -> int:
    """Find where the longest beginning of a marker at the buffer's end starts; the buffer's length is nowhere."""
    at = max(0, len(buffer) - len(marker) + 1)
    while (at := buffer.find(marker[0], at)) >= 0:
        if marker.startswith(buffer[at:]):
            return at
        at += 1
    return len(buffer)
