"""Rotary position embedding (Su et al. 2021), and the ways to stretch it over longer texts.

A stretching is a class with the frequencies that it makes of a base. Each gives what transformers' function of that
name gives (`modeling_rope_utils.ROPE_INIT_FUNCTIONS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

POSITION_MARGIN = 64
"""Rotary positions past the longest sequence: nodes of a tree may stick out, and are never kept."""


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies are slowed by a factor."""

    kind: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0
    factor: float

    def frequencies(self, theta: float, dim: int) -> Tensor:
        """[dim / 2] float32, radians a position."""
        return frequencies(theta, dim) / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are slowed, short ones kept, those between interpolated (Llama 3.1, "Positional embedding")."""

    kind: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, theta: float, dim: int) -> Tensor:
        """[dim / 2] float32, radians a position."""
        frequency, original = frequencies(theta, dim), self.original_max_position_embeddings
        wavelength = 2 * math.pi / frequency
        smooth = (original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - smooth) * frequency / self.factor + smooth * frequency
        slow = wavelength > original / self.low_freq_factor
        fast = wavelength < original / self.high_freq_factor
        return torch.where(slow, frequency / self.factor, torch.where(fast, frequency, blended))


@dataclass(frozen=True)
class YarnScaling:
    """Dimensions that turn often are kept, those that turn seldom are slowed, with a ramp between (Peng et al. 2023,
    "YaRN: Efficient Context Window Extension of Large Language Models", section 3.2)."""

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """What queries and keys are multiplied with (section 3.4, there a temperature)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the ends of the ramp are whole dimensions."""

    def frequencies(self, theta: float, dim: int) -> Tensor:
        """[dim / 2] float32, radians a position."""

        def dimension(turns: float) -> float:
            """The one that turns so often within the original length."""
            per_turn = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(per_turn) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp_(0, 1)
        frequency = frequencies(theta, dim)
        return frequency / self.factor * ramp + frequency * (1 - ramp)


@dataclass(frozen=True)
class LongScaling:
    """Each frequency is slowed by a factor of its own (Ding et al. 2024, "LongRoPE").

    There is a second set of factors for texts longer than the original ones. A text that grows past that length would
    have to be computed anew with them, since its cached keys are turned by the first. Texts here stay within it.
    """

    kind: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def frequencies(self, theta: float, dim: int) -> Tensor:
        """[dim / 2] float32, radians a position."""
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / (torch.tensor(self.short_factor, dtype=torch.float32) * theta**exponent)


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True)
class Rope:
    """How a layer's queries and keys are turned by their positions."""

    theta: float
    dim: int
    """So many numbers of a head are turned, a half of them against the other; 0: none."""
    scaling: Scaling | None = None

    def table(self, positions: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin of so many positions and a margin, [positions, 1, head_dim]; sin's first half is negated.

        What is turned stands at the beginning of each half of a head (`head_order`), and the rest is turned by nothing.
        """
        length = positions + POSITION_MARGIN
        if self.dim == 0:
            one = torch.ones(1, 1, head_dim, device=device, dtype=dtype)
            return one.expand(length, 1, head_dim), torch.zeros_like(one).expand(length, 1, head_dim)
        if self.scaling is None:
            frequency, factor = frequencies(self.theta, self.dim), 1.0
        else:
            frequency, factor = self.scaling.frequencies(self.theta, self.dim), self.scaling.attention_factor
        angle = torch.arange(length).float()[:, None] * frequency
        still = (0, (head_dim - self.dim) // 2)
        cos = torch.nn.functional.pad(angle.cos() * factor, still, value=1.0)
        sin = torch.nn.functional.pad(angle.sin() * factor, still)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos[:, None].to(device, dtype), sin[:, None].to(device, dtype)


NO_ROPE = Rope(theta=1.0, dim=0)
"""Of layers that know no positions."""


def frequencies(theta: float, dim: int) -> Tensor:
    """Those of plain rotary embedding: [dim / 2] float32, radians a position."""
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (theta**exponent)


def head_order(dim: int, head_dim: int, interleaved: bool) -> Tensor | None:
    """Where the numbers of a head come from, so that a kernel may turn the first half of a head against the second.

    Which of a head's numbers stands where means nothing to attention, as long as queries and keys agree. So a
    checkpoint in which other pairs are turned is read in another order, and nothing else knows of it.

    Args:
        dim: so many numbers at the beginning of a head are turned.
        interleaved: neighbours are turned against each other, and not the first half against the second.

    Returns:
        [head_dim] int64, or None where the order stays.
    """
    if dim == 0:
        return None
    pairs = torch.arange(dim).view(-1, 2) if interleaved else torch.arange(dim).view(2, -1).T
    still = torch.arange(dim, head_dim).view(2, -1)
    order = torch.cat((pairs[:, 0], still[0], pairs[:, 1], still[1]))
    return None if torch.equal(order, torch.arange(head_dim)) else order


def row_order(order: Tensor | None, heads: Mapping[str, int], behind: int = 0) -> dict[str, Tensor]:
    """In which order the outputs of projections are read: so many heads each, every one of them in its order.

    Args:
        order: [head_dim], or None where nothing changes.
        heads: of each projection, by its name.
        behind: outputs of each that come after these heads, and stay where they are.
    """
    if order is None:
        return {}
    dim = len(order)
    rows = {name: (torch.arange(count)[:, None] * dim + order).flatten() for name, count in heads.items()}
    return {name: torch.cat((each, len(each) + torch.arange(behind))) for name, each in rows.items()}
