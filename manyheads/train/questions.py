"""Prompts that the base comes up with itself (Magpie: Xu et al. 2024, "Alignment Data Synthesis from Scratch by
Prompting Aligned LLMs with Nothing", section 2.1): given the opening of a user's turn, it writes what a user may say.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from manyheads.config import ConfigError
from manyheads.errors import RequestError
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.output import SequenceOutput
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import SamplingParams
from manyheads.train.lines import append_lines, whole_lines
from manyheads.train.progress import Progress
from manyheads.train.speaker import GROUP, Speaker

LONGEST = 256
"""A question has fewer tokens; what has not ended by then is dropped."""
TRIES = 3
"""The base is asked at most so many times for each question that is wanted."""


@dataclass(frozen=True)
class UserTurn:
    """What the chat template puts around a user's text, as tokens."""

    opens: list[int]
    """From the beginning of the conversation."""
    closes: list[int]
    """Up to where the reply begins."""

    def ends(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Parameters that end a text which goes on as a turn is closed, beside the base's end-of-text tokens."""
        special = next((i for i, token in enumerate(self.closes) if token in tokenizer.special_ids), len(self.closes))
        text = tokenizer.decode(self.closes[:special]).strip()
        return {"stop": (text,) if text else (), "stop_token_ids": tuple(self.closes[special : special + 1])}


def user_turn(tokenizer: Tokenizer) -> UserTurn:
    """Look at what two conversations have in common that differ in the user's text.

    So these are tokens of real conversations, also where a space before the text becomes part of its first token.

    Raises:
        ConfigError: there is no chat template, or it opens no user's turn.
    """
    if not tokenizer.has_chat_template:
        raise ConfigError(
            "questions of the model's own need a chat template, and its tokenizer has none: without one it does not "
            "know users' turns; give prompts (--data) or a template (--chat-template)"
        )
    chats = [Conversation([{"role": "user", "content": word}]) for word in ("A", "the")]
    try:
        first, second = map(tokenizer.encode_chat, chats)
    except RequestError as error:
        raise ConfigError(f"the model cannot come up with questions: {error}") from error
    opens = _common(first, second)
    if not opens:
        raise ConfigError(
            "the model cannot come up with questions: its chat template puts nothing before a user's text"
        )
    closes = _common(first[len(opens) :][::-1], second[len(opens) :][::-1])[::-1]
    return UserTurn(opens, closes)


def ask_for_questions(speaker: Speaker, tokenizer: Tokenizer, turn: UserTurn, file: Path, progress: Progress) -> None:
    """Have the base come up with as many questions as the settings say, or with fewer if it takes too many tries.

    What does not end, is empty, holds special tokens or was there before is dropped, and another one asked for. Each
    try depends on the base, the seed and its number alone, so a run that was broken off goes on where it was.

    Args:
        file: keeps the questions as they come, one JSON line each, which are prompts to `read_prompts`.

    Raises:
        ConfigError: there is no room for questions, or none came.
    """
    settings = speaker.settings
    room = speaker.longest - len(turn.opens) - len(turn.closes)
    if room < 1:
        what = f"prompts have at most {speaker.longest} tokens, and the chat template alone takes that many"
        raise ConfigError(f"there is no room for questions: {what}")
    ends = turn.ends(tokenizer)
    lines = whole_lines(file)
    seen = {line["prompt"] for line in lines}
    number, last = lines[-1]["number"] + 1 if lines else 0, TRIES * settings.questions
    with progress.task("questions", settings.questions, len(seen)) as advance:
        while len(seen) < settings.questions and number < last:
            count = min(settings.questions - len(seen), GROUP, last - number)
            asked = [
                SamplingParams(max_tokens=min(LONGEST, room), seed=-1 - settings.seed * 1_000_003 - n, **ends)
                for n in range(number, number + count)
            ]
            for outputs in speaker.say([(turn.opens, params) for params in asked]):
                new = []
                for output in outputs:
                    text = _question(output, tokenizer)
                    if text and text not in seen:
                        seen.add(text)
                        new.append({"prompt": text, "number": number})
                    number += 1
                if new:
                    append_lines(file, new)
                advance(len(new), f"{number} tries")
    if not seen:
        raise ConfigError(f"the model came up with no question in {number} tries; give prompts (--data)")
    if len(seen) < settings.questions:
        progress.say(f"the model came up with {len(seen)} questions in {number} tries, not with {settings.questions}")


def _question(output: SequenceOutput | None, tokenizer: Tokenizer) -> str:
    """The text of a turn; nothing if that did not end, or goes on with what no user writes."""
    if output is None or output.finish_reason != "stop":
        return ""
    # the last token is part of what ended it
    return "" if tokenizer.special_ids.intersection(output.token_ids[:-1]) else output.text.strip()


def _common(first: list[int], second: list[int]) -> list[int]:
    """The beginning that both have in common."""
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
