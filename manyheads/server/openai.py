"""The OpenAI endpoints: completions, chat completions, models."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manyheads.frontend.output import SequenceOutput, TextDelta
from manyheads.request import FinishReason
from manyheads.server.logprobs import ChatLogprobs, CompletionLogprobs
from manyheads.server.schemas import ChatRequest, CompletionRequest
from manyheads.server.service import Generation, Prompt, Service, Update, or_disconnect
from manyheads.server.sse import DONE, chain, event, stream_response

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as OpenAI has it."""


def openai_router(service: Service) -> APIRouter:
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
            ids = await service.encode(text) if isinstance(text, str) and text else []
            prompts.append(Prompt(list(text) if isinstance(text, list) else ids, continues=True))
        answer = _Completions(service, service.generate(prompts, params), body)
        return await answer.respond(request, bool(body.stream))

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        params = body.chat_params()
        ids = await service.encode_chat([m.plain() for m in body.messages])
        answer = _Chat(service, service.generate([Prompt(ids)], params), body)
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
    """One answer, whole or as a stream. Subclasses say how the endpoint writes its choices."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, service: Service, generation: Generation, body: CompletionRequest | ChatRequest) -> None:
        self.service = service
        self.generation = generation
        self.body = body
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    async def respond(self, request: Request, stream: bool) -> Response:
        if not stream:
            await or_disconnect(request, self.generation.collect())
            return JSONResponse(self.whole())
        updates = self.generation.updates()
        # a refusal is still a status; so the stream begins with the first token
        first = await or_disconnect(request, anext(updates))
        return stream_response(self.events(chain(first, updates)))

    def whole(self) -> dict[str, Any]:
        rows = self.generation.outputs
        choices = [self.choice(i, output) for i, row in enumerate(rows) for output in row]
        return {**self.head(self.object), "choices": choices, "usage": self.generation.usage()}

    async def events(self, updates: AsyncGenerator[Update, None]) -> AsyncGenerator[bytes, None]:
        head = self.head(self.chunk_object)
        options = self.body.stream_options
        always = options is not None and options.continuous_usage_stats

        def usage() -> dict[str, Any]:
            return {"usage": self.generation.usage() if always else None} if self.body.include_usage else {}

        async with contextlib.aclosing(updates):
            for choice in self.opening():
                yield event({**head, "choices": [choice], **usage()})
            async for update in updates:
                piece = self.chunk(update)
                if piece is not None:
                    yield event({**head, "choices": [piece], **usage()})
        if self.body.include_usage:
            yield event({**head, "choices": [], "usage": self.generation.usage()})
        yield DONE

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.generation.created,
            "model": self.body.model or self.service.names[0],
        }

    def number(self, prompt_index: int, output: SequenceOutput) -> int:
        return prompt_index * self.generation.params.n + output.index

    def opening(self) -> list[dict[str, Any]]:
        return []

    def choice(self, prompt_index: int, output: SequenceOutput) -> dict[str, Any]:
        raise NotImplementedError

    def chunk(self, update: Update) -> dict[str, Any] | None:
        raise NotImplementedError


class _Completions(_Answer):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, generation: Generation, body: CompletionRequest) -> None:
        super().__init__(service, generation, body)
        self.echo = bool(body.echo)
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def choice(self, prompt_index: int, output: SequenceOutput) -> dict[str, Any]:
        logprobs = CompletionLogprobs(self.service.tokenizer).add(output.logprobs)
        text = self._prompt_text(prompt_index) + output.text
        return self._choice(self.number(prompt_index, output), text, logprobs, output.finish_reason, output)

    def opening(self) -> list[dict[str, Any]]:
        if not self.echo:
            return []
        rows = self.generation.outputs
        return [
            self._choice(self.number(i, output), self._prompt_text(i), None, None, output)
            for i, row in enumerate(rows)
            for output in row
        ]

    def chunk(self, update: Update) -> dict[str, Any] | None:
        delta = update.delta
        if not _worth_sending(delta):
            return None
        number = self.number(update.prompt_index, update.output)
        state = self._logprobs.setdefault(number, CompletionLogprobs(self.service.tokenizer))
        return self._choice(number, delta.text, state.add(delta.logprobs), delta.finish_reason, update.output)

    def _prompt_text(self, prompt_index: int) -> str:
        ids = self.generation.prompts[prompt_index].token_ids
        return self.service.tokenizer.decode(ids) if self.echo else ""

    @staticmethod
    def _choice(
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: FinishReason | None,
        output: SequenceOutput,
    ) -> dict[str, Any]:
        stop_reason = output.stop_reason if reason else None
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": stop_reason,
        }


class _Chat(_Answer):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, prompt_index: int, output: SequenceOutput) -> dict[str, Any]:
        return {
            "index": self.number(prompt_index, output),
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": ChatLogprobs(self.service.tokenizer).of(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            for i in range(self.generation.params.n)
        ]

    def chunk(self, update: Update) -> dict[str, Any] | None:
        delta = update.delta
        if not _worth_sending(delta):
            return None
        choice: dict[str, Any] = {
            "index": self.number(update.prompt_index, update.output),
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": ChatLogprobs(self.service.tokenizer).of(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason:
            choice["stop_reason"] = update.output.stop_reason
        return choice


def _worth_sending(delta: TextDelta) -> bool:
    """Text that is still held back makes no chunk, unless log-probabilities came with its tokens."""
    return bool(delta.text or delta.logprobs or delta.finish_reason)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "manyheads",
        "max_model_len": service.ready.max_model_len,
        "num_medusa_heads": service.ready.num_heads,
    }
