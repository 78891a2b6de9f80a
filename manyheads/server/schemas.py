"""The schemas of the OpenAI endpoints: what requests for completions and chat completions may hold."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field

from manyheads.errors import RequestError, require
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.generation import Place
from manyheads.frontend.tools.use import ToolUse
from manyheads.request import MAX_ALLOWED, MAX_BAD_WORDS, MAX_STOP_STRINGS, MAX_STOP_TOKENS, SamplingParams
from manyheads.server.body import Body
from manyheads.server.fields import (
    EMPTY,
    Count,
    Empty,
    Ids,
    Limits,
    LogitBias,
    Priority,
    StopString,
    Truncation,
    Whole,
    between,
)
from manyheads.server.messages import MAX_MESSAGES, Message
from manyheads.server.structured import Structured
from manyheads.server.tools import MAX_TOOLS, Choice, Tool, tool_use

NO_DEFAULTS = SamplingParams()
DEFAULT_MAX_TOKENS = 16
"""/v1/completions writes at most so many tokens where a request says nothing, as OpenAI has it."""
MAX_PROMPTS = 256
"""A request has at most so many prompts."""


class Sampling(Body):
    """These are SamplingParams as JSON; null is the default. See `manyheads.SamplingParams` for the meanings."""

    may_be_empty: ClassVar[bool] = False
    """Whether a request may ask for no output."""
    n: Annotated[Whole, between("n")] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[Whole, Limits(minimum=0, exclusiveMaximum=2**31)] | None = None
    max_steps: Count | None = Field(default=None, description="most decoding steps; a step can give several tokens")
    temperature: Annotated[float, between("temperature")] | None = Field(default=None, description="0 is greedy")
    top_p: Annotated[float, Limits(exclusiveMinimum=0, maximum=1)] | None = None
    top_k: Annotated[Whole, Limits(minimum=-1, exclusiveMaximum=2**31)] | None = None
    min_p: Annotated[float, between("min_p")] | None = None
    repetition_penalty: Annotated[float, between("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, between("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, between("frequency_penalty")] | None = None
    logit_bias: LogitBias | None = Field(default=None, description="by token id, from -100 to 100")
    seed: Annotated[Whole, Limits(minimum=-(2**63), exclusiveMaximum=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Limits(maxItems=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[Ids, Limits(maxItems=MAX_STOP_TOKENS)] | None = None
    bad_words: Annotated[list[StopString], Limits(maxItems=MAX_BAD_WORDS)] | None = Field(
        default=None, description="the output has none of these, however they begin: a token that would end one"
    )
    allowed_token_ids: Annotated[Ids, Limits(minItems=1, maxItems=MAX_ALLOWED)] | None = Field(
        default=None, description="the output has no other tokens"
    )
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    speculative: bool | None = Field(default=None, description="false decodes one token a step")
    acceptance: Literal["exact", "typical"] | None = Field(default=None, description="rule for temperature > 0")
    typical_epsilon: Annotated[float, between("typical_epsilon")] | None = None
    typical_alpha: Annotated[float, between("typical_alpha")] | None = None

    def to_params(self, defaults: SamplingParams = NO_DEFAULTS, **overrides: Any) -> SamplingParams:
        """Make the engine's parameters, or raise RequestError for a value out of its range.

        Args:
            defaults: hold where the request says nothing.
            overrides: hold instead of the fields of the same names, None aside.
        """
        given = {name: getattr(self, name) for name in Sampling.model_fields if getattr(self, name) is not None}
        given.update({name: value for name, value in overrides.items() if value is not None})
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            if name in given:
                given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
        params = msgspec.structs.replace(defaults, **given).validate()
        require(params.max_tokens != 0 or self.may_be_empty, "max_tokens must be at least 1, not 0")
        return params


class Queueing(Body):
    """A request may say how it waits."""

    priority: Priority | None = Field(default=None, description="a lower one runs earlier; the default is 0")
    timeout: float | None = Field(
        default=None, gt=0, description="seconds within which it must be able to start; else it is refused at once"
    )
    cache_salt: Annotated[str, Limits(minLength=1)] | None = Field(
        default=None, description="share cached prompts only with requests that bring the same salt"
    )

    def place(self, client: str, session: str, lora: str) -> Place:
        """Say how the requests of this client wait, with whom they share the prefix cache, which go together, and which
        adapter answers them."""
        return Place(
            client=client,
            session=session,
            priority=self.priority or 0,
            timeout=self.timeout,
            cache_salt=self.cache_salt or "",
            lora=lora,
        )


class StreamOptions(Body):
    """A stream can tell what it has used."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """As in vLLM, every chunk says the usage so far, where include_usage is set."""
    include_obfuscation: bool | None = None


class OpenAIRequest(Sampling, Queueing, Structured):
    """Both OpenAI endpoints take this. The fields from `user` on have no effect here."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Truncation | None = Field(
        default=None, description="keep so many tokens of the prompt, the last ones; -1: as many as the context holds"
    )
    return_token_ids: bool | None = Field(default=None, description="answer with the tokens of prompt and output")
    return_steps: bool | None = Field(default=None, description="answer with what each step guessed and gave")
    prompt_logprobs: Annotated[Whole, between("prompt_logprobs")] | None = Field(
        default=None, description="as logprobs, of the prompt's tokens"
    )

    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None


