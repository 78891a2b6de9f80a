"""Offline use: the engine without the server, in this process."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from manyheads.config import BUILTIN, ConfigError, EngineConfig
from manyheads.frontend.output import RequestOutput, SequenceOutput, child_params
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import (
    EngineRequest,
    QueueFull,
    RequestDelta,
    RequestError,
    SamplingParams,
)

if TYPE_CHECKING:
    from manyheads.engine.engine import Engine


class PromptDict(TypedDict, total=False):
    """vLLM's form of a prompt: one of the two."""

    prompt: str
    prompt_token_ids: list[int]


PromptLike = str | Sequence[int] | PromptDict
Message = Mapping[str, str]
T = TypeVar("T")


class LLM:
    """A model with its heads, ready to generate.

    Args:
        model: a hub id, a local folder, or `builtin`.
        heads: Medusa heads; None takes those that come with the model.
        speculative: False serves the model without its heads.
        chat_template: a file or the name of a known template (`vicuna`); None takes the tokenizer's.
        tokenizer: a folder with another tokenizer.
        engine: an engine that is running already; the other settings are not used then.
        **settings: the other fields of `EngineConfig`.

    Raises:
        ConfigError: a setting or a checkpoint cannot hold.

    >>> from manyheads import LLM, SamplingParams
    >>> llm = LLM()
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=20))[0].outputs[0].text
    """

    def __init__(
        self,
        model: str = BUILTIN,
        *,
        heads: str | None = None,
        speculative: bool = True,
        chat_template: str | None = None,
        tokenizer: str | Path | Tokenizer | None = None,
        engine: Engine | None = None,
        **settings: Any,
    ) -> None:
        known = {f.name for f in fields(EngineConfig)}
        if unknown := sorted(settings.keys() - known):
            raise ConfigError(f"unknown setting {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        self.config = EngineConfig(model=model, heads=heads, speculative=speculative, **settings)
        if isinstance(tokenizer, Tokenizer):
            self.tokenizer = tokenizer
        else:
            self.tokenizer = Tokenizer.load(tokenizer or tokenizer_folder(self.config), chat_template)
        if engine is None:
            from manyheads.engine.build import build_engine

            engine = build_engine(self.config)
        self.engine = engine
        self._ids = itertools.count()
        self._open: dict[str, SequenceOutput] = {}
        """Of all callers: whoever makes the next step takes the others' tokens for them."""

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, many at a time.

        Args:
            prompts: a text, a list of token ids, a dict with `prompt` or `prompt_token_ids`, or a list of those.
            params: for all prompts, or a list with one for each.
            progress: show a progress bar on standard error (`use_tqdm` is the same).

        Returns:
            One output per prompt, in order. A sequence that the engine failed has finish_reason `error`.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing has run then.
        """
        many = _as_list(prompts)
        jobs = [self.prompt_job(prompt, p) for prompt, p in _pair(many, params)]
        return self._run(jobs, progress if use_tqdm is None else use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations by the model's chat template.

        Args:
            messages: dicts with `role` and `content`, or a list of such conversations.
            params: for all conversations, or a list with one for each.
            progress: as for `generate`.
        """
        many: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        jobs = [self.chat_job(conversation, p) for conversation, p in _pair(many, params)]
        return self._run(jobs, progress if use_tqdm is None else use_tqdm)

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answer one conversation; yields the answer so far after each step. Closing the iterator ends it."""
        job = self.chat_job(messages, params or SamplingParams())
        for _ in self.steps([job]):
            yield job.result()

    def prompt_job(self, prompt: PromptLike, params: SamplingParams) -> Job:
        """A prompt to continue, checked.

        Raises:
            RequestError: it cannot be served.
        """
        text: str | None = None
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer.encode(prompt) if prompt else []
        elif isinstance(prompt, Mapping):
            text = prompt.get("prompt")
            if (given := prompt.get("prompt_token_ids")) is not None:
                ids = list(given)
            elif isinstance(text, str):
                return self.prompt_job(text, params)
            else:
                raise RequestError("a prompt dict needs 'prompt' (a text) or 'prompt_token_ids'")
        else:
            ids = list(prompt)
        return self._job(text, ids, params, continues=True)

    def chat_job(self, messages: Sequence[Message], params: SamplingParams) -> Job:
        """A conversation to answer, checked as `prompt_job` does."""
        return self._job(None, self.tokenizer.encode_chat(messages), params, continues=False)

    def _job(self, text: str | None, ids: list[int], params: SamplingParams, continues: bool) -> Job:
        self.engine.ready.check(params, [ids])
        return Job(str(next(self._ids)), text, ids, params, self.tokenizer, continues)

    def _run(self, jobs: list[Job], progress: bool) -> list[RequestOutput]:
        for _ in self.follow(jobs, progress):
            pass
        return [job.result() for job in jobs]

    def follow(self, jobs: Sequence[Job], progress: bool) -> Iterator[None]:
        """`steps`, with a progress bar on standard error if wanted."""
        if not progress:
            yield from self.steps(jobs)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[speed]}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(jobs), speed="")
            for _ in self.steps(jobs):
                tokens = sum(len(o.token_ids) for job in jobs for o in job.outputs)
                seconds = bar.tasks[task].elapsed or 0.0
                speed = f"{tokens / seconds:.0f} tokens/s" if seconds > 0 else ""
                bar.update(task, completed=sum(job.finished for job in jobs), speed=speed)
                yield

    def steps(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Run the engine until all jobs have ended; yields after each step. Closing it early aborts the rest."""
        waiting = deque((job, output) for job in jobs for output in job.outputs)
        running: dict[str, SequenceOutput] = {}
        try:
            while waiting or running:
                self._feed(waiting, running)
                for delta in self.engine.step():
                    output = self._open.get(delta.request_id)
                    if output is None:
                        continue  # the answer to an abort
                    output.push(delta)
                    if output.finished:
                        del self._open[delta.request_id]
                        if output.needs_abort:
                            self.engine.abort(delta.request_id)
                running = {request_id: output for request_id, output in running.items() if not output.finished}
                yield
        finally:
            for request_id in running:
                if self._open.pop(request_id, None) is not None:
                    self.engine.abort(request_id)  # the last delta comes with the next step, and is passed over

    def _feed(self, waiting: deque[tuple[Job, SequenceOutput]], running: dict[str, SequenceOutput]) -> None:
        """Give the engine what it takes; a full queue takes more later."""
        while waiting:
            job, output = waiting[0]
            request = EngineRequest(
                request_id=f"{job.request_id}-{output.index}",
                prompt_token_ids=job.prompt_token_ids,
                params=child_params(job.params, output.index),
            )
            try:
                self.engine.add_request(request)
                self._open[request.request_id] = running[request.request_id] = output
            except QueueFull:
                if not self.engine.has_work():
                    raise
                return
            except RequestError as error:
                output.push(
                    RequestDelta(
                        request_id=request.request_id, new_token_ids=[], finish_reason="error", error=str(error)
                    )
                )
            waiting.popleft()


class Job:
    """One prompt and its continuations."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        continues: bool,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        context = prompt_token_ids if continues else ()
        self.outputs = [SequenceOutput(tokenizer, params, context=context, index=i) for i in range(params.n)]

    @property
    def finished(self) -> bool:
        return all(o.finished for o in self.outputs)

    def result(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[o.result() for o in self.outputs],
            finished=self.finished,
            num_cached_tokens=self.outputs[0].num_cached_tokens,
        )


def tokenizer_folder(config: EngineConfig) -> Path:
    """The local folder with the tokenizer of a model: the base model's."""
    from manyheads.speculation.medusa.checkpoint import split_model

    return split_model(config.model, config.heads)[0]


def _as_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """One prompt or many: a list of integers is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items


def _pair(
    prompts: Sequence[T], params: SamplingParams | Sequence[SamplingParams] | None
) -> Iterator[tuple[T, SamplingParams]]:
    """Each prompt with its parameters."""
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts but {len(params)} sampling parameters")
    return zip(prompts, params, strict=True)
