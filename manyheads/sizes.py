"""Bytes, as people write and read them."""

from __future__ import annotations

import re

from manyheads.config import ConfigError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{'i' if base == 1024 else ''}b": base**power
    for base in (1000, 1024)
    for power, letter in enumerate("kmgt", 1)
}


def parse_size(text: str) -> int:
    """Bytes from `15GiB`, `500 MiB`, `1.5GB` or a plain number.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is no size; write it like 15GiB, 500MiB or 16GB")
    return int(float(match[1]) * unit)


def format_size(count: int) -> str:
    """The size in the unit that suits it: `12.6 GiB`, `340 MiB`, `12 KiB`."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
