"""The OpenAI endpoints are completions, chat completions, responses and models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from manyheads.server.answers import Model, Models
from manyheads.server.chat import chat_router
from manyheads.server.completions import completions_router
from manyheads.server.openapi import errors
from manyheads.server.responses import responses_router
from manyheads.server.service import Service


def openai_router(service: Service) -> APIRouter:
    """Make the routes of these endpoints."""
    router = APIRouter()
    for part in (completions_router, chat_router, responses_router, models_router):
        router.include_router(part(service))
    return router


def models_router(service: Service) -> APIRouter:
    """Make the routes that say what is served."""
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models", summary="What is served", responses={200: {"model": Models}})
    async def models() -> JSONResponse:
        return JSONResponse(
            {"object": "list", "data": [_model(service, name) for name in (*service.names, *service.loras)]}
        )

    @router.get("/v1/models/{name:path}", summary="One model", responses={200: {"model": Model}, **errors(404)})
    async def model(name: str) -> JSONResponse:
        service.check_model(name)
        return JSONResponse(_model(service, name))

    return router


def _model(service: Service, name: str) -> dict[str, Any]:
    ready = service.llm.ready
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "manyheads",
        "parent": service.names[0] if name in service.loras else None,
        "max_model_len": ready.max_model_len,
        "drafter": ready.drafter,
        "num_medusa_heads": ready.draft_depth if ready.drafter == "medusa" else 0,
    }
