"""Mistral's form: [TOOL_CALLS] and a list of objects, or, of newer models, a name and its arguments each time."""

from __future__ import annotations

import re

from manyheads.frontend.tools.parser import NAME, Steps, ToolParser, json_head

BEGIN = "[TOOL_CALLS]"
_OBJECT = json_head("arguments")
_NAMED = re.compile(rf"\s*({NAME})\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?(?=\{{)")


class MistralParser(ToolParser):
    """It reads replies with calls as tokenizers of Mistral from version 3 on write them (mistral-common)."""

    shows = (BEGIN, "[ARGS]", "[CALL_ID]")
    opening = BEGIN + "["
    between = ", "
    closing = "]"

    def _parse(self) -> Steps:
        while (yield from self._content(BEGIN)) is not None:
            is_list = (yield from self._skip("[")) is not None
            if not (yield from self._call(_OBJECT if is_list else _NAMED, is_object=is_list)):
                self._refuse(BEGIN + "[" * is_list)
                continue
            if is_list:
                while (yield from self._skip(",", "]")) == ",":
                    if not (yield from self._call(_OBJECT, is_object=True)):
                        self._parsed.content += ","
                        break
