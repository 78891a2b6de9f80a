"""What becomes of changed configurations of all families: refused, or the logits of transformers.

    python benchmarks/configs.py --examples 400      # writes results/configs.json

The changes and the comparison are those of tests/models/test_config.py. A text that would differ ends the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ROOT, machine, write_json
from hypothesis import given, settings
from transformers.utils.logging import disable_progress_bar

from manyheads.models.family import Family
from manyheads.models.registry import FAMILIES
from tests.models.test_config import CHANGED, LOOK, OUTCOMES, outcome, raw_config

RESULT = ROOT / "benchmarks" / "results" / "configs.json"


def count(examples: int) -> dict[str, Counter[str]]:
    """Outcomes of so many examples, by family; none is looked at twice. Raises AssertionError: a text differs."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in FAMILIES}
    seen: set[str] = set()

    @settings(max_examples=examples, derandomize=True, **LOOK)
    @given(**CHANGED)
    def look(family: Family, changes: list[tuple[str, Any]], length: int) -> None:
        text = json.dumps(raw_config(family, changes), sort_keys=True)
        if text not in seen:
            counts[family.architecture][outcome(family, changes, length)] += 1
            seen.add(text)

    look()
    return counts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # what transformers says of configurations that nobody would have
    disable_progress_bar()  # type: ignore[no-untyped-call]
    about = machine()
    counts = count(args.examples)
    total = sum(counts.values(), Counter[str]())
    outcomes = {name: total[name] for name in OUTCOMES}
    families = [{"family": name} | {kind: found[kind] for kind in OUTCOMES} for name, found in counts.items()]
    result = {"machine": about, "configurations": total.total(), "outcomes": outcomes, "families": families}
    write_json(args.out, result)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
