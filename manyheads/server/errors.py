"""Every error leaves the server in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from manyheads.errors import EngineError, ModelError, QueueFull, RequestError

_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "client_closed_request",
}


@dataclass(eq=False)
class ApiError(Exception):
    """It becomes an answer other than 200."""

    status: int
    """This is HTTP's number."""
    message: str
    """It tells a person what is wrong and what to do."""
    param: str | None = None
    """The field at fault, if one is."""
    code: str | None = None
    """It tells a program what is wrong."""
    retry_after: int | None = None
    """The client may try again after so many seconds; None leaves it to the status."""

    def body(self) -> dict[str, Any]:
        """Make the body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **more: Any) -> JSONResponse:
        """Make the answer, with the headers that its status asks for, and with more beside the error."""
        later = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse({**self.body(), **more}, self.status, _HEADERS.get(self.status, {}) | later)


def as_api_error(error: Exception) -> ApiError:
    """Give what the engine and the front end raise its meaning in HTTP."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        seconds = max(1, math.ceil(error.retry_after or 0.0))
        message = f"the server is busy: {error}; try again in {seconds} s"
        return ApiError(429, message, code="queue_full", retry_after=seconds)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_unavailable")
    if isinstance(error, ModelError):
        return ApiError(500, str(error), code="model_error")
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Answer everything that is raised, in one form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, RequestError, QueueFull, EngineError, ModelError, Exception):
        app.add_exception_handler(kind, known)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _finding(_most_telling(error.errors()), request.headers.get("content-type", "")).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path}; /docs lists what there is"
        elif error.status_code == 405:
            message = f"{request.method} is not offered for {request.url.path}; /docs lists what is"
        elif error.status_code == 400:
            message = "the body is not JSON in UTF-8"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response


def _path(detail: dict[str, Any]) -> list[str]:
    """Where an error is. The branches of a union, which pydantic names by types and tags, are of no interest."""
    names = [str(part) for part in detail["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    return [name for name in names if name not in _TYPE_NAMES and not name[0].isupper()]


_TYPE_NAMES = {"str", "int", "float", "bool", "dict", "list"}


def _most_telling(details: Sequence[Any]) -> dict[str, Any]:
    """Choose an error of the first field that has one. A union tells what is wrong with each of its branches: the one
    that came furthest is what was meant, and of those that came as far, each may have been."""
    if str(details[0]["type"]) == "json_invalid":
        return dict(details[0])
    paths = [_path(detail) for detail in details]
    of_field = [i for i, path in enumerate(paths) if path[:1] == paths[0][:1]]
    best = max(of_field, key=lambda i: len(paths[i]))
    same = [details[i] for i in of_field if paths[i] == paths[best]]
    chosen = dict(details[best])
    wanted = [str(detail["msg"]) for detail in same]
    if len(wanted) > 1 and all(text.startswith(_SHOULD) for text in wanted):
        chosen["msg"] = _SHOULD + " or ".join(dict.fromkeys(text.removeprefix(_SHOULD) for text in wanted))
    return chosen


_SHOULD = "Input should be "


def _finding(detail: dict[str, Any], content_type: str) -> ApiError:
    """Say what pydantic has found, and in which field if it is in one."""
    kind = str(detail["type"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {detail['ctx']['error']}", code="invalid_json")
    param = ".".join(_path(detail)) or None
    if kind == "string_unicode":
        return ApiError(400, "unknown field whose name is not valid Unicode", code="unknown_field")
    if param is None:
        hint = "" if "json" in content_type else " sent as Content-Type: application/json"
        return ApiError(400, f"the body must be a JSON object{hint}", code="invalid_body")
    if kind == "extra_forbidden":
        message = f"unknown field {param!r}: neither the OpenAI API nor manyheads has it"
        return ApiError(400, message, param, "unknown_field")
    if kind == "missing":
        return ApiError(400, f"field {param!r} is required", param, "missing_field")
    text = str(detail["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {text[:1].lower() + text[1:]}", param, "invalid_value")
