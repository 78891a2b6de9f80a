"""Several replicas on one machine, behind the server that serves one engine, too."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle

from manyheads.config import ConfigError, EngineConfig
from manyheads.errors import EngineError
from manyheads.scale.client import ReplicaClient
from manyheads.scale.room import check_room
from manyheads.scale.serve_app import AppSettings, Scaling, replicas
from manyheads.server import run
from manyheads.server.aside import Aside
from manyheads.server.config import ServerConfig

NAME = "manyheads"


def serve_replicas(config: EngineConfig, options: ServerConfig, count: int) -> int:
    """Start Ray here, serve with so many replicas until a signal, and return the exit status.

    Raises:
        ConfigError, EngineError: it could not start; nothing is left behind.
    """
    if count < 1:
        raise ConfigError(f"--replicas must be at least 1, not {count}")

    aside = Aside()

    async def find() -> DeploymentHandle[Any]:
        return await aside.do(lambda: _start(config, options, count))

    async def leave() -> None:
        await aside.do(_stop)

    return run.serve(config, options, backend=lambda: ReplicaClient(config, find, leave))


def _start(config: EngineConfig, options: ServerConfig, count: int) -> DeploymentHandle[Any]:
    """A Ray of this program's own, with the replicas; it has room for as many as there are to be, since processors are
    shared here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # engines are no background work
    if not options.verbose:
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    settings = AppSettings(scaling=Scaling(replicas=count))
    try:
        ray.init(
            address="local",
            num_cpus=count + 2,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=options.verbose,
        )
        check_room(settings.resources.options(config), count)
        serve.start(proxy_location=ProxyLocation.Disabled)
        return serve.run(replicas(config, options, settings), name=NAME, route_prefix=None)
    except RuntimeError as error:
        raise EngineError(f"the replicas could not start: {error}") from error


def _stop() -> None:
    if ray.is_initialized():
        ray.shutdown()  # with all that runs in it; requests have ended
