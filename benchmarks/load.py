"""The figures of docs/analysis.md: `manyheads bench` on manyheads, and on medusa-llm behind FastAPI.

    python benchmarks/load.py                # measures on a CPU, all systems in turns; reports go to results/load/
    python benchmarks/load.py --show         # tables of the results that are there, and the plots of docs/images/

    python benchmarks/enlarge.py BIG         # on a GPU: the built-in model in Vicuna-7B's shape,
    python benchmarks/load.py --plan gpu --model BIG                # 20 minutes; reports go to results/load_gpu/
    python benchmarks/load.py --plan gpu --show
    python benchmarks/load.py --plan gpu --model BIG --pace 0.2     # shorter: does everything run?

The reports are those of `manyheads bench`, so that `manyheads bench --compare` also reads them. medusa-llm runs behind
FastAPI as in the first version (first_version/README.md), with a lock around its model. All run on the GPU, if there
is one. A system that fails is left out, and the exit status tells.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from common import BUILTIN, ROOT, get_json, machine, table, undisturbed, write_json
from cpu import PORTS, export_reference, reference_server
from matplotlib.ticker import LogLocator, NullFormatter

from manyheads.bench import plots, result
from manyheads.bench.result import Level, Result
from manyheads.bench.server import started

READY = 180.0
"""Seconds that a server has to start."""
START = 25.0
"""Seconds that one usually takes: what is left must be enough for it and for a test."""
OWN = 10.0
"""Seconds that a test takes beside its loads: to start, and to measure the generator."""
GRACE = 150.0
"""Seconds that it may take, with the last answers."""


@dataclass(frozen=True)
class System:
    """A server to measure."""

    name: str
    options: tuple[str, ...] = ()
    """Of `manyheads serve`; of first_version/server.py, if it is medusa-llm."""
    reference: bool = False
    """It is medusa-llm."""


@dataclass(frozen=True)
class Test:
    """A test of `manyheads bench`, and how long."""

    argv: tuple[str, ...]
    loads: int
    """How many; as far as it is known before."""
    hold: float
    settle: float | None = None
    ramp: float | None = None

    def paced(self, pace: float) -> Test:
        """The same, longer or shorter."""

        durations = {"hold": self.hold, "settle": self.settle, "ramp": self.ramp}
        changed: dict[str, Any] = {name: max(1.0, value * pace) for name, value in durations.items() if value}
        return replace(self, **changed)

    @property
    def options(self) -> list[str]:
        """Of `manyheads bench`."""
        seconds = {"--hold": self.hold, "--settle": self.settle, "--ramp": self.ramp}
        return [*self.argv, *(text for name, value in seconds.items() if value for text in (name, f"{value:g}"))]

    @property
    def seconds(self) -> float:
        """Of all its loads."""
        if self.ramp is not None:
            return (self.loads - 1) * self.ramp + self.hold
        return self.loads * (self.hold + (self.settle if self.settle is not None else 3.0))


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of machine."""

    systems: dict[str, System]
    tests: dict[str, Test]
    left_out: frozenset[tuple[str, str]]
    """(test, system)"""
    folder: str
    """Of the results."""
    rounds: tuple[int, ...]
    tries: int
    stays: bool = False
    """A server is started once for all tests, and not for each."""
    slow: dict[str, Test] = field(default_factory=dict)
    """Those of medusa-llm, where they are others: it answers a request in seconds and not in tenths of them."""
    export: tuple[str, ...] = ()
    """Options of first_version/export_heads.py."""

    def turns(self, systems: Sequence[str], tests: Sequence[str], number: int) -> list[tuple[str, list[str]]]:
        """Which system is tested next, and by what: in another order in every second round."""
        order = systems if number % 2 else systems[::-1]
        groups = [list(tests)] if self.stays else [[test] for test in tests]
        turns = [(system, [t for t in group if self.wanted(t, system, number)]) for group in groups for system in order]
        return [turn for turn in turns if turn[1]]

    def wanted(self, test: str, system: str, number: int) -> bool:
        """The rates of an automatic sweep end where the server does: those of two rounds may differ."""
        return (test, system) not in self.left_out and (test != "rate" or number == 1)

    def test(self, test: str, system: str) -> Test:
        """That test of that system."""
        return self.slow.get(test, self.tests[test]) if self.systems[system].reference else self.tests[test]


