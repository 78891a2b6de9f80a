"""The pages for people: the chat at /, the dashboard, and the files that they are made of."""

from __future__ import annotations

from pathlib import Path
from string import Template

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
FILES = "/page"
"""Scripts and styles are served from here."""
_HEADERS = {
    # nothing of another host, nothing inline; what a model says can start nothing
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Pages and their files are asked for again each time, so that none is older than the server."""


class _Files(StaticFiles):
    """The files of the pages come with the same headers as these."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with a file."""
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def add_pages(app: FastAPI) -> None:
    """Add the pages and their icon to an application."""
    app.mount(FILES, _Files(directory=FOLDER))

    @app.get("/", include_in_schema=False)
    async def chat() -> HTMLResponse:
        return _page("chat", "manyheads")

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> HTMLResponse:
        return _page("dashboard", "manyheads · dashboard")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        data = (FOLDER / "icon.svg").read_bytes()
        return Response(data, media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})


def _page(name: str, title: str) -> HTMLResponse:
    """Put a page together: its body, below the head that all have, which names its script and its style."""
    head, body = ((FOLDER / f"{part}.html").read_text(encoding="utf-8") for part in ("head", name))
    return HTMLResponse(Template(head).substitute(name=name, title=title) + body, headers=_HEADERS)
