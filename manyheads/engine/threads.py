"""How many threads compute a step on a CPU, and whether they spin while they wait: measured again and again.

A product is shared out among threads that meet at its end, some hundred times a step. Threads that spin meet at once.
But where another process takes the core of one of them, the others spin in vain until it has its core back, and a step
takes ten or a hundred times longer than with a single thread. Threads that block leave their cores to whoever has work.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

PAIRS = 8
"""Steps of a trial with the setting that is tried, and as many between them with the one that is used."""
CLEARLY = 1.3
"""A trial ends after three pairs if one setting took so many times as long as the other,"""
AT_ONCE = 8.0
"""and after a pair if the one that is tried did."""
GAIN = 1.03
"""A setting must be so many times as fast as the one that is used to replace it."""
FIRST_WAIT, MOST_WAIT = 8, 512
"""Steps between two trials: at first, and after many in vain; each doubles them."""
QUIET, BUSY = 0.1, 0.3
"""Threads may spin where others take less than so much of a core, and must not where they take more."""
OTHER_LOAD = 0.5
"""Where others take so much of a core more or less than before, trials begin anew."""
LOOK_SECONDS = 0.25
"""Between two looks at what others take."""
BESIDE = 16
"""What a step takes beside its tokens, in tokens: so steps of about as many can be compared."""


class Setting(NamedTuple):
    """How a step is computed."""

    threads: int
    spins: bool = False
    """While threads wait for each other; otherwise they block."""


@dataclass
class _Choice:
    """What is used for steps of about as many tokens, and what is tried."""

    used: Setting
    tried: Setting | None = None
    with_used: list[float] = field(default_factory=list)  # seconds for a token, of a trial's steps
    with_tried: list[float] = field(default_factory=list)
    until_trial: int = FIRST_WAIT
    wait: int = FIRST_WAIT
    trials: int = 0


class Threads:
    """Sets torch's threads for each step. Steps of about as many tokens (by powers of two) have a setting in common.

    Args:
        most: threads at most, at least 2; halves of it are tried, down to one.
        others: cores that other processes take.
    """

    def __init__(self, most: int, others: Callable[[], float] | None = None) -> None:
        counts = sorted({max(1, most >> shift) for shift in range(most.bit_length())})
        self._settings = [Setting(n) for n in counts] + [Setting(n, True) for n in counts if n > 1]
        self._others = others or OtherProcesses()
        self._load = self._load_before = 0.0
        self._choices: dict[int, _Choice] = {}  # by magnitude of tokens
        weakref.finalize(self, _BLOCKING.end)
        weakref.finalize(self, _COUNT.give_back)
        self.is_trial = False
        """Whether the last step tried a setting that is not the one in use."""
        self._apply(Setting(most))

    @contextlib.contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Compute a step of so many tokens inside this block."""
        self._look()
        choice = self._choice(num_tokens.bit_length())
        setting = self._next(choice)
        self.is_trial = setting != choice.used
        self._apply(setting)
        began = time.perf_counter()
        yield
        if choice.tried is not None:
            seconds = (time.perf_counter() - began) / (num_tokens + BESIDE)
            (choice.with_tried if self.is_trial else choice.with_used).append(seconds)
            self._judge(choice)

    def used(self, num_tokens: int) -> Setting:
        """What steps of so many tokens are computed with."""
        return self._choice(num_tokens.bit_length()).used

    def _choice(self, magnitude: int) -> _Choice:
        """New ones begin with what is used for about as many tokens."""
        if magnitude not in self._choices:
            near = min(self._choices, key=lambda other: abs(other - magnitude), default=None)
            first = self._settings[-1]._replace(spins=False)
            self._choices[magnitude] = _Choice(first if near is None else self._choices[near].used)
        return self._choices[magnitude]

    def _look(self) -> None:
        """At what others take: what was learnt beside them says little beside fewer or more."""
        self._load = self._others()
        if self._load > BUSY:
            for choice in self._choices.values():
                choice.used = choice.used._replace(spins=False)
                if choice.tried is not None and choice.tried.spins:
                    self._end(choice, is_better=False)
        if abs(self._load - self._load_before) > OTHER_LOAD:
            self._load_before = self._load
            for choice in self._choices.values():
                choice.wait = FIRST_WAIT
                choice.until_trial = min(choice.until_trial, FIRST_WAIT)

    def _next(self, choice: _Choice) -> Setting:
        """The setting of the next step: in turns while one is tried."""
        choice.until_trial -= 1
        if choice.tried is None and choice.until_trial <= 0:
            quiet = self._load < QUIET
            rest = [s for s in self._settings if s != choice.used and (quiet or not s.spins)]
            choice.tried = rest[choice.trials % len(rest)]
            choice.trials += 1
        if choice.tried is not None and len(choice.with_tried) < len(choice.with_used):
            return choice.tried
        return choice.used

    def _judge(self, choice: _Choice) -> None:
        pairs = len(choice.with_tried)
        if pairs == 0 or pairs < len(choice.with_used):
            return
        # the longest quarter was disturbed by other work
        kept = max(1, pairs * 3 // 4)
        used, tried = (sum(sorted(times)[:kept]) for times in (choice.with_used, choice.with_tried))
        if pairs >= PAIRS or (pairs >= 3 and not 1 / CLEARLY < tried / used < CLEARLY) or tried > AT_ONCE * used:
            self._end(choice, is_better=GAIN * tried < used)

    def _end(self, choice: _Choice, is_better: bool) -> None:
        """End a trial."""
        if is_better and choice.tried is not None:
            choice.used, choice.wait = choice.tried, FIRST_WAIT
        else:
            choice.wait = min(2 * choice.wait, MOST_WAIT)
        choice.tried, choice.until_trial = None, choice.wait
        choice.with_used, choice.with_tried = [], []

    def _apply(self, setting: Setting) -> None:
        _BLOCKING.set(setting.threads > 1 and not setting.spins)
        _COUNT.set(setting.threads)


class _Count:
    """torch's number of threads, which every engine of the process sets for its steps."""

    def __init__(self) -> None:
        self._given = self._set = 0

    @property
    def given(self) -> int:
        """The number that there was before an engine set another, or that somebody else has set since."""
        self._look()
        return self._given

    def set(self, count: int) -> None:
        """Compute with so many from now on."""
        self._look()
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        self._set = count

    def give_back(self) -> None:
        """Leave torch as it was; an engine that is still there sets its number again."""
        self.set(self.given)
        self._set = 0

    def _look(self) -> None:
        if torch.get_num_threads() != self._set:
            self._given = torch.get_num_threads()


_COUNT = _Count()


def given_threads() -> int:
    """How many threads an engine may compute with: torch's own number, whatever engines before this one have set."""
    return _COUNT.given


class OtherProcesses:
    """Cores that other processes take of those that this one may use, by Linux's counters; 0 where there are none."""

    def __init__(self) -> None:
        self._cores = {f"cpu{number}" for number in os.sched_getaffinity(0)} if Path("/proc/stat").exists() else set()
        self._at, self._busy, self._load = time.monotonic(), self._others_seconds(), 0.0

    def __call__(self) -> float:
        """On average since about `LOOK_SECONDS` ago."""
        now = time.monotonic()
        if self._cores and now - self._at >= LOOK_SECONDS:
            busy = self._others_seconds()
            self._load = max(0.0, busy - self._busy) / (now - self._at)
            self._at, self._busy = now, busy
        return self._load

    def _others_seconds(self) -> float:
        """Seconds that the cores were busy with others, ever."""
        if not self._cores:
            return 0.0
        ticks = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *counts = line.split()
            if name in self._cores:
                user, nice, system, _idle, _iowait, irq, softirq, steal = (int(count) for count in counts[:8])
                ticks += user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


class _Blocking:
    """Makes OpenMP threads block while it is on.

    Its library spins for milliseconds; but only for microseconds while it manages more threads than there are cores
    (GOMP_SPINCOUNT in the manual of GNU libgomp). So a thread that does nothing keeps a team of its own, a thread more
    than there are cores. That holds for all engines of the process: each sets it for its steps.
    """

    def __init__(self) -> None:
        self._over: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def set(self, on: bool) -> None:
        """Begin or end it."""
        if on == (self._thread is not None):
            return
        if not on:
            self.end()
            return
        self._over, ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=_keep_team, args=(ready, self._over), daemon=True)
        self._thread.start()
        ready.wait()

    def end(self) -> None:
        """Let threads spin."""
        if self._thread is not None and self._over is not None:
            self._over.set()
            self._thread.join()
            self._thread = None


_BLOCKING = _Blocking()


def _keep_team(ready: threading.Event, over: threading.Event) -> None:
    """Have a team of OpenMP threads, which lives as long as the thread that called it together."""
    size = len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1
    torch.set_num_threads(size)
    torch.zeros(size * 2**16).add_(1)  # large enough to be shared out among all
    ready.set()
    over.wait()
