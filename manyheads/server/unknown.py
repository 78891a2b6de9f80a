"""Fields that nobody knows, or that have no effect, are ignored, which the log and the answer tell; a strict server
refuses them."""

from __future__ import annotations

import logging
from itertools import islice
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import Scope

from manyheads.server.body import Body
from manyheads.server.errors import ApiError

HEADER = b"x-manyheads-ignored"
MAX_NAMES = 20
"""An answer tells of so many fields."""
MAX_LENGTH = 100
MAX_TOLD = 1000
"""The log tells of so many different fields."""
_log = logging.getLogger(__name__)


class UnknownFields:
    """It looks at what requests bring beyond what this server knows."""

    def __init__(self, is_strict: bool) -> None:
        self._is_strict = is_strict
        self._told: set[str] = set()

    def take(self, body: Body, request: Request) -> None:
        """Ignore what a body brings in vain, or raise ApiError."""
        unknown = [name[:MAX_LENGTH] for name in islice(body.unknown_fields(), MAX_NAMES)]
        ignored = list(body.ignored_fields())
        if self._is_strict and unknown:
            message = f"unknown field {unknown[0]!r}: neither the OpenAI API nor manyheads has it"
            raise ApiError(400, message, unknown[0], "unknown_field")
        if self._is_strict and ignored:
            message = f"{ignored[0]}: this server does not do what it asks for"
            raise ApiError(400, message, ignored[0], "unsupported_value")
        for names, why in ((unknown, "nobody knows it"), (ignored, "this server does not do what it asks for")):
            for name in (quote(name, safe="") for name in names):
                request.state.ignored = [*getattr(request.state, "ignored", ()), name]
                if name not in self._told and len(self._told) < MAX_TOLD:
                    self._told.add(name)
                    _log.warning("the field %s of a request is ignored: %s", name, why)


def ignored_header(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Make the header that tells which fields of a request were ignored; none if none were."""
    names = scope["state"].get("ignored")
    return [(HEADER, ",".join(names).encode())] if names else []
