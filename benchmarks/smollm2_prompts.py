"""Prompts of several kinds for smollm2.py: smollm2_prompts.py DATA prompts.jsonl (builtin_model/README.md says what is
in DATA).

Tasks with texts to read (T0's), instructions (GPTeacher) and sums in words (GSM8K). Spec-Bench's are not among them.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COUNTS = {"t0_50k": 4000, "gpteacher": 3500, "gsm8k_train": 3000}
LONGEST = 3000
"""Characters of a prompt."""


def main(data: Path, file: Path) -> None:
    """Write so many of each, shuffled."""
    chosen: list[str] = []
    random_ = random.Random(1)
    for name, count in COUNTS.items():
        texts = sorted({text for text in map(_text, _rows(data / f"{name}.jsonl.gz")) if 0 < len(text) < LONGEST})
        chosen += random_.sample(texts, count)
    random_.shuffle(chosen)
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen), encoding="utf-8")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _text(row: dict[str, Any]) -> str:
    """What is asked, whatever a set calls it."""
    asked = row.get("prompt") or row.get("question") or row.get("instruction") or ""
    more = row.get("input") or ""
    return "\n\n".join(part.strip() for part in (asked, more) if part.strip())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
