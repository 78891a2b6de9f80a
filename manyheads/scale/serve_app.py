"""The Ray Serve application: replicas, and an ingress in front of them that speaks manyheads' HTTP.

A Serve config file says `import_path: manyheads.scale:app` and gives the fields of `AppSettings` as `args`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import msgspec
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from manyheads.config import EngineConfig
from manyheads.frontend.async_llm import AsyncLLM
from manyheads.frontend.defaults import default_params
from manyheads.frontend.engine_process import BUILD_ENGINE
from manyheads.frontend.llm import folders
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.scale.client import ReplicaClient
from manyheads.scale.replica import Replica
from manyheads.scale.room import ray_options
from manyheads.scale.router import PrefixRouter
from manyheads.scale.settings import AppSettings
from manyheads.server.app import create_app
from manyheads.server.config import ServerConfig
from manyheads.server.service import service_of


def replicas(
    config: EngineConfig, options: ServerConfig, settings: AppSettings, build: str = BUILD_ENGINE
) -> serve.Application:
    """The deployment of the engines; a replica whose engine has several ranks takes as many GPUs of one machine."""
    router: dict[str, Any] = {
        "request_router_class": f"{PrefixRouter.__module__}:{PrefixRouter.__name__}",
        "request_router_kwargs": settings.routing,
        "request_routing_stats_period_s": 1.0,
    }
    deployment: Any = serve.deployment(
        name="engine",
        ray_actor_options=ray_options(settings.resources, config),
        max_ongoing_requests=2 * config.max_queue,  # the queue is the engine's
        graceful_shutdown_timeout_s=options.drain_timeout,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        request_router_config=RequestRouterConfig(**router),
        **settings.scaling.options(),
    )(Replica)
    application: serve.Application = deployment.bind(
        msgspec.json.encode(config).decode(), options.watchdog, options.max_restarts, build
    )
    return application


class LateApp:
    """An ASGI application that is there once the ingress is."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on."""
        if scope["type"] == "lifespan":
            return
        assert self.app is not None
        await self.app(scope, receive, send)


_here = LateApp()
"""Of this process: an ingress is one."""


def _build_app() -> ASGIApp:
    return _here


@serve.ingress(_build_app)
class Ingress:
    """A front end of all replicas; it keeps nothing but the streams that go through it."""

    async def __init__(self, engines: DeploymentHandle[Any], engine: str, server: str) -> None:  # type: ignore[misc]
        config = msgspec.json.decode(engine, type=EngineConfig)
        options = msgspec.json.decode(server, type=ServerConfig)
        if options.api_key is None:  # a secret is no matter of a config file
            options = replace(options, api_key=os.environ.get("MANYHEADS_API_KEY") or None)

        async def find() -> DeploymentHandle[Any]:
            return engines

        client = ReplicaClient(config, find)
        ready = await client.start()
        base, tokenizer_folder = folders(config)
        tokenizer = Tokenizer.load(tokenizer_folder, options.chat_template)
        self._service = service_of(AsyncLLM(client, tokenizer, ready, default_params(base)), options)
        _here.app = create_app(self._service, options)


def app(args: AppSettings) -> serve.Application:
    """Build the application that a Serve config file asks for.

    Raises:
        ConfigError: a setting cannot hold.
    """
    config, options = args.engine_config(), args.server_config()
    options.check()
    engines = replicas(config, options, args)
    ingress: Any = serve.deployment(
        name="ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=options.drain_timeout,
    )(Ingress)
    texts = (msgspec.json.encode(config).decode(), msgspec.json.encode(options).decode())
    application: serve.Application = ingress.bind(engines, *texts)
    return application
