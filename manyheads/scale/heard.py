"""What the replicas that this process knows have said last, by name; a router hears it, `/metrics` tells it."""

from __future__ import annotations

from manyheads.stats import EngineStats

by_replica: dict[str, EngineStats] = {}
"""NOTE: a router runs in a thread of its own, and replaces all at once; read it by the module's name."""
