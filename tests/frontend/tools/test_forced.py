"""Calls that must be made: their grammar, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from manyheads.checkpoint import BUILTIN_FOLDER
from manyheads.engine.compiler import Compiler
from manyheads.engine.vocabulary import Vocabulary
from manyheads.frontend.tools.forced import MAX_CALLS, ForcedParser, call_grammar
from manyheads.frontend.tools.hermes import HermesParser
from manyheads.frontend.tools.kinds import TOOL_PARSERS
from manyheads.frontend.tools.llama import LlamaJsonParser
from manyheads.frontend.tools.parser import Parsed, ToolParser

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}, "me": {"$ref": "#"}}}
FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "walk",
        "parameters": {"type": "object", "properties": {"at": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": NODE}},
    },
    {"name": "now"},
    {"name": "any", "parameters": {"type": "object", "additionalProperties": {"type": "string"}}},
]


def find(schema: Any, place: str) -> Any:
    for key in place.removeprefix("#").strip("/").split("/"):
        schema = schema[key]
    return schema


def test_references_hold_where_the_schema_stands() -> None:
    schema = json.loads(call_grammar(FUNCTIONS, HermesParser, 1).value)
    walk, now, anything = (find(schema, c["properties"]["arguments"]["$ref"]) for c in schema["anyOf"])
    assert find(schema, walk["properties"]["at"]["$ref"])["properties"]["me"]["$ref"] == "#/$defs/arguments0"
    assert walk["additionalProperties"] is False
    assert now == {"type": "object", "properties": {}, "additionalProperties": False}
    assert anything["additionalProperties"] == {"type": "string"}


def test_one_function_and_another_key() -> None:
    schema = json.loads(call_grammar(FUNCTIONS[1:2], LlamaJsonParser, 1).value)
    assert schema["properties"]["name"] == {"const": "now"}
    assert schema["required"] == ["name", "parameters"]


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(Vocabulary(BUILTIN_FOLDER, 4096, (2,)))


def accepts(compiler: Compiler, form: type[ToolParser], most: int) -> Callable[[str], bool]:
    """Whether a grammar of calls allows a reply."""
    compiled = compiler.start(call_grammar(FUNCTIONS[1:], form, most)).result()

    def allows(text: str) -> bool:
        matcher = compiled.deep_copy()
        tokens = compiler.vocabulary.tokens.tokenize_str(text)
        return bool(matcher.consume_tokens(tokens) and matcher.is_accepting())

    return allows


@pytest.mark.parametrize("form", TOOL_PARSERS.values(), ids=TOOL_PARSERS)
def test_one_call_or_more_in_every_form(form: type[ToolParser], compiler: Compiler) -> None:
    now, anything = (f'{{"name": "{name}", "{form.arguments}": {{}}}}' for name in ("now", "any"))
    several = accepts(compiler, form, MAX_CALLS)
    assert several(now + form.closing)
    assert several(form.between.join([now, anything, now]) + form.closing)
    assert several(form.between.join([now] * MAX_CALLS) + form.closing)
    for text in (
        "",
        form.closing,
        now + now,
        now + form.between,
        form.between.join([now] * (MAX_CALLS + 1)) + form.closing,
    ):
        assert not several(text), text
    one = accepts(compiler, form, 1)
    assert one(now)
    assert not one(form.between.join([now, now]))


@pytest.mark.parametrize("form", TOOL_PARSERS.values(), ids=TOOL_PARSERS)
@pytest.mark.parametrize("streams", [False, True])
def test_calls_are_read_however_the_text_is_cut(form: type[ToolParser], streams: bool) -> None:
    calls = [("any", '{"a": "}{"}'), ("now", "{}"), ("any", "{}")]
    objects = [f'{{"name": "{name}", "{form.arguments}": {arguments}}}' for name, arguments in calls]
    text = form.between.join(objects) + form.closing
    for size, most in ((1, None), (5, None), (len(text), None), (3, 1)):
        assert read(text, size, streams, most) == ("", calls[:most])
    whole, cut = ("", [*calls[:2], ("any", "{")]), (objects[2][:-2], calls[:2])
    assert read(form.between.join(objects)[:-2], 4, streams) == (whole if streams else cut)


def read(text: str, size: int, streams: bool, most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls of a text that comes in pieces of so many characters."""
    parser = ForcedParser(frozenset({"now", "any"}), streams=streams, most=most)
    parts: list[Parsed] = [parser.push(text[i : i + size]) for i in range(0, len(text), size)]
    parts.append(parser.push("", final=True))
    calls: list[tuple[str, str]] = []
    for delta in (delta for part in parts for delta in part.calls):
        if delta.name is not None:
            calls.append((delta.name, ""))
        name, arguments = calls[delta.index]
        calls[delta.index] = (name, arguments + delta.arguments)
    return "".join(part.content for part in parts), calls
