"""What a step of one engine costs and gives: measured, and interpolated between."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from common import write_json

Points = tuple[tuple[float, float], ...]


def interpolate(points: Points, x: float) -> float:
    """Return the value at x on the line through points, which goes on with its last slope, and stays flat below."""
    at = bisect_right(points, x, key=lambda point: point[0])
    if at == 0:
        return points[0][1]
    if len(points) == 1:
        return points[0][1]
    (x0, y0), (x1, y1) = points[at - 1 : at + 1] if at < len(points) else points[-2:]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Costs and gains of a step by its decoding rows and its prompt tokens.

    A step that does both takes as long as each by itself, less what is paid once (on a GPU, reading the weights).
    Context lengths are left out: a token costs the same behind a short text and a long one.
    """

    decode: Points
    """(rows, seconds) of steps without prompts."""
    prefill: Points
    """(prompt tokens, seconds) of steps without rows."""
    gain: Points
    """(rows, tokens that a row gets in a step)."""
    once: float
    """Seconds that a step of both saves."""
    spread: float = 0.0
    """Requests differ in how well they are guessed: standard deviation of the logarithm of their tokens a step."""
    overhead: float = 0.0
    """Seconds that a request takes beside its steps: HTTP, tokenizing."""
    max_rows: int = 256
    max_prompt_tokens: int = 2048
    prompt_share: float = 3.0
    """Prompts of a step take at most so many times as long as its rows (`engine/step_target.py`)."""
    cache_tokens: int = 400_000
    """The prefix cache holds so many tokens."""
    start_seconds: float = 60.0
    """A replica takes so long to start."""

    def seconds(self, rows: int, prompt_tokens: float) -> float:
        """Return what a step takes."""
        if not prompt_tokens:
            return self._by_rows[rows][0]
        alone = self._by_prompt[int(prompt_tokens)]
        return alone if not rows else max(alone, self._by_rows[rows][0], alone + self._by_rows[rows][0] - self.once)

    def tokens_per_step(self, rows: int) -> float:
        """Return how many tokens a row gets on average."""
        return self._by_rows[rows][1]

    def most_prompt_tokens(self, rows: int) -> int:
        """Return how many prompt tokens a step may take beside so many rows."""
        return self._by_rows[rows][2]

    @cached_property
    def _by_rows(self) -> list[tuple[float, float, int]]:
        """Seconds, tokens a step and most prompt tokens, by rows."""
        found = []
        for rows in range(self.max_rows + 1):
            alone, most = interpolate(self.decode, rows), self.max_prompt_tokens
            while rows and most > 32 and interpolate(self.prefill, most) - self.once > self.prompt_share * alone:
                most = most * 3 // 4
            found.append((alone, interpolate(self.gain, rows), most))
        return found

    @cached_property
    def _by_prompt(self) -> list[float]:
        """Seconds, by prompt tokens."""
        return [interpolate(self.prefill, tokens) for tokens in range(self.max_prompt_tokens + 1)]

    def capacity(self, prompt_tokens: float, output_tokens: float) -> float:
        """Return about how many requests/s a full replica answers, with so many tokens computed of each."""
        rows = self.max_rows
        step, gain = interpolate(self.decode, rows), interpolate(self.gain, rows)
        marginal = interpolate(self.prefill, self.max_prompt_tokens) / self.max_prompt_tokens
        return 1 / (output_tokens / gain * step / rows + prompt_tokens * marginal)

    @classmethod
    def mean(cls, found: Sequence[StepCosts]) -> StepCosts:
        """Return the means of several measurements at the same rows and prompt tokens."""

        def points(name: str) -> Points:
            every = [getattr(costs, name) for costs in found]
            return tuple((at[0][0], round(fmean(y for _, y in at), 6)) for at in zip(*every, strict=True))

        def number(name: str) -> float:
            return round(fmean(getattr(costs, name) for costs in found), 6)

        points_of = {"decode": points("decode"), "prefill": points("prefill"), "gain": points("gain")}
        numbers = {name: number(name) for name in ("once", "spread", "overhead")}
        return dataclasses.replace(found[0], **points_of, **numbers)  # type: ignore[arg-type]

    def save(self, path: Path, note: dict[str, Any]) -> None:
        """Write them, with a note of where they come from."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, note | dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> StepCosts:
        """Read what `save` wrote."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in json.loads(path.read_text()).items() if key in known}
        for name in ("decode", "prefill", "gain"):
            values[name] = tuple((x, y) for x, y in values[name])
        return cls(**values)
