"""Figures of a simulation, or of a real run: goodput, latency, what it took and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.cluster import Outcome
from cluster.traffic import Request


def latency(requests: Sequence[Request], seconds: float, ttft: float, tpot: float) -> dict[str, Any]:
    """Return rates and percentiles of requests that came in so many seconds, by objectives in seconds."""
    first = np.array([request.ttft for request in requests])
    per_token = np.array([request.tpot for request in requests])
    whole = np.array([request.last - request.at for request in requests])
    good = (first <= ttft) & (per_token <= tpot)
    found = {"requests_per_s": len(requests) / seconds, "goodput": good.sum() / seconds, "attained": good.mean()}
    found["output_tokens_per_s"] = sum(request.output for request in requests) / seconds
    for name, values in (("ttft", first), ("tpot", per_token), ("whole", whole)):
        found |= {f"{name}_p{p}_s": float(np.percentile(values, p)) for p in (50, 95, 99)}
    return {key: float(f"{float(value):.4g}") for key, value in found.items()}


def figures(outcome: Outcome, settle: float, seconds: float, ttft: float, tpot: float, price: float) -> dict[str, Any]:
    """Return the figures of a simulation.

    Args:
        settle: what arrived in the first so many seconds does not count.
        seconds: requests arrived for so long.
        price: of a replica for an hour.
    """
    requests = [request for request in outcome.requests if request.at >= settle]
    found = latency(requests, seconds - settle, ttft, tpot)
    prompts = sum(request.prompt for request in requests)
    hours = outcome.replica_seconds / 3600
    tokens = sum(request.output for request in outcome.requests)
    found |= {
        "prefix_hits": round(sum(request.hits for request in requests) / prompts, 4),
        "busiest_to_mean": round(float(np.mean(outcome.uneven)), 3) if outcome.uneven else None,
        "busy": round(outcome.busy_seconds / outcome.replica_seconds, 4),
        "replica_hours": round(hours, 3),
        "most_replicas": outcome.most_replicas,
        "moved": outcome.moved,
        "cost_per_million_tokens": round(price * hours / tokens * 1e6, 4),
    }
    return found
