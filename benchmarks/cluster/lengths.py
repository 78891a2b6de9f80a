"""Counts the tokens of real prompts and answers: `python benchmarks/cluster/lengths.py DATA` writes lengths.json.

DATA holds GPTeacher's and GSM8K's questions with answers, and T0's prompts with completions: a third of each, so that
chat, reasoning, and long texts with short answers are there. Only the numbers of tokens are kept.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "gpteacher.jsonl.gz": (("instruction", "input"), "response"),
    "gsm8k_train.jsonl.gz": (("question",), "answer"),
    "t0_50k.jsonl.gz": (("prompt",), "completion"),
}
EACH, LEAST, MOST = 400, 2, 2000


def main() -> None:
    """Command line."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "manyheads" / "builtin" / "model")
    chance, pairs = random.Random(0), []
    for name, (asked, answer) in FILES.items():
        with gzip.open(Path(sys.argv[1]) / name, "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        for line in chance.sample(lines, EACH):
            texts = "\n".join(line[key] for key in asked if line[key]), line[answer].removesuffix("<|endoftext|>")
            pairs.append([min(MOST, max(LEAST, len(tokenizer(text).input_ids))) for text in texts])
    text = json.dumps({"sources": list(FILES), "tokenizer": "the built-in model's", "pairs": pairs})
    Path(__file__).with_name("lengths.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
