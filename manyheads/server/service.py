"""Generation as the endpoints see it: prompts in, text deltas out; aborts what nobody reads any more."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from manyheads.frontend.engine_client import DeltaQueue, EngineClient, EngineError
from manyheads.frontend.output import SequenceOutput, TextDelta, child_params
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import EngineReady, EngineRequest, QueueFull, RequestDelta, RequestError, SamplingParams
from manyheads.server.errors import ApiError
from manyheads.server.metrics import Metrics, SequenceTimer

T = TypeVar("T")
INLINE_CHARACTERS = 4000
"""Shorter texts are encoded at once: that takes less time than handing them to a thread."""


@dataclass
class Prompt:
    """One prompt; `continues` says that the text goes on where the prompt's ends (no chat turn between)."""

    token_ids: list[int]
    continues: bool = False


@dataclass
class Update:
    """New text of one continuation."""

    prompt_index: int
    output: SequenceOutput
    delta: TextDelta


@dataclass
class Generation:
    """`params.n` continuations of each prompt: read `updates`, or let `collect` do it."""

    service: Service
    prompts: Sequence[Prompt]
    params: SamplingParams
    outputs: list[list[SequenceOutput]] = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        tokenizer = self.service.tokenizer
        self.outputs = [
            [
                SequenceOutput(
                    tokenizer, self.params, context=prompt.token_ids if prompt.continues else (), index=index
                )
                for index in range(self.params.n)
            ]
            for prompt in self.prompts
        ]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(p.token_ids) for p in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(o.token_ids) for row in self.outputs for o in row)

    @property
    def num_cached_tokens(self) -> int:
        return sum(row[0].num_cached_tokens for row in self.outputs)

    def usage(self) -> dict[str, object]:
        """OpenAI's `usage`, and the steps that it took."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "decoding_steps": sum(o.num_steps for row in self.outputs for o in row),
        }

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Text as it comes. Closing the iterator early aborts what still runs.

        Raises:
            RequestError, QueueFull, EngineError: the engine refused or failed one of the sequences.
        """
        service = self.service
        open_: dict[str, tuple[int, SequenceOutput, SequenceTimer]] = {}
        requests = []
        base = uuid.uuid4().hex
        for i, (prompt, row) in enumerate(zip(self.prompts, self.outputs, strict=True)):
            for output in row:
                request_id = f"{base}-{i}-{output.index}"
                params = child_params(self.params, output.index)
                requests.append(EngineRequest(request_id=request_id, prompt_token_ids=prompt.token_ids, params=params))
                open_[request_id] = (i, output, service.metrics.start(len(prompt.token_ids)))
        queue = service.client.submit(requests)
        try:
            while open_:
                for n, delta in enumerate(await _waiting(queue)):
                    if n > 0:
                        await asyncio.sleep(0)  # others come in, and the news that the reader has left
                    if delta.request_id not in open_:
                        continue
                    i, output, timer = open_[delta.request_id]
                    text = output.push(delta)
                    service.metrics.tokens(timer, len(text.token_ids))
                    if output.finish_reason is not None:
                        del open_[delta.request_id]
                        if output.needs_abort:
                            service.client.abort([delta.request_id])
                        if delta.error_kind not in ("invalid", "queue_full"):
                            service.metrics.finish(timer, output.finish_reason)
                        if output.finish_reason == "error":
                            self._raise(delta)
                    if text.text or text.token_ids or text.finish_reason:
                        yield Update(i, output, text)
        finally:
            service.client.abort(open_)
            for _, _, timer in open_.values():
                service.metrics.finish(timer, "abort")

    async def collect(self) -> list[list[SequenceOutput]]:
        """Wait for the end of all."""
        async with contextlib.aclosing(self.updates()) as updates:
            async for _ in updates:
                pass
        return self.outputs

    def _raise(self, delta: RequestDelta) -> None:
        message = delta.error or "the engine gave no reason"
        if delta.error_kind in ("invalid", "queue_full"):
            self.service.metrics.rejected.inc()
        if delta.error_kind == "invalid":
            raise RequestError(message)
        if delta.error_kind == "queue_full":
            raise QueueFull(message)
        raise EngineError(message)


async def _waiting(queue: DeltaQueue) -> list[RequestDelta]:
    """What has come for a reader, at least one delta: of each request those of several steps as one, if the server did
    not keep up. So it is text that waits for nobody, and not its readers for a server that writes step by step."""
    found = {(delta := await queue.get()).request_id: delta}
    is_behind = not queue.empty()
    while not queue.empty():
        delta = queue.get_nowait()
        before = found.get(delta.request_id)
        found[delta.request_id] = delta if before is None else before.then(delta)
    if is_behind:  # a task that only waits for what is there already cannot be cancelled
        await asyncio.sleep(0)
    return list(found.values())


class Service:
    """What the endpoints share.

    Args:
        ready: what the engine serves.
        names: the model's names in requests, the first one in answers.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, ready: EngineReady, names: Sequence[str]) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.ready = ready
        self.names = list(names)
        self.metrics = Metrics(lambda: client.stats)
        self.started = int(time.time())
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served; None is the one there is."""
        if name is not None and name not in self.names:
            served = ", ".join(map(repr, self.names))
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {served}",
                param="model",
                code="model_not_found",
            )

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Generation:
        """Check a request; nothing runs before its updates are read.

        Raises:
            RequestError: it can never be served.
        """
        self.ready.check(params, [prompt.token_ids for prompt in prompts])
        if len(prompts) * params.n > (most := self.client.config.max_queue):
            raise RequestError(f"{len(prompts)} prompts with n={params.n} are too many: this server queues {most}")
        return Generation(self, prompts, params)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, without stopping everyone else while a long one is encoded."""
        self._check_characters(len(text))
        if len(text) < INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await self._in_thread(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        size = sum(len(m["content"]) for m in messages)
        self._check_characters(size)
        if size < INLINE_CHARACTERS and len(messages) < 100:
            return self.tokenizer.encode_chat(messages)
        return await self._in_thread(lambda: self.tokenizer.encode_chat(messages))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_characters(self, count: int) -> None:
        if count > self.ready.max_model_len * self.tokenizer.longest_token:
            raise RequestError(
                f"the prompt has {count} characters, which cannot fit into this model's context of "
                f"{self.ready.max_model_len} tokens"
            )

    async def _in_thread(self, work: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def or_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, but no longer than the client does.

    Raises:
        ApiError: 499, which nobody reads; the work was cancelled.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", code="client_closed")
        return task.result()
    finally:
        for t in (task, watch):
            t.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
