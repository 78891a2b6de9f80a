"""/v1/responses answers as OpenAI's newer interface does, and stores nothing."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from manyheads.frontend.generation import Generation, Update
from manyheads.frontend.reply import ReplyReader
from manyheads.server.logprobs import TextLogprobs
from manyheads.server.openapi import generates
from manyheads.server.response_answers import ResponseAnswer, ResponseEvent
from manyheads.server.response_items import Event, ResponseItems
from manyheads.server.response_request import ResponsesRequest
from manyheads.server.service import Service, whole_or_cut
from manyheads.server.sse import event


def responses_router(service: Service) -> APIRouter:
    """Make the route of this endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        "/v1/responses",
        summary="Answer, with nothing stored",
        responses=generates(ResponseEvent, whole=ResponseAnswer, also=(404,)),
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        service.accept(body, request)
        body.check()
        use = body.tool_use()
        prompt, params = await service.prompt_for(body.conversation_of_input(), use, body.params(service.llm.defaults))
        (generation,) = service.llm.prepare([prompt], params, service.place(body, request))
        reader = service.form.reader(service.llm.tokenizer, prompt.token_ids, use, streams=bool(body.stream))
        return await _ResponseWriter(service, generation, body, reader).respond(request)

    return router


class _ResponseWriter:
    """It writes an answer of /v1/responses, whole or as a stream."""

    def __init__(self, service: Service, generation: Generation, body: ResponsesRequest, reader: ReplyReader) -> None:
        self._service, self._generation, self._body, self._reader = service, generation, body, reader
        self._logprobs = TextLogprobs(service.llm.tokenizer) if body.wants_logprobs else None
        self._items = ResponseItems(self._logprobs)
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._number = 0

    async def respond(self, request: Request) -> Response:
        """Generate, and answer when all is there or as it comes."""
        generations = [self._generation]
        if self._body.stream:
            return self._service.stream(request, generations, self)
        await self._service.collect(request, generations)
        (output,) = self._generation.outputs
        if self._logprobs is not None:
            self._logprobs.add(output.logprobs)
        for _ in self._items.push(self._reader.push(output.text, final=True)):
            pass  # nobody hears of events
        for _ in self._items.close(self._status()):
            pass
        return whole_or_cut([output], self._response(self._status()))

    def begin(self) -> bytes:
        """Write the events that a stream begins with."""
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event({"type": kind, "response": self._response("in_progress")}) for kind in kinds)

    def push(self, update: Update) -> bytes:
        """Write the events of an update."""
        if self._logprobs is not None:
            self._logprobs.add(update.delta.logprobs)
        is_last = update.delta.finish_reason is not None
        reply = self._reader.push(update.delta.text, final=is_last)
        return b"".join(map(self._event, self._items.push(reply)))

    def end(self) -> bytes:
        """Write the events that a stream ends with."""
        closing = b"".join(map(self._event, self._items.close(self._status())))
        return closing + self._event({"type": f"response.{self._status()}", "response": self._response(self._status())})

    def _event(self, told: Event) -> bytes:
        self._number += 1
        return event({**told, "sequence_number": self._number - 1}, name=told["type"])

    def _status(self) -> str:
        (output,) = self._generation.outputs
        return {"stop": "completed", "length": "incomplete"}.get(output.finish_reason or "", "failed")

    def _response(self, status: str) -> dict[str, Any]:
        """Write the response as it stands."""
        body, params = self._body, self._generation.params
        asked = body.model_dump(mode="json", exclude_none=True, by_alias=True)
        (output,) = self._generation.outputs
        error = {"code": "server_error", "message": "the server ended before the answer was whole"}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": params.max_tokens,
            "metadata": body.metadata or {},
            "model": body.model or self._service.names[0],
            "output": self._items.items if status != "in_progress" else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": asked.get("reasoning"),
            "store": False,
            "temperature": params.temperature,
            "text": asked.get("text", {"format": {"type": "text"}}),
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools", []),
            "top_p": params.top_p,
            "top_logprobs": params.logprobs,
            "max_tool_calls": body.max_tool_calls,
            "truncation": "disabled",
            "usage": self._usage() if status != "in_progress" else None,
        } | ({"completed_at": int(time.time())} if output.finished and status == "completed" else {})

    def _usage(self) -> dict[str, Any]:
        (output,) = self._generation.outputs
        thoughts = [part["text"] for i in self._items.items if i["type"] == "reasoning" for part in i["content"]]
        encode = self._service.llm.tokenizer.encode
        num_input, num_output = len(self._generation.prompt.token_ids), len(output.token_ids)
        num_thoughts = sum(len(encode(text, add_special_tokens=False)) for text in thoughts)
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": min(num_thoughts, num_output)},
            "total_tokens": num_input + num_output,
        }
