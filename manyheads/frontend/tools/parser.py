"""A tool parser tells the content of a reply from the calls in it, while the text comes."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from manyheads.frontend.markers import certain
from manyheads.frontend.tools.nesting import Nesting

MAX_NAME = 256
"""A function's name has at most so many characters (OpenAI allows 64)."""
MAX_HEAD = 20_000
"""After so many characters in which nothing begins a call, there is none."""
MAX_SPACE = 50
"""So much space may stand where it has no meaning."""
NAME = rf"[\w.\-]{{1,{MAX_NAME}}}"
Steps = Generator[None, None, None]
"""A part of a parser yields when it needs more text than there is."""


@dataclass(frozen=True)
class CallDelta:
    """A call delta is a piece of a call: first its name, then its arguments, which are JSON, piece by piece."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass
class Parsed:
    """What a parser made of the text that it was given."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolParser(ABC):
    """A parser takes a reply's text piece by piece. What looks like a call and turns out to be none is content.

    A subclass reads its form in `_parse`, a generator that goes as far as the text does: it yields when it needs more,
    and ends with the text.

    Args:
        names: the functions that the request has.
        streams: give out arguments piece by piece. Otherwise a call is given out when it is whole and its arguments
            are JSON; else it stays content.
        most: calls to give out; further ones are dropped.
    """

    shows: ClassVar[tuple[str, ...]] = ()
    """Special tokens that the form is made of: they have to be in the text."""
    opening: ClassVar[str] = ""
    """Where calls must follow, the prompt ends with this; behind it stands a JSON object with a name and arguments,"""
    between: ClassVar[str] = "\n"
    """behind this each further one,"""
    closing: ClassVar[str] = ""
    """and this behind the last."""
    arguments: ClassVar[str] = "arguments"
    """The key of the arguments in such an object."""

    def __init__(self, names: frozenset[str], *, streams: bool, most: int | None = None) -> None:
        self.num_calls = 0
        self._names, self._streams, self._most = names, streams, most
        self._text = ""  # what no part of the parser has taken yet
        self._space = ""  # that was dropped before the latest marker
        self._ended = False
        self._parsed = Parsed()
        self._steps = self._parse()

    def push(self, text: str, *, final: bool = False) -> Parsed:
        """Take the next text, the last one if `final`; say what is certain now."""
        self._text += text
        self._ended = final
        self._parsed = Parsed()
        next(self._steps, None)
        return self._parsed

    @abstractmethod
    def _parse(self) -> Steps:
        """Read a reply."""

    def _content(self, *markers: str) -> Generator[None, None, str | None]:
        """Read content up to a marker and return that; None if the text ends. Space before a marker is dropped."""
        while True:
            found = [(at, marker) for marker in markers if (at := self._text.find(marker)) >= 0]
            if found:
                at, marker = min(found)
                before = self._text[:at].rstrip()
                self._parsed.content += before
                self._space = self._text[len(before) : at]
                self._text = self._text[at + len(marker) :]
                return marker
            if self._ended:
                self._parsed.content += "" if self.num_calls and self._text.isspace() else self._text
                self._text = ""
                return None
            cut = certain(self._text, markers)
            cut = max(len(self._text[:cut].rstrip()), cut - MAX_SPACE)
            self._parsed.content += self._text[:cut]
            self._text = self._text[cut:]
            yield

    def _refuse(self, marker: str) -> None:
        """Give a marker, behind which no call was, as content."""
        self._parsed.content += self._space + marker

    def _all_content(self) -> Steps:
        """Read all that follows as content."""
        while True:
            self._parsed.content += self._text
            self._text = ""
            if self._ended:
                return
            yield

    def _skip(self, *texts: str) -> Generator[None, None, str | None]:
        """Skip space, and one of some texts behind it, which is returned; None and nothing skipped if none is there."""
        while True:
            rest = self._text.lstrip()
            for text in texts:
                if rest.startswith(text):
                    self._text = rest[len(text) :]
                    return text
            may_come = len(self._text) - len(rest) < MAX_SPACE and any(text.startswith(rest) for text in texts)
            if self._ended or not may_come:
                return None
            yield

    def _call(
        self, head: re.Pattern[str], *, is_object: bool = False, is_known: bool = False
    ) -> Generator[None, None, bool]:
        """Read a call: what `head` matches, with the name in its group 1, and behind it an object of arguments.

        Args:
            is_object: the head begins a JSON object, which is read to its end. One with its keys in another order is a
                call as well.
            is_known: a name that the request does not have makes no call.

        Returns:
            Whether it was one; if not, its text is still to be read.
        """
        nesting = Nesting()
        seen = 0
        while (match := head.match(self._text)) is None:
            end = nesting.end(self._text[seen:]) if is_object else None
            if end is not None:
                return self._take_object(seen + end, is_known)
            seen = len(self._text)
            is_other = self._text.lstrip()[:1] not in ("", "{") if is_object else "{" in self._text
            if self._ended or is_other or seen > MAX_HEAD:
                return False
            yield
        name = match[1]
        if is_known and name not in self._names:
            return False
        if self._streams:
            self._text = self._text[match.end() :]
            self._give(name)
            yield from self._stream_arguments()
        elif not (yield from self._whole_arguments(match.end(), name)):
            return False
        if is_object:
            yield from self._close_object()
        return True

    def _whole_arguments(self, start: int, name: str) -> Generator[None, None, bool]:
        """Read arguments that begin at `start`, and give a call out if they are JSON."""
        nesting = Nesting()
        seen = start
        while (end := nesting.end(self._text[seen:])) is None:
            seen = len(self._text)
            if self._ended:
                return False
            yield
        arguments = self._text[start : seen + end]
        if _object(arguments) is None:
            return False
        self._text = self._text[seen + end :]
        self._give(name)
        self._add(arguments)
        return True

    def _stream_arguments(self) -> Steps:
        nesting = Nesting()
        while True:
            end = nesting.end(self._text)
            self._add(self._text[:end])
            self._text = "" if end is None else self._text[end:]
            if end is not None or self._ended:
                return
            yield

    def _close_object(self) -> Steps:
        """Skip what a call's object has behind its arguments, and its end."""
        nesting = Nesting(depth=1)
        while (end := nesting.end(self._text)) is None:
            self._text = ""
            if self._ended:
                return
            yield
        self._text = self._text[end:]

    def _take_object(self, end: int, is_known: bool) -> bool:
        """Take the text's first `end` characters as a call; tell whether they are one."""
        call = _object(self._text[:end])
        if call is None:
            return False
        name = call.get("name")
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(name, str) or not re.fullmatch(NAME, name) or (is_known and name not in self._names):
            return False
        if isinstance(arguments, str):  # JSON in JSON
            arguments = _object(arguments)
        if not isinstance(arguments, dict):
            return False
        self._text = self._text[end:]
        self._give(name)
        self._add(json.dumps(arguments, ensure_ascii=False))
        return True

    def _give(self, name: str) -> None:
        """Begin a call."""
        self.num_calls += 1
        if self._most is None or self.num_calls <= self._most:
            self._parsed.calls.append(CallDelta(self.num_calls - 1, name=name))

    def _add(self, arguments: str) -> None:
        """Add to the arguments of the latest call."""
        if arguments and (self._most is None or self.num_calls <= self._most):
            self._parsed.calls.append(CallDelta(self.num_calls - 1, arguments=arguments))


def json_head(*keys: str) -> re.Pattern[str]:
    """Match the beginning of a call as a JSON object, up to its arguments, which are under one of some keys."""
    names, space = "|".join(keys), rf"\s{{0,{MAX_SPACE}}}"
    parts = (r"", r"\{", r'"name"', ":", rf'"({NAME})"', ",", rf'"(?:{names})"', ":", r"(?=\{)")
    return re.compile(space.join(parts))


def _object(text: str) -> dict[str, Any] | None:
    """Read a JSON object; None if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
