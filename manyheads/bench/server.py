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
from manyheads.interrupt import between_steps

_READY = re.compile(r"manyheads serves .* at (http://\S+)")


@dataclass
class Target:
    """A target is a running server that is asked."""

    url: str
    model: str
    pid: int | None = None
    owner: str = ""
    """The owner of the model by the server's word, which tells manyheads, vLLM, … apart."""
    heads: int | None = None
    context: int | None = None
    """The most tokens of a request, prompt and answer, if the server tells."""
    options: tuple[str, ...] = ()
    started_here: bool = False


@contextlib.contextmanager
def started(model: str, options: Sequence[str], ready_seconds: float = 600.0) -> Iterator[tuple[str, int]]:
    """Serve a model while the block lasts, which is given URL and process id.

    Raises:
        BenchError: it did not start; the message has what it said.
    """
    command = [sys.executable, "-m", "manyheads", "serve", model, "--host", "127.0.0.1", "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log:
        with between_steps() as check:  # a Ctrl-C while it is started would leave it behind
            # NOTE: a session of its own, for the terminal's Ctrl-C is to end the load and not the server
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            check()
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
        found = _READY.search(said)
        if found:
            return found[1]
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the server did not start: {said.strip()[-2000:] or 'it said nothing'}")
        time.sleep(0.1)


def clean_url(url: str) -> str:
    """Return a server's URL without `/v1` and the last slash.

    Raises:
        BenchInputError: the text is no URL.
    """
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good:
        raise BenchInputError(f"--url {url!r} is no URL; it looks like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def get(url: str, body: Any = None, api_key: str | None = None, timeout: float = 30.0) -> Any:
    """Get JSON from a server.

    Raises:
        OSError, ValueError: the server does not answer, refuses, or does not answer with JSON.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as reply:
        return json.load(reply)


def identify(url: str, model: str | None, api_key: str | None) -> Target:
    """Ask a server what it serves.

    Raises:
        BenchError: it does not answer as OpenAI's interface does.
    """
    try:
        models = get(f"{url}/v1/models", api_key=api_key)["data"]
        entry = next((m for m in models if m["id"] == model), models[0])
        name, owner, heads = str(entry["id"]), str(entry.get("owned_by", "")), entry.get("num_medusa_heads")
        context = int(entry.get("max_model_len") or 0) or None
    except urllib.error.HTTPError as error:
        raise BenchError(
            f"{url}/v1/models answers {error.code} {error.reason}; is --url right, and the key?"
        ) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise BenchError(
            f"no answer from {url}: {reason}; is the server running? --no-check measures it all the same"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchError(f"{url} answers, but not as OpenAI's interface does; is --url right?") from error
    return Target(url, model or name, owner=owner, heads=heads, context=context)
