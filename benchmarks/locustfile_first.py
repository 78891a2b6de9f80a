"""Locust users of the first version's endpoint: short questions, one after another without a pause.

`benchmarks/cpu.py --part first-version` runs it; by hand:

    locust -f benchmarks/locustfile_first.py --headless -u 5 -r 0.1 -t 120 -H http://127.0.0.1:8001 \
        --parameters '{"temperature": 0.5, "max_steps": 100}' --samples /tmp/samples.json
"""

from __future__ import annotations

import itertools
import json
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import HttpUser, constant, events, task

from manyheads.bench.prompts import OPENINGS, SUBJECTS

# About seven tokens each, like the question that the first version was tested with. It has no chat template: both
# servers get the built-in model's as part of the text.
PROMPTS = itertools.cycle(f"<|user|>{OPENINGS[0].format(subject)}<|end|><|assistant|>" for subject in SUBJECTS)

spawned_at: list[float] = []
samples: list[dict[str, Any]] = []


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """Our two options."""
    parser.add_argument("--parameters", default="{}", help="JSON: `parameters` of every request")
    parser.add_argument("--samples", default="", help="file for one record a request")


@events.spawning_complete.add_listener
def all_there(**_: Any) -> None:
    """Measuring starts when the last user has come."""
    spawned_at.append(time.time())


@events.quitting.add_listener
def write(environment: Any, **_: Any) -> None:
    """Leaves the records where `--samples` says."""
    if environment.parsed_options.samples:
        record = {"all_users_at": spawned_at[0] if spawned_at else None, "samples": samples}
        Path(environment.parsed_options.samples).write_text(json.dumps(record))


class FirstVersionUser(HttpUser):
    """Asks, waits for the answer, asks the next."""

    wait_time = constant(0)

    @task
    def generate(self) -> None:
        """One request; whatever is not a 200 with a response counts as a failure."""
        parameters = json.loads(self.environment.parsed_options.parameters)
        body = {"prompt": next(PROMPTS), "parameters": parameters}
        sent = time.time()
        with self.client.post("/generate", json=body, catch_response=True) as reply:
            record: dict[str, Any] = {"sent": sent, "seconds": time.time() - sent, "error": None}
            if reply.status_code == 200 and "response" in reply.json():
                answer = reply.json()
                counts = answer.get("details", answer)  # ours; the first version's
                names = {"generated_tokens": "tokens", "tokens": "tokens", "steps": "steps"}
                record |= {name: counts[key] for key, name in names.items() if key in counts}
                reply.success()
            else:
                record["error"] = f"{reply.status_code} {reply.text[:300]}"
                reply.failure(record["error"])
            samples.append(record)
