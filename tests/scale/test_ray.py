"""Replicas on a local cluster of several raylets: texts, failover, routing and statistics."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.request import EngineRequest
from tests.server.conftest import free_port
from tests.tiny import VOCAB, save_model

if TYPE_CHECKING:  # importing Ray takes seconds, which only the process that runs these tests is to spend
    from manyheads.scale.client import ReplicaClient

T = TypeVar("T")
LONG = 80
PORT = free_port()
URL = f"http://127.0.0.1:{PORT}"
NAME = f"test{os.getpid()}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return EngineConfig(
        model=str(folder),
        heads=str(folder / "heads"),
        device="cpu",
        dtype="float32",
        num_threads=1,
        num_blocks=300,
        max_num_seqs=16,
        tree_size=2,
        seed=0,
    )


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head, and two machines that have room for a replica each."""
    ray = pytest.importorskip("ray")
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.config import ProxyLocation

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    made.workers = [made.add_node(num_cpus=2, resources={"engine": 1}) for _ in range(2)]
    ray.init(address=made.address, logging_level="warning", log_to_driver=False)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options={"host": "127.0.0.1", "port": PORT})
    yield made
    serve.shutdown()
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def handle(cluster: Any, config: EngineConfig) -> Any:
    from ray import serve

    from manyheads.scale.serve_app import app
    from manyheads.scale.settings import AppSettings, Resources, Scaling

    default = asdict(EngineConfig())
    settings = AppSettings(
        engine={name: value for name, value in asdict(config).items() if value != default[name]},
        scaling=Scaling(replicas=2),
        resources=Resources(num_cpus=1, num_gpus=0, custom={"engine": 1}),
    )
    serve.run(app(settings), name=NAME, route_prefix="/")
    return serve.get_deployment_handle("engine", NAME)


def request(name: str, prompt: list[int], session: str = "", **params: Any) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params), session=session)


def asked(count: int, name: str = "") -> list[EngineRequest]:
    """Each of a session of its own, so that all replicas have some, however evenly they are chosen."""
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 30))] for _ in range(count)]
    return [
        request(f"{name}{i}", prompt, f"user {i}", max_tokens=LONG, seed=i, temperature=float(i % 2))
        for i, prompt in enumerate(prompts)
    ]


def alone(config: EngineConfig, requests: list[EngineRequest]) -> dict[str, list[int]]:
    """What an engine in this process says."""
    engine = build_engine(config)
    texts: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for one in requests:
        engine.add_request(one)
    while engine.has_work():
        for delta in engine.step():
            texts[delta.request_id] += delta.new_token_ids
    return texts


def with_client(handle: Any, config: EngineConfig, work: Callable[[ReplicaClient], Awaitable[T]]) -> T:
    async def find() -> Any:
        return handle

    from manyheads.scale.client import ReplicaClient

    async def run() -> T:
        client = ReplicaClient(config, find)
        ready = await client.start()
        assert ready.vocab_size == VOCAB
        try:
            return await asyncio.wait_for(work(client), 120)
        finally:
            await client.close()

    return asyncio.run(run())


async def texts(
    client: ReplicaClient, requests: list[EngineRequest], after: int = 0, then: Callable[[], None] = lambda: None
) -> dict[str, list[int]]:
    """What replicas say; when so many tokens are there, something happens."""
    queue = client.submit(requests)
    said: dict[str, list[int]] = {r.request_id: [] for r in requests}
    left, count = len(requests), 0
    while left:
        for delta in await queue.take():
            said[delta.request_id] += delta.new_token_ids
            count += len(delta.new_token_ids)
            if after and count >= after:
                after = 0
                then()
            if delta.finish_reason is not None:
                left -= 1
                assert delta.finish_reason == "length", delta.error
    return said


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def replica_processes() -> list[int]:
    """Of this test's application; Ray names a process after its actor."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            if f"ray::ServeReplica:{NAME}:engine".encode() in command:
                found.append(int(folder.name))
    return found


def children(pid: int) -> list[int]:
    """Processes that a process has started; its engine."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def texts_are_those_of_one_engine_and_replicas_are_told_apart(handle: Any, config: EngineConfig) -> None:
    requests = asked(20)

    async def work(client: ReplicaClient) -> dict[str, list[int]]:
        said = await texts(client, requests)
        while sum(stats.generation_tokens for stats in client.by_engine.values()) < 20 * LONG:
            await asyncio.sleep(0.1)
        assert client.serving
        assert len(client.by_engine) == 2
        assert all(stats.generation_tokens > 0 for stats in client.by_engine.values())
        assert client.stats.num_pages == 600
        return said

    assert with_client(handle, config, work) == alone(config, requests)


def a_session_and_a_long_beginning_go_where_they_were(handle: Any, config: EngineConfig) -> None:
    shared = [i % VOCAB for i in range(70)]

    async def work(client: ReplicaClient) -> None:
        for i in range(5):
            await texts(client, [request(f"p{i}", [*shared, i], max_tokens=3)])
        for i in range(5):
            await texts(client, [request(f"q{i}", [*shared, i, i], max_tokens=3)])
        before = client.stats.prefix_hits
        while client.stats.prefix_hits < 9 * 64:
            await asyncio.sleep(0.1)
        assert before <= client.stats.prefix_hits

    with_client(handle, config, work)


