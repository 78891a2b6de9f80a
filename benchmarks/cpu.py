"""Measures manyheads on this machine's CPU, side by side with what it replaces; writes results/cpu.json.

    python benchmarks/cpu.py --part first-version   # 5 users, against medusa-llm behind FastAPI
    python benchmarks/cpu.py --part transformers    # 1 user, against transformers and medusa-llm
    python benchmarks/cpu.py --part load            # 1 to 32 users, speculation against plain decoding

All systems run the same float32 weights and take turns within one run, since the machine's speed wanders: compare
the ratios of neighbouring turns, not figures of different runs. benchmarks/README.md tells what each part does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    BUILTIN,
    ROOT,
    SPEC_BENCH,
    Prompt,
    ReferenceWorker,
    get_json,
    machine,
    percentile,
    save,
    server,
    spec_bench,
    summary,
    table,
)

PORTS = {"medusa-llm": 8961, "manyheads": 8962}


# ---------------------------------------------------------------------------------------------- first version, 5 users


def load_round(url: str, args: argparse.Namespace, seconds: float, parameters: dict[str, Any]) -> dict[str, Any]:
    """One run of Locust against one server. Counts what was answered after the last user had come."""
    with tempfile.TemporaryDirectory() as folder:
        samples_file = Path(folder) / "samples.json"
        ramp = (args.users - 1) / args.spawn_rate
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "benchmarks/locustfile_first.py"), "--headless"]
        command += ["-u", str(args.users), "-r", str(args.spawn_rate), "-t", f"{int(ramp + seconds)}s", "-H", url]
        # The last requests may finish: a server that is still at work would slow the next system's turn.
        command += ["--stop-timeout", "120", "--only-summary", "--exit-code-on-error", "0"]
        command += ["--parameters", json.dumps(parameters), "--samples", str(samples_file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not samples_file.exists():
            raise SystemExit(f"locust failed:\n{done.stderr[-3000:]}")
        record = json.loads(samples_file.read_text())

    start, end = record["all_users_at"], record["all_users_at"] + seconds
    inside = [s for s in record["samples"] if start <= s["sent"] + s["seconds"] < end]
    good = [s for s in inside if s["error"] is None]
    latencies = [s["seconds"] for s in good]
    tokens = [s.get("tokens", parameters["max_new_tokens"]) for s in good]
    steps = [s["steps"] for s in good if s.get("steps")]
    causes = Counter(re.sub(r"\d+", "N", s["error"]) for s in inside if s["error"] is not None)
    return {
        "seconds": seconds,
        "requests": len(good),
        "failures": len(inside) - len(good),
        "failure_causes": dict(causes.most_common(8)),
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": sum(tokens) / seconds,
        "tokens_per_request": sum(tokens) / len(good) if good else None,
        "tokens_per_step": sum(tokens) / sum(steps) if steps else None,
        "p50_s": percentile(latencies, 50),
        "p90_s": percentile(latencies, 90),
        "latencies_s": [round(s, 3) for s in latencies],
    }


def export_reference(args: argparse.Namespace, folder: str, tree: Path | None, *options: str) -> Path:
    """The model as medusa-llm 0.1 reads it; two heads for its own tree, all for a tree of ours.

    Args:
        options: more of export_heads.py.
    """
    heads = json.loads((args.heads or args.model / "heads").joinpath("config.json").read_text())["num_heads"]
    command = [args.reference_python, str(ROOT / "benchmarks/first_version/export_heads.py"), str(args.model), folder]
    command += ["--num-heads", str(heads if tree else 2), *options]
    command += ["--heads", str(args.heads)] if args.heads else []
    subprocess.run(command, check=True)
    return Path(folder) / "heads"


def reference_server(args: argparse.Namespace, heads: Path, *extra: str) -> contextlib.AbstractContextManager[object]:
    """The first version's server, told not to end replies before their 100 tokens."""
    script = str(ROOT / "benchmarks/first_version/server.py")
    command = [args.reference_python, "-W", "ignore", script, str(heads), "--ignore-eos", *extra]
    command += ["--port", str(PORTS["medusa-llm"])]
    command += ["--tree", str(args.reference_tree)] if args.reference_tree else []
    return server(command, f"http://127.0.0.1:{PORTS['medusa-llm']}")


