"""The items of a response: thoughts, text and calls, and the events that tell of them while they come."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from typing import Any

from manyheads.frontend.reply import ReplyDelta
from manyheads.server.logprobs import TextLogprobs

Event = dict[str, Any]


class ResponseItems:
    """It makes items, in OpenAI's form, of what comes of a reply.

    Args:
        logprobs: knows those of the text, if they were asked for.
    """

    def __init__(self, logprobs: TextLogprobs | None = None) -> None:
        self._logprobs = logprobs
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def push(self, delta: ReplyDelta) -> Iterator[Event]:
        """Take what a piece of text brought; give the events that tell of it."""
        if delta.thoughts:
            yield from self._add_text("reasoning", delta.thoughts)
        if delta.content and (delta.content.strip() or self._is_open("message")):
            yield from self._add_text("message", delta.content)
        for call in delta.calls:
            if call.name is not None:
                yield from self.close("completed")
                yield self._begin(
                    {"type": "function_call", "id": f"fc_{_id()}", "call_id": _id(), "name": call.name, "arguments": ""}
                )
            elif self._open is not None:
                self._open["arguments"] += call.arguments
                yield self._event("response.function_call_arguments.delta", delta=call.arguments)

    def close(self, status: str) -> Iterator[Event]:
        """End the item that is open, if one is; give the events that tell of it."""
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            name, arguments = item["name"], item["arguments"]
            yield self._event("response.function_call_arguments.done", name=name, arguments=arguments)
        else:
            (part,) = item["content"]
            kind = _KINDS[item["type"]][1]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._event(f"response.{kind}.done", content_index=0, text=part["text"], **more)
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield {**self._event("response.output_item.done"), "item": dict(item)}
        self._open = None

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _add_text(self, kind: str, text: str) -> Iterator[Event]:
        prefix, name, of_item, of_part = _KINDS[kind]
        if not self._is_open(kind):
            yield from self.close("completed")
            yield self._begin({"type": kind, "id": f"{prefix}_{_id()}", "content": [], **of_item})
            part = {"type": name, "text": "", **copy.deepcopy(of_part)}
            yield self._event("response.content_part.added", content_index=0, part=copy.deepcopy(part))
            self.items[-1]["content"].append(part)
        part = self.items[-1]["content"][0]
        part["text"] += text
        logprobs = self._logprobs.take(text) if self._logprobs is not None else []
        more = {}
        if "logprobs" in part:
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        yield self._event(f"response.{name}.delta", content_index=0, delta=text, **more)

    def _begin(self, item: dict[str, Any]) -> Event:
        self._open = {**item, "status": "in_progress"}
        self.items.append(self._open)
        event = {"type": "response.output_item.added", "output_index": len(self.items) - 1}
        return {**event, "item": {**self._open, **({"content": []} if "content" in item else {})}}

    def _event(self, kind: str, **more: Any) -> Event:
        item = self.items[-1]
        is_item = kind.startswith("response.output_item")
        of_item = {} if is_item else {"item_id": item["id"]}
        return {"type": kind, "output_index": len(self.items) - 1, **of_item, **more}


_KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "reasoning": ("rs", "reasoning_text", {"summary": []}, {}),
    "message": ("msg", "output_text", {"role": "assistant"}, {"annotations": [], "logprobs": []}),
}
"""The beginning of an item's id, the name of its parts, and what else the item and a part have."""


def _id() -> str:
    return uuid.uuid4().hex[:9]
