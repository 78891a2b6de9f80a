"""The base speaks, by our own engine: it answers prompts (answers.py), and comes up with some (questions.py)."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from manyheads.checkpoint import resolve
from manyheads.frontend.llm import LLM
from manyheads.frontend.output import SequenceOutput
from manyheads.models.registry import read_config
from manyheads.request import SamplingParams
from manyheads.train.settings import TrainSettings

GROUP = 2048
"""Prompts that are given to the engine at once."""


class Speaker:
    """The base in an engine without a drafter, which starts when it is first asked and ends with the `with` block.

    Args:
        base: a hub id, a local folder, or `builtin`.
    """

    def __init__(self, base: str, settings: TrainSettings) -> None:
        config = read_config(resolve(base))
        self.settings = settings
        self.longest = min(settings.max_prompt_tokens, config.max_position_embeddings - settings.max_new_tokens)
        """A prompt to answer has at most so many tokens."""
        self._base = base
        self._llm: LLM | None = None

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *error: object) -> None:
        self._llm = None
        gc.collect()
        torch.cuda.empty_cache()

    def say(self, asked: Sequence[tuple[list[int], SamplingParams] | None]) -> Iterator[list[SequenceOutput | None]]:
        """Continue prompts, at most GROUP of them; where one is None there is nothing to ask, and None comes of it.

        After each step of the engine come those that are there and not yielded before, in the prompts' order.
        """
        generations = [None if one is None else self._engine().prepare(*one) for one in asked]
        running = [generation for generation in generations if generation is not None]
        waiting = deque(generations)
        for _ in chain(self._engine().steps(running) if running else (), [None]):
            new: list[SequenceOutput | None] = []
            while waiting and (waiting[0] is None or waiting[0].finished):
                generation = waiting.popleft()
                new.append(None if generation is None else generation.outputs[0])
            yield new

    def _engine(self) -> LLM:
        if self._llm is None:
            room = self.longest + self.settings.max_new_tokens
            device = self.settings.device
            self._llm = LLM(self._base, speculative=False, device=device, max_model_len=room, max_queue=GROUP)
        return self._llm