def our_server(args: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """`manyheads serve` with its defaults."""
    manyheads = str(Path(sys.executable).with_name("manyheads"))
    command = [manyheads, "serve", str(args.model), "--port", str(PORTS["manyheads"])]
    command += ["--heads", str(args.heads)] if args.heads else []
    return server(command, f"http://127.0.0.1:{PORTS['manyheads']}")


def part_first_version(args: argparse.Namespace) -> dict[str, Any]:
    """Five users in a closed loop against both servers in turn; then medusa-llm without its lock, for its failures."""
    urls = {name: f"http://127.0.0.1:{port}" for name, port in PORTS.items()}
    systems = [name for name in urls if name in args.systems]
    result: dict[str, Any] = {"users": args.users, "new_tokens": args.new_tokens, "rounds": {}, "without_lock": {}}
    with tempfile.TemporaryDirectory() as folder:
        heads = Path(folder) / "heads"
        if "medusa-llm" in systems:
            heads = export_reference(args, folder, args.reference_tree)
        with contextlib.ExitStack() as stack:
            for name in systems:
                stack.enter_context(
                    our_server(args) if name == "manyheads" else reference_server(args, heads, "--one-at-a-time")
                )
            for temperature in args.temperatures:
                # medusa-llm counts steps: as many as there are tokens, so that the tokens end a reply.
                work: dict[str, Any] = {"temperature": temperature, "max_new_tokens": args.new_tokens}
                parameters = {
                    "medusa-llm": work | {"max_steps": args.new_tokens},
                    "manyheads": work
                    | {"ignore_eos": True, "raw": True}
                    | ({"acceptance": args.acceptance} if args.acceptance else {}),
                }
                rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
                for name in systems:  # warm up
                    get_json(
                        f"{urls[name]}/generate",
                        {"prompt": "<|user|>Hello.<|end|><|assistant|>", "parameters": parameters[name]},
                        300,
                    )
                for i in range(args.rounds):
                    for name in systems if i % 2 == 0 else systems[::-1]:
                        rounds[name].append(load_round(urls[name], args, args.seconds, parameters[name]))
                        show = {k: v for k, v in rounds[name][-1].items() if k != "latencies_s"}
                        print(f"temperature {temperature}, round {i + 1}, {name}: {show}", flush=True)
                result["rounds"][str(temperature)] = rounds
        if "medusa-llm" in systems:
            with reference_server(args, heads):
                work = {"temperature": 0.5, "max_steps": args.new_tokens, "max_new_tokens": args.new_tokens}
                result["without_lock"] = load_round(urls["medusa-llm"], args, min(args.seconds, 30), work)

    result["ratios"] = {}
    for temperature, rounds in result["rounds"].items():
        rows = []
        for name, turns in rounds.items():
            latencies = [s for turn in turns for s in turn["latencies_s"]]
            rows.append(
                [
                    name,
                    summary([turn["requests_per_s"] for turn in turns])["median"],
                    summary([turn["tokens_per_s"] for turn in turns])["median"],
                    percentile(latencies, 50),
                    percentile(latencies, 90),
                    sum(turn["failures"] for turn in turns),
                    turns[0]["tokens_per_request"],
                    turns[0]["tokens_per_step"],
                ]
            )
        print(f"{args.users} users, {args.new_tokens} new tokens, temperature {temperature}")
        table(["", "requests/s", "tokens/s", "p50 s", "p90 s", "failures", "tokens/request", "tokens/step"], rows)
        if len(rounds) == 2:
            ratios = {}
            for key in ("requests_per_s", "tokens_per_s", "p50_s", "p90_s"):
                pairs = zip(rounds["manyheads"], rounds["medusa-llm"], strict=True)
                ratios[key] = summary([ours[key] / theirs[key] for ours, theirs in pairs if ours[key] and theirs[key]])
            result["ratios"][temperature] = ratios
            print("manyheads / medusa-llm:", json.dumps(ratios))
    if result["without_lock"]:
        was = result["without_lock"]
        print(f"medusa-llm without a lock: {was['requests']} answers, {was['failures']} failures")
        print(json.dumps(was["failure_causes"], indent=1))
    return result


# ------------------------------------------------------------------------------------------------ one user, offline


Generate = Callable[[Prompt], dict[str, Any]]


def transformers_system(args: argparse.Namespace) -> tuple[Generate, Any]:
    """transformers' own generate: greedy, with its key/value cache, all else at its defaults."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    pad = model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 0

    def generate(prompt: Prompt) -> dict[str, Any]:
        ids = torch.tensor([prompt.token_ids])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=args.new_tokens,
                # Without an end token there is nothing to stop at, and no token is forbidden on the way.
                eos_token_id=None,
                pad_token_id=pad,
            )
        return {"token_ids": out[0, ids.shape[1] :].tolist(), "steps": args.new_tokens}

    return generate, model


def our_llm(args: argparse.Namespace, *, speculative: bool, users: int = 1) -> Any:
    """The offline engine with its defaults."""
    from manyheads import LLM

    options: dict[str, Any] = {"heads": str(args.heads)} if args.heads and speculative else {}
    return LLM(model=str(args.model), speculative=speculative, dtype="float32", max_num_seqs=users, **options)


def run_llm(llm: Any, prompts: list[Prompt], new_tokens: int) -> list[dict[str, Any]]:
    """Greedy replies of exactly `new_tokens` tokens."""
    from manyheads import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    outputs = [reply.outputs[0] for reply in llm.generate([prompt.token_ids for prompt in prompts], params)]
    return [{"token_ids": list(out.token_ids), "steps": out.num_steps} for out in outputs]


def our_system(llm: Any, new_tokens: int) -> Generate:
    """The offline engine as one of the systems that take turns."""
    return lambda prompt: run_llm(llm, [prompt], new_tokens)[0]


def worker_system(worker: ReferenceWorker, new_tokens: int) -> Generate:
    """medusa-llm as one of the systems that take turns."""
    return lambda prompt: worker.generate(prompt.token_ids, new_tokens)


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Index of the first token that differs, None if the common length is equal."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)


@torch.inference_mode()
def margin(model: Any, prompt: Prompt, reply: list[int], at: int) -> float:
    """By how much transformers preferred its token at the place where another system chose differently."""
    ids = torch.tensor([prompt.token_ids + reply[:at]])
    best = torch.topk(model(ids).logits[0, -1], 2).values
    return float(best[0] - best[1])


def part_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """One user: every prompt goes through all systems before the next prompt; the order rotates."""
    from transformers import AutoTokenizer

    limit = 1024 - args.new_tokens - 64  # 64: the nodes of medusa-llm's last step need room as well
    prompts = spec_bench(AutoTokenizer.from_pretrained(args.model), max_prompt_tokens=limit, path=args.spec_bench)
    prompts = prompts[: args.prompts + 2]
    systems: dict[str, Generate] = {}
    judge: Any = None
    with contextlib.ExitStack() as stack:
        if "transformers" in args.systems:
            systems["transformers"], judge = transformers_system(args)
        if "manyheads" in args.systems:
            for name, speculative in (("manyheads plain", False), ("manyheads Medusa", True)):
                systems[name] = our_system(our_llm(args, speculative=speculative), args.new_tokens)
        if "medusa-llm" in args.systems:
            for name, tree in (("medusa-llm", None), ("medusa-llm, our tree", args.reference_tree)):
                if name == "medusa-llm" or tree:
                    folder = stack.enter_context(tempfile.TemporaryDirectory())
                    worker = ReferenceWorker(args.reference_python, export_reference(args, folder, tree), tree)
                    stack.callback(worker.close)
                    systems[name] = worker_system(worker, args.new_tokens)

        replies: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
        names = list(systems)
        for i, prompt in enumerate(prompts):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                start = time.perf_counter()
                reply = systems[name](prompt)
                reply["seconds"] = time.perf_counter() - start
                if i >= 2:  # the first two warm up
                    replies[name].append(reply)
    prompts = prompts[2:]

    per_s = {name: [len(r["token_ids"]) / r["seconds"] for r in turns] for name, turns in replies.items()}
    result: dict[str, Any] = {
        "new_tokens": args.new_tokens,
        "threads": torch.get_num_threads(),
        "prompt_tokens": summary([len(p.token_ids) for p in prompts]),
        "systems": {},
        "ratios": {},
        "raw": [
            {"question_id": p.question_id, "category": p.category, "prompt_tokens": len(p.token_ids)}
            | {
                name: {
                    "tokens": len(turns[i]["token_ids"]),
                    "steps": turns[i]["steps"],
                    "seconds": round(turns[i]["seconds"], 4),
                }
                for name, turns in replies.items()
            }
            for i, p in enumerate(prompts)
        ],
    }
    for name, turns in replies.items():
        tokens, steps = sum(len(r["token_ids"]) for r in turns), sum(r["steps"] for r in turns)
        result["systems"][name] = {"tokens_per_s": summary(per_s[name]), "tokens_per_step": round(tokens / steps, 3)}
        for other in names:
            if other != name:
                ratios = [a / b for a, b in zip(per_s[name], per_s[other], strict=True)]
                result["ratios"][f"{name} / {other}"] = summary(ratios)
        if judge is not None and name != "transformers":
            differences = []
            for prompt, theirs, reply in zip(prompts, replies["transformers"], turns, strict=True):
                at = first_difference(reply["token_ids"], theirs["token_ids"])
                if at is not None:
                    gap = margin(judge, prompt, theirs["token_ids"], at)
                    differences.append({"question_id": prompt.question_id, "token": at, "logit_margin": gap})
            result["systems"][name]["equal_to_transformers"] = len(turns) - len(differences)
            result["systems"][name]["differences"] = differences

    print(f"1 user, {args.new_tokens} new tokens, {len(prompts)} prompts, greedy, {result['threads']} threads")
    rows = []
    for name, figures in result["systems"].items():
        speed = figures["tokens_per_s"]
        against = result["ratios"].get(f"{name} / transformers", {})
        row = [name, speed["median"], speed["min"], speed["max"], figures["tokens_per_step"]]
        equal = figures.get("equal_to_transformers")
        row += [against.get("median"), against.get("min"), against.get("max")]
        rows.append([*row, None if equal is None else f"{equal} of {len(prompts)}"])
    columns = ["", "tokens/s", "min", "max", "tokens/step", "ratio to transformers", "min", "max", "equal replies"]
    table(columns, rows)
    return result


# ------------------------------------------------------------------------------------------------ our engine under load


def batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Endless batches of prompts, each prompt once before any comes again."""
    at = 0
    while True:
        yield [prompts[(at + i) % len(prompts)] for i in range(size)]
        at += size


def part_load(args: argparse.Namespace) -> dict[str, Any]:
    """Speculation against plain decoding at several numbers of users, offline, the two taking turns."""
    from transformers import AutoTokenizer

    limit = 1024 - args.new_tokens - 64  # 64: the nodes of medusa-llm's last step need room as well
    prompts = spec_bench(AutoTokenizer.from_pretrained(args.model), max_prompt_tokens=limit, path=args.spec_bench)
    result: dict[str, Any] = {"new_tokens": args.new_tokens, "threads": torch.get_num_threads(), "users": {}}
    for users in args.load_users:
        llms = {
            "Medusa": our_llm(args, speculative=True, users=users),
            "plain": our_llm(args, speculative=False, users=users),
        }
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in llms}
        supply = batches(prompts, max(4, users * args.prompts_per_user))
        for llm in llms.values():  # warm up
            run_llm(llm, prompts[-2 * users :], 32)
        equal = total = 0
        for i in range(args.rounds):
            batch = next(supply)
            texts: dict[str, list[list[int]]] = {}
            for name in list(llms) if i % 2 == 0 else list(llms)[::-1]:
                start = time.perf_counter()
                replies = run_llm(llms[name], batch, args.new_tokens)
                seconds = time.perf_counter() - start
                texts[name] = [r["token_ids"] for r in replies]
                tokens, steps = sum(map(len, texts[name])), sum(r["steps"] for r in replies)
                turns[name].append(
                    {"tokens_per_s": tokens / seconds, "tokens_per_step": tokens / steps, "seconds": seconds}
                )
            equal += sum(a == b for a, b in zip(texts["Medusa"], texts["plain"], strict=True))
            total += len(batch)
        ratios = [
            medusa["tokens_per_s"] / plain["tokens_per_s"]
            for medusa, plain in zip(turns["Medusa"], turns["plain"], strict=True)
        ]
        result["users"][str(users)] = {
            "prompts_per_round": total // args.rounds,
            "ratio": summary(ratios),
            "equal_replies": f"{equal} of {total}",
            "turns": turns,
        } | {name: summary([turn["tokens_per_s"] for turn in turns[name]]) for name in turns}
        print(f"{users} users: {json.dumps(result['users'][str(users)]['ratio'])}", flush=True)
        del llms
        gc.collect()

    rows = []
    for users, figures in result["users"].items():
        steps = summary([turn["tokens_per_step"] for turn in figures["turns"]["Medusa"]])["median"]
        ratio = figures["ratio"]
        row = [users, figures["Medusa"]["median"], figures["plain"]["median"], ratio["median"], ratio["min"]]
        rows.append([*row, ratio["max"], steps, figures["equal_replies"]])
    print(f"{args.new_tokens} new tokens, greedy, {args.rounds} rounds")
    columns = ["users", "Medusa tokens/s", "plain tokens/s", "ratio", "min", "max", "tokens/step", "equal replies"]
    table(columns, rows)
    fewest, most = str(min(args.load_users)), str(max(args.load_users))
    if fewest != most:
        for name in ("Medusa", "plain"):
            factor = result["users"][most][name]["median"] / result["users"][fewest][name]["median"]
            result[f"{name}, {most} users / {fewest}"] = factor
            print(f"{name}: {most} users give {factor:.2f} times the tokens/s of {fewest}")
    return result


