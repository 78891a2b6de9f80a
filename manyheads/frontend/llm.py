"""LLM is for offline use: the engine runs in this process, without the server."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from manyheads.config import BUILTIN, ConfigError, EngineConfig
from manyheads.errors import QueueFull, RequestError, require
from manyheads.frontend.bad_words import with_bad_tokens
from manyheads.frontend.conversation import Conversation, Message
from manyheads.frontend.defaults import default_params
from manyheads.frontend.generation import Generation, OpenSequences, Place, Prompt, take
from manyheads.frontend.output import RequestOutput, SequenceOutput
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import EngineRequest, RequestDelta, SamplingParams

if TYPE_CHECKING:
    from manyheads.engine.engine import Engine


class PromptDict(TypedDict, total=False):
    """A prompt may have vLLM's form, with one of the two (or both: the tokens count)."""

    prompt: str
    prompt_token_ids: list[int]


PromptLike = str | Sequence[int] | PromptDict


class LLM:
    """An LLM is a model with its heads, ready to generate.

    Args:
        model: a hub id, a local folder, a GGUF file, or `builtin`.
        heads: Medusa heads; None takes those that come with the model.
        speculative: False serves the model without its heads.
        chat_template: a file or the name of a known template (`vicuna`); None takes the tokenizer's.
        tokenizer: a folder with another tokenizer, or one that is loaded.
        engine: an engine that is running already; the other settings are not used then. Its grammars are of the
            tokenizer of its own configuration.
        **settings: the other fields of `EngineConfig`. As nobody reads along, prompts come first unless
            `target_step_ms` is among them.

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
        folder = tokenizer.folder if isinstance(tokenizer, Tokenizer) else tokenizer
        settings["tokenizer"] = str(folder) if folder is not None else None
        settings.setdefault("target_step_ms", math.inf)
        self.config = EngineConfig(model=model, heads=heads, speculative=speculative, **settings)
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.load(folders(self.config)[1], chat_template)
        self.tokenizer = tokenizer
        self._has_grammars = engine is not None or tokenizer.folder is not None
        """Whether an engine can read this tokenizer's tokens."""
        self.defaults = SamplingParams()
        """Hold where a call gives no parameters: those that the model's generation_config.json asks for."""
        if engine is None:
            from manyheads.engine.build import build_engine

            self.defaults = default_params(folders(self.config)[0])
            engine = build_engine(self.config)
        self.engine = engine
        self._ids = itertools.count()
        self._open: OpenSequences = {}
        """It holds those of all callers: whoever makes the next step takes the others' tokens for them."""

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str] = "",
        progress: bool = False,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, many at a time.

        Args:
            prompts: a text, a list of token ids, a dict with `prompt` or `prompt_token_ids`, or a list of those.
            params: for all prompts, or a list with one for each; None takes `defaults`.
            lora: the name of the adapter that answers (of the setting `loras`), or a list with one for each prompt; ""
                is the base alone.
            progress: show a progress bar on standard error (`use_tqdm` is the same).

        Returns:
            One output per prompt, in order. A sequence that the engine failed has finish_reason `error`.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing has run then.
        """
        generations = [self.prepare(*asked) for asked in self._asked(_as_list(prompts), params, lora)]
        return self._run(generations, progress if use_tqdm is None else use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str] = "",
        progress: bool = False,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations by the model's chat template, as `generate` continues prompts.

        Args:
            messages: dicts with `role` and `content`, or a list of such conversations.
        """
        many: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        generations = [self.prepare_chat(*asked) for asked in self._asked(many, params, lora)]
        return self._run(generations, progress if use_tqdm is None else use_tqdm)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, lora: str = ""
    ) -> Iterator[RequestOutput]:
        """Answer one conversation and give the answer so far after each step. Closing the iterator ends it."""
        generation = self.prepare_chat(messages, params or self.defaults, lora)
        for _ in self.steps([generation]):
            yield generation.result()

    def prepare(self, prompt: PromptLike, params: SamplingParams, lora: str = "") -> Generation:
        """Check a prompt to continue, for `steps`; raise RequestError if it cannot be served."""
        name = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        given: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {name: prompt}
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
        if ids is None:
            require(isinstance(text, str), "a prompt dict needs 'prompt' (a text) or 'prompt_token_ids'")
            ids = self.tokenizer.encode(text) if text else []
        return self._prepare(Prompt(list(ids), continues=True, text=text), params, lora)

    def prepare_chat(self, messages: Sequence[Message], params: SamplingParams, lora: str = "") -> Generation:
        """Check a conversation to answer, as `prepare` does for a prompt."""
        return self._prepare(Prompt(self.tokenizer.encode_chat(Conversation(messages))), params, lora)

    def _prepare(self, prompt: Prompt, params: SamplingParams, lora: str) -> Generation:
        known = "a grammar needs a tokenizer from a folder: LLM was given one that Tokenizer.load has not read"
        require(params.grammar is None or self._has_grammars, known)
        params = with_bad_tokens(params.validate(), self.tokenizer)
        self.engine.ready.check(params, [prompt.token_ids], lora)
        return Generation(str(next(self._ids)), prompt, params, self.tokenizer, Place(lora=lora))

    def _asked(self, prompts: Sequence[Any], params: Any, lora: Any) -> Iterator[tuple[Any, SamplingParams, str]]:
        """Give each prompt its own of what was given for all of them or for each."""
        given = (("sampling parameters", params or self.defaults), ("adapters", lora))
        each = [[some] * len(prompts) if isinstance(some, (str, SamplingParams)) else list(some) for _, some in given]
        for (what, _), some in zip(given, each, strict=True):
            require(len(some) == len(prompts), f"{len(prompts)} prompts but {len(some)} {what}")
        return zip(prompts, *each, strict=True)

    def _run(self, generations: list[Generation], progress: bool) -> list[RequestOutput]:
        for _ in self.follow(generations, progress):
            pass
        return [generation.result() for generation in generations]

    def follow(self, generations: Sequence[Generation], progress: bool) -> Iterator[None]:
        """Do what `steps` does, with a progress bar on standard error if wanted."""
        if not progress:
            yield from self.steps(generations)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[speed]}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(generations), speed="")
            for _ in self.steps(generations):
                tokens = sum(len(o.token_ids) for generation in generations for o in generation.outputs)
                seconds = bar.tasks[task].elapsed or 0.0
                speed = f"{tokens / seconds:.0f} tokens/s" if seconds > 0 else ""
                bar.update(task, completed=sum(g.finished for g in generations), speed=speed)
                yield

    def steps(self, generations: Iterable[Generation]) -> Iterator[None]:
        """Run the engine until all generations have ended; yield after each step. Closing it early aborts the rest."""
        waiting = deque(pair for generation in generations for pair in generation.requests())
        running: list[str] = []
        try:
            while waiting or running:
                self._feed(waiting, running)
                for delta in self.engine.step():
                    take(delta, self._open, self.engine.abort)
                running = [request_id for request_id in running if request_id in self._open]
                yield
        finally:
            for request_id in running:
                if self._open.pop(request_id, None) is not None:
                    self.engine.abort(request_id)  # the last delta comes with the next step, and is passed over

    def _feed(self, waiting: deque[tuple[EngineRequest, SequenceOutput]], running: list[str]) -> None:
        """Give the engine as much as it takes; a full queue takes more later."""
        while waiting:
            request, output = waiting[0]
            try:
                self.engine.add_request(request)
                self._open[request.request_id] = output
                running.append(request.request_id)
            except QueueFull:
                if not self.engine.has_work():
                    raise
                return
            except RequestError as error:
                output.push(RequestDelta.failure(request.request_id, str(error), "invalid"))
            waiting.popleft()


def folders(config: EngineConfig) -> tuple[Path, Path]:
    """Find the local folders of the base model and of the tokenizer, which are one unless another one is given."""
    from manyheads.speculation.medusa.checkpoint import split_model

    base = split_model(config.model, config.heads)[0]
    return base, base if config.tokenizer is None else Path(config.tokenizer)


def _as_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """Make a list of one prompt or many; a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items