Prompt = Annotated[str, Limits(minLength=1)]
TokenIds = Annotated[Ids, Field(min_length=1)]
_SOME = Limits(minItems=1, maxItems=MAX_PROMPTS)


class CompletionRequest(OpenAIRequest):
    """This body goes to POST /v1/completions."""

    may_be_empty: ClassVar[bool] = True
    prompt: Prompt | Annotated[list[Prompt], _SOME] | TokenIds | Annotated[list[TokenIds], _SOME]
    max_tokens: Annotated[Whole, Limits(minimum=0, exclusiveMaximum=2**31)] | None = Field(
        default=None, description="0 writes nothing: for echo, or prompt_logprobs"
    )
    logprobs: Annotated[Whole, between("logprobs")] | None = None
    echo: bool | None = Field(default=None, description="begin with the prompt, its logprobs included")
    best_of: Annotated[Whole, between("n")] | None = Field(
        default=None, description="write so many, and answer with the n whose tokens are likeliest on average"
    )
    suffix: Annotated[str, Limits(maxLength=0)] | None = Field(default=None, description="not supported")

    def check(self) -> None:
        """Raise RequestError for what this server does not do."""
        require(self.best_of is None or self.best_of >= (self.n or 1), "best_of must be at least n")
        is_ranked = (self.best_of or 1) > (self.n or 1)
        require(not (is_ranked and self.stream), "best_of does not stream: the best is known at the end")
        require(not self.suffix, "suffix is not supported: this model only continues text")

    def completion_params(self, defaults: SamplingParams) -> SamplingParams:
        """Make the engine's parameters from this endpoint's names."""
        self.check()
        is_ranked = (self.best_of or 1) > (self.n or 1)
        echoed = self.logprobs if self.echo else None
        return self.to_params(
            defaults,
            n=self.best_of,
            grammar=self.grammar(),
            return_steps=self.return_steps,
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=(self.logprobs or 0) if is_ranked else self.logprobs,
            prompt_logprobs=max((n for n in (self.prompt_logprobs, echoed) if n is not None), default=None),
        )

    def prompts(self) -> list[str] | list[list[int]]:
        """Make a list of the prompts, one or many."""
        prompt: Any = self.prompt
        many = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        prompts = prompt if many else [prompt]
        require(len(prompts) > 0, "the prompt is empty")
        require(len(prompts) <= MAX_PROMPTS, f"at most {MAX_PROMPTS} prompts in one request, not {len(prompts)}")
        return prompts


_NO_CALL = (None, "none", "auto")


class ChatRequest(OpenAIRequest):
    """This body goes to POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = Field(default=None, description="most output tokens (the same as max_tokens)")
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, between("logprobs")] | None = Field(default=None, description="needs logprobs: true")
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = Field(default=None, description="the default is auto")
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call in a reply")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="variables of the chat template, such as enable_thinking"
    )
    add_generation_prompt: bool | None = Field(default=None, description="open the assistant's turn; true by default")
    continue_final_message: bool | None = Field(default=None, description="go on in the last message")
    reasoning_effort: Any = Field(default=None, description="for the chat template; none asks for no thoughts")
    functions: Empty = None
    function_call: Annotated[Any, Limits(enum=_NO_CALL)] = None
    modalities: list[Annotated[str, Limits(enum=["text"])]] | None = None
    audio: Empty = None
    web_search_options: Annotated[Any, Limits(enum=[None], description="not supported")] = None
    moderation: Empty = None

    verbosity: Any = None
    prediction: Any = None

    def check(self) -> None:
        """Raise RequestError for what this server does not do."""
        is_old = self.functions not in EMPTY or self.function_call not in _NO_CALL
        require(not is_old, "functions and function_call are not supported: use tools and tool_choice")
        is_text = self.audio in EMPTY and all(m == "text" for m in self.modalities or ())
        require(is_text, "modalities: this server gives text only")
        require(self.web_search_options is None, "web_search_options: this server does not search the web")
        require(self.moderation in EMPTY, "moderation: this server does not moderate texts")
        require(self.top_logprobs is None or bool(self.logprobs), "top_logprobs needs logprobs: true")

    def tool_use(self) -> ToolUse:
        """Say what the request wants with functions."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def conversation(self) -> Conversation:
        """Make what the chat template is filled with."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        if self.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
        continues = bool(self.continue_final_message)
        opens = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        messages = [message.plain() for message in self.messages]
        return Conversation(messages, opens_reply=opens, continues_last=continues, variables=variables)

    def chat_params(self, defaults: SamplingParams) -> SamplingParams:
        """Make the engine's parameters from this endpoint's names for the limits."""
        self.check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; max_tokens is the old name, drop it")
        return self.to_params(
            defaults,
            max_tokens=self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
            grammar=self.grammar(),
            return_steps=self.return_steps,
        )
