"""Rank 0 of several that share a model: it starts the others, and tells them what its runner does."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import msgspec

from manyheads.config import EngineConfig
from manyheads.engine.blueprint import Blueprint, Progress
from manyheads.engine.rank_messages import Clear, Message, RecordPasses, RecordSteps, Rewind, Teller
from manyheads.engine.readout import PendingStep
from manyheads.engine.recorded import RecordedSteps
from manyheads.engine.runner import Runner
from manyheads.engine.step import Request, StepPlan, nothing
from manyheads.models.parallel import Ranks, here
from manyheads.speculation.draft import Draft

COMMAND: tuple[str, ...] = (sys.executable, "-m", "manyheads.engine.rank")
"""What starts a rank."""
LENGTH_BYTES = 4
"""A message is preceded by its length, in so many bytes."""
CLOSE_SECONDS = 10.0
"""How long ranks that were killed may take to end."""
ARRIVALS_SECONDS = 0.01
"""So often rank 0 looks who has come."""


class RankLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told first."""

    config: EngineConfig
    rank: int
    folder: str
    """In which ranks find each other."""
    version: str
    """Of manyheads, which has to be the same."""


class RankFailed(RuntimeError):
    """Another rank has ended, and with it the engine."""


class Others:
    """The processes of the ranks from 1 on. Messages go through their standard input; where that closes, they end."""

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        self.failure: str | None = None
        """How one of them ended."""
        self._ranks: Ranks | None = None
        self._processes = [
            subprocess.Popen(COMMAND, stdin=subprocess.PIPE) for _ in range(1, config.tensor_parallel_size)
        ]
        self._pipes = [_writable(process) for process in self._processes]
        left, there = threading.Event(), weakref.ref(self)
        watchers = [
            threading.Thread(target=_watch, args=(there, rank, process, left), daemon=True)
            for rank, process in enumerate(self._processes, 1)
        ]
        self.close = weakref.finalize(self, _close, self._processes, self._pipes, watchers, left)
        """Ends them, as it happens by itself when nobody has this object any more, or the program ends."""
        for watcher in watchers:
            watcher.start()
        for rank in range(1, config.tensor_parallel_size):
            first = RankLaunch(config=config, rank=rank, folder=str(folder), version=version("manyheads"))
            with self.blamed():
                self._send(self._pipes[rank - 1], msgspec.msgpack.encode(first))

    def join(self, folder: Path, plan: Blueprint) -> Ranks:
        """Meet them. Raises RankFailed, also where one of them has ended before it came."""
        while not all(here(folder, rank).exists() for rank in range(1, len(self._processes) + 1)):
            if self.failure is not None:
                raise RankFailed(self.failure)
            time.sleep(ARRIVALS_SECONDS)
        with self.blamed():
            ranks = Ranks.join(0, len(self._processes) + 1, folder, plan.shape.device, plan.row_bytes)
        self._ranks = ranks
        return ranks

    def tell(self, message: Message) -> None:
        """Say what comes next. Raises RankFailed."""
        if self.failure is not None:
            raise RankFailed(self.failure)
        data = msgspec.msgpack.encode(message)
        with self.blamed():
            for pipe in self._pipes:
                self._send(pipe, data)

    @contextlib.contextmanager
    def blamed(self) -> Any:
        """An error that another rank's end may have caused says so."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
            ended = (_how(rank, process) for rank, process in enumerate(self._processes, 1))
            how = self.failure or next((line for line in ended if line), None)
            if how is None:
                raise
            raise RankFailed(how) from error

    def ended(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """A rank is no more: who waits for it is let go."""
        self.failure = _how(rank, process)
        if self._ranks is not None:
            self._ranks.abort()

    @staticmethod
    def _send(pipe: IO[bytes], data: bytes) -> None:
        pipe.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        pipe.flush()


class LeadingRunner(Runner):
    """Rank 0's runner: the others hear of what it does before it does it."""

    def __init__(self, others: Others, folder: Path, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._others, self._teller = others, Teller()
        # NOTE: not sooner: NCCL's threads go on asking the store in it, and wait for minutes where it is missing
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        weakref.finalize(self, _leave, self.model.ranks, self.recorded)

    def launch(self, plan: StepPlan, follow: Callable[[], None] = nothing) -> PendingStep:
        self._others.tell(self._teller.launch(plan))

        def lead() -> None:
            follow()
            self._others.tell(self._teller.followed(plan))

        with self._others.blamed():
            return super().launch(plan, lead)

    def put(self, requests: list[Request]) -> None:
        self._others.tell(self._teller.put(requests))
        super().put(requests)

    def rewind(self, requests: list[Request]) -> None:
        self._others.tell(Rewind([request.row for request in requests]))
        super().rewind(requests)

    def clear(self) -> None:
        self._others.tell(Clear())
        super().clear()

    def record_steps(self, wanted: list[tuple[int, Draft]]) -> None:
        self._others.tell(RecordSteps(wanted))
        super().record_steps(wanted)

    def record_passes(self, max_tokens: int, max_inflight: int, instead: Mapping[int, int]) -> None:
        self._others.tell(RecordPasses(max_tokens, max_inflight, dict(instead)))
        super().record_passes(max_tokens, max_inflight, instead)


def leading_runner(plan: Blueprint, progress: Progress) -> Runner:
    """Start the other ranks, and build with them.

    Raises:
        CheckpointError: a checkpoint cannot hold.
        RankFailed: another rank has ended.
    """
    folder = Path(tempfile.mkdtemp(prefix="manyheads-ranks-"))
    with contextlib.ExitStack() as failed:
        failed.callback(shutil.rmtree, folder, ignore_errors=True)
        progress(f"starting {plan.config.tensor_parallel_size} ranks")
        others = Others(plan.config, folder)
        failed.callback(others.close)
        ranks = others.join(folder, plan)
        failed.callback(_leave, ranks, None)
        with others.blamed():
            runner = plan.runner(progress, partial(LeadingRunner, others, folder), ranks)
        failed.pop_all()  # the runner does all that when it goes
        return runner


def _leave(ranks: Ranks, recorded: RecordedSteps | None) -> None:
    """Nobody uses this rank any more. NCCL ends a group only when no graph is left that it has a part in, and where
    nobody aborts it, it waits for the others first: at the end of a process, for good."""
    if recorded is not None:
        recorded.forget()
    ranks.abort()


def _writable(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _how(rank: int, process: subprocess.Popen[bytes]) -> str | None:
    status = process.returncode
    if status is None:
        return None
    return f"rank {rank} ended " + (f"by signal {-status}" if status < 0 else f"with status {status}")


def _watch(others: weakref.ref[Others], rank: int, process: subprocess.Popen[bytes], left: threading.Event) -> None:
    process.wait()
    if not left.is_set() and (there := others()) is not None:
        there.ended(rank, process)


def _close(
    processes: list[subprocess.Popen[bytes]],
    pipes: list[IO[bytes]],
    watchers: list[threading.Thread],
    left: threading.Event,
) -> None:
    """Nobody uses the ranks any more. At the end of a program no thread may be in the middle of a call into torch: it
    would not get back to the interpreter, and end the process by a signal."""
    left.set()
    for process in processes:
        process.kill()  # it owns nothing that would have to be saved
    for pipe in pipes:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    for watcher in watchers:
        if watcher.ident is not None and watcher is not threading.current_thread():
            watcher.join(CLOSE_SECONDS)
