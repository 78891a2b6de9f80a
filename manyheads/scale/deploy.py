"""Deploys the application on a cluster that is there."""

from __future__ import annotations

import logging
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve

from manyheads.config import ConfigError, EngineConfig
from manyheads.errors import EngineError
from manyheads.scale.room import check_room
from manyheads.scale.serve_app import AppSettings, app, checked_settings


def deploy(settings: dict[str, Any], address: str, name: str, route_prefix: str, may_grow: bool) -> None:
    """Build the application of `AppSettings`, and wait until it serves; one of the same name is replaced bit by bit.

    Args:
        may_grow: whether the cluster adds machines by itself.

    Raises:
        ConfigError: a setting cannot hold, or the cluster has no room.
        EngineError: there is no such cluster, or the application does not start there.
    """
    try:
        checked = AppSettings(**settings)
    except ValidationError as error:
        raise ConfigError(str(error)) from error
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise EngineError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    try:
        application = app(checked)
        if not may_grow:
            engine = checked_settings("engine", checked.engine, EngineConfig)
            check_room(checked.resources.options(engine), checked.scaling.replicas)
        serve.run(application, name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        raise EngineError(f"{name} could not start: {error}") from error
    finally:
        ray.shutdown()  # leaves the cluster, where the application goes on
