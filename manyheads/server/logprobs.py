"""Log-probabilities are written in the two forms of the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import TokenLogprobs

LEAST = -9999.0
"""This stands for minus infinity, which JSON does not have."""


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
    """Write `logprobs` as chat completions have them; None where there are none."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**token(entry.token_id, entry.logprob), "top_logprobs": [token(*other) for other in entry.top]}
        for entry in logprobs or ()
    ]
    return {"content": content, "refusal": None} if content else None


class TextLogprobs:
    """It finds the log-probabilities of tokens that pieces of a reply's text came of; what marks thoughts and calls
    belongs to none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[dict[str, Any]] = []

    def add(self, logprobs: Sequence[TokenLogprobs] | None) -> None:
        """Take those of the next tokens."""
        written = chat_logprobs(self._tokenizer, logprobs)
        self._waiting += written["content"] if written else []

    def take(self, text: str) -> list[dict[str, Any]]:
        """Give those of the next piece of text, and forget what came before it. A token goes with the first piece that
        it has a part in."""
        sizes = [len(entry["bytes"]) for entry in self._waiting]
        *starts, end = accumulate(sizes, initial=0)
        found = bytes(byte for entry in self._waiting for byte in entry["bytes"]).find(text.encode())
        # what is not found began in a token that is gone, or is no whole character in its tokens
        begin, stop = (found, found + len(text.encode())) if found >= 0 else (0, end)
        last = sum(start < stop for start in starts)
        taken = [
            entry
            for entry, start, size in zip(self._waiting[:last], starts, sizes, strict=False)
            if start + size > begin
        ]
        self._waiting = self._waiting[last:]
        return taken


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs] | None
) -> list[dict[str, Any] | None] | None:
    """Write `prompt_logprobs` as vLLM has them: by id, of a prompt's tokens and the likeliest; null for the first."""
    if logprobs is None:
        return None

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    found: list[dict[str, Any] | None] = [None]
    for token in logprobs:
        top = {str(t): entry(t, value, rank) for rank, (t, value) in enumerate(token.top, 1)}
        found.append({str(token.token_id): entry(token.token_id, token.logprob, token.rank), **top})
    return found


class CompletionLogprobs:
    """It writes `logprobs` as completions have them, and keeps the text offset from chunk to chunk."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def add(
        self,
        logprobs: Sequence[TokenLogprobs] | None,
        echoed: Sequence[int] = (),
        prompt_logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> dict[str, Any] | None:
        """Write those of the next tokens; None where there are none.

        Args:
            echoed: the prompt's tokens, which come first if they are part of the text; nothing is known of the first.
            prompt_logprobs: of the others.
        """
        entries: list[TokenLogprobs | None] = [*([None] if echoed else ())]
        entries += (*((prompt_logprobs or ()) if echoed else ()), *(logprobs or ()))
        if not entries:
            return None
        texts = [self._text(entry.token_id if entry is not None else echoed[0]) for entry in entries]
        *offsets, self._offset = accumulate(map(len, texts), initial=self._offset)
        return {
            "tokens": texts,
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                None if entry is None else {self._text(t): _finite(value) for t, value in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:  # as OpenAI writes parts of characters: told apart, though no text
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST
