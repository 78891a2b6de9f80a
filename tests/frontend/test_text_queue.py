"""Long texts wait in short queues, and not for giant ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from manyheads.errors import QueueFull
from manyheads.frontend.text_queue import GIANT_CHARACTERS, MOST_CHARACTERS, TextQueue

LONG, GIANT = GIANT_CHARACTERS, GIANT_CHARACTERS + 1


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Work that waits for this is held up; in the end it is let go."""
    event = threading.Event()
    yield event
    event.set()


def test_a_giant_text_holds_up_giant_ones_only(held: threading.Event) -> None:
    async def check() -> None:
        queue = TextQueue()
        giant = asyncio.create_task(queue.run(GIANT, lambda: held.wait(10) and "giant"))
        await asyncio.sleep(0)
        assert await queue.run(LONG, lambda: "long") == "long"
        second = asyncio.create_task(queue.run(GIANT, lambda: "second"))
        await asyncio.sleep(0.05)
        assert not second.done()
        held.set()
        assert await asyncio.gather(giant, second) == ["giant", "second"]
        queue.close()

    asyncio.run(check())


@pytest.mark.parametrize("size", [LONG, GIANT])
def test_only_so_much_may_wait(held: threading.Event, size: int) -> None:
    async def check() -> None:
        queue, fits = TextQueue(), MOST_CHARACTERS // size
        first = [asyncio.create_task(queue.run(size, lambda: held.wait(10))) for _ in range(fits)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="characters wait to be encoded"):
            await queue.run(size, lambda: True)
        held.set()
        assert await asyncio.gather(*first) == [True] * fits
        assert await queue.run(size, lambda: "again") == "again"
        queue.close()

    asyncio.run(check())


def test_a_text_counts_until_it_is_done_though_its_client_has_left(held: threading.Event) -> None:
    async def check() -> None:
        queue = TextQueue()
        left = asyncio.create_task(queue.run(GIANT, lambda: held.wait(10)))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        with pytest.raises(QueueFull):
            await queue.run(MOST_CHARACTERS, lambda: True)
        held.set()
        queue.close()

    asyncio.run(check())


def test_what_fails_and_what_is_larger_than_the_queue() -> None:
    async def check() -> None:
        queue = TextQueue()
        with pytest.raises(ZeroDivisionError):
            await queue.run(MOST_CHARACTERS, lambda: 1 / 0)
        assert await queue.run(10 * MOST_CHARACTERS, lambda: 1) == 1
        queue.close()

    asyncio.run(check())
