"""`/tokenize` and `/detokenize` show what the model's tokenizer makes of texts, and of tokens."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from manyheads.errors import require
from manyheads.frontend.conversation import Conversation
from manyheads.server.answers import Text, Tokens
from manyheads.server.body import Body
from manyheads.server.fields import Ids, Limits
from manyheads.server.messages import Message
from manyheads.server.openapi import errors
from manyheads.server.service import Service
from manyheads.server.tools import MAX_TOOLS, Tool, tool_use


def _given(name: str, other: str) -> dict[str, Any]:
    """Describe that one field is given and the other one is not."""
    null = {"type": "null"}
    return {"properties": {name: {"not": null}, other: null}, "required": [name]}


_EITHER = {"oneOf": [_given("prompt", "messages"), _given("messages", "prompt")]}


class TokenizeRequest(Body, json_schema_extra=_EITHER):
    """This body goes to POST /tokenize, with a text, or with messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Limits(minItems=1)] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS, description="with messages")
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """This body goes to POST /detokenize."""

    model: str | None = None
    tokens: Ids
    skip_special_tokens: bool = False


def tokenizer_router(service: Service) -> APIRouter:
    """Make the routes of these endpoints."""
    router = APIRouter(tags=["Tokenizer"])
    bad = errors(400, 404, 413)

    @router.post(
        "/tokenize",
        summary="Tokens of a text or a conversation",
        responses={200: {"model": Tokens}, **bad},
    )
    async def tokenize(body: TokenizeRequest, request: Request) -> JSONResponse:
        service.accept(body, request)
        require((body.prompt is None) != (body.messages is None), "give either prompt or messages")
        if body.messages is not None:
            use = tool_use(body.tools, None, None)
            messages = [message.plain() for message in body.messages]
            ids = await service.llm.encode_chat(Conversation(messages, tools=use.tools))
        else:
            ids = await service.llm.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.llm.ready.max_model_len})

    @router.post("/detokenize", summary="The text of tokens", responses={200: {"model": Text}, **bad})
    async def detokenize(body: DetokenizeRequest, request: Request) -> JSONResponse:
        service.accept(body, request)
        last = service.llm.ready.vocab_size - 1
        require(all(0 <= t <= last for t in body.tokens), f"tokens must be between 0 and {last}")
        text = service.llm.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
        return JSONResponse({"prompt": text})

    return router
