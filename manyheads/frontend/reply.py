"""A reply's text is told apart into thoughts, content and calls of functions, while it comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from manyheads.config import ConfigError
from manyheads.frontend.reasoning import REASONING_PARSERS, ThoughtMarks, ThoughtSplitter, find_marks
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.frontend.tools.kinds import TOOL_PARSERS, find_parser
from manyheads.frontend.tools.parser import Parsed, ToolParser
from manyheads.frontend.tools.use import ToolUse

NONE = "none"
_LOOK_BACK = 16
"""The mark at which thoughts begin is among so many tokens at a prompt's end, if the prompt opens them."""


@dataclass
class ReplyDelta(Parsed):
    """What a piece of text adds to a reply."""

    thoughts: str = ""

    def __bool__(self) -> bool:
        return bool(self.thoughts or self.content or self.calls)


@dataclass
class Call:
    """A call is a function's name with its arguments, which are JSON."""

    name: str
    arguments: str = ""


@dataclass
class WholeReply:
    """A whole reply has thoughts, content and calls, each of which may be missing."""

    thoughts: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: ReplyDelta) -> None:
        """Add what a piece of text brought."""
        self.thoughts += delta.thoughts
        self.content += delta.content
        for call in delta.calls:
            if call.name is not None:
                self.calls.append(Call(call.name))
            self.calls[call.index].arguments += call.arguments


@dataclass(frozen=True)
class ReplyForm:
    """A model has a form for its calls and one for its thoughts."""

    tools: type[ToolParser] | None
    thoughts: ThoughtMarks | None
    shows: frozenset[int] = frozenset()
    """Special tokens that these forms are made of."""
    calls_several: bool = False
    """Whether a reply that must call may make several calls. Left to itself, a model that was not made for calls
    repeats the first one for ever."""

    @classmethod
    def find(cls, tokenizer: Tokenizer, tool_parser: str | None, reasoning_parser: str | None) -> ReplyForm:
        """Find a model's forms by its chat template, unless parsers are named, as `check_parsers` takes them."""
        tools, marks = TOOL_PARSERS.get(tool_parser or ""), REASONING_PARSERS.get(reasoning_parser or "")
        template = tokenizer.chat_template(with_tools=True)
        if tool_parser is None:
            tools = find_parser(template)
        if reasoning_parser is None:
            marks = find_marks(tokenizer.chat_template())
        texts = (*(tools.shows if tools else ()), *((marks.begin, marks.end) if marks else ()))
        ids = tokenizer.hf.convert_tokens_to_ids(list(texts))
        shows = frozenset(i for i in ids if i is not None) & tokenizer.special_ids
        return cls(tools, marks, shows, calls_several="tools" in template or tool_parser in TOOL_PARSERS)

    def reader(self, tokenizer: Tokenizer, prompt: list[int], use: ToolUse, *, streams: bool) -> ReplyReader:
        """Make what reads a reply to a prompt (token ids)."""
        splitter = None
        if self.thoughts is not None:
            end = tokenizer.decode(prompt[-_LOOK_BACK:], skip_special_tokens=False).rstrip()
            splitter = ThoughtSplitter(self.thoughts, is_open=end.endswith(self.thoughts.begin))
        return ReplyReader(splitter, use.parser(self.tools, streams=streams))


def check_parsers(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Raise ConfigError for a parser that there is not; `none` reads nothing, None leaves it to the chat template."""
    options: tuple[tuple[str, str | None, Iterable[str]], ...] = (
        ("--tool-parser", tool_parser, TOOL_PARSERS),
        ("--reasoning-parser", reasoning_parser, REASONING_PARSERS),
    )
    for option, name, known in options:
        if name not in (None, NONE, *known):
            raise ConfigError(f"{option} must be {', '.join(known)} or {NONE}, not {name!r}")


class ReplyReader:
    """It reads one reply."""

    def __init__(self, splitter: ThoughtSplitter | None, parser: ToolParser | None) -> None:
        self._splitter, self._parser = splitter, parser

    def push(self, text: str, *, final: bool = False) -> ReplyDelta:
        """Take the next text, the last one if `final`; say what is certain now."""
        thoughts = ""
        if self._splitter is not None:
            thoughts, text = self._splitter.push(text, final=final)
        if self._parser is None:
            return ReplyDelta(content=text, thoughts=thoughts)
        parsed = self._parser.push(text, final=final)
        return ReplyDelta(content=parsed.content, calls=parsed.calls, thoughts=thoughts)

    def read(self, text: str) -> WholeReply:
        """Read a reply that is whole."""
        reply = WholeReply()
        reply.add(self.push(text, final=True))
        return reply
