"""What adapters cost: many users, each with one of many adapters, against the base alone.

The adapters are random and nearly silent (their B is tiny), so that texts, and how often heads are right, are the
base's, and only the work differs. Two engines answer the same prompts in turns, the base alone and the base with all
adapters, plainly and with the heads that come with the model; and the one with adapters once more, where nobody asks
for one. The fastest round of each counts.

    python benchmarks/lora.py                                                   # a CPU, the built-in model
    python benchmarks/lora.py --model ENLARGED --device cuda --users 64         # benchmarks/enlarge.py: 7B's shape
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import BUILTIN, ROOT, gpu_machine, save, table
from safetensors.torch import save_file

from manyheads import LLM, SamplingParams
from manyheads.models.parameters import Packed
from manyheads.models.registry import parameters, read_config
from manyheads.speculation.medusa.checkpoint import split_model

SILENT = 1e-4
TOPICS = (
    "the sea", "a lost dog", "how bread is made", "the moon", "a train journey", "learning to swim", "an old clock",
    "the first day of school", "volcanoes", "a cat and a bird", "planting a tree", "a storm", "music", "winter",
    "a map", "robots",
)  # fmt: skip


def write_adapter(folder: Path, model: Path, rank: int, seed: int, device: str) -> None:
    """An adapter on every projection of a model's layers; its numbers differ between kinds of devices."""
    config = read_config(model)
    random = torch.Generator(device).manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for layer in parameters(config).layers:
        for part in (part for part in layer.values() if isinstance(part, Packed)):
            for module, (outputs, inputs) in (
                (key.removesuffix(".weight"), shape) for key, shape in part.shapes.items() if len(shape) == 2
            ):
                a = torch.randn(rank, inputs, generator=random, device=device) / inputs**0.5
                b = torch.randn(outputs, rank, generator=random, device=device) * SILENT
                for side, weight in (("A", a), ("B", b)):
                    key = f"base_model.model.model.{module}.lora_{side}.weight"
                    state[key] = weight.to(config.dtype).cpu()
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--plain-only", action="store_true", help="leave out the heads")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lora.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = {f"adapter-{i}": str(Path(folder) / f"adapter-{i}") for i in range(args.adapters)}
        device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        for seed, path in enumerate(names.values()):
            write_adapter(Path(path), split_model(str(args.model), None)[0], args.rank, seed, device)
        measure(args, names)


def measure(args: argparse.Namespace, names: dict[str, str]) -> None:
    """Let all engines answer in turns, and say how fast each is."""
    length = 128 + args.new_tokens
    settings: dict[str, Any] = {
        "num_threads": args.threads,
        "device": args.device,
        "quantization": args.quantization,
        "max_num_seqs": args.users,
        "max_model_len": length,
        "num_blocks": args.users * (length // 16 + 8),
        "prefix_caching": False,
    }
    has_heads = not args.plain_only
    loaded = {"base": {}, "adapters": names}
    engines = {
        who: LLM(str(args.model), speculative=has_heads, loras=loras, **settings) for who, loras in loaded.items()
    }
    asked = [f"Write a short text about {TOPICS[i % len(TOPICS)]}, number {i}." for i in range(args.users)]
    prompts = [[{"role": "user", "content": text}] for text in asked]
    chosen = [list(names)[i % len(names)] for i in range(args.users)]
    speeds: dict[tuple[str, str], list[float]] = {}
    steps: dict[tuple[str, str], float] = {}
    for number in range(args.rounds + 1):
        for kind, (who, llm) in itertools.product(("plain", "heads")[: 1 + has_heads], engines.items()):
            params = SamplingParams(
                temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True, speculative=kind == "heads"
            )
            for asks in ("base",) if who == "base" else ("adapters", "adapters, none asked for"):
                began = time.perf_counter()
                outputs = llm.chat(prompts, params, lora=chosen if asks == "adapters" else "")
                seconds = time.perf_counter() - began
                found = [output.outputs[0] for output in outputs]
                tokens = sum(len(output.token_ids) for output in found)
                steps[kind, asks] = tokens / sum(output.num_steps for output in found)
                if number > 0:
                    speeds.setdefault((kind, asks), []).append(tokens / seconds)
    rows, records = [], []
    for (kind, asks), values in speeds.items():
        best = max(values)  # what disturbs a machine makes a round slower
        record = {
            "engine": kind,
            "requests": asks,
            "tokens_per_s": [round(value, 1) for value in values],
            "of_the_base": round(best / max(speeds[kind, "base"]), 3),
            "tokens_a_step": round(steps[kind, asks], 2),
        }
        records.append(record)
        rows.append([kind, asks, best, record["of_the_base"], record["tokens_a_step"]])
    table(["engine", "requests", "tokens/s", "of the base's", "tokens a step"], rows)
    weights = {who: llm.engine.stats().memory.weights for who, llm in engines.items()}
    what = {
        name: getattr(args, name) for name in ("adapters", "rank", "users", "new_tokens", "quantization", "threads")
    }
    device = engines["base"].engine.ready.device
    result = {"machine": gpu_machine(device), **what, "device": device, "weights_bytes": weights, "rows": records}
    save(args.out, f"{args.model.name}, {device}", result)


if __name__ == "__main__":
    main()
