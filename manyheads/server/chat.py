"""/v1/chat/completions answers conversations, with calls of functions where there are some."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from manyheads.frontend.generation import Generation
from manyheads.frontend.output import SequenceOutput, TextDelta
from manyheads.frontend.reply import Call, ReplyDelta
from manyheads.frontend.tools.parser import CallDelta
from manyheads.frontend.tools.use import ToolUse
from manyheads.server.answers import ChatCompletion, ChatCompletionChunk
from manyheads.server.logprobs import chat_logprobs, prompt_logprobs
from manyheads.server.openapi import generates
from manyheads.server.schemas import ChatRequest
from manyheads.server.service import Service
from manyheads.server.writer import Writer


def chat_router(service: Service) -> APIRouter:
    """Make the route of this endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        responses=generates(ChatCompletionChunk, whole=ChatCompletion, also=(404,)),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.accept(body, request)
        use = body.tool_use()
        params = body.chat_params(service.llm.defaults)
        prompt, params = await service.prompt_for(body.conversation(), use, params, body.truncate_prompt_tokens)
        generations = service.llm.prepare([prompt], params, service.place(body, request))
        return await _ChatWriter(service, generations, body, use).respond(request)

    return router


def call_id() -> str:
    """Make the id of a call: Mistral's templates want nine letters or digits, others take anything."""
    return uuid.uuid4().hex[:9]


class _ChatWriter(Writer[ChatRequest]):
    """It writes answers of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, generations: list[Generation], body: ChatRequest, use: ToolUse) -> None:
        super().__init__(service, generations, body)
        streams = bool(body.stream)
        self._readers = {
            output: service.form.reader(self.tokenizer, generation.prompt.token_ids, use, streams=streams)
            for generation, output in self.outputs
        }
        self._calling: set[SequenceOutput] = set()

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in self.numbers.values()]

    def head(self, kind: str) -> dict[str, Any]:
        head = super().head(kind)
        (generation,) = self.generations
        if self.body.return_token_ids:
            head["prompt_token_ids"] = generation.prompt.token_ids
        if self.body.prompt_logprobs is not None and kind == self.object:
            head["prompt_logprobs"] = prompt_logprobs(self.tokenizer, generation.outputs[0].prompt_logprobs)
        return head

    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        reply = self._readers[output].read(output.text)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.thoughts:
            message["reasoning_content"] = reply.thoughts
        if reply.calls:
            message["content"] = reply.content.strip() or None
            message["tool_calls"] = [_whole_call(call) for call in reply.calls]
            self._calling.add(output)
        choice = {
            "index": self.numbers[output],
            "message": message,
            "logprobs": chat_logprobs(self.tokenizer, output.logprobs),
            **self._end(output),
            **({"token_ids": output.token_ids} if self.body.return_token_ids else {}),
        }
        return self.with_steps(choice, output.steps)

    def chunk(self, generation: Generation, output: SequenceOutput, delta: TextDelta) -> dict[str, Any] | None:
        is_last = delta.finish_reason is not None
        reply = self._readers[output].push(delta.text, final=is_last)
        if reply.calls:
            self._calling.add(output)
        wants_tokens = bool(self.body.return_token_ids and delta.token_ids)
        if not (reply or delta.logprobs or is_last or wants_tokens or delta.trace is not None):
            return None
        choice = {
            "index": self.numbers[output],
            "delta": _delta(reply),
            "logprobs": chat_logprobs(self.tokenizer, delta.logprobs),
            "finish_reason": None,
        }
        if is_last:
            choice |= self._end(output)
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return self.with_steps(choice, [delta.trace])

    def _end(self, output: SequenceOutput) -> dict[str, Any]:
        calls = output in self._calling and output.finish_reason == "stop"
        return {"finish_reason": "tool_calls" if calls else output.finish_reason, "stop_reason": output.stop_reason}


def _delta(reply: ReplyDelta) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if reply.thoughts:
        delta["reasoning_content"] = reply.thoughts
    if reply.content:
        delta["content"] = reply.content
    if reply.calls:
        delta["tool_calls"] = [_call_piece(call) for call in reply.calls]
    return delta


def _whole_call(call: Call) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_piece(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    begin = {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": ""}}
    return {"index": call.index, **begin}
