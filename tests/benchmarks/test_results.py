"""Published results have the compact form, so that a clone is read and not scrolled."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common

ROOT = common.ROOT
RESULTS = sorted([*(ROOT / "benchmarks/results").rglob("*.json"), *(ROOT / "builtin_model/results").rglob("*.json")])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_results_have_the_form_that_scripts_write(path: Path) -> None:
    text = path.read_text()
    assert text == common.compact(json.loads(text)) + "\n"


def test_results_are_short() -> None:
    assert len(RESULTS) > 50
    assert sum(len(path.read_text().splitlines()) for path in RESULTS) < 3000


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        {"a": 1, "rows": [{"text": f"line\n\u2028{i}", "x": i / 7} for i in range(30)]},
        {str(i): {"x": list(range(i))} for i in range(32)},
        {"series": [[i, float(i), -0.0, 1e-300] for i in range(500)], "": {"y": {"z": ["w" * 600] * 9}}},
    ],
)
def test_no_value_changes(value: object) -> None:
    text = common.compact(value)
    assert json.dumps(json.loads(text)) == json.dumps(value)


def test_long_entries_have_a_line_for_each_record(tmp_path: Path) -> None:
    rows = [{"users": users, "tokens_per_s": [users * 1.5] * 40} for users in (1, 4, 16)]
    path = tmp_path / "result.json"
    common.save(path, "load", {"machine": {"cores": 2}, "rows": rows})
    common.save(path, "other", {"n": 3})
    assert path.read_text().splitlines() == [
        "{",
        ' "load": {',
        '  "machine": {"cores": 2},',
        f'  "rows": {json.dumps(rows)}',
        " },",
        ' "other": {"n": 3}',
        "}",
    ]
    common.write_json(path, {"rows": rows, "series": list(range(200))})
    first, second, third = map(json.dumps, rows)
    assert path.read_text().splitlines() == [
        "{",
        ' "rows": [',
        f"  {first},",
        f"  {second},",
        f"  {third}",
        " ],",
        f' "series": {list(range(200))}',
        "}",
    ]
