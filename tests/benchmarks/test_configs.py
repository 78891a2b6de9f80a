"""The count of changed configurations: what is published adds up, and a text that differs ends the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from manyheads.models.registry import FAMILIES
from tests.models.test_config import OUTCOMES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import configs


def test_the_published_count_adds_up() -> None:
    result: dict[str, Any] = json.loads(configs.RESULT.read_text())
    families = result["families"]
    assert {found["family"] for found in families} <= FAMILIES.keys()
    assert result["outcomes"] == {kind: sum(found[kind] for found in families) for kind in OUTCOMES}
    assert sum(result["outcomes"].values()) == result["configurations"] > 220
    told = " ".join((configs.ROOT / "docs" / "models.md").read_text().split())
    counts = result["outcomes"]
    assert (
        f"of {result['configurations']}, {counts['equal']} gave equal logits, {counts['refused']} were refused" in told
    )


def test_outcomes_are_counted_and_another_text_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "outcome", lambda family, changes, length: "refused")
    counts = configs.count(30)
    assert 10 < sum(found.total() for found in counts.values()) <= 30
    assert {kind for found in counts.values() for kind in found} == {"refused"}

    def differs(*_: Any) -> str:
        raise AssertionError("another text")

    monkeypatch.setattr(configs, "outcome", differs)
    with pytest.raises(AssertionError, match="another text"):
        configs.count(3)
