"""What requests for /v1/responses may hold, and how that becomes a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from manyheads.errors import RequestError, require
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.tools.use import ToolUse
from manyheads.grammar import Grammar
from manyheads.request import SamplingParams
from manyheads.server.body import Body
from manyheads.server.fields import EMPTY, Count, Empty, Limits, Whole, between
from manyheads.server.messages import MAX_MESSAGES, Part
from manyheads.server.schemas import Queueing, Sampling
from manyheads.server.tools import (
    MAX_TOOLS,
    Allowed,
    AllowedTools,
    Choice,
    Function,
    FunctionName,
    NamedTool,
    Tool,
)
from manyheads.server.tools import tool_use as make_tool_use


class MessageItem(Body):
    """Somebody says something."""

    keeps_unknown: ClassVar[bool] = True
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class CallItem(Body):
    """The assistant has called a function."""

    keeps_unknown: ClassVar[bool] = True
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Body):
    """A function has answered."""

    keeps_unknown: ClassVar[bool] = True
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


class ReasoningItem(Body):
    """The assistant has thought."""

    keeps_unknown: ClassVar[bool] = True
    type: Literal["reasoning"]
    content: list[dict[str, Any]] | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return f"type={kind}" if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("type=message")]
    | Annotated[CallItem, Tag("type=function_call")]
    | Annotated[OutputItem, Tag("type=function_call_output")]
    | Annotated[ReasoningItem, Tag("type=reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="type must be message, function_call, function_call_output or reasoning",
    ),
]


def _is_function(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"{kind[:100]!r} tools are not supported: this server has functions only")
    return tool


class ResponseTool(Function):
    """A function can be called; other tools are not supported."""

    type: Literal["function"]


class ResponseNamedTool(FunctionName):
    """This function must be called."""

    type: Literal["function"]


class ResponseAllowedTools(Body):
    """Only some of the functions may, or must, be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ResponseNamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class Format(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Text(Body):
    """The text of a response may have a form."""

    format: Format | None = None
    verbosity: Any = None


class Reasoning(Body):
    """How much to think, which chat templates may know."""

    effort: Any = None
    summary: Any = None
    generate_summary: Any = None


LOGPROBS = "message.output_text.logprobs"
"""`include` asks for log-probabilities of the text by this name."""


class ResponsesRequest(Sampling, Queueing):
    """This body goes to POST /v1/responses. Nothing is stored; the fields from `user` on have no effect here."""

    model: str | None = None
    input: Annotated[str, Limits(minLength=1)] | Annotated[list[Item], Limits(minItems=1, maxItems=MAX_MESSAGES)]
    instructions: str | None = Field(default=None, description="a system message before the input")
    n: Annotated[Whole, Limits(const=1)] | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    text: Text | None = None
    tools: list[Annotated[ResponseTool, BeforeValidator(_is_function)]] | None = Field(
        default=None, max_length=MAX_TOOLS
    )
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | ResponseAllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include: list[str] | None = Field(default=None, description=f"{LOGPROBS}; others are ignored")
    top_logprobs: Annotated[Whole, between("logprobs")] | None = Field(default=None, description=f"of {LOGPROBS}")
    max_tool_calls: Annotated[Whole, Limits(minimum=1)] | None = Field(
        default=None, description="of tools that the server has itself: none"
    )
    previous_response_id: Empty = None
    conversation: Empty = None
    prompt: Empty = None
    background: Annotated[Any, Limits(enum=[None, False])] = None

    user: Any = None
    metadata: dict[str, Any] | None = None
    store: Any = None
    truncation: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    stream_options: Any = None
    moderation: Any = None
    context_management: Any = None
    access_programs: Any = None
    background_options: Any = None
    image: Any = None

    @property
    def wants_logprobs(self) -> bool:
        """Tell whether the answer is to have log-probabilities of its text."""
        return LOGPROBS in (self.include or ())

    def ignored_fields(self) -> Iterator[str]:
        """Name what would change the answer, and is not done here."""
        if any(name != LOGPROBS for name in self.include or ()):
            yield "include"
        if self.top_logprobs is not None and not self.wants_logprobs:
            yield "top_logprobs"
        if self.truncation not in (None, "disabled"):
            yield "truncation"

    def check(self) -> None:
        """Raise RequestError for what this server does not do."""
        for name in ("previous_response_id", "conversation", "prompt"):
            require(getattr(self, name) in EMPTY, f"{name} is not supported: nothing is stored; send the whole input")
        require(not self.background, "background is not supported: nothing is stored")
        require(self.n in (None, 1), "n must be 1 here")
        require(len(self.input) > 0, "the input is empty")
        num_items = 1 if isinstance(self.input, str) else len(self.input)
        require(num_items <= MAX_MESSAGES, f"input has {num_items} items; the most is {MAX_MESSAGES}")

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Make the engine's parameters from this endpoint's names."""
        logprobs = (self.top_logprobs or 0) if self.wants_logprobs else None
        return self.to_params(defaults, max_tokens=self.max_output_tokens, grammar=self.grammar(), logprobs=logprobs)

    def grammar(self) -> Grammar | None:
        """Make the grammar of the text's form; None if it has none."""
        form = self.text.format if self.text is not None else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_schema" and form.schema_ is None:
            raise RequestError("text.format of type json_schema needs a schema")
        return Grammar("json", json.dumps(form.schema_ if form.type == "json_schema" else {"type": "object"}))

    def tool_use(self) -> ToolUse:
        """Say what the request wants with functions."""
        tools = [Tool(type="function", function=_function(tool)) for tool in self.tools or ()]
        given = self.tool_choice
        choice: Choice | None = given if isinstance(given, str) else None
        if isinstance(given, ResponseNamedTool):
            choice = _named(given)
        elif isinstance(given, ResponseAllowedTools):
            allowed = Allowed(mode=given.mode, tools=[_named(tool) for tool in given.tools])
            choice = AllowedTools(type="allowed_tools", allowed_tools=allowed)
        return make_tool_use(tools, choice, self.parallel_tool_calls)

    def conversation_of_input(self) -> Conversation:
        """Make what the chat template is filled with. Raises RequestError for what is not text."""
        variables = dict(self.chat_template_kwargs or {})
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is not None:
            variables.setdefault("reasoning_effort", effort)
        if effort == "none":
            variables.setdefault("enable_thinking", False)
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            _add_items(messages, self.input)
        return Conversation(messages, variables=variables)


def _add_items(messages: list[dict[str, Any]], items: list[Any]) -> None:
    """Add messages; what the assistant thinks, says and calls in turn is one message of his."""

    def assistant() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for item in items:
        if isinstance(item, ReasoningItem):
            texts = [str(part.get("text", "")) for part in item.content or ()]
            assistant()["reasoning_content"] = "".join(texts)
        elif isinstance(item, CallItem):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif isinstance(item, OutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif item.role == "assistant":
            assistant()["content"] += _text(item.content)
        else:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item.content)})


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.plain() for part in content)


def _function(tool: ResponseTool) -> Function:
    return Function(**tool.model_dump(exclude={"type"}, exclude_none=True))


def _named(tool: ResponseNamedTool) -> NamedTool:
    return NamedTool(type="function", function=FunctionName(name=tool.name))
