"""Every session of examples/clients against a server of the built-in model, with the clients that are installed.

    python -m venv /tmp/clients && /tmp/clients/bin/pip install openai langchain-openai instructor litellm \
        'pydantic-ai-slim[openai]' openai-agents
    python benchmarks/clients.py --python /tmp/clients/bin/python    # writes results/clients.json

A session that does not end as it should makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ROOT, machine, write_json

from manyheads.bench.server import started

RESULT = ROOT / "benchmarks" / "results" / "clients.json"
SESSIONS = ROOT / "examples" / "clients"
SECONDS = 300
"""A session may take so long."""


def packages(session: Path) -> list[str]:
    """What a session needs beside OpenAI's client: its first line says so."""
    first = session.read_text().splitlines()[0]
    named = re.findall(r"pip install '?([a-z-]+)", first)
    return ["openai", *named]


def versions(python: str, names: list[str]) -> dict[str, str | None]:
    """The versions of packages that a Python has; None: it has none."""
    program = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""
    done = subprocess.run([python, "-c", program, *names], capture_output=True, text=True, check=True)
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def run(python: str, session: Path, url: str) -> dict[str, Any]:
    """Run a session: a record of the result."""
    there = versions(python, packages(session))
    found: dict[str, Any] = {"session": session.name, "versions": there}
    if None in there.values():
        return found | {"outcome": "not installed"}
    begun = time.monotonic()
    command = [python, str(session), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    outcome = "passed" if done.returncode == 0 else "failed: " + (done.stderr.strip().splitlines() or ["?"])[-1][:300]
    return found | {"outcome": outcome, "seconds": round(time.monotonic() - begun, 1), "says": done.stdout.splitlines()}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="that has the clients (default: this one)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    about, found = machine(), []
    with started("builtin", ["--max-num-seqs", "8"], 180) as (url, _):
        for session in sorted(SESSIONS.glob("*_session.py")):
            found.append(run(args.python, session, url))
            print(f"{session.name}: {found[-1]['outcome']}", flush=True)
    write_json(args.out, {"machine": about, "clients": found})
    return int(any(record["outcome"].startswith("failed") for record in found))


if __name__ == "__main__":
    sys.exit(main())
