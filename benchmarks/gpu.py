"""Decoding speed on a GPU by number of users, of manyheads or of vLLM, from the same checkpoint.

    python benchmarks/enlarge.py MODEL                            # the built-in model in Vicuna-7B's shape
    python benchmarks/gpu.py MODEL OUT.json --mode medusa         # or plain, ngram
    python benchmarks/gpu.py MODEL OUT.json --system vllm --mode plain

`sweep`: all requests come at once, 128 tokens in, 256 out; what counts is the time after the last prompt: a run that
asks for one token is timed first and taken off. Prompts are Spec-Bench's first turns, cut or repeated to 128 tokens.
`long`: 16 requests of 8,000 tokens in, while all of them decode; the text is far longer than the built-in model was
made for, so that its acceptance means little. `first`: the time to the first token of 2,000 tokens alone. `gaps`: the
times between what 32 streams get, while a prompt of 4,000 tokens comes every 0.4 s.

`profile`: of steps of --shapes, rows × nodes, the time of each kernel (gpu_profile.py); the engine is of no use then.
`replies`: of 480 greedy replies of 128 tokens, how many are those of another run, which left them in the file that
--replies names (the first run with that file does).

`sampled`: the sweep once for each of --sampling, which are `SamplingParams` of both systems, in JSON:

    … --tests sampled --sampling '{"temperature": 0}' '{"temperature": 0.8, "top_p": 0.9}'

With --acceptance, candidates are accepted by chance, by what is published for the kind of drafter or by a table of
one's own (by_chance.py); of vLLM's chains too, position by position. --random makes MODEL a folder without weights, for
a published shape with random ones (random_model.py; of vLLM plain only). Both go with --quantization and with several
GPUs:

    python benchmarks/gpu.py FOLDER OUT.json --random llama-3.1-70b --acceptance --quantization fp8 \\
        --tensor-parallel-size 2

`memory` is rank 0's, and every rank holds as many weights. `embedding` is a part of them of which a step reads a few
rows only, unless it is the projection to the vocabulary as well; the rest of a model without experts is read at every
step, by all ranks at the same time, and bounds how fast it can be.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

import random_model
from by_chance import KINDS, chain_rates, table_of
from changes import Changes
from common import write_json

from manyheads.engine.runner import Runner

USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class System(Protocol):
    sampling: dict[str, Any]
    """How the requests to come are drawn: `SamplingParams` of either system."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations of exactly so many tokens."""

    def counters(self) -> dict[str, int]:
        """Whatever it counts."""

    def step_times(self) -> dict[str, Any]:
        """What it knows of its steps since the last call."""

    def costs(self) -> dict[str, Any]:
        """Steps in milliseconds as it measured them at its start."""

    def memory(self) -> dict[str, int]:
        """What it knows of its memory, in bytes by part."""

    def add(self, prompt: list[int], num_tokens: int) -> str:
        """Queue a request; its name."""

    def step(self) -> dict[str, int]:
        """One step of the engine: how many tokens came, by request."""


