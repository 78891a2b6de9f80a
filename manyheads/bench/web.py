"""Locust's web page can load a server with OpenAI's interface: `locust -f locustfile.py -H http://127.0.0.1:8000`.

Beside each request's row there are rows for its time to first token (TTFT) and time per output token (TPOT).
"""

from __future__ import annotations

import os
from typing import Any

from locust import events, runners

from manyheads.bench.plan import Run
from manyheads.bench.prompts import Workload, prepare
from manyheads.bench.server import clean_url, identify
from manyheads.bench.users import AskingUser, Traffic


class ChatUser(AskingUser):
    """A user of the page asks, reads the answer to its end, and asks the next question."""

    host = "http://127.0.0.1:8000"


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens in each prompt")
    parser.add_argument("--output-tokens", type=int, default=100, help="tokens in each answer")
    parser.add_argument("--natural", action="store_true", help="let the model end its answers")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions")
    parser.add_argument("--model", default="", help="its name (default: the server's first)")


@events.test_start.add_listener
def _prepare(environment: Any, **_: Any) -> None:
    """Prepare questions for this host, in the processes that have users."""
    if isinstance(environment.runner, runners.MasterRunner):
        return
    options = environment.parsed_options
    work = Workload(
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        natural=options.natural,
        chat=options.chat,
    )
    key = os.environ.get("MANYHEADS_API_KEY")
    target = identify(clean_url(environment.host or ChatUser.host), options.model or None, key)
    questions, _notes = prepare(work, target, key)
    run = Run(target.url, work.path, "users", [], "", "", max_tokens=work.output_tokens)
    environment.traffic = Traffic(run, questions, environment)
