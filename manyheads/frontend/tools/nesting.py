"""Nesting finds where a JSON object ends in text that comes in pieces."""

from __future__ import annotations

import re

_MARKS = re.compile(r'["\\{}\[\]]')


class Nesting:
    """It counts brackets outside of strings.

    Args:
        depth: brackets that are open already.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escapes = False  # the next character belongs to a backslash

    def end(self, piece: str) -> int | None:
        """Take the next piece of text; return where in it the outermost bracket closes, or None if it does not."""
        at = int(self._escapes and bool(piece))
        self._escapes = self._escapes and not piece
        while (match := _MARKS.search(piece, at)) is not None:
            mark, at = match[0], match.end()
            if mark == '"':
                self._in_string = not self._in_string
            elif mark == "\\":
                self._escapes = self._in_string and at == len(piece)
                at += self._in_string
            elif not self._in_string:
                self._depth += 1 if mark in "{[" else -1
                if self._depth <= 0:
                    return at
        return None
