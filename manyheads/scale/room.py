"""What a replica takes of a cluster, and whether there is room; Ray itself would wait for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from manyheads.config import ConfigError, EngineConfig
from manyheads.scale.settings import Resources


def ray_options(resources: Resources, config: EngineConfig) -> dict[str, Any]:
    """Ray's options of a replica; a cluster is there."""
    gpus = resources.num_gpus
    if gpus is None:
        device = config.device
        if device == "auto":
            device = "cuda" if any(there.get("GPU") for there in resources_by_machine()) else "cpu"
        gpus = 0 if device == "cpu" else config.tensor_parallel_size
    return {"num_cpus": resources.num_cpus, "num_gpus": gpus, "resources": resources.custom}


def check_room(options: Mapping[str, Any], count: int) -> None:
    """See that so many replicas fit into the machines of the cluster, were these empty.

    Args:
        options: of `ray_options`.

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
