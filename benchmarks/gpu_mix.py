"""Several servers under the same mixed traffic, one after the other on each GPU, all GPUs at the same time.

    python benchmarks/enlarge.py MODEL
    python benchmarks/enlarge_eagle3.py DRAFTER MODEL EAGLE3
    python benchmarks/gpu_mix.py MODEL OUT.json --gpus 'medusa,fp8;plain,vllm-plain'     # two GPUs
    python benchmarks/gpu_mix.py MODEL OUT.json --gpus 'eagle3;vllm-eagle3' --eagle3 EAGLE3 --by-chance
    python benchmarks/traffic.py OUT.json --table

The traffic is traffic.py's. A server starts, is driven at each rate with each seed, and ends before the next one of its
GPU starts. With --by-chance, candidates are accepted at published rates (by_chance.py; of vLLM, its synthetic
acceptance). vLLM runs with --vllm-path in front of PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from common import ROOT, machine, save
from traffic import add_options, measure, model_of, points, texts_of

START_SECONDS = 300.0
"""A server that is not ready after so long is given up."""
OURS: dict[str, list[str]] = {
    "medusa": [],
    "plain": ["--no-speculative"],
    "fp8": ["--quantization", "fp8", "--kv-cache-dtype", "fp8"],
    "eagle3": [],
    "eagle3-fp8": ["--quantization", "fp8", "--kv-cache-dtype", "fp8"],
}
"""Options of `manyheads serve` by system."""
VLLM: dict[str, list[str]] = {
    "vllm-plain": [],
    "vllm-eagle3": [],
    "vllm-fp8": ["--quantization", "fp8", "--kv-cache-dtype", "fp8", "--dtype", "bfloat16"],
    "vllm-eagle3-fp8": ["--quantization", "fp8", "--kv-cache-dtype", "fp8", "--dtype", "bfloat16"],
}
"""And of `vllm serve`, whose attention over a cache in fp8 (FlashAttention 3) gives bfloat16 alone."""
LOCK = threading.Lock()
"""Results are written by one GPU's thread at a time."""


def command(system: str, port: int, args: argparse.Namespace) -> list[str]:
    """What starts a system."""
    eagle3 = "eagle3" in system
    if eagle3 and args.eagle3 is None:
        raise SystemExit(f"{system} needs --eagle3")
    if system in OURS:
        by_chance = args.by_chance and system != "plain"
        script = [str(ROOT / "benchmarks" / "by_chance.py")] if by_chance else ["-m", "manyheads", "serve"]
        heads = ["--heads", str(args.eagle3)] if eagle3 else []
        return [sys.executable, *script, str(args.model), "--port", str(port), *OURS[system], *heads]
    speculative = []
    if eagle3:
        config: dict[str, Any] = {"method": "eagle3", "model": str(args.eagle3), "num_speculative_tokens": args.drafts}
        if args.by_chance:
            from by_chance import chain_rates, table_of

            rates = chain_rates(table_of("eagle3"), args.drafts)
            config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
        speculative = ["--speculative-config", json.dumps(config)]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.model)]
    server += ["--port", str(port), "--dtype", "float16", "--max-model-len", "4096", "--max-num-seqs", "256"]
    return [*server, *VLLM[system], *speculative]


def environment(system: str, gpu: int, args: argparse.Namespace) -> dict[str, str]:
    """Of a system's process."""
    found = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
    if system in VLLM:
        found |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
        if args.vllm_path is not None:
            found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(args.vllm_path), os.environ.get("PYTHONPATH"))))
    return found


def serve(system: str, gpu: int, port: int, texts: list[list[int]], args: argparse.Namespace) -> None:
    """Start a system, drive it, and end it."""
    url, log = f"http://127.0.0.1:{port}", args.out.with_suffix(f".{system}.log")
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command(system, port, args),
            env=environment(system, gpu, args),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        if not ready(process, url):
            print(f"{system} did not start: {log}", flush=True)
            return
        part: dict[str, Any] = {"ready_s": round(time.monotonic() - began, 1), "rows": []}
        import torch  # NOTE: here, since the processes of clients import this file, and have to start soon

        gpu_name = torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None
        part["machine"] = machine() | {"gpu": gpu_name, "by_chance": args.by_chance}
        print(f"{system} ready after {part['ready_s']} s", flush=True)
        model = model_of(url)
        for seed, rate in points(args):
            part["rows"].append(measure(url, model, rate, args.hold, seed, texts))
            print(system, json.dumps(part["rows"][-1]), flush=True)
            part["metrics"] = metrics(url)
            with LOCK:
                save(args.out, system, part)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(2)  # until the GPU has its memory back


def ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait for a server; whether it has started."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.5)
    return False


def metrics(url: str) -> dict[str, float]:
    """What a server of ours says of its drafts, and of what it compiled while serving."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    wanted = ("manyheads_tokens_per_step", "manyheads_compiled_while", "manyheads_spec_decode_drafted_by")
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith(wanted))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--gpus", default="medusa;plain", help=f"systems of each GPU, or none; of {', '.join([*OURS, *VLLM])}"
    )
    parser.add_argument("--eagle3", type=Path, help="the drafter")
    parser.add_argument("--drafts", type=int, default=3, help="tokens that vLLM drafts at a time")
    parser.add_argument("--by-chance", action="store_true")
    parser.add_argument("--vllm-path", type=Path, help="where vLLM is, if it is not installed")
    add_options(parser)
    parser.set_defaults(rates=[15.0, 30.0])
    parser.add_argument("--port", type=int, default=18900, help="the first of one for each GPU")
    args = parser.parse_args()
    systems = [of_gpu.split(",") if of_gpu else [] for of_gpu in args.gpus.split(";")]
    for system in itertools.chain(*systems):
        if system not in OURS | VLLM:
            parser.error(f"there is no system {system!r}")
        command(system, 0, args)  # before hours are spent
    texts = texts_of(args.prompts, args.model / "tokenizer.json")

    def run(gpu: int) -> None:
        for system in systems[gpu]:
            serve(system, gpu, args.port + gpu, texts, args)

    threads = [threading.Thread(target=run, args=(gpu,)) for gpu in range(len(systems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
