"""What every kind of drafter has while it is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from manyheads.models.config import ModelConfig
from manyheads.train.base import Base
from manyheads.train.dataset import Batch
from manyheads.train.prompts import Answer
from manyheads.train.settings import TrainSettings

Guesses = Callable[[int, Tensor], Tensor]
"""It makes logits [n, V] of (the depth from 0, which of the places [n] int64)."""


class TrainedDrafter(nn.Module, ABC):
    """A drafter that learns: its parameters, its losses, its guesses, and how it is written."""

    part: str
    """What guesses one depth: a head, or a pass."""
    follows_path: bool
    """Whether a guess depends on those before it: it is made only where the right token was among their candidates."""
    depth: int
    """Tokens guessed after the base's own."""
    token_map: Tensor | None
    """[V] int64, the token that each of the V logits stands for, ascending; None: all tokens in order."""

    @classmethod
    @abstractmethod
    def start(cls, settings: TrainSettings, base: Base, config: ModelConfig, answers: list[Answer]) -> TrainedDrafter:
        """The drafter before the first step, on the CPU. Raises ConfigError where the settings do not fit the base."""

    @abstractmethod
    def backward(
        self,
        settings: TrainSettings,
        base: Base,
        teacher: Base | None,
        batch: Batch,
        targets: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """Add the gradients of a group of rows; the sums of the losses [1 + depth], the base's own first.

        Args:
            teacher: the base as it was, where the base learns too in this step; else None.
            batch, targets: on the CPU, where finding what counts makes nobody wait.
            targets: [R · L, 1 + depth] int64 as `Batch.ahead` and `place` make them; negative ones do not count.
            counts: [1 + depth], targets of the whole step.
        """

    @abstractmethod
    def guesses(self, base: Base, batch: Batch, places: Tensor) -> Guesses:
        """What is guessed at these places [N] int64 (on the CPU) of the R · L, given the text up to each guess."""

    @abstractmethod
    def write(self, out: Path, name: str, config: ModelConfig) -> None:
        """Write what can be served with a base of that name: a hub id, `builtin`, or a local folder's absolute path."""

    def place(self, tokens: Tensor, vocab_size: int) -> Tensor:
        """Tokens as numbers of logits: -1 stays, and a token that has none is -2."""
        if self.token_map is None:
            return tokens
        place = torch.full((vocab_size + 1,), -2, device=tokens.device)
        place[self.token_map.to(tokens.device)] = torch.arange(len(self.token_map), device=tokens.device)
        place[-1] = -1
        return place[tokens]


def most_used(answers: list[Answer], count: int, vocab_size: int) -> Tensor:
    """The tokens that are used most in the answers, [count] int64, ascending; of equals the lower ones."""
    counts = Counter(token for answer in answers for token in answer.tokens)
    used = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(used[:count]))
