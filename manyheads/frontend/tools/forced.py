"""A reply that must call is JSON objects, held to that by a grammar, whatever form the model knows.

What the form has between calls and behind the last is between and behind these: a model ends its calls as it learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from manyheads.engine.formats import json_form
from manyheads.frontend.tools.parser import Steps, ToolParser, json_head
from manyheads.grammar import Grammar

MAX_CALLS = 16
"""A reply that must call makes at most so many calls: a model that does not know where to end would go on and on."""
_HEAD = json_head("arguments", "parameters")


class ForcedParser(ToolParser):
    """It reads a reply that is JSON objects with a name and arguments."""

    def _parse(self) -> Steps:
        while (yield from self._call(_HEAD, is_object=True)):
            while (begin := self._text.find("{")) < 0 and not self._ended:
                self._text = ""
                yield
            self._text = self._text[begin:] if begin >= 0 else ""
        yield from self._all_content()


def call_grammar(functions: Sequence[Mapping[str, Any]], form: type[ToolParser], most: int) -> Grammar:
    """Make the grammar of one or more calls of some functions.

    Args:
        functions: with `name` and perhaps `parameters`, a JSON Schema.
        form: what the model's calls are written in.
        most: calls. Behind a single one nothing of the form has to follow.
    """
    schema = _call_schema(functions, form.arguments)
    if most == 1:
        return Grammar("json", json.dumps(schema))
    between, closing = json.dumps(form.between), json.dumps(form.closing) if form.closing else ""
    start = f"start: call ({between} call){{0,{most - 1}}} {closing}"
    return Grammar("grammar", f"{start}\ncall: %json {json.dumps(json_form(schema))}\n")


def _call_schema(functions: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Make the JSON Schema of a call, with its arguments under this key."""
    definitions = {}
    calls = []
    for number, function in enumerate(functions):
        place = f"#/$defs/arguments{number}"
        definitions[f"arguments{number}"] = _moved(_closed(function.get("parameters") or {"properties": {}}), place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, key: {"$ref": place}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions}


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Let arguments have no names but those of the function, unless its schema says something about others."""
    more = {} if "properties" not in schema else {"type": "object", "additionalProperties": False}
    return {**more, **schema}


def _moved(schema: Any, place: str) -> Any:
    """Let a schema's references to itself hold where it stands now."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }  # fmt: skip
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema
