"""The server is watched while it is loaded: memory of its processes and of the GPU, and its own counters."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import psutil

from manyheads.bench import counters
from manyheads.bench.counters import Counters
from manyheads.bench.machine import ask_gpus
from manyheads.bench.result import Memory

LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


class Watch:
    """A watch is a thread that looks at a server once a second.

    Without the id of the server's first process it finds the one that listens, if that is on this machine.
    """

    def __init__(self, url: str, pid: int | None, api_key: str | None) -> None:
        self._url, self._key = url, api_key
        self.pid = pid if pid is not None else listener(url)
        self.memory: list[Memory] = []
        """The sizes; their times are seconds of the monotonic clock."""
        self.counters: list[tuple[float, Counters]] = []
        self._gpu = shutil.which("nvidia-smi") if self.pid is not None else None
        self._visible = visible_gpus(self.pid) if self.pid is not None else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, start: float, end: float) -> tuple[Counters, Counters] | None:
        """Return the looks closest to two times, or None if there are no two."""
        if len(self.counters) < 2:
            return None
        first = min(self.counters, key=lambda look: abs(look[0] - start))
        last = min(self.counters, key=lambda look: abs(look[0] - end))
        return (first[1], last[1]) if last[0] > first[0] else None

    def _run(self) -> None:
        while True:
            self.look()
            if self._stop.wait(1.0):
                self.look()
                return

    def look(self) -> None:
        """Look at the server's counters and memory now."""
        now = time.perf_counter()
        seen = counters.look(self._url, self._key)
        if seen is not None:
            self.counters.append((now, seen))
        host = resident(self.pid) if self.pid is not None else None
        gpu = gpu_bytes(self._gpu, self._visible) if self._gpu else None
        if host is not None or gpu is not None:
            self.memory.append(Memory(now, host, gpu, seen.memory if seen else {}))


def resident(pid: int) -> int | None:
    """Return the resident bytes of a process and its children, shared pages once for each; None if it is gone."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return None
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it ended just now
            total += int(process.memory_info().rss)
    return total


def listener(url: str) -> int | None:
    """Return the process that listens at a local URL, or None if it is elsewhere or not to be seen."""
    parts = urlsplit(url)
    if parts.hostname not in LOCAL:
        return None
    try:
        connections: list[Any] = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = (c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
    return next((pid for pid in found if pid), None)


def visible_gpus(pid: int) -> str | None:
    """Return the process's CUDA_VISIBLE_DEVICES, or None if it may use all GPUs, or cannot be asked."""
    try:
        visible: str | None = psutil.Process(pid).environ().get("CUDA_VISIBLE_DEVICES")
    except psutil.Error:
        return None
    return visible


def gpu_bytes(nvidia_smi: str, gpus: str | None = None) -> int | None:
    """Return the bytes in use on GPUs, given as indices or UUIDs with commas (None: all), or None if not to be had."""
    used = ask_gpus(nvidia_smi, "memory.used", *([] if gpus is None else [f"--id={gpus}"]))
    try:
        return None if used is None else sum(map(int, used)) * 2**20
    except ValueError:
        return None
