"""`manyheads bench` makes load tests and their reports, and opens Locust's web page."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.bench.plan import BenchInputError, parse_loads, split_address
from manyheads.cli.parser import Parser
from manyheads.config import ConfigError
from manyheads.interrupt import between_steps, ended_as_by_interrupt

if TYPE_CHECKING:
    from manyheads.bench.measure import Options

MODES = {
    "users": "so many users at once, each asking one question after another (closed loop)",
    "rate": "so many requests a second at random times, answered or not (open loop)",
    "mix": "requests of many lengths at random times, up to the highest rate that is answered within limits",
    "trace": "the requests of --prompts at the times that they tell",
    "first": "the test of the first version: 5 users, one more every 10 s, 150 s, 7 tokens in, 100 out",
}
USUAL: dict[str, Any] = {"users": "1,2,4,8", "rates": "", "speeds": "1", "hold": 20.0, "settle": 3.0}
USUAL |= {"prompt_tokens": "128", "output_tokens": "100", "ttft_ms": 1000.0, "tpot_ms": 100.0}
PROMPTS, ANSWERS = "lognormal:250,0.9,16,1400", "lognormal:150,0.8,8,600"
DEFAULTS: dict[str, dict[str, Any]] = {
    "first": {"users": "5", "hold": 110.0, "ramp": 10.0, "prompt_tokens": "7"},
    "mix": {"prompt_tokens": PROMPTS, "output_tokens": ANSWERS, "ttft_ms": 500.0, "tpot_ms": 20.0},
}
"""These are the defaults of modes that have others than the usual ones."""
MOST_USERS = 10_000


def add_commands(program: Parser) -> None:
    """Add `manyheads bench` to the program."""
    example = "manyheads bench users --users 1,4,16"
    parser = program.add_command("bench", "load a server and report how it does", run, example)
    modes = "; ".join(f"{mode}: {text}" for mode, text in MODES.items())
    parser.add_argument("mode", nargs="?", choices=tuple(MODES), help=f"{modes} (default: users)")
    target = parser.add_argument_group("server")
    target.add_argument("--url", help="measure this running server (default: start one here)")
    target.add_argument(
        "--model", help="what to serve here, or the model's name at --url (default: builtin; its first)"
    )
    target.add_argument(
        "--serve", default="", metavar="OPTIONS", help="of `manyheads serve`, as in --serve='--dtype float32'"
    )
    target.add_argument("--api-key", help="for the server (default: $MANYHEADS_API_KEY, if set)")
    target.add_argument("--no-check", dest="check", action="store_false", help="do not ask the server first who it is")
    load = parser.add_argument_group("load")
    load.add_argument("--users", help="numbers of users, such as 1,2,4,8 (default)")
    load.add_argument("--ramp", type=float, metavar="SECONDS", help="users: one more after so long, up to --users")
    text = "doubled until the server is overloaded; mix: then narrowed down to the highest rate that holds"
    load.add_argument("--rates", help=f"requests a second, such as 1,2,4 (default: {text})")
    load.add_argument("--speeds", help="speeds of the trace, such as 1,2 (default: 1)")
    load.add_argument("--hold", type=float, help="seconds to measure each load (default: 20)")
    load.add_argument("--settle", type=float, help="seconds before that do not count (default: 3)")
    load.add_argument("--drain", type=float, default=60.0, help="seconds for the last answers (default: 60)")
    load.add_argument(
        "--timeout", type=float, default=120.0, help="seconds of silence until a request fails (default: 120)"
    )
    load.add_argument(
        "--workers", type=int, default=0, help="processes that make the load (default: one, without a master)"
    )
    load.add_argument(
        "--bind", metavar="HOST:PORT", help="wait there for the --workers, which other machines start with --join"
    )
    load.add_argument(
        "--join", metavar="HOST:PORT", help="be a worker of the tests of another machine, until Ctrl-C; nothing else"
    )
    load.add_argument(
        "--no-limit", dest="limit", action="store_false", help="do not measure the generator itself first"
    )
    _add_requests(parser)
    report = parser.add_argument_group("report")
    text = "goodput: first token within (default: 1000; mix: 500)"
    report.add_argument("--ttft-ms", type=float, help=text)
    report.add_argument("--tpot-ms", type=float, help="goodput: time per output token (default: 100; mix: 20)")
    text = "mix: a rate holds if this share of the requests sent is within both (default: 0.95)"
    report.add_argument("--attain", type=float, metavar="SHARE", help=text)
    text = "mix: write a trace of each rate beside the report"
    report.add_argument("--save-traces", action="store_true", default=None, help=text)
    report.add_argument("--name", help="of the run, in reports (default: the server's and the model's)")
    report.add_argument("--output", "-o", metavar="FOLDER", help="where the report goes (default: bench-DATE)")
    report.add_argument("--compare", nargs="+", metavar="FOLDER", help="lay reports side by side; nothing is measured")
    report.add_argument("--ui", action="store_true", help="open Locust's web page for --url; nothing else is done")


def _add_requests(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("requests")
    usual = "(default: {}; mix: lognormal:MEDIAN,SIGMA,LEAST,MOST, {})"
    text = "tokens in each prompt " + usual.format(128, PROMPTS)
    work.add_argument("--prompt-tokens", metavar="N", help=text)
    text = "JSON lines with `prompt` or `messages`, `max_tokens`, `at`; mix: text, or JSON lines, to cut prompts from"
    work.add_argument("--prompts", metavar="FILE", help=text)
    text = "tokens in each answer " + usual.format(100, ANSWERS)
    work.add_argument("--output-tokens", metavar="N", help=text)
    text = "mix: each prompt begins with so many tokens more, of a shared text (default: 0)"
    work.add_argument("--system-tokens", type=int, metavar="N", help=text)
    work.add_argument("--system-prompts", type=int, metavar="K", help="mix: so many shared texts (default: 1)")
    work.add_argument(
        "--natural", action="store_true", help="let the model end its answers; --output-tokens is the most"
    )
    work.add_argument("--chat", action="store_true", help="ask /v1/chat/completions (default: /v1/completions)")
    work.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    work.add_argument("--body", default="{}", metavar="JSON", help="more fields of every request")
    work.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Measure, compare, or open the page; return 1 if no request was answered, 130 if the test was ended early."""
    missing = [name for name in ("locust", "matplotlib", "psutil") if importlib.util.find_spec(name) is None]
    if missing:  # NOTE: not by importing it: Locust changes the standard library of the process
        raise ConfigError(f"load tests need {', '.join(missing)}: pip install 'manyheads[bench]'")
    folder = Path(args.output or f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if args.compare:
        from manyheads.bench.compare import compare

        print(compare([Path(name) for name in args.compare], folder))
        return 0
    if args.ui:
        return _ui(args)
    if args.join:
        return _join(args)
    from manyheads.bench.findings import findings
    from manyheads.bench.measure import measure
    from manyheads.bench.progress import Progress
    from manyheads.bench.report import write

    with ended_as_by_interrupt():
        result, records = measure(bench_options(args, folder), Progress())
        page = write(result, records, folder)
    for text in findings(result):
        print(text)
    print(f"report: {page}")
    if result.interrupted:
        return 130
    return 0 if result.whole.completed else 1


def bench_options(args: argparse.Namespace, folder: Path | None = None) -> Options:
    """Make what is to be measured from the options.

    Args:
        folder: the report's, where traces go, too.

    Raises:
        BenchInputError: they make no sense.
    """
    from manyheads.bench.measure import Options
    from manyheads.bench.mix import Lengths, Mix
    from manyheads.bench.prompts import Workload

    mode = args.mode or "users"
    _check(args, mode)
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**vars(args) | USUAL | DEFAULTS.get(mode, {}) | given)
    prompts = Lengths.parse(args.prompt_tokens, "--prompt-tokens")
    answers = Lengths.parse(args.output_tokens, "--output-tokens")
    mix = Mix(prompts, answers, args.system_tokens or 0, args.system_prompts or 1, args.attain or 0.95)
    if mode != "mix" and not (prompts.fixed and answers.fixed):
        raise BenchInputError(f"lengths that vary are for `manyheads bench mix`, not for {mode}")
    kind: Any = "users" if mode == "first" else mode
    asked = {"rate": args.rates, "mix": args.rates, "trace": args.speeds}.get(mode, args.users)
    loads = parse_loads(asked, kind, float(MOST_USERS) if kind == "users" else 1e6)
    if args.workers and kind == "users" and min(loads) < args.workers and args.ramp is None:
        raise BenchInputError(f"--workers {args.workers} are more than the {min(loads):g} users of a load")
    options = Options(
        kind=kind,
        loads=loads,
        hold=args.hold,
        settle=args.settle,
        ramp=args.ramp,
        work=Workload(
            prompt_tokens=prompts.median,
            file=Path(args.prompts) if args.prompts else None,
            output_tokens=answers.median,
            natural=args.natural,
            chat=args.chat,
            temperature=args.temperature,
            extra=_body(args.body),
            seed=args.seed,
        ),
        mix=mix if mode == "mix" else None,
        traces=folder if args.save_traces else None,
        objectives={"ttft": args.ttft_ms / 1e3, "tpot": args.tpot_ms / 1e3},
        url=args.url,
        model=args.model,
        serve=tuple(shlex.split(args.serve)),
        api_key=args.api_key or os.environ.get("MANYHEADS_API_KEY") or None,
        check=args.check,
        workers=args.workers,
        bind=args.bind,
        timeout=args.timeout,
        drain=args.drain,
        calibrate=args.limit,
        name=args.name,
    )
    return replace(options, settings=_settings(options, mode, args.body))


