"""The server that chaos.py disturbs: it runs in processes of its own, and what it leaves behind is looked for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import psutil
from chaos_client import get
from common import ROOT

_SERVES = re.compile(r"manyheads serves .* at (http://\S+)")
START_SECONDS = 900.0
SHARED_MEMORY = Path("/dev/shm")


class Server:
    """A server with a folder of its own for temporary files.

    Args:
        program: what Python is to run (tests have a server of their own).
        files: how many it may have open at once (`ulimit -n`; default: as many as this process).
    """

    def __init__(
        self,
        model: Path | str,
        options: Sequence[str],
        program: Sequence[str] = ("-m", "manyheads", "serve"),
        files: int | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.temp = self.folder / "tmp"
        self.temp.mkdir()
        self._shared = set(SHARED_MEMORY.iterdir())
        command = [sys.executable, *program, str(model), "--host", "127.0.0.1", "--port", "0"]
        self._log = self.folder / "log"
        self.url = ""
        self.start_seconds = 0.0
        """From the command to a /ready of 200."""
        limits = resource.getrlimit(resource.RLIMIT_NOFILE) if files is None else (files, files)
        with self._log.open("w") as log:
            # NOTE: a session of its own, for the terminal's Ctrl-C is to end chaos.py, which then ends the server
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(self.temp)},
                start_new_session=True,
                preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, limits),
            )

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text()

    @property
    def engine(self) -> psutil.Process | None:
        """The engine's process; None while there is none."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "manyheads.frontend.engine_process" in child.cmdline():
                    return child
        return None

    async def wait_ready(self) -> None:
        """Waits until it takes requests for the first time. Raises RuntimeError if it does not start."""
        start = time.monotonic()
        while True:
            if self.process.poll() is not None or time.monotonic() - start > START_SECONDS:
                raise RuntimeError(f"the server did not start: {self.log[-2000:]}")
            if found := _SERVES.search(self.log):
                self.url = found[1]
                if (await get(self.url, "/ready"))[0] == 200:
                    break
            await asyncio.sleep(0.05)
        self.start_seconds = time.monotonic() - start

    async def metric(self, name: str) -> float:
        """A figure of /metrics, without the prefix; NaN if the server does not answer."""
        _, text = await get(self.url, "/metrics")
        found = re.search(rf"^manyheads_{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else float("nan")

    def left_over(self) -> list[str]:
        """Files, sockets, processes and shared memory that are still there; nothing else made them."""
        found = [str(path) for path in self.temp.rglob("*")]
        found += [line for line in Path("/proc/net/unix").read_text().splitlines() if str(self.temp) in line]
        mapped = ""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if f"TMPDIR={self.temp}".encode() in (process / "environ").read_bytes():
                    found.append(f"process {process.name}")
                mapped += (process / "maps").read_text()
        # what another program of this machine has made meanwhile is held by that program
        found += [str(path) for path in set(SHARED_MEMORY.iterdir()) - self._shared if str(path) not in mapped]
        return found

    def close(self) -> None:
        """Ends it, whatever state it is in, and removes the folder."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder)


@contextlib.asynccontextmanager
async def started(model: Path | str, options: Sequence[str], **more: Any) -> AsyncGenerator[Server, None]:
    """A server that takes requests, while the block lasts; the arguments are those of `Server`."""
    server = Server(model, options, **more)
    try:
        await server.wait_ready()
        yield server
    finally:
        server.close()


def poison(model: Path, folder: Path) -> int:
    """Copies a checkpoint into a folder that is not there yet; there the last token gives NaN. Returns that token.

    No checkpoint with NaN in it is accepted. So the token's embedding is zero, and so is what its norm has beside the
    mean of squares: 0 / 0.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.0}))
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[(embeddings == 0).all(dim=1), 0] = 1.0  # a padding token's
    embeddings[-1] = 0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return len(embeddings) - 1
