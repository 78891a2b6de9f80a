"""Long texts are encoded in threads, and only so many may wait for that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from manyheads.errors import QueueFull

T = TypeVar("T")
GIANT_CHARACTERS = 50_000
"""Longer texts (about 50 ms of work and more) have a thread of their own, so that the others never wait for one."""
MOST_CHARACTERS = 2_000_000
"""Texts may wait in a queue up to so many characters, about 2 s of work; but one more may always be added to none."""


class _Lane:
    """A lane is a thread and the texts that wait for it, which are encoded in the order in which they came."""

    def __init__(self, name: str) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._num_characters = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        with self._lock:
            if self._num_characters and self._num_characters + size > MOST_CHARACTERS:
                raise QueueFull(f"texts of {self._num_characters} characters wait to be encoded")
            self._num_characters += size
        future = self.thread.submit(work)
        # a text counts until it is done, also when its client has left meanwhile
        future.add_done_callback(lambda _: self._leave(size))
        return await asyncio.wrap_future(future)

    def _leave(self, size: int) -> None:
        with self._lock:
            self._num_characters -= size


class TextQueue:
    """The text queue keeps long texts from holding up the event loop, and giant ones from holding up long ones."""

    def __init__(self) -> None:
        self._long, self._giant = _Lane("tokenizer"), _Lane("tokenizer-giant")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do what encodes a text of `size` characters; QueueFull if too much waits already."""
        lane = self._giant if size > GIANT_CHARACTERS else self._long
        return await lane.run(size, work)

    def close(self) -> None:
        """Stop; what waits is not done."""
        for lane in (self._long, self._giant):
            lane.thread.shutdown(wait=False, cancel_futures=True)
