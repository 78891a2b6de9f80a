"""The schemas say what requests may hold. OpenAI's fields without effect here are ignored; unknown ones are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from manyheads.errors import RequestError, require
from manyheads.frontend.generation import Place
from manyheads.request import MAX_STOP_STRINGS, MAX_STOP_TOKENS, SamplingParams
from manyheads.server.fields import EMPTY, Count, Empty, Ids, Limits, LogitBias, Priority, StopString, Whole, between
from manyheads.server.structured import GuidedParameters, Structured

MAX_PROMPTS = 256
"""A request has at most so many prompts."""
MAX_MESSAGES = 4096


class Body(BaseModel, extra="forbid", allow_inf_nan=False, strict=True):
    """No part of a body has unknown fields, values of another type, NaN, or text that is none."""

    @field_validator("*", mode="after")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        # JSON can spell half a surrogate pair, which no encoding of Unicode has
        for text in value if isinstance(value, list) else (value,):
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError("not valid Unicode: half a surrogate pair") from None
        return value


class Sampling(Body):
    """These are SamplingParams as JSON; null is the default. See `manyheads.SamplingParams` for the meanings."""

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
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    speculative: bool | None = Field(default=None, description="false decodes one token a step")
    acceptance: Literal["exact", "typical"] | None = Field(default=None, description="rule for temperature > 0")
    typical_epsilon: Annotated[float, between("typical_epsilon")] | None = None
    typical_alpha: Annotated[float, between("typical_alpha")] | None = None

    def to_params(self, **overrides: Any) -> SamplingParams:
        """Make the engine's parameters, or raise RequestError for a value out of its range."""
        given = {name: getattr(self, name) for name in Sampling.model_fields if getattr(self, name) is not None}
        given.update({name: value for name, value in overrides.items() if value is not None})
        for name in ("stop", "stop_token_ids"):
            if name in given:
                given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
        return SamplingParams(**given).validate()


class Queueing(Body):
    """A request may say how it waits."""

    priority: Priority | None = Field(default=None, description="a lower one runs earlier; the default is 0")
    timeout: float | None = Field(
        default=None, gt=0, description="seconds within which it must be able to start; else it is refused at once"
    )

    def place(self, client: str) -> Place:
        """Say how the requests of this client wait."""
        return Place(client=client, priority=self.priority or 0, timeout=self.timeout)


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

    prompt: Prompt | Annotated[list[Prompt], _SOME] | TokenIds | Annotated[list[TokenIds], _SOME]
    logprobs: Annotated[Whole, between("logprobs")] | None = None
    echo: bool | None = Field(default=None, description="not together with logprobs")
    best_of: Annotated[Whole, between("n")] | None = Field(default=None, description="the same as n")
    suffix: Annotated[str, Limits(maxLength=0)] | None = Field(default=None, description="not supported")

    def check(self) -> None:
        """Raise RequestError for what this server does not do."""
        require(self.best_of in (None, self.n or 1), "best_of must equal n: candidates are not ranked here")
        require(not self.suffix, "suffix is not supported: this model only continues text")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo and logprobs do not go together: prompt tokens get no log-probabilities")

    def prompts(self) -> list[str] | list[list[int]]:
        """Make a list of the prompts, one or many."""
        prompt: Any = self.prompt
        many = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        prompts = prompt if many else [prompt]
        require(len(prompts) > 0, "the prompt is empty")
        require(len(prompts) <= MAX_PROMPTS, f"at most {MAX_PROMPTS} prompts in one request, not {len(prompts)}")
        return prompts


class TextPart(Body):
    """A message's content may come in parts, of which only text is supported."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None


_HAS_CONTENT = {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]}
_IS_ASSISTANT = {"properties": {"role": {"const": "assistant"}}}


class Message(Body, json_schema_extra={"anyOf": [_HAS_CONTENT, _IS_ASSISTANT]}):
    """A message of an assistant may hold the empty fields that OpenAI's client sends back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Empty = None
    tool_calls: Empty = None
    function_call: Empty = None

    def plain(self) -> dict[str, str]:
        """Reduce it to role and text. Raises RequestError for what is not text."""
        for field in ("audio", "tool_calls", "function_call"):
            require(
                getattr(self, field) in EMPTY, f"messages with {field} are not supported: this server takes text only"
            )
        require(self.content is not None or self.role == "assistant", f"a {self.role} message needs content")
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


