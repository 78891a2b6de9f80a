"""Stops Locust's users at moments that are rare in a real run: `python -m tests.bench.stopped_users HOW URL`.

It prints whether the user ended, and why each of its requests failed. A process of its own, for Locust changes the
standard library. The server answers the first request, and no other.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import gevent
from locust.env import Environment

from manyheads.bench.generator import Users
from manyheads.bench.plan import Question, Run
from manyheads.bench.record import Record
from manyheads.bench.users import Traffic


def main(how: str, url: str) -> None:
    environment: Any = Environment(user_classes=[Users], catch_exceptions=False)
    runner = environment.create_local_runner()
    run = Run(url, "/v1/completions", "users", [], "", "", timeout=60.0)
    environment.traffic = Traffic(run, [Question({"prompt": "x"})], environment)
    (user,) = runner.spawn_users({"Users": 1})
    records: list[Record] = []

    def heard(record: Record) -> None:
        records.append(record)
        if len(records) == 1 and how == "between":
            gevent.spawn(user.stop)  # it runs as soon as the user gives way, which it does between two requests
        if len(records) == 1 and how == "asking":
            gevent.spawn_later(0.2, user.stop, force=True)

    environment.traffic.listeners.append(heard)
    print(json.dumps([user.greenlet.join(5.0) or user.greenlet.dead, [record.reason for record in records]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
