"""What `manyheads deploy` writes and refuses, and what there must be before anything is deployed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from manyheads.cli import main
from manyheads.cli.extras import needs_ray
from manyheads.config import ConfigError, EngineConfig
from manyheads.scale.settings import AppSettings, Resources, Scaling
from manyheads.server.config import ServerConfig

GIVEN = {
    "--replicas": "2",
    "--least-replicas": "1",
    "--most-replicas": "4",
    "--open-requests": "8",
    "--gpus": "2",
    "--max-model-len": "512",
    "--lora": "sql=/adapters/sql",
    "--tool-parser": "hermes",
    "--reasoning-parser": "think",
    "--api-key-file": "/etc/keys",
    "--served-model-name": "mine",
    "--chat-template": "vicuna",
    "--name": "other",
    "--route-prefix": "/other",
}


def test_the_config_file_is_what_the_application_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "there", "--config", "--strict", *(part for pair in GIVEN.items() for part in pair)]) == 0
    (application,) = json.loads(capsys.readouterr().out)["applications"]
    assert application["name"] == "other"
    assert application["route_prefix"] == "/other"
    assert application["import_path"] == "manyheads.scale:app"
    settings = AppSettings.read(application["args"])
    assert settings.engine_config() == EngineConfig(model="there", max_model_len=512, loras={"sql": "/adapters/sql"})
    assert settings.server_config() == ServerConfig(
        tool_parser="hermes",
        reasoning_parser="think",
        strict=True,
        api_key_file="/etc/keys",
        served_model_names=("mine",),
        chat_template="vicuna",
    )
    assert settings.scaling == Scaling(replicas=2, least=1, most=4, open_requests=8.0)
    assert settings.resources == Resources(num_gpus=2)


def test_a_config_file_says_no_more_than_what_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "--config"]) == 0
    (application,) = json.loads(capsys.readouterr().out)["applications"]
    assert application["args"]["engine"] == {}
    assert application["args"]["server"] == {}
    assert AppSettings.read(application["args"]) == AppSettings()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"engine": {"modell": "x"}}, "engine: there is no setting 'modell'"),
        ({"engine": {"tree_size": "many"}}, "engine: Expected `int \\| null`, got `str`"),
        ({"server": {"reasoning_parser": "no"}}, "server: --reasoning-parser must be"),
        ({"scaling": {"open_requests": 0}}, "scaling.open_requests: "),
        ({"resources": {"num_cpus": -1}}, "resources.num_cpus: "),
        ({"replicas": 2}, "replicas: Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_hold(given: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        AppSettings.read(given)


def test_ray_is_asked_for_where_it_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"need Ray: pip install 'manyheads\[ray\]'"), needs_ray():
        raise ModuleNotFoundError("No module named 'ray.serve'", name="ray.serve")
    with pytest.raises(ModuleNotFoundError, match="other"), needs_ray():
        raise ModuleNotFoundError("No module named 'other'", name="other")


def machines(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    ray = pytest.importorskip("ray")
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": r} for r in resources)])


def test_a_cluster_has_room_or_says_for_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    machines(monkeypatch, {"CPU": 4.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 4.0, "special": 1.0}, {"CPU": 16.0})
    from manyheads.scale.room import check_room, ray_options

    two_ranks = ray_options(Resources(), EngineConfig(tensor_parallel_size=2))
    assert two_ranks == {"num_cpus": 1.0, "num_gpus": 2, "resources": {}}
    check_room(two_ranks, 3)
    with pytest.raises(ConfigError, match=r"4 replicas of 1 CPU, 2 GPU each are asked for, .* room for 3"):
        check_room(two_ranks, 4)
    check_room(ray_options(Resources(num_cpus=4), EngineConfig(device="cpu")), 7)
    with pytest.raises(ConfigError, match="room for 1"):
        check_room(ray_options(Resources(custom={"special": 1}), EngineConfig(device="cpu")), 2)
    check_room(ray_options(Resources(num_cpus=0), EngineConfig(device="cpu")), 1000)


def test_gpus_are_taken_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    machines(monkeypatch, {"CPU": 4.0})
    from manyheads.scale.room import ray_options

    assert ray_options(Resources(), EngineConfig())["num_gpus"] == 0
    assert ray_options(Resources(num_gpus=0.5), EngineConfig())["num_gpus"] == 0.5


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_an_address_where_nobody_listens_is_told_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    started = time.monotonic()
    assert main(["deploy", "--address", address]) == 1
    assert time.monotonic() - started < 30  # most of which an import may take
    assert capsys.readouterr().err == f"manyheads: error: no Ray cluster at {address}: [Errno 111] Connection refused\n"


def test_a_signal_while_replicas_start_is_ours() -> None:
    pytest.importorskip("ray")
    program = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
from manyheads.scale.local import _start_ray, keep_signals
from manyheads.server.aside import Aside
from manyheads.server.config import ServerConfig
import asyncio
asyncio.run(Aside().do(lambda: _start_ray(ServerConfig(), 1)))
keep_signals()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.returncode == 7
