"""DeepSeek's form: special tokens around a name and its arguments, which V3 writes as a block of code."""

from __future__ import annotations

import re

from manyheads.frontend.tools.parser import NAME, Steps, ToolParser

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_HEAD = re.compile(rf"\s*(?:function{SEPARATOR})?({NAME})(?:{SEPARATOR}|\s*```json)\s*(?=\{{)")


class DeepSeekParser(ToolParser):
    """It reads replies with calls as the chat templates of DeepSeek V3, V3.1 and R1 write them."""

    shows = (BEGIN, END, CALL, SEPARATOR, CALL_END)

    def _parse(self) -> Steps:
        while (marker := (yield from self._content(BEGIN, CALL))) is not None:
            if marker == BEGIN:
                yield from self._skip(CALL)
            if (yield from self._call(_HEAD)):
                yield from self._skip("```")
                yield from self._skip(CALL_END)
                yield from self._skip(END)
            else:
                self._refuse(marker)
