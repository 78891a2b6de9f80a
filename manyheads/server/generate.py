"""`/generate` and `/generate_stream` are the interface of this project's first version, with counts beside the text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from manyheads.errors import require
from manyheads.frontend.generation import Generation, Prompt, Update
from manyheads.server.answers import GenerateAnswer, GenerateText
from manyheads.server.auth import client_of
from manyheads.server.openapi import generates
from manyheads.server.schemas import GenerateRequest
from manyheads.server.service import Service, whole_or_cut
from manyheads.server.sse import event, stream_response


def generate_router(service: Service) -> APIRouter:
    """Make the routes of these endpoints."""
    router = APIRouter(tags=["Generate"])

    @router.post("/generate", summary="Follow an instruction", responses=generates(whole=GenerateAnswer))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """The model's chat template is applied to the prompt, unless `parameters.raw` is true or it has none."""
        start = time.perf_counter()
        generation = await _prepare(service, body, request)
        await service.collect(request, [generation])
        return whole_or_cut(generation.outputs, _answer(generation, start))

    @router.post(
        "/generate_stream",
        summary="Follow an instruction, word by word",
        response_class=StreamingResponse,
        responses=generates(GenerateText, GenerateAnswer),
    )
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """Server-sent events `{"text": …}`; the last one is what /generate answers."""
        start = time.perf_counter()
        generation = await _prepare(service, body, request)
        return stream_response(_events(generation, await service.stream(request, [generation]), start))

    return router


async def _prepare(service: Service, body: GenerateRequest, request: Request) -> Generation:
    params = body.parameters.generate_params()
    require(bool(body.prompt.strip()), "the prompt is empty")
    if body.parameters.raw or not service.llm.tokenizer.has_chat_template:
        prompt = Prompt(await service.llm.encode(body.prompt), continues=True)
    else:
        prompt = Prompt(await service.llm.encode_chat([{"role": "user", "content": body.prompt}]))
    (generation,) = service.llm.prepare([prompt], params, body.parameters.place(client_of(request)))
    return generation


async def _events(
    generation: Generation, updates: AsyncGenerator[Update, None], start: float
) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(updates):
        async for update in updates:
            if update.delta.text:
                yield event({"text": update.delta.text})
    yield event(_answer(generation, start))


def _answer(generation: Generation, start: float) -> dict[str, Any]:
    (output,) = generation.outputs
    tokens, steps = len(output.token_ids), output.num_steps
    return {
        "response": output.text,
        "details": {
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "prompt_tokens": len(generation.prompt.token_ids),
            "generated_tokens": tokens,
            "steps": steps,
            "tokens_per_step": round(tokens / steps, 3) if steps else 0.0,
            "seconds": round(time.perf_counter() - start, 4),
        },
    }
