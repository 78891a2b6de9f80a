"""Requests as they arrive: lengths of real prompts and answers, beginnings that they share, conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LENGTHS = Path(__file__).with_name("lengths.json")


@dataclass(slots=True)
class Request:
    """A request, and what becomes of it. Times are seconds of the simulation."""

    at: float
    prompt: int
    """Tokens, shared beginnings included."""
    output: int
    prefixes: tuple[tuple[str, int], ...] = ()
    """Texts that it begins with, and the tokens up to their ends, from short to long; the last one is its own."""
    pace: float = 1.0
    """Its tokens a step against the mean."""
    first: float = -1.0
    """When its first token came; negative until then."""
    last: float = -1.0
    """When its last token came; negative until then."""
    done: float = 0.0
    """Tokens that it has."""
    hits: int = 0
    """Prompt tokens that were found in a cache."""
    computed: int = 0
    """Prompt tokens that were computed, again after a failure included."""
    moves: int = 0
    """How often the replica under it has died."""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.at

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 if there is none."""
        return (self.last - self.first) / (self.output - 1) if self.output > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What arrives: conversations begin at random times; each turn brings the text before it."""

    rate: float
    """Requests a second, turns of conversations included."""
    seconds: float
    systems: int = 1
    """So many different beginnings (system prompts) are in use, by a law of Zipf."""
    system_tokens: int = 0
    turns: float = 1.0
    """Mean number of turns in a conversation, geometrically distributed."""
    pause: float = 20.0
    """Mean seconds between an answer and the next turn, which is taken to begin so long after the turn before."""
    wave: float = 0.0
    """The rate goes up and down by this share of it, once in the whole time."""
    lengths: tuple[tuple[int, int], ...] = field(default_factory=lambda: read_lengths())
    """(prompt, answer) in tokens, of which pairs are drawn."""
    spread: float = 0.0
    """`StepCosts.spread`."""

    def draw(self, seed: int) -> list[Request]:
        """Return all requests in the order of arrival."""
        chance = np.random.default_rng(seed)
        starts = self._starts(chance)
        turns = chance.geometric(1 / self.turns, len(starts))
        popular = 1 / np.arange(1, self.systems + 1)
        systems = chance.choice(self.systems, len(starts), p=popular / popular.sum())
        found: list[Request] = []
        for i, start in enumerate(starts):
            found += self._conversation(chance, f"c{i}", float(start), int(turns[i]), f"s{systems[i]}")
        found = [request for request in found if request.at < self.seconds]
        found.sort(key=lambda request: request.at)
        return found

    def _starts(self, chance: np.random.Generator) -> np.ndarray:
        """Times at which conversations begin; those before 0 are there when the clock starts."""
        lead = self.pause * 5 * (self.turns - 1)
        rate, whole = self.rate / self.turns, self.seconds + lead
        starts = chance.uniform(-lead, self.seconds, chance.poisson(rate * (1 + self.wave) * whole))
        allowed = 1 - self.wave * np.cos(2 * np.pi * starts / self.seconds)
        return np.sort(starts[chance.uniform(0, 1 + self.wave, len(starts)) < allowed])

    def _conversation(
        self, chance: np.random.Generator, key: str, at: float, turns: int, system: str
    ) -> Iterator[Request]:
        text = self.system_tokens
        for _ in range(turns):
            asked, answered = self.lengths[chance.integers(len(self.lengths))]
            prefixes = ((system, self.system_tokens),) if self.system_tokens else ()
            text += asked
            pace = float(np.exp(chance.normal(0, self.spread) - self.spread**2 / 2)) if self.spread else 1.0
            if at >= 0:
                yield Request(at, text, answered, (*prefixes, (key, text)), pace)
            text += answered
            at += chance.exponential(self.pause)


def read_lengths(path: Path = LENGTHS) -> tuple[tuple[int, int], ...]:
    """Return the pairs that `lengths.py` counted."""
    return tuple((prompt, answer) for prompt, answer in json.loads(path.read_text())["pairs"])
