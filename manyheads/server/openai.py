"""The OpenAI endpoints are completions, chat completions and models."""

from __future__ import annotations

import contextlib
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manyheads.frontend.generation import Generation, Prompt, Update
from manyheads.frontend.output import SequenceOutput, TextDelta
from manyheads.server.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, Model, Models
from manyheads.server.auth import client_of
from manyheads.server.logprobs import CompletionLogprobs, chat_logprobs
from manyheads.server.openapi import errors, generates
from manyheads.server.schemas import ChatRequest, CompletionRequest, StreamOptions
from manyheads.server.service import Service, whole_or_cut
from manyheads.server.sse import DONE, event, stream_response

DEFAULT_MAX_TOKENS = 16
"""/v1/completions writes at most so many tokens where a request says nothing, as OpenAI has it."""


def openai_router(service: Service) -> APIRouter:
    """Make the routes of these endpoints."""
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        "/v1/completions",
        summary="Continue a text",
        responses=generates(CompletionChunk, whole=Completion, also=(404,)),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        body.check()
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = body.to_params(logprobs=body.logprobs, max_tokens=max_tokens, grammar=body.grammar())
        prompts = []
        for text in body.prompts():
            ids = await service.llm.encode(text) if isinstance(text, str) and text else []
            prompts.append(Prompt(list(text) if isinstance(text, list) else ids, continues=True))
        generations = service.llm.prepare(prompts, params, body.place(client_of(request)))
        return await _Completions(service, generations, body).respond(request)

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        responses=generates(ChatCompletionChunk, whole=ChatCompletion, also=(404,)),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        params = body.chat_params()
        ids = await service.llm.encode_chat([m.plain() for m in body.messages])
        generations = service.llm.prepare([Prompt(ids)], params, body.place(client_of(request)))
        return await _Chat(service, generations, body).respond(request)

    @router.get("/v1/models", summary="What is served", responses={200: {"model": Models}})
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})

    @router.get("/v1/models/{name:path}", summary="One model", responses={200: {"model": Model}, **errors(404)})
    async def model(name: str) -> JSONResponse:
        service.check_model(name)
        return JSONResponse(_model(service, name))

    return router


class _Answer(ABC):
    """An answer goes out whole or as a stream. Subclasses say how their endpoint writes its choices."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, service: Service, generations: list[Generation], body: CompletionRequest | ChatRequest) -> None:
        self.service = service
        self.tokenizer = service.llm.tokenizer
        self.generations = generations
        self.body = body
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.outputs = [(generation, output) for generation in generations for output in generation.outputs]
        """These are the continuations of all prompts, in the order of the choices."""
        self.numbers = {output: number for number, (_, output) in enumerate(self.outputs)}

    async def respond(self, request: Request) -> Response:
        """Generate, and answer when all is there or as it comes."""
        if self.body.stream:
            return stream_response(self.events(await self.service.stream(request, self.generations)))
        await self.service.collect(request, self.generations)
        choices = [self.choice(generation, output) for generation, output in self.outputs]
        body = {**self.head(self.object), "choices": choices, "usage": _usage(self.generations)}
        return whole_or_cut(self.numbers, body)

    async def events(self, updates: AsyncGenerator[Update, None]) -> AsyncGenerator[bytes, None]:
        """Make the server-sent events of a stream."""
        head = self.head(self.chunk_object)
        options = self.body.stream_options or StreamOptions()

        def chunk(choice: dict[str, Any]) -> bytes:
            usage = _usage(self.generations) if options.continuous_usage_stats else None
            return event({**head, "choices": [choice], **({"usage": usage} if options.include_usage else {})})

        async with contextlib.aclosing(updates):
            for choice in self.opening():
                yield chunk(choice)
            async for update in updates:
                delta = update.delta
                # text that is still held back makes no chunk, unless log-probabilities came with its tokens
                if delta.text or delta.logprobs or delta.finish_reason:
                    yield chunk(self.chunk(update.output, delta))
        if options.include_usage:
            yield event({**head, "choices": [], "usage": _usage(self.generations)})
        yield DONE

    def head(self, kind: str) -> dict[str, Any]:
        """Make what an answer and each chunk begin with."""
        name = self.body.model or self.service.names[0]
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """Make the choices that a stream begins with, before there is text."""

    @abstractmethod
    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        """Write a continuation as a whole answer has it."""

    @abstractmethod
    def chunk(self, output: SequenceOutput, delta: TextDelta) -> dict[str, Any]:
        """Write what came of a continuation as a stream has it."""


class _Completions(_Answer):
    """It is an answer of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, generations: list[Generation], body: CompletionRequest) -> None:
        super().__init__(service, generations, body)
        self.echo = body.echo
        self._logprobs = {output: CompletionLogprobs(self.tokenizer) for output in self.numbers}

    def opening(self) -> list[dict[str, Any]]:
        outputs = self.outputs if self.echo else []
        return [self.chunk(o, TextDelta(text=self._prompt_text(generation))) for generation, o in outputs]

    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        text = self._prompt_text(generation) + output.text
        whole = TextDelta(text=text, logprobs=output.logprobs, finish_reason=output.finish_reason)
        return self.chunk(output, whole)

    def chunk(self, output: SequenceOutput, delta: TextDelta) -> dict[str, Any]:
        return {
            "index": self.numbers[output],
            "text": delta.text,
            "logprobs": self._logprobs[output].add(delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": output.stop_reason if delta.finish_reason else None,
        }

    def _prompt_text(self, generation: Generation) -> str:
        return self.tokenizer.decode(generation.prompt.token_ids) if self.echo else ""


class _Chat(_Answer):
    """It is an answer of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in self.numbers.values()]

    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        return {
            "index": self.numbers[output],
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": chat_logprobs(self.tokenizer, output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def chunk(self, output: SequenceOutput, delta: TextDelta) -> dict[str, Any]:
        choice = {
            "index": self.numbers[output],
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": chat_logprobs(self.tokenizer, delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        return choice | {"stop_reason": output.stop_reason} if delta.finish_reason else choice


def _usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Make OpenAI's `usage`, with the steps that it took."""
    outputs = [output for generation in generations for output in generation.outputs]
    num_prompt_tokens = sum(len(generation.prompt.token_ids) for generation in generations)
    num_output_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(g.outputs[0].num_cached_tokens for g in generations)},
        "decoding_steps": sum(output.num_steps for output in outputs),
    }


def _model(service: Service, name: str) -> dict[str, Any]:
    ready = service.llm.ready
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "manyheads",
        "max_model_len": ready.max_model_len,
        "drafter": ready.drafter,
        "num_medusa_heads": ready.draft_depth if ready.drafter == "medusa" else 0,
    }
