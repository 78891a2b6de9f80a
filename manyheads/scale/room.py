"""Whether a cluster has room for what is to run there; Ray itself would wait for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from manyheads.config import ConfigError


def check_room(options: Mapping[str, Any], count: int) -> None:
    """See that so many replicas fit into the machines of the cluster, were these empty.

    Args:
        options: Ray's, of a replica.

    Raises:
        ConfigError: saying how many fit.
    """
    wanted = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
    wanted = {name: amount for name, amount in wanted.items() if amount}
    machines = resources_by_machine()
    fit = sum(min((int(m.get(name, 0) / amount) for name, amount in wanted.items()), default=count) for m in machines)
    if fit < count:
        each = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        raise ConfigError(f"{count} replicas of {each} each are asked for, and the cluster has room for {fit}")


def resources_by_machine() -> list[dict[str, float]]:
    """What each machine of the cluster has, by Ray's names."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