class Manyheads:
    def __init__(self, args: argparse.Namespace) -> None:
        from manyheads.config import EngineConfig
        from manyheads.engine.build import build_engine

        Changes(
            by_chance=args.acceptance is not None,
            acceptance=args.acceptance,
            random_folder=str(args.model) if args.random else None,
        ).install()
        # by chance, all rows have to pass by the sampler
        self.sampling: dict[str, Any] = {"temperature": 1.0 if args.acceptance else 0.0}
        self.engine = build_engine(
            EngineConfig(
                model=str(args.model),
                heads=str(args.heads) if args.heads and args.mode in KINDS else None,
                speculative=args.mode != "plain",
                drafter="ngram" if args.mode == "ngram" else None,
                tree_size=args.tree_size,
                max_model_len=args.max_model_len,
                prefix_caching=False,
                max_num_seqs=args.max_num_seqs,
                quantization=args.quantization,
                kv_cache_dtype=args.kv_cache_dtype,
                tensor_parallel_size=args.tensor_parallel_size,
                seed=0,
            ),
            lambda line: print(f"{time.perf_counter() - args.start:6.1f} s  {line}", flush=True),
        )
        self._count = 0
        self.steps: dict[str, list[float]] = {}
        observe = self.engine.planner.observe_cost

        def record(rows: int, draft: Any, seconds: float, prompt_tokens: int = 0) -> None:
            if prompt_tokens == 0:
                self.steps.setdefault(f"{rows}x{draft.num_tokens(rows) / rows:g}", []).append(seconds)
            observe(rows, draft, seconds, prompt_tokens)

        self.engine.planner.observe_cost = record  # type: ignore[method-assign]

    def add(self, prompt: list[int], num_tokens: int) -> str:
        from manyheads.request import EngineRequest, SamplingParams

        params = SamplingParams(**self.sampling, max_tokens=num_tokens, ignore_eos=True)
        self._count += 1
        self.engine.add_request(EngineRequest(request_id=str(self._count), prompt_token_ids=prompt, params=params))
        return str(self._count)

    def step(self) -> dict[str, int]:
        return {delta.request_id: len(delta.new_token_ids) for delta in self.engine.step() if delta.new_token_ids}

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        replies: dict[str, list[int]] = {self.add(prompt, num_tokens): [] for prompt in prompts}
        while self.engine.has_work():
            for delta in self.engine.step():
                replies[delta.request_id] += delta.new_token_ids
        return list(replies.values())

    def memory(self) -> dict[str, int]:
        assert isinstance(self.engine.runner, Runner)
        use = self.engine.ready.memory
        found = {name: getattr(use, name) for name in ("weights", "heads", "kv_cache", "graphs", "rest")}
        return found | {"embedding": self.engine.runner.model.embedding.nbytes}

    def costs(self) -> dict[str, Any]:
        """Of rows alone, and by rows and in-flight tokens."""
        if self.engine.planner.costs is None:
            return {}
        costs = self.engine.planner.costs.guess
        plain = {rows: seconds * 1e3 for rows, seconds in costs.plain.items()}
        return {"plain": plain, "trees": {n: {t: s * 1e3 for t, s in c.items()} for n, c in costs.trees.items()}}

    def counters(self) -> dict[str, int]:
        stats = self.engine.stats()
        return {"steps": stats.steps, "row_steps": stats.row_steps}

    def step_times(self) -> dict[str, Any]:
        """By rows and nodes, since the last call: how many steps, and their median in milliseconds."""
        steps, self.steps = self.steps, {}
        return {key: [len(times), round(sorted(times)[len(times) // 2] * 1e3, 3)] for key, times in steps.items()}


class Vllm:
    def __init__(self, args: argparse.Namespace) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM, SamplingParams

        speculative: dict[str, Any] = {}
        if args.mode in KINDS:
            heads = str(args.heads or args.model / "heads")
            config: dict[str, Any] = {"method": args.mode, "model": heads, "num_speculative_tokens": args.drafts}
            if args.acceptance:
                rates = chain_rates(args.acceptance, args.drafts)
                config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
            speculative["speculative_config"] = config
        if args.random:
            speculative["load_format"] = "dummy"
            let_vllm_be_random()
        self.llm = LLM(
            model=str(args.model),
            skip_tokenizer_init=True,
            dtype="auto" if args.random else "float16",
            max_model_len=args.max_model_len,
            gpu_memory_utilization=0.9,
            max_num_seqs=args.max_num_seqs or 256,
            enable_prefix_caching=False,
            disable_log_stats=False,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
            tensor_parallel_size=args.tensor_parallel_size,
            **speculative,
        )
        self._params = SamplingParams
        self.sampling: dict[str, Any] = {"temperature": 0.0}
        self._received: dict[str, int] = {}

    def _sampling(self, num_tokens: int) -> Any:
        # no min_tokens: it would forbid the end token, and with it the text that our engine writes
        return self._params(**self.sampling, max_tokens=num_tokens, ignore_eos=True, detokenize=False)

    def add(self, prompt: list[int], num_tokens: int) -> str:
        name = f"stream-{len(self._received)}"
        self._received[name] = 0
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, self._sampling(num_tokens))
        return name

    def step(self) -> dict[str, int]:
        gained = {}
        for output in self.llm.llm_engine.step():
            count = len(output.outputs[0].token_ids)
            gained[output.request_id] = count - self._received[output.request_id]
            self._received[output.request_id] = count
        return {name: count for name, count in gained.items() if count}

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        replies = self.llm.generate(asked, self._sampling(num_tokens), use_tqdm=False)
        return [list(reply.outputs[0].token_ids) for reply in replies]

    def memory(self) -> dict[str, int]:
        return {}

    def costs(self) -> dict[str, Any]:
        return {}

    def counters(self) -> dict[str, int]:
        found = {m.name: m for m in self.llm.get_metrics() if "spec_decode" in m.name}
        return {name: int(metric.value) for name, metric in found.items() if hasattr(metric, "value")}

    def step_times(self) -> dict[str, Any]:
        return {}


def let_vllm_be_random() -> None:
    """Give vLLM's dummy weights random_model.py's distribution. Its own are so small, those of norms as well, that all
    texts are one, and of a model with experts all tokens go to the same few."""
    from vllm.model_executor.model_loader import dummy_loader

    def fill(layer: Any, config: Any) -> None:
        for tensor in layer.state_dict().values():
            if tensor.dim() == 1:  # of a norm
                tensor.fill_(1.0)
            elif not tensor.is_meta:
                tensor.normal_(0, random_model.DEVIATION)

    dummy_loader.initialize_dummy_weights = fill


def spec_bench_prompts(model: Path, file: Path, length: int, count: int) -> list[list[int]]:
    """Token ids of chat prompts, each of exactly `length` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    user, assistant, end = (vocabulary[f"<|{name}|>"] for name in ("user", "assistant", "end"))
    turns = [json.loads(line)["turns"][0] for line in file.read_text().splitlines()]
    prompts = []
    for i in range(count):
        turn = turns[(i * 37) % len(turns)]  # all categories, from few prompts on
        ids = tokenizer.encode(turn).ids
        ids = (ids * (length // len(ids) + 1))[: length - 3]
        prompts.append([user, *ids, end, assistant])
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--system", choices=("manyheads", "vllm"), default="manyheads")
    parser.add_argument("--mode", choices=("plain", *KINDS, "ngram"), default="medusa")
    parser.add_argument("--heads", type=Path, help="the drafter (default: MODEL/heads)")
    parser.add_argument("--drafts", type=int, default=4, help="tokens that vLLM drafts at a time")
    parser.add_argument("--tests", type=lambda text: text.split(","), default=["sweep"])
    parser.add_argument("--quantization", help="int8, fp8, int4 …; of vLLM, fp8")
    parser.add_argument("--kv-cache-dtype", default="auto", help="fp8, int8; of vLLM, fp8")
    parser.add_argument(
        "--acceptance", nargs="?", const="published", help="accept candidates by chance; a JSON file has other rates"
    )
    parser.add_argument("--sampling", type=json.loads, nargs="+", default=[])
    parser.add_argument("--users", type=lambda text: [int(n) for n in text.split(",")], default=list(USERS))
    parser.add_argument("--prompts", type=Path, default=Path("spec_bench.jsonl"))
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=12288)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--tree-size", type=int)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--shapes", default="1x1,1x24,4x8,16x4", help="of the profile")
    parser.add_argument("--replies", type=Path, help="greedy replies to be compared with, or to be written")
    parser.add_argument("--random", choices=random_model.SHAPES, help="random weights of this shape, on this device")
    parser.add_argument("--rounds", type=int, default=8, help="of few users, each with other prompts")
    args = parser.parse_args()
    if "sampled" in args.tests and (args.acceptance or not args.sampling):
        parser.error("the test `sampled` needs --sampling, and draws that are not by chance")
    if args.acceptance:
        file = None if args.acceptance == "published" else Path(args.acceptance)
        args.acceptance = table_of(args.mode, file)
    if args.random:
        if args.system != "manyheads" and args.mode != "plain":
            parser.error("--random has no drafter for vLLM: --mode plain")
        random_model.write(args.model, args.random)
    args.start = time.perf_counter()
    system: System = Manyheads(args) if args.system == "manyheads" else Vllm(args)
    ready = time.perf_counter() - args.start
    print(f"ready after {ready:.1f} s", flush=True)
    record: dict[str, Any] = {"ready_s": ready, "system": args.system, "mode": args.mode, "memory": system.memory()}
    record["ranks"] = args.tensor_parallel_size
    record["costs_ms"] = system.costs()
    print(record["memory"], flush=True)
    for test in args.tests:
        record["rows" if test == "sweep" else test] = TESTS[test](system, args)
        write_json(args.out, record)


def decoding(system: System, rounds: list[list[list[int]]], num_tokens: int) -> dict[str, Any]:
    """Output tokens a second after the last prompt, of all rounds together."""
    users, prefill, wall, tokens = len(rounds[0]), 0.0, 0.0, 0
    counters: dict[str, int] = {}
    system.step_times()
    for asked in rounds:
        start = time.perf_counter()
        system.generate(asked, 1)
        prefill += time.perf_counter() - start
        before = system.counters()
        start = time.perf_counter()
        replies = system.generate(asked, num_tokens)
        wall += time.perf_counter() - start
        tokens += sum(map(len, replies))
        for name, n in system.counters().items():
            counters[name] = counters.get(name, 0) + n - before.get(name, 0)
    decoded = tokens - users * len(rounds)  # without those that prompts end with
    row = {
        "users": users,
        "rounds": len(rounds),
        "decode_tokens_per_s": decoded / (wall - prefill),
        "prefill_s": prefill,
        "wall_s": wall,
        "tokens": tokens,
        "counters": counters,
    }
    if counters.get("row_steps"):
        row["tokens_per_row_step"] = round(decoded / counters["row_steps"], 3)
    print(row, flush=True)
    return {**row, "step_times": system.step_times()}


def sweep(system: System, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of few users several rounds, each with other prompts: how many tokens a step gives depends on the text."""
    prompts = spec_bench_prompts(args.model, args.prompts, args.tokens_in, 480)
    rows = []
    for users in args.users:
        rounds = [prompts[i * users : (i + 1) * users] for i in range(max(1, min(args.rounds, 64 // users)))]
        system.generate(rounds[0], 16)  # whatever is compiled or captured on the way
        rows.append(decoding(system, rounds, args.tokens_out))
    return rows


def sampled(system: System, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sweep, drawn in several ways."""
    found, usual = [], system.sampling
    for system.sampling in args.sampling:
        print(system.sampling, flush=True)
        found.append({"sampling": system.sampling, "rows": sweep(system, args)})
    system.sampling = usual
    return found


def long(system: System, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second while all 16 decode: from the last prompt's first token to the first request's end."""
    prompts = spec_bench_prompts(args.model, args.prompts, 8000, 16)
    system.generate(prompts[:1], 4)
    left = {system.add(prompt, 512): 512 for prompt in prompts}
    silent, begun, tokens, steps, now = set(left), 0.0, 0, 0, 0.0
    while len(left) == len(prompts):
        gained = system.step()
        now = time.perf_counter()
        if begun:
            tokens += sum(gained.values())
            steps += 1
        for name, count in gained.items():
            left[name] -= count
            if left[name] <= 0:
                del left[name]
        silent -= gained.keys()
        begun = begun or (0.0 if silent else now)
        if not silent and steps == 0:
            system.step_times()
    while left:
        for name, count in system.step().items():
            left[name] = left.get(name, 0) - count
        left = {name: count for name, count in left.items() if count > 0}
    row = {
        "users": 16,
        "tokens": tokens,
        "steps": steps,
        "seconds": now - begun,
        "decode_tokens_per_s": tokens / (now - begun),
    }
    print(row, flush=True)
    return {**row, "step_times": system.step_times()}


def first(system: System, args: argparse.Namespace) -> dict[str, Any]:
    times = {}
    for length in (128, 2000):
        prompts = spec_bench_prompts(args.model, args.prompts, length, 8)
        seconds = []
        for prompt in prompts:
            start = time.perf_counter()
            system.generate([prompt], 1)
            seconds.append(time.perf_counter() - start)
        times[str(length)] = sorted(seconds[1:])[len(seconds[1:]) // 2]
    print(times, flush=True)
    return times


def gaps(system: System, args: argparse.Namespace) -> dict[str, Any]:
    system.generate(spec_bench_prompts(args.model, args.prompts, 4000, 1), 4)
    late = spec_bench_prompts(args.model, args.prompts, 4000, 8)
    names = {system.add(prompt, 800) for prompt in spec_bench_prompts(args.model, args.prompts, 128, 32)}
    last: dict[str, float] = {}
    seen: list[float] = []
    firsts: list[float] = []
    asked: dict[str, float] = {}
    left, started, begun = dict.fromkeys(names, 800), time.perf_counter(), None
    while left:
        gained = system.step()
        now = time.perf_counter()
        if begun is None and len(last) == len(names):
            begun = now
        if begun is not None and len(asked) < len(late) and now - begun > 0.4 * (len(asked) + 1):
            asked[system.add(late[len(asked)], 1)] = now
        for name, count in gained.items():
            if name in asked:
                firsts.append(now - asked[name])
                continue
            if name in last and begun is not None and asked:
                seen.append(now - last[name])
            last[name] = now
            left[name] -= count
            if left[name] <= 0:
                del left[name]
    seen.sort()
    result = {
        "gap_p50_s": seen[len(seen) // 2],
        "gap_p99_s": seen[int(len(seen) * 0.99)],
        "gap_max_s": seen[-1],
        "first_token_of_4000_s": sorted(firsts)[len(firsts) // 2],
        "arrived": len(asked),
        "wall_s": time.perf_counter() - started,
    }
    print(result, flush=True)
    return result


def replies(system: System, args: argparse.Namespace) -> dict[str, Any]:
    from quantization_quality import agreement

    found = system.generate(spec_bench_prompts(args.model, args.prompts, args.tokens_in, 480), 128)
    if not args.replies.exists():
        args.replies.write_text(json.dumps(found))
    result = agreement(found, json.loads(args.replies.read_text()))
    print(result, flush=True)
    return result


def profile(system: System, args: argparse.Namespace) -> dict[str, Any]:
    import gpu_profile

    assert isinstance(system, Manyheads)
    result = gpu_profile.profiles(system.engine, args.shapes)
    print({name: round(found["step_ms"], 3) for name, found in result.items()}, flush=True)
    return result


TESTS = {
    "sweep": sweep,
    "sampled": sampled,
    "long": long,
    "first": first,
    "gaps": gaps,
    "replies": replies,
    "profile": profile,
}


if __name__ == "__main__":
    main()