SHORT = ("--prompt-tokens", "7")
ROOMY = ("--memory", "32GiB")
"""Of a GPU, whichever it is: room for about as many short requests as 256 users have."""
BRIEF = ("--no-limit", "--drain", "2")
"""The generator is measured with the sweep, and nobody waits for the last answers."""
FIRST_GPU = Test(("users", "--users", "5", *SHORT, *BRIEF), loads=5, hold=110, ramp=10)
"""`manyheads bench first`, whose times can be paced."""
PLANS = {
    "cpu": Plan(
        systems={
            "manyheads": System("manyheads"),
            "plain": System("manyheads, no speculation", ("--no-speculative",)),
            "medusa-llm": System("medusa-llm behind FastAPI", ("--one-at-a-time",), reference=True),
        },
        tests={
            "first": Test(("first",), loads=1, hold=110),  # and 40 s for its ramp, which is the preset's
            "users": Test(("users", "--users", "1,2,4,8,16,32,64", *SHORT), loads=7, hold=10),
            "chat": Test(("users", "--users", "1,2,4,8,16", *SHORT, "--chat"), loads=5, hold=10),
            "rate": Test(("rate", *SHORT), loads=11, hold=10),
        },
        slow={"users": Test(("users", "--users", "1,2,4,8,16", *SHORT), loads=5, hold=30, settle=8)},
        # the first version has no chats; one system's overload says it all
        left_out=frozenset({("chat", "medusa-llm"), ("rate", "plain"), ("rate", "medusa-llm")}),
        folder="load",
        rounds=(1, 2),
        tries=3,
    ),
    "gpu": Plan(
        systems={
            "half": System("manyheads, half precision", ROOMY),
            "medusa-llm": System("medusa-llm, half precision", ("--one-at-a-time",), reference=True),
            "medusa-llm-8bit": System("medusa-llm, 8 bits", ("--one-at-a-time", "--eight-bit"), reference=True),
            "fp8": System("manyheads, fp8", (*ROOMY, "--quantization", "fp8")),
            "int8": System("manyheads, int8", (*ROOMY, "--quantization", "int8")),
        },
        tests={
            "first": FIRST_GPU,
            "users": Test(("users", "--users", "1,4,16,64,256", *SHORT, "--drain", "2"), loads=5, hold=8, settle=2),
        },
        left_out=frozenset({("users", "medusa-llm"), ("users", "medusa-llm-8bit")}),
        folder="load_gpu",
        rounds=(1,),
        tries=1,
        stays=True,
        export=("--link", "--context", "2048"),
    ),
}


def end(processes: Sequence[psutil.Process]) -> None:
    """See that they are gone: what they leave would load the machine and hold memory while others are measured."""
    for process in psutil.wait_procs(processes, 10)[1]:
        process.kill()


