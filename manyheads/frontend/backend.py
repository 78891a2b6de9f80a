"""What a front end sends its requests to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from manyheads.config import EngineConfig
from manyheads.frontend.open_request import DeltaQueue
from manyheads.request import EngineReady, EngineRequest
from manyheads.stats import EngineStats


class Backend(Protocol):
    """An engine in a process beside this one (`EngineClient`), or many of them somewhere (`scale.ReplicaClient`)."""

    config: EngineConfig
    failure: str | None
    """Once there will be no engine any more, this says why."""

    @property
    def num_restarts(self) -> int:
        """Count the engines that replaced one that died or hung."""

    @property
    def num_resumed(self) -> int:
        """Count the requests that went on in another engine, each time."""

    @property
    def stats(self) -> EngineStats:
        """What the engine said last; of many, all together."""

    @property
    def by_engine(self) -> dict[str, EngineStats]:
        """The same of each of several engines, by its name; {} where there is one."""

    @property
    def serving(self) -> bool:
        """Tell whether an engine is there that takes requests."""

    @property
    def alive(self) -> bool:
        """Tell whether an engine speaks, or another is being started."""

    @property
    def num_open(self) -> int:
        """Count the requests that have not ended."""

    async def start(self) -> EngineReady:
        """Wait until an engine serves. Raises ConfigError or EngineError: it cannot."""

    def submit(self, requests: Iterable[EngineRequest]) -> DeltaQueue:
        """Send requests and return the queue of all their deltas, of which each request's last has a finish_reason."""

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its last delta follows. An unknown id is fine."""

    def abort_all(self) -> None:
        """Ask for the end of all open requests."""

    async def close(self) -> None:
        """Let go what there is. Open requests get a last delta that says so."""
