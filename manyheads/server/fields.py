"""The types of a request's fields say in the interface's description what they may be."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from manyheads.request import MAX_LOGIT_BIASES, MAX_STOP_CHARACTERS, RANGES


class Limits:
    """These words of JSON Schema describe a type's limits; others check them, who can say better what is wrong."""

    def __init__(self, **words: Any) -> None:
        self.words = words

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Add the limits to what pydantic says about the type."""
        return {**handler(schema), **self.words}


def between(name: str) -> Limits:
    """Describe the range of a field of SamplingParams."""
    low, high = RANGES[name]
    return Limits(minimum=low, maximum=high)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wholes(values: Any) -> Any:
    # there may be a million of them, of which the types are looked at quickly
    has_floats = isinstance(values, list) and float in set(map(type, values))
    return [_whole(value) for value in values] if has_floats else values


Whole = Annotated[int, BeforeValidator(_whole)]
"""In JSON, 2.0 is as whole as 2."""
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31), BeforeValidator(_whole)]
Truncation = Annotated[int, Field(ge=-1, lt=2**31), BeforeValidator(_whole), Limits(**{"not": {"const": 0}})]
Count = Annotated[Whole, Limits(minimum=1, exclusiveMaximum=2**31)]
_Id = Annotated[int, Limits(minimum=0, description="of a token of the model's vocabulary")]
Ids = Annotated[list[_Id], BeforeValidator(_wholes)]
StopString = Annotated[str, Limits(minLength=1, maxLength=MAX_STOP_CHARACTERS)]
LogitBias = Annotated[
    dict[Annotated[int, Field(strict=False)], Annotated[float, Limits(minimum=-100, maximum=100)]],
    Limits(maxProperties=MAX_LOGIT_BIASES, propertyNames={"pattern": "^[0-9]+$"}),
]
EMPTY: tuple[Any, ...] = (None, [], {})
"""What this server does not do may be asked for by no more than this."""
Empty = Annotated[Any, Limits(enum=EMPTY, description="not supported")]
