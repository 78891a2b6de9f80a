"""Many engines' statistics as those of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from manyheads.stats import AdapterStats, EngineStats, MemoryUse


def summed(every: Sequence[EngineStats]) -> EngineStats:
    """Sums, but of waits the shortest (a new request goes there), and of trees the largest."""
    if not every:
        return EngineStats()
    total = {
        field.name: [getattr(stats, field.name) for stats in every] for field in msgspec.structs.fields(EngineStats)
    }
    parts = [part.name for part in msgspec.structs.fields(MemoryUse)]
    uses = total.pop("memory")
    memory = MemoryUse(**{part: sum(getattr(use, part) for use in uses) for part in parts})
    adapters = {
        name: _adapter([stats.adapters[name] for stats in every if name in stats.adapters])
        for name in dict.fromkeys(name for stats in total.pop("adapters") for name in stats)
    }
    waits, trees, drafters = total.pop("queue_wait"), total.pop("tree_size"), total.pop("drafter")
    sums: dict[str, Any] = {name: _added(values) for name, values in total.items()}
    return EngineStats(
        memory=memory, queue_wait=min(waits), tree_size=max(trees), drafter=drafters[0], adapters=adapters, **sums
    )


def _adapter(every: list[AdapterStats]) -> AdapterStats:
    """One adapter's sums."""
    return AdapterStats(
        **{name: sum(getattr(stats, name) for stats in every) for name in AdapterStats.__struct_fields__}
    )


def _added(values: list[Any]) -> Any:
    """Numbers, or lists of numbers by depth."""
    if not isinstance(values[0], list):
        return sum(values)
    return [sum(each[depth] for each in values if depth < len(each)) for depth in range(max(map(len, values)))]
