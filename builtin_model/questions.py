"""What the built-in base is asked, for its heads to learn from its answers: questions.py DATA FILE."""

from __future__ import annotations

import json
import random
import sys
from itertools import chain
from pathlib import Path

from data import clean, entries, read

LONGEST = 3000
"""Characters of a question."""


def main(data: Path, file: Path) -> None:
    asked = dict.fromkeys(talk[0]["content"] for entry in chain(*entries(data)) for talk in entry.variants[:2])
    # and what the base did not learn: its answers to strangers are what it is used for
    unseen = (clean(row["prompt"]) for row in read(data / "t0_50k.jsonl.gz"))
    asked |= dict.fromkeys(prompt for prompt in unseen if len(prompt) < LONGEST)
    prompts = [prompt for prompt in asked if prompt.strip()]
    random.Random(1).shuffle(prompts)
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
