"""The description of the interface (/openapi.json, shown at /docs) says what is sent, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from manyheads.server.answers import ChatCompletionChunk, CompletionChunk, ErrorAnswer, GenerateAnswer, GenerateText
from manyheads.server.body import Body
from manyheads.server.response_answers import ResponseEvent

Responses = dict[int | str, dict[str, Any]]
"""These are the answers of a route by status, as FastAPI takes them."""
_EVENTS = (CompletionChunk, ChatCompletionChunk, ResponseEvent, GenerateText, GenerateAnswer, ErrorAnswer)
_MEANINGS = {
    400: "the request cannot be served as asked; nothing ran",
    401: "the API key is missing or wrong",
    404: "there is no such model",
    413: "the body is too large",
    429: "too many requests wait, or the API key is at a limit; come back later",
    503: "the engine does not serve",
}
_REF = "#/components/schemas/{model}"


def errors(*statuses: int) -> Responses:
    """Describe these statuses, each of which comes with an ErrorAnswer."""
    found: Responses = {s: {"model": ErrorAnswer, "description": _MEANINGS[s]} for s in statuses}
    for status in {429, 503} & found.keys():
        found[status]["headers"] = {"Retry-After": {"description": "in seconds", "schema": {"type": "integer"}}}
    return found


def generates(*events: type[BaseModel], whole: type[BaseModel] | None = None, also: tuple[int, ...] = ()) -> Responses:
    """Describe the answers of a route that generates: a stream of events, and the whole where it can be had.

    Args:
        events: a stream has these, each written as JSON.
        also: errors beyond those that all such routes have.
    """
    names = [event.__name__ for event in events] + [ErrorAnswer.__name__]
    refs = [{"$ref": _REF.format(model=name)} for name in names]
    item = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": refs}}
    data = {"anyOf": [{"const": "[DONE]"}, item]}
    content = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    success = {"model": whole} if whole else {}
    streams = {"content": {"text/event-stream": content}} if events else {}
    description = "what the model wrote" + (f"; a stream's events are {', '.join(names)}" if events else "")
    return errors(400, 413, 429, 503, *also) | {200: {"description": description, **success, **streams}}


def describe(app: FastAPI, needs_key: Callable[[str], bool], *, is_strict: bool = False) -> None:
    """Complete what FastAPI finds out about an application by itself.

    Args:
        needs_key: tells whether a path asks for an API key.
        is_strict: fields that nobody knows are refused.
    """
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(plain(), needs_key)
            for name in Body.closed() if is_strict else ():
                if (body := plain()["components"]["schemas"].get(name)) is not None:
                    body["additionalProperties"] = False
        return plain()

    app.openapi = complete  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], needs_key: Callable[[str], bool]) -> None:
    components = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # this server answers 400 with an ErrorAnswer
        components.pop(name, None)
    _, events = models_json_schema([(event, "serialization") for event in _EVENTS], ref_template=_REF)
    schema["components"]["schemas"] = events["$defs"] | components
    request_id = {"description": "the request's own, or one that was made", "schema": {"type": "string"}}
    wrong_key = {
        "description": _MEANINGS[401],
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=ErrorAnswer.__name__)}}},
    }
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if needs_key(path):
                operation["responses"]["401"] = dict(wrong_key)
                operation["security"] = [{"key": []}]
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for response in operation["responses"].values():
                response["headers"] = response.get("headers", {}) | {"X-Request-Id": request_id}
