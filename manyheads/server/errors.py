"""Every error leaves the server in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from manyheads.frontend.engine_client import EngineError
from manyheads.request import QueueFull, RequestError

RETRY_AFTER = "1"
"""A client that was refused may try again after so many seconds: a row comes free every few steps."""
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "client_closed_request",
}


class ApiError(Exception):
    """It becomes an answer other than 200.

    Args:
        status: of HTTP.
        message: for a person: what is wrong and what to do.
        param: the field at fault, if one is.
        code: for a program.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Make the body of an error's answer; arguments as for `ApiError`."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """Make an error's answer, with the headers that its status asks for; arguments as for `ApiError`."""
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = RETRY_AFTER
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message, param, code), status, headers)


def as_api_error(error: Exception) -> ApiError:
    """Give what the engine and the front end raise its meaning in HTTP."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"the server is busy: {error}; try again later", code="queue_full")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_unavailable")
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Answer everything that is raised, in one form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        api = as_api_error(error)
        return error_response(api.status, api.message, api.param, api.code)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param, code = describe(error.errors()[0], request.headers.get("content-type", ""))
        return error_response(400, message, param, code)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path}; /docs lists what there is"
        elif error.status_code == 405:
            message = f"{request.method} is not offered for {request.url.path}; /docs lists what is"
        elif error.status_code == 400:
            message = "the body is not JSON in UTF-8"
        response = error_response(error.status_code, message)
        response.headers.update(error.headers or {})
        return response

    for kind in (ApiError, RequestError, QueueFull, EngineError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def describe(detail: dict[str, Any], content_type: str) -> tuple[str, str | None, str]:
    """Describe one finding of pydantic's by a message, the field at fault (if one is) and a code."""
    kind = str(detail["type"])
    if kind == "json_invalid":
        return f"the body is not JSON: {detail['ctx']['error']}", None, "invalid_json"
    # the tags of a union's branches are of no interest to the caller
    path = [str(p) for p in detail["loc"][1:] if isinstance(p, int) or str(p).isidentifier()]
    param = ".".join(path) or None
    if kind == "string_unicode":
        return "unknown field whose name is not valid Unicode", None, "unknown_field"
    if param is None:
        hint = "" if "json" in content_type else " sent as Content-Type: application/json"
        return f"the body must be a JSON object{hint}", None, "invalid_body"
    if kind == "extra_forbidden":
        return f"unknown field {param!r}: neither the OpenAI API nor manyheads has it", param, "unknown_field"
    if kind == "missing":
        return f"field {param!r} is required", param, "missing_field"
    text = str(detail["msg"]).removeprefix("Value error, ")
    return f"{param}: {text[:1].lower() + text[1:]}", param, "invalid_value"