def _check(args: argparse.Namespace, mode: str) -> None:
    """Refuse options that the mode does not have, that do not go together, or that are out of range."""
    homes = {"users": ("users", "first"), "rates": ("rate", "mix"), "speeds": ("trace",), "ramp": ("users",)}
    homes |= dict.fromkeys(("system_tokens", "system_prompts", "attain", "save_traces"), ("mix",))
    for flag, modes in homes.items():
        if getattr(args, flag) is not None and mode not in modes:
            raise BenchInputError(f"--{flag.replace('_', '-')} is for `manyheads bench {modes[0]}`, not for {mode}")
    if mode == "trace" and not args.prompts:
        raise BenchInputError("a trace needs --prompts FILE, with `at` on each line")
    if args.bind and not (args.workers and args.url):
        raise BenchInputError("--bind needs --workers, the number of processes that will join, and --url")
    if args.bind:
        split_address(args.bind)
    if args.url and args.serve:
        raise BenchInputError("--serve is for servers that are started here, not for --url")
    ranges = {"hold": (0, 1e6), "settle": (-1, 1e6), "drain": (0, 1e6), "timeout": (0, 1e6), "ramp": (0, 1e6)}
    ranges |= {"system_tokens": (-1, 1e7), "system_prompts": (0, 1e4), "ttft_ms": (0, 1e9), "tpot_ms": (0, 1e9)}
    ranges |= {"workers": (-1, 256), "attain": (0, 1)}
    for option, (low, high) in ranges.items():
        value = getattr(args, option)
        if value is not None and not low < value <= high:
            raise BenchInputError(
                f"--{option.replace('_', '-')} must be above {max(low, 0):g}, at most {high:g}: not {value:g}"
            )


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise BenchInputError(f"--body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BenchInputError("--body must be a JSON object, such as '{\"top_p\": 0.9}'")
    if reserved := body.keys() & {"stream", "stream_options", "prompt", "messages", "n"}:
        raise BenchInputError(f"--body cannot set {', '.join(sorted(reserved))}")
    return body


def _settings(options: Options, mode: str, body: str) -> dict[str, Any]:
    """Return what was asked for, as the report shows it."""
    work = options.work
    settings: dict[str, Any] = {"mode": mode, "hold": f"{options.hold:g} s"}
    if options.ramp is None:
        settings["settle"] = f"{options.settle:g} s"
    else:
        settings["ramp"] = f"one more user every {options.ramp:g} s"
    if options.mix is not None:
        settings |= options.mix.settings(work.file)
    else:
        settings |= {"prompts": work.file.name} if work.file else {"prompt_tokens": work.prompt_tokens}
        settings |= {"output_tokens": work.output_tokens}
    settings |= {"endpoint": work.path, "temperature": work.temperature}
    settings |= {"natural": True} if work.natural else {}
    settings |= {"body": body} if work.extra else {}
    return settings | ({"workers": options.workers} if options.workers else {})


def _join(args: argparse.Namespace) -> int:
    """Make load for one test after the other, each in a process of its own."""
    split_address(args.join)
    if args.api_key:
        os.environ["MANYHEADS_API_KEY"] = args.api_key
    print(f"making load for {args.join} (Ctrl-C ends this)", flush=True)
    command = [sys.executable, "-m", "manyheads.bench.generator", "--join", args.join]
    with ended_as_by_interrupt():
        while True:
            with between_steps() as check:  # a Ctrl-C while it is started would leave it behind
                # a session of its own: Ctrl-C must not reach it while it is being imported, where nothing catches it
                process = subprocess.Popen(command, start_new_session=True)
            try:
                check()
                process.wait()
            finally:
                process.terminate()
                process.wait()
            time.sleep(1.0)


def _ui(args: argparse.Namespace) -> int:
    """Become Locust, with our users."""
    from manyheads.bench import web

    command = [sys.executable, "-m", "locust", "-f", web.__file__]
    command += ["--prompt-tokens", args.prompt_tokens or USUAL["prompt_tokens"]]
    command += ["--output-tokens", args.output_tokens or USUAL["output_tokens"], *(["--chat"] if args.chat else [])]
    command += ["-H", args.url] if args.url else []
    if args.api_key:
        os.environ["MANYHEADS_API_KEY"] = args.api_key
    sys.stdout.flush()
    os.execv(sys.executable, command)
