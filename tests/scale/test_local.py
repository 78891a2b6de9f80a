"""`serve --replicas`: a Ray of its own, from its start to its end."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

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
