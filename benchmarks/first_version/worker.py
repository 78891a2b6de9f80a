"""medusa-llm 0.1 as a worker: one JSON request a line in, one JSON reply a line out.

`benchmarks/cpu.py` starts it with its own environment's Python, to take turns with the others prompt by prompt.

    {"prompt_ids": [1, 2], "temperature": 0.0, "max_new_tokens": 128}
    -> {"token_ids": [3, 4], "steps": 9, "seconds": 1.2}
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import reference


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="the heads that export_heads.py wrote")
    parser.add_argument("--tree", type=Path, help="JSON list of paths (default: the library's 1 x 7 x 6)")
    args = parser.parse_args()
    tree = json.loads(args.tree.read_text()) if args.tree else None
    model = reference.load(args.model, ignore_eos=True, tree=tree)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        result = reference.generate(
            model,
            request["prompt_ids"],
            temperature=request["temperature"],
            max_steps=request["max_new_tokens"],
            max_new_tokens=request["max_new_tokens"],
            tree=tree,
        )
        seconds = time.perf_counter() - start
        reply = {"token_ids": result.token_ids, "steps": result.steps, "seconds": seconds}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
