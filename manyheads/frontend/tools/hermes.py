"""Hermes' form, which Qwen and many others share: <tool_call>{"name": …, "arguments": {…}}</tool_call>."""

from __future__ import annotations

from manyheads.frontend.tools.parser import Steps, ToolParser, json_head

BEGIN, END = "<tool_call>", "</tool_call>"
_HEAD = json_head("arguments", "parameters")


class HermesParser(ToolParser):
    """It reads replies with calls in Hermes' form (Nous Research, Hermes-Function-Calling, README)."""

    shows = (BEGIN, END)
    opening = f"{BEGIN}\n"
    between = f"\n{END}\n{BEGIN}\n"
    closing = f"\n{END}"

    def _parse(self) -> Steps:
        while (yield from self._content(BEGIN)) is not None:
            if (yield from self._call(_HEAD, is_object=True)):
                yield from self._skip(END)
            else:
                self._refuse(BEGIN)
