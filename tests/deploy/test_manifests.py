from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from manyheads.cli import make_parser
from manyheads.scale.room import ray_options
from manyheads.scale.settings import AppSettings
from tests.deploy import schemas

FOLDER = Path(__file__).parents[2] / "deploy"
KUBERNETES = "1.34"
CUSTOM = {"InferencePool": schemas.INFERENCE_POOL, "HTTPRoute": schemas.HTTP_ROUTE, "RayService": schemas.RAY_SERVICE}


def resources(name: str) -> dict[str, Any]:
    """By kind."""
    return {r["kind"]: r for r in yaml.safe_load_all((FOLDER / name).read_text())}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("replicas.yaml", {"Deployment", "Service", "PodDisruptionBudget"}),
        ("gateway.yaml", {"InferencePool", "HTTPRoute"}),
        ("rayservice.yaml", {"RayService"}),
    ],
)
def test_schemas(name: str, kinds: set[str]) -> None:
    found = resources(name)
    assert found.keys() == kinds
    for kind, one in found.items():
        if kind in CUSTOM:
            jsonschema.validate(one, CUSTOM[kind])
        else:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_a_misspelt_key_is_found() -> None:
    deployment = resources("replicas.yaml")["Deployment"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["readinesProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    pool = resources("gateway.yaml")["InferencePool"]
    pool["spec"]["targetPort"] = pool["spec"].pop("targetPorts")
    with pytest.raises(jsonschema.ValidationError, match="targetPort"):
        jsonschema.validate(pool, schemas.INFERENCE_POOL)


def test_replicas_are_what_the_server_is() -> None:
    found = resources("replicas.yaml")
    pod = found["Deployment"]["spec"]["template"]
    spec, labels = pod["spec"], pod["metadata"]["labels"]
    (container,) = spec["containers"]
    options = vars(make_parser().parse_args(container["args"]))
    assert options["host"] == "0.0.0.0"
    before_sigterm = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > before_sigterm + options["drain_timeout"]
    probes = {key: container[f"{key}Probe"]["httpGet"]["path"] for key in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    (port,) = container["ports"]
    assert port["containerPort"] == options["port"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    selected = found["Service"]["spec"]["selector"]
    assert selected == labels == found["Deployment"]["spec"]["selector"]["matchLabels"]
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    gateway = resources("gateway.yaml")
    pool = gateway["InferencePool"]
    assert pool["spec"]["selector"]["matchLabels"] == labels
    assert pool["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    (backend,) = gateway["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])


def test_the_ray_cluster_has_room_for_its_replicas() -> None:
    spec = resources("rayservice.yaml")["RayService"]["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    jsonschema.validate(config, schemas.SERVE_CONFIG)
    cluster = spec["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):  # their pods by Kubernetes' own schema
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (application,) = config["applications"]
    settings = AppSettings.read(application["args"])
    engine, server = settings.engine_config(), settings.server_config()
    worker = workers["template"]["spec"]
    gpus = worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    wanted = ray_options(settings.resources, engine)["num_gpus"]
    assert wanted == engine.tensor_parallel_size <= gpus
    scaling = settings.scaling.options()["autoscaling_config"]
    assert scaling["min_replicas"] <= workers["minReplicas"] * (gpus // wanted)
    assert scaling["max_replicas"] <= workers["maxReplicas"] * (gpus // wanted)
    assert worker["terminationGracePeriodSeconds"] > server.drain_timeout
