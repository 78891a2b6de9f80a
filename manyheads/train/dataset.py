"""Answers as packed rows, and which rows make a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.train.prompts import Answer


@dataclass(frozen=True, eq=False)
class Batch:
    """R packed rows of L tokens on the CPU, each a few conversations one after another that do not see each other."""

    tokens: Tensor  # [R, L] int64
    part: Tensor  # [R, L] int64, number of the conversation in its row; 0 is the padding at the end
    answer: Tensor  # [R, L] bool, the base said it

    @property
    def positions(self) -> Tensor:
        """[R, L] int64, from 0 in each conversation."""
        places = torch.arange(self.part.shape[1]).expand_as(self.part)
        return places - torch.where(self._begins, places, 0).cummax(dim=1).values

    @property
    def bounds(self) -> Tensor:
        """[conversations + 1] int32: where each begins in the R · L tokens, and the end; padding counts as one."""
        begins = self._begins.flatten().nonzero()[:, 0]
        return F.pad(begins, (0, 1), value=self.part.numel()).int()

    @property
    def _begins(self) -> Tensor:
        return F.pad(self.part[:, 1:] != self.part[:, :-1], (1, 0), value=True)

    def take(self, rows: Tensor) -> Batch:
        """Those of the rows with these numbers [n] int64."""
        return Batch(self.tokens[rows], self.part[rows], self.answer[rows])

    def ahead(self, num_heads: int) -> Tensor:
        """[R, L, 1 + heads] int64: the next token, then what each head is to say; -1 where the answer is over."""
        return ahead(self.tokens, self.answer, num_heads)


def ahead(tokens: Tensor, answer: Tensor, num_heads: int) -> Tensor:
    """The tokens [R, L] 1, 2, …, heads + 1 places further, [R, L, 1 + heads] int64; -1 from where the answer ends.

    Args:
        answer: [R, L] bool, whether the token is the answer's.
    """
    shifts = range(1, num_heads + 2)
    wanted = torch.stack([F.pad(tokens[:, s:], (0, s)) for s in shifts], dim=-1)
    # a token counts if all from the next one up to it are the answer's
    valid = torch.stack([F.pad(answer[:, s:], (0, s)) for s in shifts], dim=-1).cummin(dim=-1).values
    return torch.where(valid, wanted, -1)


def pack(answers: list[Answer], length: int) -> Batch:
    """Rows that begin with the beginning of a conversation; one that does not fit any more starts the next row.

    A conversation longer than a row is cut at its end.
    """
    rows: list[tuple[list[int], list[int], list[bool]]] = []
    for item in answers:
        ids = [*item.prompt, *item.tokens][:length]
        if not rows or len(rows[-1][0]) + len(ids) > length:
            rows.append(([], [], []))
        tokens, part, answer = rows[-1]
        part += [part[-1] + 1 if part else 1] * len(ids)
        answer += [i >= len(item.prompt) for i in range(len(ids))]
        tokens += ids

    def padded(lists: Iterable[list[int]]) -> Tensor:
        return torch.stack([F.pad(torch.tensor(values), (0, length - len(values))) for values in lists])

    return Batch(*map(padded, zip(*rows, strict=True)))


class Order:
    """Which rows make a step: a function of seed and step, so that a run can go on anywhere.

    Args:
        num_rows: rows of the data set.
        step_rows: rows of a step; what does not fill one at an epoch's end waits for the next epoch's order.
    """

    def __init__(self, num_rows: int, step_rows: int, seed: int) -> None:
        self.num_rows, self.step_rows, self.seed = num_rows, min(step_rows, num_rows), seed
        self.steps_per_epoch = num_rows // self.step_rows

    def rows(self, step: int) -> Tensor:
        """The numbers of a step's rows, [step_rows] int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_rows, generator=generator)
        return order[place * self.step_rows : (place + 1) * self.step_rows]
