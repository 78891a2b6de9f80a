"""A replica: an engine in a process of its own, supervised as by a server, that other processes reach through Ray."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator

import msgspec

from manyheads.config import EngineConfig
from manyheads.errors import EngineError
from manyheads.frontend.engine_client import EngineClient
from manyheads.frontend.engine_process import BUILD_ENGINE
from manyheads.request import EngineRequest
from manyheads.scale.heard import Mended
from manyheads.scale.router import MENDED, STATS
from manyheads.scale.routing import Route


class Replica:
    """What Serve runs one of for each engine.

    Args:
        config: of the engine, as JSON.
        watchdog, max_restarts, build: as `EngineClient`'s; a replica whose engine cannot be replaced is unhealthy, and
            Serve starts another.
    """

    async def __init__(self, config: str, watchdog: float, max_restarts: int, build: str = BUILD_ENGINE) -> None:  # type: ignore[misc]
        # Serve waits for it, within the event loop that everything else here runs in
        engine = msgspec.json.decode(config, type=EngineConfig)
        self._client = EngineClient(engine, watchdog=watchdog, max_restarts=max_restarts, build=build)
        self._ready = msgspec.msgpack.encode(await self._client.start())

    async def ready(self) -> bytes:
        """`EngineReady` of this engine."""
        return self._ready

    async def generate(self, data: bytes, route: Route) -> AsyncGenerator[bytes, None]:
        """The deltas of a request, to the last; where the reader leaves, the request is aborted.

        Args:
            data: `EngineRequest`.
            route: read by the router on the way here.
        """
        client = self._client
        request = msgspec.msgpack.decode(data, type=EngineRequest)
        name = request.request_id
        # a front end that could not reach this replica for a moment may send a request again that has not ended here
        request = msgspec.structs.replace(request, request_id=f"{name} {uuid.uuid4().hex}")
        queue = client.submit([request])
        ended = False
        try:
            while not ended:
                for delta in await queue.take():
                    ended = delta.finish_reason is not None
                    yield msgspec.msgpack.encode(msgspec.structs.replace(delta, request_id=name))
        finally:
            if not ended:
                client.abort(request.request_id)

    async def check_health(self) -> None:
        """Raise EngineError where the engine says nothing, or will not be replaced any more."""
        client = self._client
        if not client.alive:
            raise EngineError(client.failure or "the engine says nothing")

    async def record_routing_stats(self) -> dict[str, bytes]:
        """What routers and `/metrics` get to know of this replica."""
        client = self._client
        mended = Mended(client.num_restarts, client.num_resumed)
        return {STATS: msgspec.msgpack.encode(client.stats), MENDED: msgspec.msgpack.encode(mended)}

    async def __del__(self) -> None:
        """Serve's last call: nothing runs any more, or it has taken too long."""
        await self._client.close()