@contextlib.contextmanager
def serving(system: System, plan: Plan, args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server that has answered once, while the block lasts."""
    processes: list[psutil.Process] = []
    try:
        with running(system, plan, args) as url:
            body = {"prompt": "Tell me something about jazz.", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
            get_json(f"{url}/v1/completions", body, READY)  # the first answer loads kernels and takes memory
            try:
                yield url
            finally:
                processes += psutil.Process().children(recursive=True)
                if system.reference:  # it would first work off all requests whose users are gone
                    for process in processes:
                        process.kill()
    finally:
        end(processes)


@contextlib.contextmanager
def running(system: System, plan: Plan, args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server, while the block lasts."""
    if not system.reference:
        with started(str(args.model), system.options, READY) as (url, _):
            yield url
        return
    heads = args.scratch / "heads"
    if not (heads / "config.json").exists():  # what is written last
        export_reference(args, str(args.scratch), None, *plan.export)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with reference_server(args, heads, *system.options, "--device", device):
        yield f"http://127.0.0.1:{PORTS['medusa-llm']}"


def bench(test: Test, name: str, url: str, left: float) -> Result:
    """The report of a test; if it hangs, or so many seconds are over, of what was measured until then."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "manyheads", "bench", *test.options, "--name", name]
        process = psutil.Popen([*command, "--url", url, "-o", folder], cwd=ROOT)
        try:
            process.wait(min(test.seconds + GRACE, max(left, 0.0)))
        except psutil.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # Ctrl-C keeps what was measured
            process.wait(OWN)
        finally:
            if process.is_running():
                generators = process.children(recursive=True)
                process.kill()
                end([process, *generators])
        return result.load(Path(folder))


def measure(test: str, key: str, target: Path, plan: Plan, args: argparse.Namespace, url: str | None) -> None:
    """One run; its report goes to `target`, with what other work took of the cores among its notes.

    Args:
        url: of a server that runs; None starts one for this run alone.
    """
    system, what = plan.systems[key], plan.test(test, key).paced(args.pace)

    def run() -> Result:
        with contextlib.nullcontext(url) if url else serving(system, plan, args) as at:
            return bench(what, system.name, at, args.deadline - time.monotonic())

    found, share = undisturbed(run, args.tries or plan.tries)
    found.notes.append(f"other work took {share:.1%} of the cores meanwhile")
    write_json(target, msgspec.to_builtins(found))


@contextlib.contextmanager
def attempt(what: str, failed: list[str]) -> Iterator[None]:
    """Go on whatever happens in the block, and remember it."""
    print(f"\n{what}, {datetime.datetime.now():%H:%M:%S}", flush=True)
    try:
        yield
    except (Exception, SystemExit):
        traceback.print_exc()
        failed.append(what)


def measure_all(plan: Plan, args: argparse.Namespace) -> list[str]:
    """All that is asked for, in the time that there is; what was not to be had."""
    failed: list[str] = []

    def enough(what: str, seconds: float) -> bool:
        if args.deadline - time.monotonic() >= seconds:
            return True
        failed.append(f"{what} (no time)")
        return False

    def turn(key: str, tests: Sequence[str], number: int, url: str | None) -> None:
        for test in tests:
            what = f"{test} of {key}"
            if enough(what, plan.test(test, key).paced(args.pace).seconds + OWN):
                with attempt(what, failed):
                    measure(test, key, args.out / f"{test}-{key}-{number}.json", plan, args, url)

    for number in args.rounds or plan.rounds:
        for key, tests in plan.turns(args.systems, args.tests, number):
            if not plan.stays:
                turn(key, tests, number, None)
            elif enough(key, START + plan.test(tests[0], key).paced(args.pace).seconds + OWN):
                with attempt(key, failed), serving(plan.systems[key], plan, args) as url:
                    turn(key, tests, number, url)
    return failed


def runs(test: str, system: str, folder: Path) -> list[Result]:
    """The reports that are there."""
    return [result.load(path) for path in sorted(folder.glob(f"{test}-{system}-[0-9].json"))]


def median(levels: Sequence[Level], take: Callable[[Level], float | None]) -> float | None:
    """Of the rounds' figures."""
    values = [value for value in map(take, levels) if value is not None]
    return statistics.median(values) if values else None


def together(rounds: Sequence[Result]) -> Result:
    """One result whose plotted figures are the medians of the rounds'."""
    made = rounds[0]
    for i, level in enumerate(made.levels):
        same = [r.levels[i] for r in rounds]
        level.output_tokens_per_s = median(same, lambda v: v.output_tokens_per_s) or 0.0
        level.tokens_per_step = median(same, lambda v: v.tokens_per_step)
        for name in ("ttft", "tpot", "e2e"):
            for place in ("p50", "p90", "p99"):
                value = median(same, lambda v: getattr(getattr(v, name), place, None))  # noqa: B023 (called at once)
                if value is not None:
                    setattr(getattr(level, name), place, value)
        level.requests_per_s = median(same, lambda v: v.requests_per_s) or 0.0
    return made


FIGURES: dict[str, Callable[[Level], float | None]] = {
    "requests/s": lambda v: v.requests_per_s,
    "goodput": lambda v: v.goodput,
    "under way": lambda v: v.in_flight,
    "tokens/s": lambda v: v.output_tokens_per_s,
    "latency p50 s": lambda v: v.e2e.p50 if v.e2e else None,
    "p90 s": lambda v: v.e2e.p90 if v.e2e else None,
    "p99 s": lambda v: v.e2e.p99 if v.e2e else None,
    "TTFT p50 ms": lambda v: v.ttft.p50 * 1e3 if v.ttft else None,
    "p99 ms": lambda v: v.ttft.p99 * 1e3 if v.ttft else None,
    "TPOT p50 ms": lambda v: v.tpot.p50 * 1e3 if v.tpot else None,
    "tokens/step": lambda v: v.tokens_per_step,
}


def show(plan: Plan, folder: Path, images: Path) -> None:
    """Tables, and plots over the number of users."""
    names = {key: system.name for key, system in plan.systems.items()}
    found = {(test, key): runs(test, key, folder) for test in plan.tests for key in plan.systems}
    found = {case: rounds for case, rounds in found.items() if rounds}
    for test in plan.tests:
        cases = {names[key]: rounds for (name, key), rounds in found.items() if name == test}
        for name, rounds in cases.items():
            answered, failed = sum(r.whole.completed for r in rounds), sum(r.whole.failed for r in rounds)
            cpu = [v.generator.cpu for r in rounds for v in r.levels if v.generator.cpu is not None]
            print(f"{test}: {name}, {len(rounds)} runs, {answered} answers, {failed} failures, ", end="")
            print(f"generator {max(cpu, default=0):.0%} of a core at most")
            bound = [f"{v.load:g}: {text}" for r in rounds for v in r.levels for text in v.generator.bound]
            print("".join(f"  {text}\n" for text in [*bound, *(n for r in rounds for n in r.notes)]), end="")
        rows = []
        for name, rounds in cases.items():
            for i, level in enumerate(rounds[0].levels):
                same = [r.levels[i] for r in rounds]
                speeds = [v.output_tokens_per_s for v in same]
                row = [median(same, take) for take in FIGURES.values()]
                answers = sum(v.completed for v in same)
                rows.append([f"{level.load:g}", name, *row, f"{min(speeds):.0f} to {max(speeds):.0f}", answers])
        table(["load", "", *FIGURES, "tokens/s, runs", "answers"], sorted(rows, key=lambda row: float(row[0])))
        show_memory(cases)
    draw(plan, found, images)


def show_memory(cases: dict[str, list[Result]]) -> None:
    """GiB: by part as the server tells them at last, and what was seen from outside."""
    rows = []
    for name, rounds in cases.items():
        seen = [m for r in rounds for m in r.memory]
        parts = next((m.parts for m in reversed(seen) if m.parts), {})
        row: list[object] = [name, *(parts[k] / 2**30 if k in parts else None for k in plots.KINDS)]
        for sizes in ([m.gpu for m in seen if m.gpu], [m.host for m in seen if m.host]):
            row.append(f"{min(sizes) / 2**30:.2f} to {max(sizes) / 2**30:.2f}" if sizes else None)
        rows.append(row)
    table(["GiB", *plots.KINDS.values(), "GPU", "host"], rows)


def draw(plan: Plan, found: dict[tuple[str, str], list[Result]], images: Path) -> None:
    """Over users, and memory over time; of a system without a sweep, what the first version's test tells of it."""
    best = [found.get(("users", key)) or found.get(("first", key)) for key in plan.systems]
    medians = [together(rounds) for rounds in best if rounds]
    if not medians:
        return
    loads = sorted({level.load for one in medians for level in one.levels})
    throughput = plots.by_load(medians, "Throughput by users", "output tokens/s", {"": lambda v: v.output_tokens_per_s})
    latency = plots.by_load(medians, "Median latency by users", "seconds", {"": lambda v: v.e2e.p50 if v.e2e else None})
    speeds = [level.output_tokens_per_s for one in medians for level in one.levels]
    is_wide = max(speeds) > 100 * min(speeds)  # the slowest would lie on the axis
    for plot in (latency, *([throughput] if is_wide else [])):
        plot.axes.set_yscale("log")
        plot.axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plot.axes.yaxis.set_major_formatter("{x:g}")
        plot.axes.yaxis.set_minor_formatter(NullFormatter())
    drawn = [("throughput", throughput, not is_wide), ("latency", latency, False)]
    memory = plots.Plot("Memory in use on the GPU", "seconds", "GiB")
    for key in plan.systems:
        for one in found.get(("first", key), [])[:1]:
            seen = [m for m in one.memory if m.gpu]
            memory.line([m.at for m in seen], [(m.gpu or 0) / 2**30 for m in seen], one.name, marker="")
    if memory.axes.lines:
        drawn.append(("memory", memory, True))
    for name, plot, zero in drawn:
        plot.axes.set_facecolor("white")
        plot.figure.set_facecolor("white")
        ticks = loads if plot is not memory else ()
        (images / f"{plan.folder.replace('_', '-')}-{name}.svg").write_text(plot.svg(whole_x=ticks, zero=zero) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="cpu", help="what to measure (default: cpu)")
    parser.add_argument("--model", type=Path, default=BUILTIN, help="base model (default: the built-in)")
    parser.add_argument("--systems", nargs="+", help="of the plan (default: all)")
    parser.add_argument("--tests", nargs="+", help="of the plan (default: all)")
    parser.add_argument("--rounds", type=int, nargs="+", help="numbers of the rounds to run (default: the plan's)")
    parser.add_argument("--tries", type=int, help="of a run that other work disturbs (default: the plan's)")
    parser.add_argument("--pace", type=float, default=1.0, help="factor of all durations (default: 1)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that takes longer in all")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, help="folder of the results (default: the plan's)")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--reference-python", default="/tmp/refenv/bin/python", help="see first_version/README.md")
    args = parser.parse_args()
    plan = PLANS[args.plan]
    for name, known in (("systems", plan.systems), ("tests", plan.tests)):
        if unknown := set(getattr(args, name) or ()) - known.keys():
            parser.error(f"--{name}: {', '.join(unknown)} not in {', '.join(known)}")
        setattr(args, name, getattr(args, name) or list(known))
    args.deadline = time.monotonic() + args.seconds
    args.out = args.out or ROOT / "benchmarks/results" / plan.folder
    args.heads = args.reference_tree = None
    failed = []
    if not args.show:
        scratch = tempfile.TemporaryDirectory()
        args.scratch = Path(scratch.name)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "machine.json", machine())
        failed = measure_all(plan, args)
    show(plan, args.out, args.images)
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
