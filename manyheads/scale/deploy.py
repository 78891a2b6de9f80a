"""Deploys the application on a cluster that is there."""

from __future__ import annotations

import logging
import os
import re
import socket

import ray
from ray import serve

from manyheads.errors import EngineError
from manyheads.scale.room import check_room, ray_options
from manyheads.scale.serve_app import app
from manyheads.scale.settings import AppSettings

CONNECT_SECONDS = 5.0
"""A cluster's head must answer within them."""


def deploy(settings: AppSettings, address: str, name: str, route_prefix: str, may_grow: bool) -> None:
    """Build the application, and wait until it serves; one of the same name is replaced bit by bit.

    Args:
        may_grow: whether the cluster adds machines by itself.

    Raises:
        ConfigError: a setting cannot hold, or the cluster has no room.
        EngineError: there is no such cluster, or the application does not start there.
    """
    try:
        _find_head(address)
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError) as error:
        raise EngineError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    try:
        application = app(settings)
        if not may_grow:
            check_room(ray_options(settings.resources, settings.engine_config()), settings.scaling.replicas)
        serve.run(application, name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        raise EngineError(f"{name} could not start: {error}") from error
    finally:
        ray.shutdown()  # leaves the cluster, where the application goes on


def _find_head(address: str) -> None:
    """Raise OSError where nobody listens at an address; Ray itself would ask for minutes, with warnings of its own."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if found := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
