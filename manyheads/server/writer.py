"""Answers of the OpenAI endpoints go out whole or as a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from manyheads.frontend.generation import Generation, Update
from manyheads.frontend.output import SequenceOutput, TextDelta
from manyheads.request import StepTrace
from manyheads.server.schemas import ChatRequest, CompletionRequest, StreamOptions
from manyheads.server.service import Service, whole_or_cut
from manyheads.server.sse import DONE
from manyheads.server.steps import written_steps

B = TypeVar("B", ChatRequest, CompletionRequest)


class Writer(ABC, Generic[B]):
    """A writer sends an answer out, whole or as a stream. Subclasses say how their endpoint writes its choices."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, service: Service, generations: list[Generation], body: B) -> None:
        self.service = service
        self.tokenizer = service.llm.tokenizer
        self.generations = generations
        self.body: B = body
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.outputs = [(generation, output) for generation in generations for output in generation.outputs]
        """These are the continuations of all prompts, in the order of the choices."""
        self.numbers = {output: number for number, (_, output) in enumerate(self.outputs)}
        self.generation_of = {output: generation for generation, output in self.outputs}
        self._options = body.stream_options or StreamOptions()

    async def respond(self, request: Request) -> Response:
        """Generate, and answer when all is there or as it comes."""
        if self.body.stream:
            return self.service.stream(request, self.generations, self)
        await self.service.collect(request, self.generations)
        chosen = self.chosen()
        self.numbers = {output: number for number, (_, output) in enumerate(chosen)}
        choices = [self.choice(generation, output) for generation, output in chosen]
        body = {**self.head(self.object), "choices": choices, "usage": usage(self.generations)}
        return whole_or_cut(self.numbers, body)

    def begin(self) -> bytes:
        """Write the events that a stream begins with."""
        head = msgspec.json.encode(self.head(self.chunk_object))
        self._before = b"data: " + head[:-1] + b',"choices":['
        return b"".join(map(self._event, self.opening()))

    def push(self, update: Update) -> bytes:
        """Write the event of an update, if it has one."""
        choice = self.chunk(self.generation_of[update.output], update.output, update.delta)
        return b"" if choice is None else self._event(choice)

    def end(self) -> bytes:
        """Write the events that a stream ends with."""
        if not self._options.include_usage:
            return DONE
        return b'%b],"usage":%b}\n\n' % (self._before, msgspec.json.encode(usage(self.generations))) + DONE

    def _event(self, choice: dict[str, Any]) -> bytes:
        """Write an event; what all those of a stream begin with is written once."""
        choices = self._before + msgspec.json.encode(choice)
        if not self._options.include_usage:
            return choices + b"]}\n\n"
        so_far = usage(self.generations) if self._options.continuous_usage_stats else None
        return b'%b],"usage":%b}\n\n' % (choices, msgspec.json.encode(so_far))

    def head(self, kind: str) -> dict[str, Any]:
        """Make what an answer and each chunk begin with."""
        name = self.body.model or self.service.names[0]
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    def with_steps(self, choice: dict[str, Any], traces: Sequence[StepTrace | None] | None) -> dict[str, Any]:
        """Add to a choice what it tells of steps, if the request asks for that."""
        if self.body.return_steps:
            choice["steps"] = written_steps(self.tokenizer, traces or ())
        return choice

    def chosen(self) -> list[tuple[Generation, SequenceOutput]]:
        """Say which continuations a whole answer has."""
        return self.outputs

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """Make the choices that a stream begins with, before there is text."""

    @abstractmethod
    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        """Write a continuation as a whole answer has it."""

    @abstractmethod
    def chunk(self, generation: Generation, output: SequenceOutput, delta: TextDelta) -> dict[str, Any] | None:
        """Write what came of a continuation as a stream has it; None if there is nothing to tell yet."""


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Make OpenAI's `usage`, with the steps that it took."""
    num_prompt_tokens = num_output_tokens = num_cached_tokens = num_steps = 0
    for generation in generations:
        num_prompt_tokens += len(generation.prompt.token_ids)
        num_cached_tokens += generation.outputs[0].num_cached_tokens
        for output in generation.outputs:
            num_output_tokens += len(output.token_ids)
            num_steps += output.num_steps
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        "decoding_steps": num_steps,
    }
