"""`serve --replicas`: a Ray of its own, from its start to its end."""

from __future__ import annotations

import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.conftest import eventually, launch


def test_a_signal_while_replicas_start() -> None:
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory() as folder:  # a short path, as Ray's sockets want it
        Path(folder, "hold").touch()
        running = launch(Path(folder), "--replicas", "1", FAKE_TOKENIZER="1")
        assert eventually(lambda: bool(list(running.pids.iterdir())), 120)  # an engine that goes on starting
        assert running.stop(signal.SIGTERM) < 30
        assert running.process.returncode == 0
        assert "Traceback" not in running.errors()


def test_replicas_that_cannot_start_say_why() -> None:
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory() as folder:
        running = launch(Path(folder), "--replicas", "1", FAKE_TOKENIZER="1", FAKE_ENGINE_ERROR="heads do not fit")
        assert running.process.wait(120) == 1
        error = "the replicas could not start: manyheads.config.ConfigError: heads do not fit"
        assert running.errors() == f"manyheads: error: {error}\n"


def test_a_ray_that_dies_ends_the_server() -> None:
    pytest.importorskip("ray")
    soon = {"RAY_health_check_period_ms": "200", "RAY_health_check_failure_threshold": "2"}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        running = launch(Path(folder), "--replicas", "1", FAKE_TOKENIZER="1", **soon).wait_ready()
        running.pids.with_name("pause").touch()
        asked = pool.submit(httpx.post, running.url + "/generate", json={"prompt": "Hi"}, timeout=100)
        (raylet,) = (p for p in psutil.Process(running.process.pid).children(recursive=True) if p.name() == "raylet")
        raylet.kill()  # it would have started replicas
        assert running.process.wait(100) == 1
        assert "manyheads: error: the engine has stopped: Ray has died on this machine" in running.errors()
        assert asked.result().status_code == 503
