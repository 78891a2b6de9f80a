from __future__ import annotations

import pytest

from manyheads.config import ConfigError
from manyheads.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("15GiB", 15 * 2**30), ("15GB", 15 * 10**9), (" 500 mib", 500 * 2**20), ("1.5kB", 1500), ("64", 64), ("64B", 64)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "15G", "GiB", "-1GiB", "1e9", "15 GiB or so"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size; write it like 15GiB"):
        parse_size(text)


def test_sizes_are_written() -> None:
    sizes = (0, 300 * 2**10, 2**20, 717 * 2**20, int(12.64 * 2**30))
    assert [format_size(s) for s in sizes] == ["0 KiB", "300 KiB", "1 MiB", "717 MiB", "12.6 GiB"]
