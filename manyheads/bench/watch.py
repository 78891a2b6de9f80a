"""The server is watched while it is loaded: memory of its processes and of the GPU, and its own counters."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import psutil

from manyheads.bench import counters
from manyheads.bench.counters import Counters
from manyheads.bench.result import Memory

LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


class Watch:
    """A watch is a thread that looks at a server once a second.

    Args:
        url: the server's.
        pid: its first process; None finds the process that listens, if it is on this machine.
    """

    def __init__(self, url: str, pid: int | None, api_key: str | None = None, every: float = 1.0) -> None:
        self._url, self._key, self._every = url, api_key, every
        self.pid = pid if pid is not None else listener(url)
        self.memory: list[tuple[float, Memory]] = []
        """Pairs of the monotonic time in seconds and the sizes then."""
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
            if self._stop.wait(self._every):
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
            self.memory.append((now, Memory(0.0, host, gpu, seen.memory if seen else {})))


def resident(pid: int) -> int | None:
    """Return the resident bytes of a process and its children, shared pages once for each; None if it is gone."""
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return None
    total = 0
    for process in processes:
        try:
            total += int(process.memory_info().rss)
        except psutil.Error:  # it ended just now
            continue
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
    """Return the bytes in use on these GPUs (None: all), by whatever process, or None if they cannot be had.

    Args:
        gpus: indices or UUIDs, separated by commas.
    """
    command = [nvidia_smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if gpus is not None:
        command.append(f"--id={gpus}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return sum(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
