"""Llama 3's forms: {"name": …, "parameters": {…}}, or Python's [name(key=value)]. Such a reply is nothing but calls."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from manyheads.frontend.tools.parser import NAME, Steps, ToolParser, json_head

_HEAD = json_head("parameters", "arguments")
MAX_LIST = 20_000
MAX_DEPTH = 40
"""A list of calls in Python has at most so many characters, and brackets inside of each other."""


class LlamaJsonParser(ToolParser):
    """It reads replies with calls as Llama 3.1's template asks for them: objects, perhaps with semicolons between."""

    shows = ("<|python_tag|>",)
    arguments = "parameters"
    between = "; "

    def _parse(self) -> Steps:
        tag = yield from self._skip("<|python_tag|>")
        while (yield from self._call(_HEAD, is_object=True, is_known=True)):
            tag = yield from self._skip(";")
        if self.num_calls == 0:
            self._parsed.content += tag or ""
        yield from self._all_content()


class PythonicParser(ToolParser):
    """It reads replies that are a list of calls in Python, as Llama 3.2 and 4 write them."""

    shows = ("<|python_start|>", "<|python_end|>")

    def _parse(self) -> Steps:
        yield from self._skip("<|python_start|>")
        while not self._ended and len(self._text) <= MAX_LIST and self._text.lstrip()[:1] in ("", "["):
            yield
        text = self._text.strip().removesuffix("<|python_end|>").rstrip()
        calls = _calls(text)
        if calls is not None and all(name in self._names for name, _ in calls):
            self._text = ""
            for name, arguments in calls:
                self._give(name)
                self._add(arguments)
        yield from self._all_content()


def _calls(text: str) -> list[tuple[str, str]] | None:
    """Read a list of calls in Python: names, and arguments as JSON; None if the text is none."""
    if not re.match(rf"\[\s*{NAME}\(", text) or len(text) > MAX_LIST or _depth(text) > MAX_DEPTH:
        return None
    try:
        (statement,) = ast.parse(text).body
        elements = statement.value.elts  # type: ignore[attr-defined]
        return [_call(element) for element in elements] or None
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("no call with keywords alone")
    arguments: dict[Any, Any] = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    return ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _depth(text: str) -> int:
    """Count the brackets that are open at once, at most; those in strings count as well."""
    return max(_depths(text), default=0)


def _depths(text: str) -> Iterator[int]:
    depth = 0
    for mark in re.findall(r"[\[({\])}]", text):
        depth += 1 if mark in "[({" else -1
        yield depth
