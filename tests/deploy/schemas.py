"""What the manifests use of custom resources, of Prometheus' rules and of Grafana's dashboards, as JSON schemas.

They are strict (no other keys), so that a misspelt one is found without the definitions of a cluster. Sources: the
custom resource definitions of KubeRay 1.4, Gateway API 1.3 and its inference extension 1.0; Ray Serve's config schema.
"""

from __future__ import annotations

from typing import Any

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
SECONDS = {"type": "number", "exclusiveMinimum": 0}


def obj(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these keys and no others."""
    properties = required | optional
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(item: dict[str, Any], least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least}


def resource(api: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return obj({"apiVersion": {"const": api}, "kind": {"const": kind}, "metadata": obj({"name": NAME}), "spec": spec})


INFERENCE_POOL = resource(
    "inference.networking.k8s.io/v1",
    "InferencePool",
    obj(
        {
            "selector": obj({"matchLabels": {"type": "object", "minProperties": 1, "additionalProperties": TEXT}}),
            "targetPorts": many(obj({"number": PORT})),
            "endpointPickerRef": obj(
                {"name": NAME, "port": obj({"number": PORT})}, failureMode={"enum": ["FailOpen", "FailClose"]}
            ),
        }
    ),
)

HTTP_ROUTE = resource(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    obj(
        {
            "parentRefs": many(obj({"name": NAME})),
            "rules": many(
                obj(
                    {"backendRefs": many(obj({"group": TEXT, "kind": TEXT, "name": NAME}))},
                    matches=many(obj({"path": obj({"type": {"const": "PathPrefix"}, "value": TEXT})})),
                    timeouts=obj({"request": {"type": "string", "pattern": r"^\d+(h|m|s|ms)$"}}),
                )
            ),
        }
    ),
)

POD = {"type": "object"}  # the test holds it against Kubernetes' own schema
GROUP = {"rayStartParams": {"type": "object", "additionalProperties": TEXT}, "template": obj({"spec": POD})}
RAY_SERVICE = resource(
    "ray.io/v1",
    "RayService",
    obj(
        {
            "serveConfigV2": TEXT,
            "rayClusterConfig": obj(
                {
                    "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                    "headGroupSpec": obj(GROUP),
                    "workerGroupSpecs": many(
                        obj(GROUP | {"groupName": NAME, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT})
                    ),
                },
                enableInTreeAutoscaling={"type": "boolean"},
            ),
        },
        upgradeStrategy=obj({"type": {"enum": ["NewCluster", "None"]}}),
    ),
)

SERVE_CONFIG = obj(
    {
        "applications": many(
            obj(
                {
                    "name": NAME,
                    "import_path": {"const": "manyheads.scale:app"},
                    "route_prefix": {"type": "string", "pattern": "^/"},
                    "args": {"type": "object"},
                }
            )
        )
    }
)

DURATION = {"type": "string", "pattern": r"^\d+[smhd]$"}
RULES = obj(
    {
        "groups": many(
            obj(
                {
                    "name": NAME,
                    "rules": many(
                        obj(
                            {
                                "alert": {"type": "string", "pattern": "^Manyheads[A-Z][A-Za-z]+$"},
                                "expr": TEXT,
                                "labels": obj({"severity": {"enum": ["critical", "warning", "info"]}}),
                                "annotations": obj({"summary": {"type": "string", "pattern": r"\.$"}}),
                            },
                            **{"for": DURATION},
                        )
                    ),
                }
            )
        )
    }
)

SOURCE = obj({"type": {"const": "prometheus"}, "uid": {"const": "$datasource"}})
PLACE = obj({"x": COUNT, "y": COUNT, "w": {"type": "integer", "minimum": 1, "maximum": 24}, "h": COUNT})
PANEL = obj(
    {
        "id": COUNT,
        "title": TEXT,
        "type": {"enum": ["timeseries", "stat"]},
        "gridPos": PLACE,
        "datasource": SOURCE,
        "fieldConfig": obj({"defaults": {"type": "object"}, "overrides": {"type": "array"}}),
        "targets": many(obj({"refId": {"type": "string", "pattern": "^[A-Z]$"}, "expr": TEXT, "legendFormat": TEXT})),
    },
    description=TEXT,
)
DASHBOARD = obj(
    {
        "title": TEXT,
        "uid": NAME,
        "schemaVersion": {"type": "integer", "minimum": 36},
        "templating": obj({"list": many({"type": "object", "required": ["name", "type", "query"]})}),
        "panels": many(PANEL),
    },
    editable={"type": "boolean"},
    refresh=DURATION,
    time=obj({"from": TEXT, "to": TEXT}),
)
