"""The OpenAI endpoints are completions, chat completions and models."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manyheads.frontend.generation import Generation, Prompt, Update
from manyheads.frontend.output import SequenceOutput, TextDelta
from manyheads.request import FinishReason
from manyheads.server.logprobs import CompletionLogprobs, chat_logprobs
from manyheads.server.schemas import ChatRequest, CompletionRequest
from manyheads.server.service import Service, or_disconnect
from manyheads.server.sse import DONE, chain, event, stream_response

DEFAULT_MAX_TOKENS = 16
"""/v1/completions writes at most so many tokens where a request says nothing, as OpenAI has it."""


def openai_router(service: Service) -> APIRouter:
    """Make the routes of these endpoints."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        body.check()
        params = body.to_params(
            logprobs=body.logprobs, max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        )
        prompts = []
        for text in body.prompts():
            ids = await service.llm.encode(text) if isinstance(text, str) and text else []
            prompts.append(Prompt(list(text) if isinstance(text, list) else ids, continues=True))
        answer = _Completions(service, service.llm.prepare(prompts, params), body)
        return await answer.respond(request, bool(body.stream))

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        params = body.chat_params()
        ids = await service.llm.encode_chat([m.plain() for m in body.messages])
        answer = _Chat(service, service.llm.prepare([Prompt(ids)], params), body)
        return await answer.respond(request, bool(body.stream))

    @router.get("/v1/models", summary="What is served")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})

    @router.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> JSONResponse:
        service.check_model(name)
        return JSONResponse(_model(service, name))

    return router


class _Answer:
    """An answer goes out whole or as a stream. Subclasses say how their endpoint writes its choices."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, service: Service, generations: list[Generation], body: CompletionRequest | ChatRequest) -> None:
        self.service = service
        self.generations = generations
        self.body = body
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.numbers = {output: number for number, (_, output) in enumerate(self.outputs())}

    def outputs(self) -> Iterator[tuple[Generation, SequenceOutput]]:
        """Go through the continuations of all prompts, in the order of the choices."""
        return ((generation, output) for generation in self.generations for output in generation.outputs)

    async def respond(self, request: Request, stream: bool) -> Response:
        """Generate, and answer when all is there or as it comes."""
        if not stream:
            await or_disconnect(request, self.service.collect(self.generations))
            return JSONResponse(self.whole())
        updates = self.service.updates(self.generations)
        # a refusal is still a status; so the stream begins with the first token
        first = await or_disconnect(request, anext(updates))
        return stream_response(self.events(chain(first, updates)))

    def whole(self) -> dict[str, Any]:
        """Make the body of an answer that is not streamed."""
        choices = [self.choice(generation, output) for generation, output in self.outputs()]
        return {**self.head(self.object), "choices": choices, "usage": _usage(self.generations)}

    async def events(self, updates: AsyncGenerator[Update, None]) -> AsyncGenerator[bytes, None]:
        """Make the server-sent events of a stream."""
        head = self.head(self.chunk_object)
        options = self.body.stream_options
        always = options is not None and options.continuous_usage_stats

        def usage() -> dict[str, Any]:
            return {"usage": _usage(self.generations) if always else None} if self.body.include_usage else {}

        async with contextlib.aclosing(updates):
            for choice in self.opening():
                yield event({**head, "choices": [choice], **usage()})
            async for update in updates:
                if _is_worth_sending(update.delta):
                    yield event({**head, "choices": [self.chunk(update)], **usage()})
        if self.body.include_usage:
            yield event({**head, "choices": [], "usage": _usage(self.generations)})
        yield DONE

    def head(self, kind: str) -> dict[str, Any]:
        """Make what an answer and each chunk begin with."""
        name = self.body.model or self.service.names[0]
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    def opening(self) -> list[dict[str, Any]]:
        """Make the choices that a stream begins with, before there is text."""
        return []

    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        """Write a continuation as a whole answer has it."""
        raise NotImplementedError

    def chunk(self, update: Update) -> dict[str, Any]:
        """Write what came of a continuation as a stream has it."""
        raise NotImplementedError


class _Completions(_Answer):
    """It is an answer of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, generations: list[Generation], body: CompletionRequest) -> None:
        super().__init__(service, generations, body)
        self.echo = bool(body.echo)
        self._logprobs: dict[SequenceOutput, CompletionLogprobs] = {}

    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        logprobs = CompletionLogprobs(self.service.llm.tokenizer).add(output.logprobs)
        return self._choice(output, self._prompt_text(generation) + output.text, logprobs, output.finish_reason)

    def opening(self) -> list[dict[str, Any]]:
        if not self.echo:
            return []
        return [self._choice(output, self._prompt_text(generation)) for generation, output in self.outputs()]

    def chunk(self, update: Update) -> dict[str, Any]:
        delta = update.delta
        state = self._logprobs.setdefault(update.output, CompletionLogprobs(self.service.llm.tokenizer))
        return self._choice(update.output, delta.text, state.add(delta.logprobs), delta.finish_reason)

    def _prompt_text(self, generation: Generation) -> str:
        return self.service.llm.tokenizer.decode(generation.prompt.token_ids) if self.echo else ""

    def _choice(
        self,
        output: SequenceOutput,
        text: str,
        logprobs: dict[str, Any] | None = None,
        reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        return {
            "index": self.numbers[output],
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": output.stop_reason if reason else None,
        }


class _Chat(_Answer):
    """It is an answer of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        return {
            "index": self.numbers[output],
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": chat_logprobs(self.service.llm.tokenizer, output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in self.numbers.values()]

    def chunk(self, update: Update) -> dict[str, Any]:
        delta = update.delta
        choice: dict[str, Any] = {
            "index": self.numbers[update.output],
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": chat_logprobs(self.service.llm.tokenizer, delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason:
            choice["stop_reason"] = update.output.stop_reason
        return choice


def _is_worth_sending(delta: TextDelta) -> bool:
    """Text that is still held back makes no chunk, unless log-probabilities came with its tokens."""
    return bool(delta.text or delta.logprobs or delta.finish_reason)


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
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "manyheads",
        "max_model_len": service.llm.ready.max_model_len,
        "drafter": service.llm.ready.drafter,
        "num_medusa_heads": service.llm.ready.draft_depth if service.llm.ready.drafter == "medusa" else 0,
    }
