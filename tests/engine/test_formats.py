"""Dates and times of schemas are real ones."""

from __future__ import annotations

import datetime
import re

import pytest

from manyheads.engine.formats import PATTERNS, with_real_dates


def test_every_date_of_four_hundred_years_and_no_other() -> None:
    pattern = re.compile(PATTERNS["date"])
    for year in range(1800, 2201):
        for month in range(14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                text = f"{year:04}-{month:02}-{day:02}"
                try:
                    is_date = bool(datetime.date(year, month, day))
                except ValueError:
                    is_date = False
                assert bool(pattern.match(text)) == is_date, text


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("23:59:59Z", True),
        ("00:00:00.123+23:59", True),
        ("12:30:60Z", False),
        ("24:00:00Z", False),
        ("12:00:00", False),
        ("12:00:00.Z", False),
        ("12:00:00+24:00", False),
    ],
)
def test_times(text: str, holds: bool) -> None:
    assert bool(re.match(PATTERNS["time"], text)) == holds
    assert bool(re.match(PATTERNS["date-time"], f"2024-02-29T{text}")) == holds


def test_only_schemas_change() -> None:
    date = {"type": "string", "format": "date"}
    real = {"type": "string", "pattern": PATTERNS["date"]}
    schema = {
        "properties": {"format": date, "x": {"const": date}, "y": {"enum": [date]}},
        "items": [date, True],
        "anyOf": [{"items": date}, {"format": "uuid"}, {"format": "date", "pattern": "^2"}],
        "$defs": {"d": {"additionalProperties": date}},
        "default": date,
    }
    assert with_real_dates(schema) == {
        "properties": {"format": real, "x": {"const": date}, "y": {"enum": [date]}},
        "items": [real, True],
        "anyOf": [{"items": real}, {"format": "uuid"}, {"format": "date", "pattern": "^2"}],
        "$defs": {"d": {"additionalProperties": real}},
        "default": date,
    }
    assert schema["default"] is date
