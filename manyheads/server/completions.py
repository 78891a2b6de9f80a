"""/v1/completions continues texts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from manyheads.frontend.generation import Generation, Prompt
from manyheads.frontend.output import SequenceOutput, TextDelta
from manyheads.server.answers import Completion, CompletionChunk
from manyheads.server.logprobs import CompletionLogprobs, prompt_logprobs
from manyheads.server.openapi import generates
from manyheads.server.schemas import CompletionRequest
from manyheads.server.service import Service
from manyheads.server.writer import Writer


def completions_router(service: Service) -> APIRouter:
    """Make the route of this endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        "/v1/completions",
        summary="Continue a text",
        responses=generates(CompletionChunk, whole=Completion, also=(404,)),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.accept(body, request)
        params = body.completion_params(service.llm.defaults)
        prompts = []
        for text in body.prompts():
            ids = await service.llm.encode(text) if isinstance(text, str) and text else []
            ids = service.truncated(list(text) if isinstance(text, list) else ids, params, body.truncate_prompt_tokens)
            prompts.append(Prompt(ids, continues=True))
        generations = service.llm.prepare(prompts, params, service.place(body, request))
        return await _CompletionWriter(service, generations, body).respond(request)

    return router


class _CompletionWriter(Writer[CompletionRequest]):
    """It writes answers of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, generations: list[Generation], body: CompletionRequest) -> None:
        super().__init__(service, generations, body)
        self._logprobs = {output: CompletionLogprobs(self.tokenizer) for output in self.numbers}
        self._waits = body.echo and body.logprobs is not None
        """The prompt's text comes with its log-probabilities, and these with the first tokens."""

    def opening(self) -> list[dict[str, Any]]:
        if not self.body.echo or self._waits:
            return []
        return [self._choice(g, output, TextDelta(text=self._prompt_text(g))) for g, output in self.outputs]

    def chosen(self) -> list[tuple[Generation, SequenceOutput]]:
        """Of a prompt's `best_of` continuations, take the n whose tokens are likeliest on average."""
        n = self.body.n or 1
        return [(g, output) for g in self.generations for output in sorted(g.outputs, key=_unlikeliness)[:n]]

    def choice(self, generation: Generation, output: SequenceOutput) -> dict[str, Any]:
        text = "" if self._waits else self._prompt_text(generation)
        whole = TextDelta(
            text=text + output.text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=output.finish_reason,
        )
        return self.with_steps(self._choice(generation, output, whole, is_first=True), output.steps)

    def chunk(self, generation: Generation, output: SequenceOutput, delta: TextDelta) -> dict[str, Any] | None:
        is_first = delta.prompt_logprobs is not None
        wants_tokens = bool(self.body.return_token_ids and delta.token_ids)
        wants_more = wants_tokens or delta.trace is not None
        if not (delta.text or delta.logprobs or delta.finish_reason or is_first or wants_more):
            return None  # text that is still held back, unless log-probabilities came with its tokens
        return self.with_steps(self._choice(generation, output, delta, is_first=is_first), [delta.trace])

    def _choice(
        self, generation: Generation, output: SequenceOutput, delta: TextDelta, is_first: bool = False
    ) -> dict[str, Any]:
        body, text, logprobs = self.body, delta.text, None
        prompt = generation.prompt.token_ids
        if body.logprobs is not None:
            echoed = prompt if self._waits and is_first else []
            logprobs = self._logprobs[output].add(delta.logprobs, echoed, delta.prompt_logprobs)
            text = (self._prompt_text(generation) if echoed else "") + text
        choice = {
            "index": self.numbers[output],
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": output.stop_reason if delta.finish_reason else None,
        }
        if body.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = prompt_logprobs(self.tokenizer, delta.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": prompt, "token_ids": delta.token_ids}
        return choice

    def _prompt_text(self, generation: Generation) -> str:
        return self.tokenizer.decode(generation.prompt.token_ids) if self.body.echo else ""


def _unlikeliness(output: SequenceOutput) -> float:
    logprobs = [entry.logprob for entry in output.logprobs or ()]
    return -sum(logprobs) / len(logprobs) if logprobs else 0.0
