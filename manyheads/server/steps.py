"""What a step guessed and gave is written for requests that ask for it (`return_steps`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import StepTrace


def written_steps(tokenizer: Tokenizer, traces: Iterable[StepTrace | None]) -> list[dict[str, Any]]:
    """Write the steps that are there as an answer has them."""

    def text(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    return [
        {
            "num_tokens": trace.num_tokens,
            "guesses": [
                {"token": text(guess.token_id), "parent": guess.parent, "accepted": guess.accepted}
                for guess in trace.guesses
            ],
        }
        for trace in traces
        if trace is not None
    ]
