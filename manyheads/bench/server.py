"""A load test starts `manyheads serve`, or asks a server that runs who it is."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from manyheads.bench.plan import BenchError, BenchInputError

_READY = re.compile(r"manyheads serves .* at (http://\S+)")


@dataclass
class Target:
    """A target is a running server that is asked."""

    url: str
    model: str
    pid: int | None = None
    server: str = ""
    """The owner of the model by the server's word, which tells manyheads, vLLM, … apart."""
    heads: int | None = None
    options: tuple[str, ...] = ()
    started_here: bool = False


@contextlib.contextmanager
def started(model: str, options: Sequence[str], ready_seconds: float = 600.0) -> Iterator[tuple[str, int]]:
    """Serve a model while the block lasts, which is given URL and process id, or raise BenchError with what it said."""
    command = [sys.executable, "-m", "manyheads", "serve", model, "--host", "127.0.0.1", "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log:
        # NOTE: a session of its own, for the terminal's Ctrl-C is to end the load and not the server
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield _wait_ready(process, log, ready_seconds), process.pid
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], log: Any, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while True:
        log.seek(0)
        said = log.read()
        if found := _READY.search(said):
            return found[1]
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the server did not start: {said.strip()[-2000:] or 'it said nothing'}")
        time.sleep(0.1)


def clean_url(url: str) -> str:
    """Return a server's URL without `/v1` and the last slash, or raise BenchInputError if the text is no URL."""
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good:
        raise BenchInputError(f"--url {url!r} is no URL; it looks like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def get(url: str, body: Any = None, api_key: str | None = None) -> Any:
    """Get JSON from a server; OSError or ValueError say that it does not answer, refuses, or answers something else."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30.0) as reply:
        return json.load(reply)


def identify(url: str, model: str | None, api_key: str | None) -> Target:
    """Ask a server what it serves, or raise BenchError if it does not answer as OpenAI's interface does."""
    try:
        models = get(f"{url}/v1/models", api_key=api_key)["data"]
        entry = next((m for m in models if m["id"] == model), models[0])
        target = Target(url, model or str(entry["id"]), server=str(entry.get("owned_by", "")))
        target.heads = entry.get("num_medusa_heads")
        return target
    except urllib.error.HTTPError as error:
        trouble = f"{url}/v1/models answers {error.code} {error.reason}; is --url right, and the key?"
        raise BenchError(trouble) from error
    except OSError as error:
        trouble = f"no answer from {url}: {getattr(error, 'reason', error)}; is the server running?"
        raise BenchError(f"{trouble} --no-check measures it all the same") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchError(f"{url} answers, but not as OpenAI's interface does; is --url right?") from error
