"""A reply that must be a call is one JSON object, held to that by a grammar, whatever form the model knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from manyheads.frontend.tools.parser import Steps, ToolParser, json_head
from manyheads.grammar import Grammar

_HEAD = json_head("arguments", "parameters")


class ForcedParser(ToolParser):
    """It reads a reply that is a JSON object with a name and arguments."""

    def _parse(self) -> Steps:
        yield from self._call(_HEAD, is_object=True)
        yield from self._all_content()


def call_grammar(functions: Sequence[Mapping[str, Any]], key: str) -> Grammar:
    """Make the grammar of a call of one of some functions.

    Args:
        functions: with `name` and perhaps `parameters`, a JSON Schema.
        key: of the arguments in the call.
    """
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
    return Grammar("json", json.dumps({**schema, "$defs": definitions}))


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
