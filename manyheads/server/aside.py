"""Work beside the event loop that may take minutes, such as loading or starting something."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Aside:
    """A thread beside the event loop, for which nobody waits at the end of the program: Ctrl-C ends a download.

    NOTE: it stays. Processes may be ended by the system with the thread that has started them (Ray's are).
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    async def do(self, work: Callable[[], T]) -> T:
        """Do something there, and wait for it; it goes on if the waiting is cancelled."""
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()  # so that it takes a result even when nobody waits for it any more
        self._work.put((work, done))
        return await asyncio.wrap_future(done)

    def _run(self) -> None:
        while True:
            work, done = self._work.get()
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
