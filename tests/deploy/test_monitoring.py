from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from manyheads.request import EngineReady
from manyheads.server.config import ConnectionLimits
from manyheads.server.connections import Guard
from manyheads.server.metrics import Metrics
from manyheads.stats import EngineStats
from tests.deploy import schemas

FOLDER = Path(__file__).parents[2] / "deploy"
PROMETHEUS_OWN = {"up"}


def page() -> dict[str, set[str]]:
    """Samples of our `/metrics` by name, with the values of `le` that they have."""
    engine = SimpleNamespace(
        stats=EngineStats(drafted_by_depth=[2], accepted_by_depth=[1], drafter="medusa"),
        num_restarts=0,
        num_resumed=0,
        by_engine={},
    )
    ready = EngineReady(
        model="m",
        max_model_len=8,
        vocab_size=8,
        dtype="float32",
        device="cpu",
        num_pages=4,
        page_size=16,
        eos_token_ids=[],
    )
    metrics = Metrics(engine, ready)
    Guard(ConnectionLimits(), metrics.drops, metrics.registry)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).add(sample.labels.get("le", ""))
    return found


def dashboard() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "grafana" / "manyheads.json").read_text()))


def rules() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "alerts.yaml").read_text()))


def expressions() -> list[str]:
    """All PromQL, with a value for each of Grafana's variables."""
    values = {"rate_interval": "5m", "range": "1h"} | {v["name"]: "1.0" for v in dashboard()["templating"]["list"]}
    found = [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]
    found += [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [re.sub(r"\$(?:__)?(\w+)", lambda match: values[match[1]], text) for text in found]


def names(text: str) -> set[str]:
    """The metrics that an expression reads. Raises ValueError where it is no PromQL."""
    found = set()

    def visit(expression: Any) -> None:
        if isinstance(expression, promql_parser.VectorSelector):
            found.add(expression.name)

    promql_parser.walk(promql_parser.parse(text), visit)
    return found


def test_schemas() -> None:
    jsonschema.validate(rules(), schemas.RULES)
    jsonschema.validate(dashboard(), schemas.DASHBOARD)


def test_every_metric_is_on_our_page() -> None:
    known = page().keys() | PROMETHEUS_OWN
    for text in expressions():
        assert names(text), text
        assert names(text) <= known, text
    assert names("rate(manyheads_num_preemption_total[5m]) > 1 and up") - known == {"manyheads_num_preemption_total"}


def test_objectives_of_the_dashboard_are_buckets() -> None:
    found = page()
    choices = {v["name"]: set(v["query"].split(",")) for v in dashboard()["templating"]["list"]}
    assert choices["ttft"] <= found["manyheads_time_to_first_token_seconds_bucket"]
    assert choices["tpot"] <= found["manyheads_request_time_per_output_token_seconds_bucket"]


def test_panels_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(p["x"], p["y"], p["x"] + p["w"], p["y"] + p["h"]) for p in (panel["gridPos"] for panel in panels)]
    assert all(right <= 24 for _, _, right, _ in places)
    for a, b in combinations(places, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_what_is_no_promql_is_found() -> None:
    with pytest.raises(ValueError, match="paren"):
        names("sum(rate(up[5m])")
