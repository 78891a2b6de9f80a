"""Measures a server's step costs from outside: from `/metrics`, and from requests that make its steps of one kind."""

from __future__ import annotations

import statistics
from asyncio import Task, create_task, gather, sleep
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from cluster.costs import Points, StepCosts
from cluster.real import Text, ask, counters
from cluster.traffic import Request

OUTPUT = 96
"""Tokens of the answers that are measured."""
PROBES = 8
"""Prompts that are sent beside them."""
SHORT = 24
"""Tokens of their prompts."""


class Calibration:
    """A calibration asks one server; each of its prompts is a new one, so that no cache has it.

    Args:
        max_rows: as the server's `--max-num-seqs`.
        number: of the calibration, if several run at once: they have different prompts.
    """

    def __init__(self, url: str, text: Text, max_rows: int, max_prompt_tokens: int, number: int = 0) -> None:
        self._url, self._text = url, text
        self._max_rows, self._max_prompt_tokens = max_rows, max_prompt_tokens
        self._asked = 100_000 * number
        self._paces: list[float] = []
        """Logarithms of the answers' tokens a step, against the mean of those that ran beside."""

    async def run(self, rows: Sequence[int], prompts: Sequence[int], rounds: int) -> StepCosts:
        """Measure, in as many rounds, of which medians are taken."""
        await self._rows(min(4, self._max_rows))  # what the server learns at first is left out
        self._paces = []
        decode, gain = [], []
        for count in rows:
            found = [await self._rows(count) for _ in range(max(rounds, -(-2 * rounds // count)))]
            decode.append((float(count), statistics.median(seconds for seconds, _ in found)))
            gain.append((float(count), statistics.fmean(tokens for _, tokens in found)))
        waits = {count: [await self._prompt(count) for _ in range(2 * rounds + 1)] for count in (1, *prompts)}
        overhead = max(0.0, statistics.median(waits[1]) - decode[0][1])
        prefill = [(float(count), statistics.median(waits[count]) - overhead) for count in prompts]
        few, many = rows[len(rows) // 2], prompts[len(prompts) // 2]
        both = [await self._both(few, many, dict(decode)[few]) for _ in range(rounds)]
        once = dict(decode)[few] + dict(prefill)[many] + overhead - statistics.median(both)
        return StepCosts(
            decode=_rounded(decode),
            prefill=_rounded(prefill),
            gain=_rounded(gain),
            once=round(max(0.0, once), 6),
            spread=round(float(np.std(self._paces)), 3),
            overhead=round(overhead, 6),
            max_rows=self._max_rows,
            max_prompt_tokens=self._max_prompt_tokens,
        )

    async def _ask(self, prompt: int, output: int) -> tuple[float, float, int]:
        self._asked += 1
        return await ask(self._url, self._text.prompt(Request(0.0, prompt, output), -self._asked), output)

    async def _streams(self, count: int) -> list[Task[tuple[float, float, int]]]:
        """Begin so many answers, and return once all have their first steps behind them."""
        before = (await counters(self._url))["decoding_row_steps_total"]
        tasks = [create_task(self._ask(SHORT, OUTPUT)) for _ in range(count)]
        while (await counters(self._url))["decoding_row_steps_total"] < before + 3 * count:
            await sleep(0.02)
        return tasks

    async def _end(self, tasks: list[Task[tuple[float, float, int]]]) -> None:
        logs = np.log([(OUTPUT - 1) / steps for _, _, steps in await gather(*tasks)])
        self._paces += list(logs - logs.mean())

    async def _rows(self, count: int) -> tuple[float, float]:
        """Return seconds of a step with so many rows, and tokens of a row in it."""
        tasks = await self._streams(count)
        seen = [(perf_counter(), await counters(self._url))]
        while not any(task.done() for task in tasks):
            await sleep(0.05)
            seen.append((perf_counter(), await counters(self._url)))
        await self._end(tasks)
        (began, a), (ended, b) = seen[0], seen[-2 if len(seen) > 2 else -1]
        steps = b["engine_steps_total"] - a["engine_steps_total"]
        row_steps = b["decoding_row_steps_total"] - a["decoding_row_steps_total"]
        return (ended - began) / steps, (b["generation_tokens_total"] - a["generation_tokens_total"]) / row_steps

    async def _prompt(self, tokens: int) -> float:
        """Return the seconds that an idle server needs for a prompt and one token."""
        began = perf_counter()
        first, _, _ = await self._ask(tokens, 1)
        return first - began

    async def _both(self, rows: int, tokens: int, alone: float) -> float:
        """Return seconds of a step of so many rows and a prompt of so many tokens, `alone` being that of the rows.

        A prompt waits for the end of the step under way, which is half of it on average: after the answer to one, which
        comes at the end of a step, the next is sent at another time of the steps that follow.
        """
        tasks, waits = await self._streams(rows), list[float]()
        await self._prompt(tokens)
        while not any(task.done() for task in tasks) and len(waits) < PROBES:
            await sleep(alone * (len(waits) + 0.5) / PROBES)
            waits.append(await self._prompt(tokens))
        await self._end(tasks)
        return statistics.fmean(waits) - alone / 2


def _rounded(points: list[tuple[float, float]]) -> Points:
    return tuple((x, round(y, 6)) for x, y in points)
