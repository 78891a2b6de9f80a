"""Prompts for self-distillation, from JSON lines (.gz or not) in the shapes that data sets come in.

| a line | is |
|---|---|
| `{"prompt": "…"}` | a question; without a chat template a text to continue |
| `{"messages": [{"role": "user", "content": "…"}, …]}` | a conversation; what follows the last question is dropped |
| `{"conversations": [{"from": "human", "value": "…"}, …]}` | the same, as ShareGPT spells it |
| `{"turns": ["…", …]}` | Spec-Bench and MT-Bench; the first question is asked |
| `{"instruction": "…", "input": "…"}` | Alpaca |
| `{"prompt_token_ids": […], "token_ids": […]}` | answered already (`training/answers.jsonl` of another run) |

Other keys are passed over: the base's own answers are what the heads learn, not the data set's.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.config import ConfigError
from manyheads.errors import RequestError
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.tokenizer import Tokenizer

ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Answer:
    """A prompt and what the base said to it; no tokens where it has not been asked yet."""

    prompt: list[int]
    tokens: list[int]


def read_prompts(files: Iterable[str | Path], tokenizer: Tokenizer) -> Iterator[Answer]:
    """Every line as token ids. Raises ConfigError naming the file and line that is not as expected."""
    for path in map(Path, files):
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    if raw.strip():
                        try:
                            yield _answer(json.loads(raw), tokenizer)
                        except (ValueError, RequestError) as error:
                            raise ConfigError(f"{path}, line {number}: {error}") from error
        except (OSError, EOFError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error


def _answer(line: Any, tokenizer: Tokenizer) -> Answer:
    if not isinstance(line, dict):
        raise ValueError("no JSON object")
    if "prompt_token_ids" in line:
        prompt, tokens = line["prompt_token_ids"], line.get("token_ids", [])
        size = len(tokenizer.hf)
        if not all(isinstance(ids, list) and all(type(t) is int and t >= 0 for t in ids) for ids in (prompt, tokens)):
            raise ValueError("prompt_token_ids and token_ids must be lists of token ids")
        if (largest := max([*prompt, *tokens], default=0)) >= max(size, 1):
            raise ValueError(f"token id {largest} is outside the tokenizer's {size} tokens")
        return Answer(prompt, tokens)
    messages = _messages(line)
    if not messages:
        raise ValueError("holds no question")
    if not all(isinstance(m["content"], str) and m["content"].strip() for m in messages):
        raise ValueError("a message is empty or no text")
    if "prompt" in line and not tokenizer.has_chat_template:
        return Answer(tokenizer.encode(messages[-1]["content"]), [])
    return Answer(tokenizer.encode_chat(Conversation(messages)), [])


def _messages(line: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation up to its last question, its contents not checked yet."""
    if "messages" in line or "conversations" in line:
        turns = line.get("messages", line.get("conversations"))
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("messages must be a list of objects")
        roles = [str(turn.get("role", turn.get("from"))) for turn in turns]
        messages = [
            {"role": ROLES.get(role, role), "content": turn.get("content", turn.get("value"))}
            for role, turn in zip(roles, turns, strict=True)
        ]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        return messages
    if "turns" in line:
        if not isinstance(line["turns"], list):
            raise ValueError("turns must be a list of texts")
        questions = line["turns"][:1]
    elif "prompt" in line:
        questions = [line["prompt"]]
    elif "instruction" in line:
        more = line.get("input") or ""
        if not isinstance(more, str) or not isinstance(line["instruction"], str):
            raise ValueError("instruction and input must be texts")
        questions = [line["instruction"] + (f"\n\n{more}" if more.strip() else "")]
    else:
        keys = ", ".join(sorted(line)[:4]) or "none"
        raise ValueError(f"needs prompt, messages, conversations, turns or instruction; its keys are {keys}")
    return [{"role": "user", "content": question} for question in questions]
