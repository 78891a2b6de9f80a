"""AsyncLLM is the front end of an engine in another process: many callers put prompts in and read text as it comes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from manyheads.errors import EngineError, ModelError, QueueFull, RequestError, require
from manyheads.frontend.backend import Backend
from manyheads.frontend.bad_words import with_bad_tokens
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.generation import Generation, OpenSequences, Place, Prompt, Update, take
from manyheads.frontend.output import SequenceOutput
from manyheads.frontend.text_queue import TextQueue
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import EngineReady, SamplingParams

_ERRORS = {"invalid": RequestError, "engine": EngineError, "model": ModelError}
INLINE_CHARACTERS = 4000
"""Shorter texts are encoded at once: that takes less time than handing them to a thread."""


class AsyncLLM:
    """AsyncLLM is to the many callers of an event loop what `LLM` is to one.

    It checks requests, encodes their text, and follows them through the engine process.

    Args:
        client: of an engine that serves; whoever started it closes it.
        ready: what it serves.
        defaults: hold where a request says nothing.
    """

    def __init__(
        self, client: Backend, tokenizer: Tokenizer, ready: EngineReady, defaults: SamplingParams | None = None
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.ready = ready
        self.defaults = defaults or SamplingParams()
        self._texts = TextQueue()

    def prepare(
        self, prompts: Sequence[Prompt], params: SamplingParams, place: Place | None = None
    ) -> list[Generation]:
        """Check the prompts of one call (RequestError if they can't be served); nothing runs before `updates` does."""
        params = with_bad_tokens(params.validate(), self.tokenizer)
        self.ready.check(params, [prompt.token_ids for prompt in prompts], place.lora if place is not None else "")
        count, n, most = len(prompts), params.n, self.client.config.max_queue
        require(count * n <= most, f"{count} prompts with n={n} are too many: this server queues {most}")
        base = uuid.uuid4().hex
        return [Generation(f"{base}-{i}", prompt, params, self.tokenizer, place) for i, prompt in enumerate(prompts)]

    async def updates(self, generations: Sequence[Generation]) -> AsyncGenerator[Update, None]:
        """Run generations and give their text as it comes. Closing the iterator early aborts what still runs.

        Raises:
            RequestError, QueueFull, EngineError, ModelError: the engine refused or failed one of the continuations.
        """
        pairs = [pair for generation in generations for pair in generation.requests()]
        sequences: OpenSequences = {request.request_id: output for request, output in pairs}
        queue = self.client.submit(request for request, _ in pairs)
        try:
            while sequences:
                for n, delta in enumerate(await queue.take()):
                    if n > 0:
                        await asyncio.sleep(0)  # others come in, and the news that the reader has left
                    update = take(delta, sequences, self.client.abort)
                    if update is None:
                        continue
                    if update.output.finish_reason == "error":
                        raise _error(update.output)
                    yield update
        finally:
            for request_id in sequences:
                self.client.abort(request_id)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text, without stopping everyone else for a long one.

        Raises:
            RequestError: no context can hold it.
            QueueFull: too many long texts wait.
        """
        work = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._encode(len(text), work)

    async def encode_chat(self, conversation: Conversation) -> list[int]:
        """Encode a conversation by the chat template, as `encode` does a text."""
        is_quick = len(conversation.messages) < 100
        return await self._encode(conversation.size(), partial(self.tokenizer.encode_chat, conversation), is_quick)

    def close(self) -> None:
        """Stop encoding; the engine's client is the caller's to close."""
        self._texts.close()

    async def _encode(self, size: int, work: Callable[[], list[int]], is_quick: bool = True) -> list[int]:
        longest = self.ready.max_model_len
        fits = size <= longest * self.tokenizer.longest_token
        context = f"this model's context of {longest} tokens"
        require(fits, f"the prompt has {size} characters, which cannot fit into {context}")
        if is_quick and size < INLINE_CHARACTERS:
            token_ids = work()
            await asyncio.sleep(0)  # a request may bring hundreds of texts: the others go on between them
            return token_ids
        return await self._texts.run(size, work)


def _error(output: SequenceOutput) -> Exception:
    """Make an exception of how a continuation ended."""
    message = output.error or "the engine gave no reason"
    if output.error_kind == "queue_full":
        return QueueFull(message, output.retry_after)
    return _ERRORS[output.error_kind or "engine"](message)
