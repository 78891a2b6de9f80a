"""The grammar of calls that must be made."""

from __future__ import annotations

import json
from typing import Any

from manyheads.frontend.tools.forced import call_grammar

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
    schema = json.loads(call_grammar(FUNCTIONS, "arguments").value)
    walk, now, anything = (find(schema, c["properties"]["arguments"]["$ref"]) for c in schema["anyOf"])
    assert find(schema, walk["properties"]["at"]["$ref"])["properties"]["me"]["$ref"] == "#/$defs/arguments0"
    assert walk["additionalProperties"] is False
    assert now == {"type": "object", "properties": {}, "additionalProperties": False}
    assert anything["additionalProperties"] == {"type": "string"}


def test_one_function_and_another_key() -> None:
    schema = json.loads(call_grammar(FUNCTIONS[1:2], "parameters").value)
    assert schema["properties"]["name"] == {"const": "now"}
    assert schema["required"] == ["name", "parameters"]
