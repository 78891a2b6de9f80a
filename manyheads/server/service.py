"""The endpoints share the front end, the model's names and the metrics, and wait for no client that has left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from fastapi.responses import JSONResponse
from starlette.requests import Request

from manyheads.config import ConfigError
from manyheads.errors import QueueFull, RequestError, require
from manyheads.frontend.async_llm import AsyncLLM
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.generation import Generation, Place, Prompt, Update
from manyheads.frontend.output import SequenceOutput
from manyheads.frontend.reply import ReplyForm
from manyheads.frontend.tools.hermes import HermesParser
from manyheads.frontend.tools.use import ToolUse
from manyheads.request import SamplingParams
from manyheads.server.auth import client_of, session_of
from manyheads.server.body import Body
from manyheads.server.config import ServerConfig
from manyheads.server.errors import ApiError
from manyheads.server.leaving import while_there
from manyheads.server.metrics import Metrics, SequenceTimer
from manyheads.server.schemas import Queueing
from manyheads.server.sse import Events, EventStream
from manyheads.server.unknown import UnknownFields


class Service:
    """A service is what the endpoints share.

    Args:
        llm: the front end of the engine.
        names: the model's names in requests, the first one in answers; adapters have names of their own.
        form: of the model's replies.
        is_strict: refuse fields that nobody knows, instead of ignoring them.
    """

    def __init__(self, llm: AsyncLLM, names: Sequence[str], form: ReplyForm, *, is_strict: bool = False) -> None:
        self.llm = llm
        self.names = list(names)
        self.loras = list(llm.ready.loras)
        self.form = form
        self._unknown = UnknownFields(is_strict)
        self.metrics = Metrics(llm.client, llm.ready)
        self.started = int(time.time())
        self.draining = False
        """Whether the server is about to end, and takes no new requests."""

    def accept(self, body: Body, request: Request) -> None:
        """Check what a body asks of this server in general: ApiError for a model or, if strict, a field it has not."""
        self.check_model(getattr(body, "model", None))
        self._unknown.take(body, request)

    async def prompt_for(
        self, conversation: Conversation, use: ToolUse, params: SamplingParams, truncate: int | None = None
    ) -> tuple[Prompt, SamplingParams]:
        """Make the prompt of a conversation whose reply may or must call functions, and parameters that make it do so.

        Args:
            truncate: as `truncated`'s `most`.
        """
        form = self.form
        if use.must_call:
            reader = form.tools or HermesParser
            params = msgspec.structs.replace(params, grammar=use.grammar(reader, several=form.calls_several))
            variables = {**({"enable_thinking": False} if form.thoughts else {}), **conversation.variables}
            conversation = replace(conversation, variables=variables, begins_with=reader.opening, closes=form.thoughts)
        ids = await self.llm.encode_chat(replace(conversation, tools=use.tools))
        ids = self.truncated(ids, params, truncate)
        return Prompt(ids, continues=conversation.continues_last, shows=form.shows), params

    def truncated(self, token_ids: list[int], params: SamplingParams, most: int | None) -> list[int]:
        """Keep the last tokens of a prompt: `most` of them, -1 for as many as the context holds, None for all."""
        if most is None:
            return token_ids
        require(most != 0 and most >= -1, f"truncate_prompt_tokens must be -1 or at least 1, not {most}")
        room = self.llm.ready.max_model_len - max(params.max_tokens or 1, 1)
        return token_ids[-(most if most > 0 else max(room, 1)) :]

    def place(self, body: Queueing, request: Request) -> Place:
        """Say how the requests of a body wait, and which adapter answers them: the one that it calls its model."""
        name = getattr(body, "model", None)
        return body.place(client_of(request), session_of(request), name if name in self.loras else "")

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not served; None is the base."""
        if name is not None and name not in (*self.names, *self.loras):
            there = ", ".join(map(repr, (*self.names, *self.loras)))
            message = f"the model {name[:200]!r} does not exist; this server has {there}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def not_ready(self) -> str | None:
        """Say why new requests are not welcome; None if they are."""
        client = self.llm.client
        if self.draining:
            return "the server is about to end"
        if not client.serving:
            return "the engine is being started again" if client.failure is None else client.failure
        if client.stats.num_waiting >= client.config.max_queue:
            return f"{client.stats.num_waiting} requests wait, the most that may"
        longest = client.config.max_wait
        if longest is not None and client.stats.queue_wait > longest:
            return f"a request would wait {client.stats.queue_wait:.0f} s; the most is {longest:g} s"
        return None

    async def updates(self, generations: Sequence[Generation]) -> AsyncGenerator[Update, None]:
        """Give the updates of the front end (`AsyncLLM.updates`), and count them in the metrics."""
        if self.draining:
            raise ApiError(503, "the server is about to end, and takes no new requests", code="shutting_down")
        timers = {o: SequenceTimer(len(g.prompt.token_ids)) for g in generations for o in g.outputs}
        try:
            async with contextlib.aclosing(self.llm.updates(generations)) as updates:
                async for update in updates:
                    output = update.output
                    self.metrics.tokens(timers[output], len(update.delta.token_ids))
                    if output.finish_reason is not None:
                        self.metrics.finish(timers.pop(output), output.finish_reason)
                    yield update
        except (RequestError, QueueFull):
            self.metrics.rejected.inc()
            raise
        finally:
            for output, timer in timers.items():  # of those that failed or that nobody waits for any more
                if output.error_kind not in ("invalid", "queue_full"):
                    self.metrics.finish(timer, output.finish_reason or "abort")

    async def collect(self, request: Request, generations: Sequence[Generation]) -> None:
        """Wait until all generations have ended, or raise ApiError 499 when the client has left."""

        async def run() -> None:
            async with contextlib.aclosing(self.updates(generations)) as updates:
                async for _ in updates:
                    pass

        request.state.generations = generations  # for the log and the limits of a key
        if not await while_there(request.receive, run()):
            raise ApiError(499, "the client closed the connection", code="client_closed")

    def stream(self, request: Request, generations: Sequence[Generation], events: Events) -> EventStream:
        """Answer with events, as updates of the generations come."""
        request.state.generations = generations
        return EventStream(self.updates(generations), events)


def service_of(llm: AsyncLLM, options: ServerConfig) -> Service:
    """Make the service that the options ask for. Raises ConfigError: a parser or a name cannot hold."""
    form = ReplyForm.find(llm.tokenizer, options.tool_parser, options.reasoning_parser)
    names = options.served_model_names or (llm.ready.model,)
    if taken := set(names) & set(llm.ready.loras):
        raise ConfigError(f"{min(taken)!r} is the name of an adapter and of the model; rename one of them")
    return Service(llm, names, form, is_strict=options.strict)


def whole_or_cut(outputs: Iterable[SequenceOutput], body: dict[str, Any]) -> JSONResponse:
    """Answer with a body, or where a continuation was cut short with an error that holds what there is."""
    if all(output.finish_reason != "abort" for output in outputs):
        return JSONResponse(body)
    error = ApiError(503, "the server ended before the answer was whole; what there is stands in partial", code="cut")
    return error.response(partial=body)
