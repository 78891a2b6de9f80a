"""Files of JSON lines that grow while a run goes on, and are taken up again when it was broken off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add objects to a file, one a line."""
    with file.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps(line) + "\n")


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file, none where there is no file; a line that was cut off is removed from it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
    return [json.loads(line) for line in data[:whole].splitlines()]
