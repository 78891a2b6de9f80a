"""Forms and functions that nobody would send, by the thousand, over HTTP: is any of them answered with a 5xx?

    python benchmarks/fuzz.py                       # starts a server; writes results/fuzz.json
    python benchmarks/fuzz.py --requests 500 --seed 3

Hypothesis makes up JSON Schemas, regular expressions, grammars, choices, structural tags and functions, from right ones
to nonsense, and sends them ten at a time. What has to hold: no status of 500 or more, an answer within a minute, and an
engine that was never started again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from common import BUILTIN, ROOT, machine, save
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from manyheads.bench.server import started

AT_ONCE = 10
"""Requests of an example of hypothesis."""
LONGEST = 60.0
"""Seconds of an answer."""
NAMES = st.sampled_from(["a", "name", "größe", "", "x y", '"', "$ref", "type"]) | st.text(max_size=6)
PATTERN = st.text("ab01[](){}*+?|\\^$.-,dswn ", max_size=14)
SCALARS = st.none() | st.booleans() | st.integers(-5, 300) | st.floats(-1e9, 1e9) | st.text(max_size=5)
TYPES = st.sampled_from([*("object", "array", "string", "integer", "number", "boolean", "null") * 3, "date", 3])


def objects(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas with these inside, most of their keywords right."""
    return st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES | st.lists(TYPES, max_size=3),
            "properties": st.dictionaries(NAMES, schemas, max_size=3) | SCALARS,
            "required": st.lists(NAMES, max_size=3) | SCALARS,
            "additionalProperties": schemas,
            "items": schemas | st.lists(schemas, max_size=2),
            "prefixItems": st.lists(schemas, max_size=3),
            "minItems": st.integers(-1, 5) | SCALARS,
            "maxItems": st.integers(0, 6),
            "enum": st.lists(SCALARS, max_size=4),
            "const": SCALARS,
            "pattern": PATTERN,
            "format": st.sampled_from(["date", "email", "uuid", "nothing", 1]),
            "minLength": st.integers(-1, 8),
            "maxLength": st.integers(0, 2000),
            "minimum": st.integers(-9, 9) | st.floats(-2, 2),
            "maximum": st.integers(-9, 9),
            "multipleOf": st.sampled_from([0, 1, 0.1, 7]),
            "anyOf": st.lists(schemas, max_size=3),
            "oneOf": st.lists(schemas, max_size=2),
            "allOf": st.lists(schemas, max_size=2),
            "not": schemas,
            "$ref": st.sampled_from(["#", "#/$defs/a", "#/nowhere", "http://x/y", 5]),
            "$defs": st.dictionaries(NAMES, schemas, max_size=2),
            "uniqueItems": st.booleans(),
        },
    )


SCHEMAS = st.recursive(st.just({}) | st.just({"type": "string"}) | objects(st.booleans()), objects, max_leaves=8)
LARK = st.text('start:rule "ab"|()?*+~12../[a-z]/\n%ignore_WS', max_size=60) | st.sampled_from(
    ['start: "a" | "b" start', "start: start", 'start: /[a-z]+/ "!"~3', 'root ::= "x" root | "y"']
)
FORMS: list[st.SearchStrategy[dict[str, Any]]] = [
    st.fixed_dictionaries(
        {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"name": NAMES, "schema": SCHEMAS})}
    ).map(lambda form: {"response_format": form}),
    st.sampled_from([{"type": "json_object"}, {"type": "text"}, {"type": "xml"}, 5]).map(
        lambda form: {"response_format": form}
    ),
    PATTERN.map(lambda pattern: {"structured_outputs": {"regex": pattern}}),
    LARK.map(lambda text: {"structured_outputs": {"grammar": text}}),
    st.lists(st.text(max_size=6) | SCALARS, max_size=4).map(lambda texts: {"structured_outputs": {"choice": texts}}),
    SCHEMAS.map(lambda schema: {"guided_json": schema}),
    st.dictionaries(NAMES, SCALARS, max_size=3).map(lambda tags: {"structured_outputs": {"structural_tag": tags}}),
]
FUNCTIONS = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "function", "code"])},
    optional={
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["look_up", "add", "f"]) | NAMES},
            optional={"parameters": SCHEMAS, "description": st.text(max_size=9), "strict": st.booleans()},
        )
    },
)
CALLS = st.fixed_dictionaries(
    {
        "tools": st.lists(FUNCTIONS, max_size=3),
        "tool_choice": st.sampled_from(["auto", "required", "none", "any", {"type": "function", "function": {}}])
        | NAMES.map(lambda name: {"type": "function", "function": {"name": name}}),
    }
)
BODIES = st.fixed_dictionaries(
    {"form": st.one_of(*FORMS, CALLS), "max_tokens": st.integers(1, 12), "temperature": st.sampled_from([0, 1.0])},
    optional={"stream": st.booleans(), "logprobs": st.booleans(), "n": st.integers(1, 2)},
)


class Fuzz:
    """Sends requests to a server, and remembers how each was answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        self.statuses: Counter[int] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.slowest = 0.0

    async def ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """Send one; what may not be is kept in `wrong`."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Say it."}], **body, **body.pop("form")}
        begun = time.monotonic()
        try:
            answer = await client.post(f"{self.url}/v1/chat/completions", json=body, timeout=LONGEST)
        except httpx.HTTPError as error:
            self.wrong.append({"body": body, "error": repr(error)})
            return
        self.slowest = max(self.slowest, time.monotonic() - begun)
        self.statuses[answer.status_code] += 1
        if answer.status_code >= 500 or (answer.status_code == 200 and '"error"' in answer.text[-300:]):
            self.wrong.append({"body": body, "status": answer.status_code, "answer": answer.text[-500:]})

    async def ask_all(self, bodies: list[dict[str, Any]]) -> None:
        """Send some at once."""
        async with httpx.AsyncClient() as client:
            await asyncio.gather(*(self.ask(client, body) for body in bodies))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    args = parser.parse_args()
    with started(str(BUILTIN), []) as (url, _):
        fuzz = Fuzz(url)

        @seed(args.seed)
        @settings(
            max_examples=args.requests // AT_ONCE,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(BODIES, min_size=AT_ONCE, max_size=AT_ONCE))
        def send(bodies: list[dict[str, Any]]) -> None:
            asyncio.run(fuzz.ask_all(bodies))

        send()
        metrics = httpx.get(f"{url}/metrics").text
    restarts = sum(float(n) for n in re.findall(r"^manyheads_engine_restarts_total (\S+)", metrics, re.MULTILINE))
    result = {
        "machine": machine(),
        "settings": {"requests": args.requests, "seed": args.seed, "at_once": AT_ONCE},
        "statuses": {str(status): count for status, count in sorted(fuzz.statuses.items())},
        "slowest_s": round(fuzz.slowest, 2),
        "engine_restarts": restarts,
        "wrong": fuzz.wrong[:20],
    }
    save(args.out, "structured", result)
    print(json.dumps({name: result[name] for name in ("statuses", "slowest_s", "engine_restarts", "wrong")}, indent=1))
    if fuzz.wrong or restarts:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
