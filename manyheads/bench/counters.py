"""A server counts for itself, and tells by `/metrics`: tokens a step, acceptance by depth, memory by part."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

import msgspec

_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Counters(msgspec.Struct):
    """Counters are what one look at a server found; what it does not have stays 0 or empty."""

    tokens: float = 0.0
    row_steps: float = 0.0
    drafts: float = 0.0
    """The number of speculating rows, summed over steps; vLLM alone has it."""
    accepted: float = 0.0
    drafted_by_depth: dict[int, float] = {}
    accepted_by_depth: dict[int, float] = {}
    memory: dict[str, int] = {}
    """The bytes of each kind of memory."""
    by_engine: dict[str, float] = {}
    """Of several engines behind one server, the tokens of each, by its name."""


def parse(text: str) -> Counters | None:
    """Read counters from Prometheus' text, ours or vLLM's; return None if it holds neither."""
    seen = Counters(drafted_by_depth={}, accepted_by_depth={}, memory={}, by_engine={})
    known = False
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        full, labels_text, value_text = match.groups()
        prefix, _, name = full.replace(":", "_", 1).partition("_")
        if prefix not in ("manyheads", "vllm"):
            continue
        try:
            value = float(value_text)
        except ValueError:
            continue
        known = True
        labels = dict(_LABEL.findall(labels_text or ""))
        if name == "generation_tokens_total":
            seen.tokens += value
        elif name == "engine_generation_tokens_total":
            seen.by_engine[labels["engine"]] = value
        elif name == "decoding_row_steps_total":
            seen.row_steps += value
        elif name == "spec_decode_num_drafts_total":
            seen.drafts += value
        elif name == "spec_decode_num_accepted_tokens_total":
            seen.accepted += value
        elif name == "spec_decode_drafted_by_depth_total":
            seen.drafted_by_depth[int(labels["depth"])] = value
        elif name == "spec_decode_accepted_by_depth_total":
            seen.accepted_by_depth[int(labels["depth"])] = value
        elif name == "spec_decode_num_accepted_tokens_per_pos_total":
            depth = int(labels["position"]) + 1
            seen.accepted_by_depth[depth] = seen.accepted_by_depth.get(depth, 0.0) + value
        elif name == "memory_bytes":
            seen.memory[labels.get("kind", "rest")] = int(value)
    return seen if known else None


def look(url: str, api_key: str | None = None, timeout: float = 5.0) -> Counters | None:
    """Return the server's counters of now, or None if it has none that we know, or does not answer."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", headers=headers), timeout=timeout) as page:
            return parse(page.read().decode("utf-8", "replace"))
    except (OSError, urllib.error.URLError, ValueError):
        return None


def tokens_per_step(before: Counters, after: Counters) -> float | None:
    """Return the tokens that a decoding row got in a step, as a mean between two looks."""
    steps = after.row_steps - before.row_steps
    if steps > 0:
        return (after.tokens - before.tokens) / steps
    drafts = after.drafts - before.drafts
    return 1 + (after.accepted - before.accepted) / drafts if drafts > 0 else None


def by_engine(before: Counters, after: Counters) -> dict[str, float]:
    """Return the tokens of each engine between two looks; one that has gone meanwhile is left out."""
    return {name: tokens - before.by_engine.get(name, 0.0) for name, tokens in after.by_engine.items()}


def acceptance(before: Counters, after: Counters) -> list[float]:
    """Return the share of trees that were accepted to depth 1, 2, … between two looks, as deep as trees went."""
    shares = []
    for depth in sorted(after.accepted_by_depth):
        accepted = after.accepted_by_depth[depth] - before.accepted_by_depth.get(depth, 0.0)
        if after.drafted_by_depth:
            drafted = after.drafted_by_depth.get(depth, 0.0) - before.drafted_by_depth.get(depth, 0.0)
        else:
            drafted = after.drafts - before.drafts
        if drafted <= 0:
            break
        shares.append(accepted / drafted)
    return shares
