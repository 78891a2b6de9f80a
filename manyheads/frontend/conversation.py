"""A conversation is what a chat template makes a prompt of: messages, tools, and how the prompt is to end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from manyheads.errors import require
from manyheads.frontend.reasoning import ThoughtMarks

Message = Mapping[str, Any]
MAX_DEPTH = 64
TAKEN = frozenset(
    {"conversation", "conversations", "messages", "tools", "chat_template", "tokenize", "add_generation_prompt"}
    | {"continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict", "self"}
    | {"return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs", "processor_kwargs"}
)
"""These names mean something to what fills templates in, so that no template can have them as variables."""
_ASKS_FOR_CALLS = """You can call functions. These are their descriptions, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between these tags, and one such block for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>"""


@dataclass(frozen=True)
class Conversation:
    """A conversation is to be answered, or its last message continued."""

    messages: Sequence[Message]
    """Dicts with `role` and `content` (text), and whatever else the template reads: `tool_calls`, `name`, …"""
    _: KW_ONLY
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""
    opens_reply: bool = True
    """The prompt ends with the opening of the assistant's turn."""
    continues_last: bool = False
    """The prompt ends in the middle of the last message."""
    begins_with: str = ""
    """The prompt ends with this, special tokens included, which the reply goes on behind,"""
    closes: ThoughtMarks | None = None
    """and before it with the end of thoughts, where the template has opened some."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """The template sees these as well, such as `enable_thinking`."""

    def check(self) -> None:
        """Raise RequestError for what no template can make a prompt of."""
        require(len(self.messages) > 0, "messages must not be empty")
        both = self.opens_reply and self.continues_last
        require(not both, "continue_final_message needs add_generation_prompt: false: a reply is begun or continued")
        taken = sorted(TAKEN & self.variables.keys())
        require(not taken, f"chat_template_kwargs cannot set {', '.join(taken)}")

    def size(self) -> int:
        """Count the characters of all texts in messages, tools and variables.

        Raises:
            RequestError: they are nested too deeply, or hold what is no text.
        """
        count = 0
        level: list[Any] = [*self.messages, *self.tools, self.variables]
        for _ in range(MAX_DEPTH):
            inner: list[Any] = []
            for value in level:
                if isinstance(value, str):
                    require(_is_unicode(value), "messages and tools must be valid Unicode: half a surrogate pair")
                    count += len(value)
                elif isinstance(value, Mapping):
                    inner += value.keys()
                    inner += value.values()
                elif isinstance(value, (list, tuple)):
                    inner += value
            level = inner
        require(not level, f"messages and tools must not be nested deeper than {MAX_DEPTH}")
        return count

    def ending(self, text: str) -> str:
        """Return what follows the text that the template made."""
        marks = self.closes
        is_open = marks is not None and text.rstrip().endswith(marks.begin)
        return (f"{marks.end}\n\n" if marks is not None and is_open else "") + self.begins_with

    def guarded(self, guard: Callable[[str], str]) -> Conversation:
        """Apply `guard` to every text that a caller gave."""
        return replace(
            self,
            messages=_guarded(self.messages, guard),
            tools=_guarded(self.tools, guard),
            variables=_guarded(self.variables, guard),
        )

    def as_known(self) -> Conversation:
        """Give calls in the form that templates know which know tools."""
        return replace(self, messages=[_with_objects(message) for message in self.messages])

    def as_text(self) -> Conversation:
        """Put tools, calls and their results into the text of messages, in Hermes' form: no template need know them."""
        messages: list[dict[str, Any]] = []
        before = None
        for message in self.messages:
            text = _as_text(_with_objects(message))
            if message["role"] == before == "tool":  # roles are to take turns
                messages[-1]["content"] += "\n" + text["content"]
            else:
                messages.append(text)
            before = message["role"]
        if self.tools:
            lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.tools)
            asks = _ASKS_FOR_CALLS.format(tools=lines)
            has_system = messages[0]["role"] == "system"
            system = f"{messages[0]['content']}\n\n{asks}" if has_system else asks
            messages = [{"role": "system", "content": system}, *messages[has_system:]]
        return replace(self, messages=messages, tools=())


def _is_unicode(text: str) -> bool:
    # JSON can spell half a surrogate pair, which no encoding of Unicode has
    with contextlib.suppress(UnicodeEncodeError):
        return text.isascii() or bool(text.encode())
    return False


def _with_objects(message: Message) -> Message:
    """Give the arguments of a message's calls as objects, as templates want them; OpenAI's API has them as JSON."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if calls else message


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # a model may have written what is no JSON
            function["arguments"] = json.loads(arguments or "{}")
    return {**call, "function": function}


def _as_text(message: Message) -> dict[str, Any]:
    """Write calls and results of functions as text."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    blocks = [content] if content else []
    for call in message.get("tool_calls") or ():
        function = {name: call["function"].get(name) for name in ("name", "arguments")}
        blocks.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    plain = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**plain, "content": "\n".join(blocks)}


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {guard(key): _guarded(item, guard) for key, item in value.items()}
    return [_guarded(item, guard) for item in value] if isinstance(value, (list, tuple)) else value