def tokens_by_replica() -> dict[str, float]:
    """What each replica has generated, by the ingress's metrics."""
    lines = httpx.get(f"{URL}/metrics", timeout=30).text.splitlines()
    return {
        line.split()[0]: float(line.split()[1])
        for line in lines
        if line.startswith("manyheads_engine_generation_tokens_total{")
    }


def the_application_answers_over_http_and_a_session_has_a_replica(config: EngineConfig) -> None:
    until(lambda: len(tokens_by_replica()) == 2)
    assert httpx.get(f"{URL}/ready", timeout=30).status_code == 200
    requests = [request(str(i), [i, i + 1, i + 2], max_tokens=20, temperature=0.0) for i in range(8)]
    wanted, before = alone(config, requests), tokens_by_replica()
    for asked_for in requests:
        body = {"prompt": asked_for.prompt_token_ids, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{URL}/v1/completions", json=body, headers={"X-Session-Id": "mine"}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == wanted[asked_for.request_id]
    said = sum(map(len, wanted.values()))
    until(lambda: sum(tokens_by_replica().values()) - sum(before.values()) >= said)
    gained = [count - before[name] for name, count in tokens_by_replica().items()]
    assert sorted(gained) == [0, said], "a session's requests go to one replica"


def an_aborted_request_ends_here_and_there(handle: Any, config: EngineConfig) -> None:
    async def work(client: ReplicaClient) -> None:
        queue = client.submit([request("x", [1, 2], max_tokens=100)])
        await queue.take()
        client.abort("x")
        while (delta := (await queue.take())[-1]).finish_reason is None:
            pass
        assert delta.finish_reason == "abort"
        assert client.num_open == 0
        while client.stats.num_running:
            await asyncio.sleep(0.1)

    with_client(handle, config, work)


def a_replica_that_is_killed_costs_a_pause(handle: Any, config: EngineConfig) -> None:
    requests = asked(20, "k")
    victims = replica_processes()
    assert len(victims) == 2

    async def work(client: ReplicaClient) -> dict[str, list[int]]:
        restarts, resumed = client.num_restarts, client.num_resumed
        said = await texts(client, requests, 100, lambda: os.kill(victims[0], signal.SIGKILL))
        assert client.num_resumed > resumed + 1, "many requests met one death"
        assert client.num_restarts == restarts + 1
        return said

    assert with_client(handle, config, work) == alone(config, requests)
    until(lambda: len(replica_processes()) == 2)


def an_engine_that_is_killed_in_its_replica_is_counted_by_the_front_end(handle: Any, config: EngineConfig) -> None:
    requests = asked(20, "e")

    async def work(client: ReplicaClient) -> dict[str, list[int]]:
        # a replica that has just come is without its engine for a while
        while len(client.by_engine) < 2 or not all(map(children, replica_processes())):
            await asyncio.sleep(0.1)
        (engine,) = children(replica_processes()[0])
        restarts, resumed = client.num_restarts, client.num_resumed
        said = await texts(client, requests, 100, lambda: os.kill(engine, signal.SIGKILL))
        while client.num_restarts == restarts or client.num_resumed == resumed:
            await asyncio.sleep(0.1)
        assert client.num_restarts == restarts + 1
        return said

    assert with_client(handle, config, work) == alone(config, requests)


def a_machine_that_is_lost_costs_a_pause(cluster: Any, handle: Any, config: EngineConfig) -> None:
    requests = asked(200, "n")  # they take longer than it takes Ray to end a machine

    async def work(client: ReplicaClient) -> dict[str, list[int]]:
        while len(client.by_engine) < 2:
            await asyncio.sleep(0.1)
        lose = lambda: cluster.remove_node(cluster.workers.pop(), allow_graceful=False)  # noqa: E731
        restarts, resumed = client.num_restarts, client.num_resumed
        said = await texts(client, requests, 100, lose)
        assert client.num_resumed > resumed
        assert client.num_restarts == restarts + 1
        return said

    assert with_client(handle, config, work) == alone(config, requests)


def test_replicas(cluster: Any, handle: Any, config: EngineConfig) -> None:
    """One test, for the cluster takes longer to start than all of it."""
    texts_are_those_of_one_engine_and_replicas_are_told_apart(handle, config)
    the_application_answers_over_http_and_a_session_has_a_replica(config)
    a_session_and_a_long_beginning_go_where_they_were(handle, config)
    an_aborted_request_ends_here_and_there(handle, config)
    a_replica_that_is_killed_costs_a_pause(handle, config)
    an_engine_that_is_killed_in_its_replica_is_counted_by_the_front_end(handle, config)
    a_machine_that_is_lost_costs_a_pause(cluster, handle, config)
