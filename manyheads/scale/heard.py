"""What the replicas that this process knows have said last, by name; a router hears it, `/metrics` tells it."""

from __future__ import annotations

import msgspec

from manyheads.stats import EngineStats


class Mended(msgspec.Struct, frozen=True):
    """A replica tells what it has done for its own engine, as `frontend.backend.Backend` counts it."""

    restarts: int = 0
    resumed: int = 0


# NOTE: a router runs in a thread of its own, and replaces all at once; read these by the module's name
by_replica: dict[str, EngineStats] = {}
mended: dict[str, Mended] = {}
"""Those that are gone are here, too, for what is counted never becomes less."""
