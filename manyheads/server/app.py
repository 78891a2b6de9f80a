"""The web application puts routes, limits and errors together."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from manyheads.errors import EngineError
from manyheads.server.answers import Version
from manyheads.server.auth import DOCS_FILES, ApiKeys, needs_key
from manyheads.server.config import ServerConfig
from manyheads.server.errors import ApiError, add_error_handlers
from manyheads.server.generate import generate_router
from manyheads.server.head import HeadAsGet
from manyheads.server.keys import Keys
from manyheads.server.limits import BodyLimit
from manyheads.server.logs import RequestLog
from manyheads.server.openai import openai_router
from manyheads.server.openapi import describe, errors
from manyheads.server.pages import add_pages
from manyheads.server.service import Service
from manyheads.server.tokenizing import tokenizer_router


def package_version() -> str:
    """Return the version of this package; without an installed one it is `unknown`."""
    try:
        return version("manyheads")
    except PackageNotFoundError:
        return "unknown"


def create_app(service: Service, config: ServerConfig) -> ASGIApp:
    """Make the application around a running engine."""
    # Swagger's page with its scripts from this server: it works without a network
    app = FastAPIOffline(
        title="manyheads",
        version=package_version(),
        description="Serves a language model with Medusa heads to many people at once.",
        redoc_url=None,
        static_url=DOCS_FILES,
    )
    add_error_handlers(app)
    # the last one added is the outermost
    app.add_middleware(HeadAsGet)
    body_timeout = config.connections.body_timeout
    app.add_middleware(BodyLimit, config.max_body_bytes, seconds=body_timeout, drops=service.metrics.drops)
    if config.needs_key:
        keys = Keys(config.api_key, config.api_key_file)
        app.add_middleware(ApiKeys, keys=keys, protect_info=config.protect_info)
    if origins := config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "X-Manyheads-Ignored"],
        )
    app.include_router(generate_router(service))
    app.include_router(openai_router(service))
    app.include_router(tokenizer_router(service))
    _add_service_routes(app, service)
    add_pages(app)
    describe(app, lambda path: config.needs_key and needs_key(path, config.protect_info), is_strict=config.strict)
    # not one of the application's own, for those do not see the answer to an unexpected error
    return RequestLog(app, access_log=config.access_log)


def _add_service_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["Service"], summary="200 while the engine works or is replaced", responses=errors(503))
    async def health() -> Response:
        client = service.llm.client
        if not client.alive:
            raise EngineError(f"the engine has stopped: {client.failure or 'it says nothing'}")
        return JSONResponse({"status": "ok" if client.serving else "restarting"})

    @app.get("/ready", tags=["Service"], summary="200 while new requests are welcome", responses=errors(503))
    async def ready() -> Response:
        if (why := service.not_ready()) is not None:
            raise ApiError(503, why, code="not_ready")
        return JSONResponse({"status": "ready"})

    @app.get("/version", tags=["Service"], summary="Of this package", responses={200: {"model": Version}})
    async def get_version() -> JSONResponse:
        return JSONResponse({"version": package_version()})

    @app.get("/metrics", tags=["Service"], summary="For Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
