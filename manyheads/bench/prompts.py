"""Questions have prompts of a fixed number of tokens, or come from a file, which may be a trace with arrival times."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from manyheads.bench.plan import BenchInputError, Question
from manyheads.bench.server import Target, get

SUBJECTS = [
    "hip hop",
    "the moon",
    "Paris",
    "football",
    "the Beatles",
    "gold",
    "whales",
    "chess",
    "New York",
    "the sun",
    "coffee",
    "jazz",
    "bread",
    "the sea",
    "Mozart",
    "winter",
    "horses",
    "volcanoes",
    "the Alps",
    "tea",
    "trains",
    "bees",
    "the desert",
    "cinema",
    "glass",
    "rivers",
    "Rome",
    "ships",
    "clocks",
    "maps",
    "rain",
    "dogs",
    "islands",
    "paper",
    "salt",
    "the wind",
    "bridges",
    "gardens",
    "castles",
    "stars",
]
OPENINGS = (
    "Tell me something about {}.",
    "What should a traveller know about {}?",
    "Write a short story about {}.",
    "How would you explain {} to a child?",
    "Why do people care about {}?",
    "Describe the history of {}.",
    "List three facts about {}.",
)
COUNT = 128
"""There are so many different prompts of a fixed length, which are used in turn."""
TOKENS_PER_WORD = 1.3
"""An English word has about so many tokens."""


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """This is a line of a file of prompts."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    at: float | None = None
    id: Any = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A workload says what each request asks for."""

    prompt_tokens: int = 128
    file: Path | None = None
    output_tokens: int = 100
    natural: bool = False
    """Whether the model ends its answers; otherwise they have `output_tokens`."""
    chat: bool = False
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of each body."""
    seed: int = 0

    @property
    def path(self) -> str:
        """The path of the endpoint that takes these requests."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, target: Target, prompt: str | list[int] | None, messages: Any, max_tokens: int | None) -> Any:
        """Return the body of one request."""
        body: dict[str, Any] = {"model": target.model}
        if messages is not None or self.chat:
            body["messages"] = messages or [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body |= {"max_tokens": max_tokens or self.output_tokens, "temperature": self.temperature}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if not self.natural:
            body["ignore_eos"] = True
        return body | self.extra


def prepare(work: Workload, target: Target, api_key: str | None) -> tuple[list[Question], list[str]]:
    """Make the questions, and say what a reader of the report should know about them.

    Raises:
        BenchInputError: the file holds none, or is not as it should be.
    """
    if work.file is not None:
        return read(work, target), [f"prompts from {work.file.name}"]
    texts, notes = fixed_length(work, target, api_key)
    return [Question(work.body(target, text, None, None)) for text in texts], notes


def read(work: Workload, target: Target) -> list[Question]:
    """Read questions from JSON lines with `prompt` or `messages`, and `max_tokens` and `at` (seconds) if wanted.

    Raises:
        BenchInputError: a line is not as it should be.
    """
    assert work.file is not None
    try:
        lines = work.file.read_bytes().split(b"\n")
    except OSError as error:
        raise BenchInputError(f"cannot read {work.file}: {error.strerror}") from error
    questions = []
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        where = f"{work.file}, line {number}"
        try:
            line = msgspec.json.decode(raw, type=_Line)
        except msgspec.DecodeError as error:
            raise BenchInputError(f"{where}: {error}") from error
        if (line.prompt is None) == (line.messages is None):
            raise BenchInputError(f"{where}: needs either `prompt` or `messages`")
        if line.messages is not None and not work.chat:
            raise BenchInputError(f"{where}: `messages` need --chat")
        if line.at is not None and not 0 <= line.at < 1e7:
            raise BenchInputError(f"{where}: `at` must be seconds from the start, not {line.at}")
        if line.max_tokens is not None and line.max_tokens < 1:
            raise BenchInputError(f"{where}: max_tokens must be 1 or more, not {line.max_tokens}")
        questions.append(Question(work.body(target, line.prompt, line.messages, line.max_tokens), line.at))
    if not questions:
        raise BenchInputError(f"{work.file} holds no prompt")
    return questions


def fixed_length(work: Workload, target: Target, api_key: str | None) -> tuple[list[Any], list[str]]:
    """Make English prompts of `prompt_tokens`: token ids if the server has `/tokenize`, or else about as many words."""
    chance = random.Random(work.seed)
    if not work.chat:
        try:
            return [_cut(chance, work.prompt_tokens, target, api_key) for _ in range(COUNT)], []
        except (OSError, ValueError, LookupError, TypeError):
            pass  # not a server with /tokenize in our and vLLM's shape
    words = max(1, round(work.prompt_tokens / TOKENS_PER_WORD))
    note = (
        f"asked for {work.prompt_tokens} prompt tokens: without /tokenize{' for chats' if work.chat else ''}, prompts "
        f"have {words} words; the server's own count is in the tables"
    )
    return [" ".join(_text(chance, words).split()[:words]) for _ in range(COUNT)], [note]


def _cut(chance: random.Random, count: int, target: Target, api_key: str | None) -> list[int]:
    """Make a prompt of exactly so many tokens; a short one is a whole sentence if some sentence has that length."""
    best: list[int] = []
    for _ in range(8):
        body = {"model": target.model, "prompt": _text(chance, count)}
        ids = [int(t) for t in get(f"{target.url}/tokenize", body, api_key)["tokens"]]
        if len(ids) == count:
            return ids
        best = ids if len(ids) > count else best
        if count > 32:
            break
    if not best:
        raise ValueError("the text has fewer tokens than words")
    return best[:count]


def _text(chance: random.Random, words: int) -> str:
    """Return sentences with at least so many words in all."""
    text = ""
    while len(text.split()) < words or not text:
        text += (" " if text else "") + sentences(chance, 1)
    return text


def sentences(chance: random.Random, count: int) -> str:
    """Return so many random sentences."""
    return " ".join(chance.choice(OPENINGS).format(chance.choice(SUBJECTS)) for _ in range(count))