PARTS = {"first-version": part_first_version, "transformers": part_transformers, "load": part_load}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--model", type=Path, default=BUILTIN, help="base model (default: the built-in)")
    parser.add_argument("--heads", type=Path, help="Medusa heads (default: MODEL/heads)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu.json")
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH, help="Spec-Bench's questions")
    parser.add_argument("--reference-python", default="/tmp/refenv/bin/python", help="see first_version/README.md")
    parser.add_argument("--reference-tree", type=Path, help="JSON list of paths: a tree for medusa-llm beside its own")
    parser.add_argument("--systems", nargs="+", default=["transformers", "medusa-llm", "manyheads"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each system (first-version, load)")
    first = parser.add_argument_group("first-version")
    first.add_argument("--users", type=int, default=5)
    first.add_argument("--spawn-rate", type=float, default=1.0, help="users a second (the original test: 0.1)")
    first.add_argument("--seconds", type=float, default=60.0, help="a turn, after the last user has come")
    first.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.5])
    first.add_argument(
        "--acceptance", help="manyheads' rule above temperature 0 (default: its own; medusa-llm: typical)"
    )
    offline = parser.add_argument_group("transformers and load")
    offline.add_argument("--prompts", type=int, default=40, help="prompts (transformers)")
    offline.add_argument("--load-users", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    offline.add_argument("--prompts-per-user", type=int, default=3, help="prompts a user and turn (load)")
    parser.add_argument("--new-tokens", type=int, help="tokens of a reply (100 for first-version, else 128)")
    args = parser.parse_args()

    args.model = args.model.resolve()
    for part in PARTS if args.part == "all" else [args.part]:
        options = argparse.Namespace(**vars(args))
        options.new_tokens = args.new_tokens or (100 if part == "first-version" else 128)
        where = machine()
        print(f"== {part}: {json.dumps(where)}", flush=True)
        save(args.out, part, {"machine": where} | PARTS[part](options))


if __name__ == "__main__":
    main()
