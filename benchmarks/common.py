"""What the benchmark scripts share: the machine's name, prompts, summaries, child processes."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
BUILTIN = ROOT / "manyheads" / "builtin" / "model"
SPEC_BENCH = ROOT.parent / "shared" / "data" / "spec_bench.jsonl"
LINE = 500
"""Characters; in a result, a value whose JSON is no longer than this stays on one line."""
RECORDS = 32
"""In a result, a list or object with more entries is a series, such as memory over time: it stays on one line, too."""


def machine() -> dict[str, Any]:
    """Where and when: goes into every result."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(": ")[1] for line in cpuinfo.splitlines() if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit, dirty = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit + ("+" if dirty else ""),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def gpu_machine(device: str) -> dict[str, Any]:
    """The machine, and the GPU that an engine on this device computes on; None on a CPU."""
    import torch  # here, since most scripts need none

    return machine() | {"gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None}


class Others:
    """What other work takes of the machine's processors, from here to `share`."""

    def __init__(self) -> None:
        self._at, self._busy, self._ours = time.monotonic(), _busy(), _ours()

    def share(self) -> float:
        """Of all cores; what the processes that this one started take does not count."""
        seconds = time.monotonic() - self._at
        return ((_busy() - self._busy) - (_ours() - self._ours)) / (seconds * (os.cpu_count() or 1))


def _busy() -> float:
    """Seconds that all cores were not idle, also those that a virtual machine did not get."""
    import psutil  # here, since vLLM's environment, in which gpu.py runs too, may lack it

    times = psutil.cpu_times()
    return float(sum(times[:8]) - times.idle - times.iowait)


def _ours() -> float:
    """Seconds of this process and all below it, ended or not."""
    import psutil

    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def undisturbed(run: Callable[[], T], tries: int, most: float = 0.05) -> tuple[T, float]:
    """Runs until other work took no more than this share of the cores meanwhile, or takes the least disturbed try.

    What came of it, and the share. Chosen by what others did, not by what came of it.
    """
    done: list[tuple[float, T]] = []
    while len(done) < tries:
        for _ in range(60 if tries > 1 else 0):  # until it is quiet, but not for ever
            others = Others()
            time.sleep(2)
            if others.share() <= most:
                break
        others = Others()
        result = run()
        done.append((others.share(), result))
        print(f"other work took {done[-1][0]:.1%} of the cores meanwhile", flush=True)
        if done[-1][0] <= most:
            break
    share, result = min(done, key=lambda turn: turn[0])
    return result, round(share, 4)


def summary(values: Sequence[float]) -> dict[str, float]:
    """How many, the median and the extremes."""
    if not values:
        return {"n": 0}
    return {
        "n": len(values),
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def percentile(values: Sequence[float], p: float) -> float | None:
    """Nearest-rank percentile, p in (0, 100]; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)]


def save(path: Path, part: str, result: dict[str, Any]) -> None:
    """Puts one part's result into the results file, beside the other parts'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[part] = result
    write_json(path, everything)


def write_json(path: Path, result: Any) -> None:
    """Writes a result in the form that all results have, see `compact`."""
    path.write_text(compact(result) + "\n")


def compact(value: Any, levels: int = 2) -> str:
    """JSON that is read and not scrolled: a line for each entry, or for each record of an entry that is long (`LINE`).

    Args:
        value: anything that JSON can hold.
        levels: how many objects and lists inside each other may be spread over lines; what is deeper stays on one line.
    """
    text = json.dumps(value)
    value = json.loads(text)  # tuples are lists now, and all keys strings
    if levels == 0 or not isinstance(value, dict | list) or len(text) <= LINE or len(value) > RECORDS:
        return text
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {compact(entry, levels - 1)}" for key, entry in value.items()]
    else:
        entries = [compact(entry, levels - 1) for entry in value]
    inside = ",\n".join(entries).replace("\n", "\n ")  # in a JSON string a line break is an escape
    return f"{text[0]}\n {inside}\n{text[-1]}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a Markdown table."""
    print("\n" + "\n".join(markdown(header, rows)) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
        return "" if value is None else str(value)

    lines = [list(header), ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def write_between(page: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Puts lines between a page's two marks. Raises ValueError if the page lacks them."""
    before, _, rest = page.read_text().partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{page} needs the marks {begin!r} and {end!r}")
    page.write_text(before + "\n".join([begin, "", *lines, "", end]) + after)


@dataclass(frozen=True)
class Prompt:
    """A benchmark question as a chat prompt."""

    question_id: int
    category: str
    token_ids: list[int]


def need_spec_bench(path: Path) -> None:
    """Ends the script where Spec-Bench's questions are not there."""
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there. Spec-Bench's questions are data/spec_bench/question.jsonl of "
            "https://github.com/hemingkx/Spec-Bench: --spec-bench FILE"
        )


def spec_bench(
    tokenizer: Any, *, max_prompt_tokens: int, path: Path = SPEC_BENCH, system: str | None = None
) -> list[Prompt]:
    """First turns of Spec-Bench with the chat template, in a fixed random order; longer prompts are left out."""
    need_spec_bench(path)
    prompts = []
    before = [{"role": "system", "content": system}] if system else []
    for line in path.read_text().splitlines():
        question = json.loads(line)
        text = tokenizer.apply_chat_template(
            [*before, {"role": "user", "content": question["turns"][0]}], tokenize=False, add_generation_prompt=True
        )
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(token_ids) <= max_prompt_tokens:
            prompts.append(Prompt(question["question_id"], question["category"], token_ids))
    random.Random(0).shuffle(prompts)
    return prompts


def _git(*command: str) -> str:
    """What git says; nothing where it, or the repository, is not there."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def get_json(url: str, body: dict[str, Any] | None = None, timeout: float = 60) -> Any:
    """GET, or POST with a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        text = reply.read()
    return json.loads(text) if text.strip().startswith((b"{", b"[")) else text.decode()


@contextlib.contextmanager
def server(
    command: Sequence[str], url: str, ready_timeout: float = 180, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Runs a server while the block lasts; the block starts when GET {url}/health answers."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env, text=True)
        try:
            deadline = time.monotonic() + ready_timeout
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"server did not start: {' '.join(command)}\n{log.read()[-3000:]}")
                with contextlib.suppress(OSError, urllib.error.URLError):
                    get_json(f"{url}/health", timeout=5)
                    break
                time.sleep(0.3)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


class ReferenceWorker:
    """medusa-llm 0.1 in its own environment (first_version/worker.py), one request at a time."""

    def __init__(self, python: str, model: Path, tree: Path | None = None) -> None:
        command = [python, "-W", "ignore", str(ROOT / "benchmarks/first_version/worker.py"), str(model)]
        if tree is not None:
            command += ["--tree", str(tree)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the medusa-llm worker ended with {self.process.wait()}; run its command by hand")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def generate(self, prompt_ids: list[int], max_new_tokens: int, temperature: float = 0.0) -> dict[str, Any]:
        """{"token_ids", "steps", "seconds"}; the seconds are those of the generation alone."""
        assert self.process.stdin is not None
        request = {"prompt_ids": prompt_ids, "temperature": temperature, "max_new_tokens": max_new_tokens}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """Ends the process by ending its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
