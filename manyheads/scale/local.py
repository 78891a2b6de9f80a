"""Several replicas on one machine, behind the server that serves one engine, too."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from manyheads.config import ConfigError, EngineConfig
from manyheads.errors import EngineError
from manyheads.scale.client import ReplicaClient
from manyheads.scale.room import check_room, ray_options, resources_by_machine
from manyheads.scale.serve_app import replicas
from manyheads.scale.settings import AppSettings, Scaling
from manyheads.server import run
from manyheads.server.aside import Aside
from manyheads.server.config import ServerConfig

NAME = "manyheads"
WATCH_SECONDS = 2.0
"""So often it is looked whether Ray is still there."""


def serve_replicas(config: EngineConfig, options: ServerConfig, count: int) -> int:
    """Start Ray here, serve with so many replicas until a signal, and return the exit status.

    Raises:
        ConfigError, EngineError: it could not start; nothing is left behind.
    """
    if count < 1:
        raise ConfigError(f"--replicas must be at least 1, not {count}")

    aside = Aside()

    async def find() -> DeploymentHandle[Any]:
        await aside.do(lambda: _start_ray(options, count))
        keep_signals()
        handle = await aside.do(lambda: _start_replicas(config, options, count))
        while not await aside.do(_are_ready):  # a signal need not wait until they are
            await asyncio.sleep(0.1)
        return handle

    async def leave() -> None:
        await aside.do(_stop)

    async def watch() -> str:
        watching = Aside()  # of its own: it waits where Ray does not answer
        while await watching.do(resources_by_machine):
            await asyncio.sleep(WATCH_SECONDS)
        return "Ray has died on this machine"

    return run.serve(config, options, backend=lambda: ReplicaClient(config, find, leave, watch))


def _start_ray(options: ServerConfig, count: int) -> None:
    """A Ray of this program's own; it has room for as many replicas as there are to be, since processors are shared
    here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # engines are no background work
    if not options.verbose:
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # for Serve's own processes; here it is imported already
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(
            address="local",
            num_cpus=count + 2,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=options.verbose,
        )
    except Exception as error:  # Ray knows no narrower one for a machine that is too busy to start it
        raise EngineError(f"Ray could not start: {error}") from error


def keep_signals() -> None:
    """Give signals back to those who had them before Ray, whose library prints a stack and ends the program."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.getsignal(number))  # Python's handlers are as they were; the system's are not


def _start_replicas(config: EngineConfig, options: ServerConfig, count: int) -> DeploymentHandle[Any]:
    settings = AppSettings(scaling=Scaling(replicas=count))
    try:
        check_room(ray_options(settings.resources, config), count)
        serve.start(proxy_location=ProxyLocation.Disabled)
        target = serve.RunTarget(replicas(config, options, settings), name=NAME, route_prefix=None)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        return handle
    except RuntimeError as error:
        raise EngineError(f"the replicas could not start: {error}") from error


def _are_ready() -> bool:
    """Tell whether all replicas are there. Raises EngineError: they never will be."""
    told = serve.status().applications[NAME]
    if told.status == ApplicationStatus.DEPLOY_FAILED:
        lines = told.deployments["engine"].message.strip().splitlines()  # a replica's traceback, if one has begun
        raise EngineError(f"the replicas could not start: {lines[-1] if lines else told.message}")
    return told.status == ApplicationStatus.RUNNING


def _stop() -> None:
    if ray.is_initialized():
        ray.shutdown()  # with all that runs in it; requests have ended
