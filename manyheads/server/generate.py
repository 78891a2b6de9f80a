"""`/generate` and `/generate_stream` are the interface of this project's first version, with counts beside the text."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

from manyheads.errors import RequestError, require
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.generation import Generation, Prompt, Update
from manyheads.request import SamplingParams
from manyheads.server.answers import GenerateAnswer, GenerateText
from manyheads.server.body import Body
from manyheads.server.fields import Count, Limits, Whole
from manyheads.server.openapi import generates
from manyheads.server.schemas import Queueing, Sampling
from manyheads.server.service import Service, whole_or_cut
from manyheads.server.sse import event
from manyheads.server.structured import GuidedParameters


class GenerateParameters(Sampling, Queueing, GuidedParameters):
    """`parameters` of /generate are those of SamplingParams, also by TGI's names for them."""

    n: Annotated[Whole, Limits(const=1)] | None = None
    max_new_tokens: Count | None = Field(default=None, description="most output tokens (max_tokens is the same)")
    raw: bool = Field(default=False, description="the prompt is text to continue, not an instruction")

    def generate_params(self, defaults: SamplingParams) -> SamplingParams:
        """Make the engine's parameters from either name of the limit."""
        if None not in (self.max_tokens, self.max_new_tokens) and self.max_tokens != self.max_new_tokens:
            raise RequestError("max_tokens and max_new_tokens are the same and must not differ")
        require(self.n in (None, 1), "n must be 1 here; /v1/completions gives several continuations")
        return self.to_params(defaults, max_tokens=self.max_new_tokens, grammar=self.asked())


_EXAMPLE = {"prompt": "Tell me something about hip hop.", "parameters": {"temperature": 0.5, "max_steps": 100}}


class GenerateRequest(Body, json_schema_extra={"examples": [_EXAMPLE]}):
    """This body goes to POST /generate and /generate_stream."""

    prompt: Annotated[str, Limits(pattern=r"\S")]
    parameters: GenerateParameters = GenerateParameters()


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
        return service.stream(request, [generation], _GenerateEvents(generation, start))

    return router


async def _prepare(service: Service, body: GenerateRequest, request: Request) -> Generation:
    service.accept(body, request)
    params = body.parameters.generate_params(service.llm.defaults)
    require(bool(body.prompt.strip()), "the prompt is empty")
    if body.parameters.raw or not service.llm.tokenizer.has_chat_template:
        prompt = Prompt(await service.llm.encode(body.prompt), continues=True)
    else:
        prompt = Prompt(await service.llm.encode_chat(Conversation([{"role": "user", "content": body.prompt}])))
    (generation,) = service.llm.prepare([prompt], params, service.place(body.parameters, request))
    return generation


class _GenerateEvents:
    """It writes the events of /generate_stream."""

    def __init__(self, generation: Generation, start: float) -> None:
        self._generation, self._start = generation, start

    def begin(self) -> bytes:
        return b""

    def push(self, update: Update) -> bytes:
        return event({"text": update.delta.text}) if update.delta.text else b""

    def end(self) -> bytes:
        return event(_answer(self._generation, self._start))


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