_NO_TOOLS = (None, "none", "auto")
NoTools = Annotated[Any, Limits(enum=_NO_TOOLS)]


class ChatRequest(OpenAIRequest):
    """This body goes to POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = Field(default=None, description="most output tokens (the same as max_tokens)")
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, between("logprobs")] | None = Field(default=None, description="needs logprobs: true")
    tools: Empty = None
    tool_choice: NoTools = None
    functions: Empty = None
    function_call: NoTools = None
    modalities: list[Annotated[str, Limits(enum=["text"])]] | None = None
    audio: Empty = None
    web_search_options: Empty = None
    moderation: Empty = None

    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None

    def check(self) -> None:
        """Raise RequestError for what this server does not do."""
        no_tools = "tools are not supported by this server; leave"
        require(self.tools in EMPTY and self.functions in EMPTY, f"{no_tools} tools and functions out")
        for choice in (self.tool_choice, self.function_call):
            require(choice in _NO_TOOLS, f"{no_tools} tool_choice and function_call out")
        is_text = self.audio in EMPTY and all(m == "text" for m in self.modalities or ())
        require(is_text, "modalities: this server gives text only")
        require(self.web_search_options in EMPTY, "web_search_options: this server does not search the web")
        require(self.moderation in EMPTY, "moderation: this server does not moderate texts")
        require(self.top_logprobs is None or bool(self.logprobs), "top_logprobs needs logprobs: true")

    def chat_params(self) -> SamplingParams:
        """Make the engine's parameters from this endpoint's names for the limits."""
        self.check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; max_tokens is the old name, drop it")
        return self.to_params(
            max_tokens=self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            grammar=self.grammar(),
        )


class GenerateParameters(Sampling, Queueing, GuidedParameters):
    """`parameters` of /generate are those of SamplingParams, also by TGI's names for them."""

    n: Annotated[Whole, Limits(const=1)] | None = None
    max_new_tokens: Count | None = Field(default=None, description="most output tokens (max_tokens is the same)")
    raw: bool = Field(default=False, description="the prompt is text to continue, not an instruction")

    def generate_params(self) -> SamplingParams:
        """Make the engine's parameters from either name of the limit."""
        if None not in (self.max_tokens, self.max_new_tokens) and self.max_tokens != self.max_new_tokens:
            raise RequestError("max_tokens and max_new_tokens are the same and must not differ")
        require(self.n in (None, 1), "n must be 1 here; /v1/completions gives several continuations")
        return self.to_params(max_tokens=self.max_new_tokens, grammar=self.asked())


_EXAMPLE = {"prompt": "Tell me something about hip hop.", "parameters": {"temperature": 0.5, "max_steps": 100}}


class GenerateRequest(Body, json_schema_extra={"examples": [_EXAMPLE]}):
    """This body goes to POST /generate and /generate_stream."""

    prompt: Annotated[str, Limits(pattern=r"\S")]
    parameters: GenerateParameters = GenerateParameters()


def _given(name: str, other: str) -> dict[str, Any]:
    """Describe that one field is given and the other one is not."""
    null = {"type": "null"}
    return {"properties": {name: {"not": null}, other: null}, "required": [name]}


_EITHER = {"oneOf": [_given("prompt", "messages"), _given("messages", "prompt")]}


class TokenizeRequest(Body, json_schema_extra=_EITHER):
    """This body goes to POST /tokenize, with a text, or with messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Limits(minItems=1)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """This body goes to POST /detokenize."""

    model: str | None = None
    tokens: Ids
    skip_special_tokens: bool = False
