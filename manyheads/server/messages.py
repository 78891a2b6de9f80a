"""The messages of a conversation, as requests bring them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from manyheads.errors import RequestError, require
from manyheads.server.body import Body
from manyheads.server.fields import EMPTY, Empty, Limits

MAX_MESSAGES = 4096
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Parts of these types are text, which stands in the field on the right."""


class Part(Body, json_schema_extra={"required": ["type", "text"]}):
    """A message's content may come in parts, of which only text is supported."""

    keeps_unknown: ClassVar[bool] = True
    type: Annotated[str, Limits(enum=["text"])]
    text: Annotated[str | None, Limits(type="string")] = None
    refusal: Annotated[str | None, Limits(description="the text of a part of this type")] = None

    def plain(self) -> str:
        """Return the text. Raises RequestError for what is none."""
        require(self.type in _TEXTS, f"{self.type[:100]!r} parts are not supported: this server takes text only")
        field = _TEXTS[self.type]
        text = getattr(self, field)
        if text is None:
            raise RequestError(f"a part of type {self.type!r} needs {field!r}")
        return str(text)


class CalledFunction(Body):
    """A function was called with these arguments."""

    keeps_unknown: ClassVar[bool] = True
    name: str
    arguments: str | dict[str, Any] = Field(default="{}", description="JSON")


class ToolCall(Body):
    """The assistant has called a function."""

    keeps_unknown: ClassVar[bool] = True
    id: str | None = None
    type: Annotated[str, Limits(enum=["function"])] = "function"
    function: CalledFunction


_HAS_CONTENT = {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]}
_IS_ASSISTANT = {"properties": {"role": {"const": "assistant"}}}


class Message(Body, json_schema_extra={"anyOf": [_HAS_CONTENT, _IS_ASSISTANT]}):
    """A chat template sees a message's further fields, such as `name` or `reasoning_content`, too."""

    keeps_unknown: ClassVar[bool] = True
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: Any = None
    reasoning_content: Any = Field(default=None, description="an assistant's thoughts; `reasoning` is the same")
    reasoning: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Empty = None
    function_call: Empty = None

    def plain(self) -> dict[str, Any]:
        """Make it what chat templates read. Raises RequestError for what is not text."""
        for field in ("audio", "function_call"):
            hint = "use tool_calls" if field == "function_call" else "this server takes text only"
            require(getattr(self, field) in EMPTY, f"messages with {field} are not supported: {hint}")
        require(self.content is not None or self.role == "assistant", f"a {self.role} message needs content")
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.plain() for part in content)
        hidden = {"role", "content", "audio", "function_call", "annotations", "refusal", "reasoning"}
        more = {name: value for name, value in self.model_dump(exclude=hidden).items() if value not in EMPTY}
        if self.reasoning is not None:
            more.setdefault("reasoning_content", self.reasoning)
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **more}
