"""This process is a rank from 1 on: it builds its part of the model and does what rank 0 tells it.

`engine/ranks.py` starts it as `python -m manyheads.engine.rank`. What comes on standard input is a `RankLaunch` and
then messages; where it closes, this process ends, whatever it waits for.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import IO

import msgspec

from manyheads.engine.blueprint import Blueprint
from manyheads.engine.rank_messages import Follower, Message
from manyheads.engine.ranks import LENGTH_BYTES, RankLaunch
from manyheads.models.parallel import Ranks


def main() -> None:
    """Follow rank 0 until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to handle
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, inbox), daemon=True).start()
    launch = msgspec.msgpack.decode(inbox.get(), type=RankLaunch)
    decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
    try:
        follower = build(launch, lambda: decoder.decode(inbox.get()))
    except (ValueError, OSError) as error:
        sys.exit(f"rank {launch.rank}: {error}")
    while True:
        follower.follow(decoder.decode(inbox.get()))


def build(launch: RankLaunch, receive: Callable[[], Message]) -> Follower:
    """A follower. Raises ValueError or OSError: rank 0 is of another version, or this rank's part cannot be built."""
    if launch.version != version("manyheads"):
        raise ValueError(f"this is manyheads {version('manyheads')}, and rank 0 is {launch.version}")
    plan = Blueprint.draw(launch.config, lambda line: None, launch.rank)
    size = launch.config.tensor_parallel_size
    ranks = Ranks.join(launch.rank, size, Path(launch.folder), plan.shape.device, plan.row_bytes)
    return Follower(plan.runner(lambda line: None, ranks=ranks), plan.compiler(), receive)


def _receive(pipe: IO[bytes], inbox: queue.SimpleQueue[bytes]) -> None:
    # NOTE: a thread, since the main one may wait for a rank that is no more
    while length := pipe.read(LENGTH_BYTES):
        inbox.put(pipe.read(int.from_bytes(length, "little")))
    os._exit(0)


if __name__ == "__main__":
    main()
