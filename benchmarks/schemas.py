"""Two hundred JSON Schemas of different kinds, as APIs, forms and tools have them, made up for these measurements.

Ten families, from single keywords to records of records, are varied over sizes and names; none is taken from anywhere.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]
WORDS = ("name", "colour", "size", "owner", "place", "weight", "note", "label", "state", "title")
STRINGS: tuple[Schema, ...] = (
    {"type": "string", "maxLength": 12},
    {"type": "string", "minLength": 1, "maxLength": 8},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
    {"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email", "maxLength": 20},
)
NUMBERS: tuple[Schema, ...] = (
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"type": "integer", "minimum": -50, "maximum": 1500},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1000},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "minimum": -2.5, "maximum": 99.5},
    {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
    {"type": "number", "exclusiveMinimum": 10, "maximum": 20},
)
CONSTANTS: tuple[Schema, ...] = (
    {"const": "fixed"},
    {"const": 42},
    {"const": None},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2, 3, "many", True, None]},
    {"enum": ["a", "ab", "abc", "b"]},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["boolean", "null"]},
    {"enum": [{"kind": "x", "n": 1}, {"kind": "y", "n": 2}]},
)
SCALARS = (*STRINGS, *NUMBERS, *CONSTANTS)


def record(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    """A closed object of these properties, all of them required unless told otherwise."""
    wanted = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": wanted, "additionalProperties": False}


def schemas(count: int = 200) -> list[Schema]:
    """So many schemas, the same ones every time."""
    families = [
        _scalars(),
        _records(),
        _optional(),
        _arrays(),
        _tuples(),
        _unions(),
        _references(),
        _nested(),
        _maps(),
        _combined(),
    ]
    # each family in turn gives its next one, so that a part of them has all kinds
    rounds = itertools.zip_longest(*families)
    found = [schema for turn in rounds for schema in turn if schema is not None]
    if len(found) < count:
        raise ValueError(f"there are {len(found)} schemas, not {count}")
    return found[:count]


def _scalars() -> Iterator[Schema]:
    yield from SCALARS


def _records() -> Iterator[Schema]:
    for size, start in itertools.product((1, 2, 3, 4, 6), range(0, len(SCALARS), 5)):
        yield record({WORDS[i]: SCALARS[(start + 3 * i) % len(SCALARS)] for i in range(size)})


def _optional() -> Iterator[Schema]:
    for size, start in itertools.product((2, 3, 4, 5), range(0, 24, 3)):
        names = WORDS[start % 4 : start % 4 + size]
        properties = {name: SCALARS[(start + i) % len(SCALARS)] for i, name in enumerate(names)}
        yield record(properties, required=list(names[: size // 2]))


def _arrays() -> Iterator[Schema]:
    for (least, most), item in itertools.product(((0, 2), (1, 3), (2, 2)), SCALARS[::4]):
        yield {"type": "array", "items": item, "minItems": least, "maxItems": most}
    yield {"type": "array", "items": record({"x": NUMBERS[0], "y": NUMBERS[3]}), "minItems": 1, "maxItems": 2}


def _tuples() -> Iterator[Schema]:
    for first, second in zip(STRINGS, itertools.cycle(NUMBERS), strict=False):
        yield {"type": "array", "prefixItems": [first, second], "items": False, "minItems": 2}


def _unions() -> Iterator[Schema]:
    for first, second in zip(STRINGS, itertools.cycle(CONSTANTS[1:3]), strict=False):
        yield {"anyOf": [first, second]}
    for first, second in itertools.product(NUMBERS[:4], STRINGS[::3]):
        shapes = [record({"kind": {"const": "n"}, "n": first}), record({"kind": {"const": "s"}, "s": second})]
        yield {"anyOf": shapes}


def _references() -> Iterator[Schema]:
    for scalar in SCALARS[::2]:
        yield {
            "$defs": {"leaf": scalar},
            **record({"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}}),
        }
    for most in (1, 2):
        children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": most}
        node = record({"value": NUMBERS[0], "children": children}, required=["value"])
        yield {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def _nested() -> Iterator[Schema]:
    for depth, scalar in itertools.product((2, 3, 4, 5), SCALARS[1::5]):
        schema = scalar
        for level in range(depth):
            schema = record({WORDS[level]: schema, "id": NUMBERS[level % 3]})
        yield schema


def _maps() -> Iterator[Schema]:
    for value in SCALARS[::4]:
        yield {"type": "object", "properties": {"id": NUMBERS[0]}, "required": ["id"], "additionalProperties": value}


def _combined() -> Iterator[Schema]:
    for start in range(0, 24, 2):
        some = [SCALARS[(start + i) % len(SCALARS)] for i in range(3)]
        items = {
            "type": "array",
            "items": record({"what": some[0], "how_many": NUMBERS[1]}),
            "minItems": 1,
            "maxItems": 2,
        }
        status = {"enum": ["open", "paid", "lost"]}
        yield record(
            {"order_number": NUMBERS[2], "status": status, "items": items, "remark": {"anyOf": [some[1], some[2]]}}
        )


if __name__ == "__main__":
    for schema in schemas():
        print(json.dumps(schema))
