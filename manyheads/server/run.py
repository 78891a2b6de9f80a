"""`serve` runs the engine process and the web server, from start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from manyheads.config import ConfigError, EngineConfig
from manyheads.errors import EngineError
from manyheads.frontend.async_llm import AsyncLLM
from manyheads.frontend.backend import Backend
from manyheads.frontend.defaults import default_params
from manyheads.frontend.engine_client import EngineClient
from manyheads.frontend.engine_process import BUILD_ENGINE
from manyheads.frontend.llm import folders
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import EngineReady, SamplingParams
from manyheads.say import say
from manyheads.server.app import create_app
from manyheads.server.aside import Aside
from manyheads.server.config import ServerConfig
from manyheads.server.connections import Guard, GuardedServer, raise_file_limit
from manyheads.server.logs import log_config
from manyheads.server.service import Service, service_of
from manyheads.sizes import format_size

CLOSE_SECONDS = 1
"""The last answers may take so long to get out."""
GARBAGE = (20_000, 10, 10)
"""Garbage is collected after so many new objects (`gc.set_threshold`; Python's own is 700): a step of many streams
makes thousands, nearly all of which need no collector."""


class Server(GuardedServer):
    """uvicorn ends when we say so: after the requests that run, or when there is no engine any more."""

    def __init__(self, config: uvicorn.Config, guard: Guard, client: Backend) -> None:
        super().__init__(config, guard)
        self._client = client

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: `serve` has handlers of its own, in force from before the engine starts."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Tell, ten times a second, whether to end."""
        return await super().on_tick(counter) or self._client.failure is not None

    async def drain(self, service: Service, seconds: float) -> None:
        """Take no new requests, finish those that run within so many seconds, abort the others, and end."""
        service.draining = True
        if self._client.num_open:
            what = f"{self._client.num_open} requests in at most {seconds:g} s; a second signal ends them now"
            say(f"manyheads: finishing {what}")
        deadline = time.monotonic() + seconds
        while self._client.num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._client.abort_all()  # each gets an answer that says so
        self.should_exit = True


def serve(
    config: EngineConfig,
    server: ServerConfig,
    *,
    build: str = BUILD_ENGINE,
    backend: Callable[[], Backend] | None = None,
) -> int:
    """Serve until a signal, and return the exit status.

    Args:
        build: as of `EngineClient`.
        backend: makes what requests go to, within the event loop; None is an engine in a process beside this one.

    Raises:
        ConfigError, EngineError: it could not start, or the engine has died; nothing is left behind.
    """
    server.check()
    if server.is_exposed:
        say(f"warning: anybody who reaches {server.host} may ask: no --api-key or --api-key-file")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processors are the engine's
    raise_file_limit()

    def engine() -> Backend:
        return EngineClient(
            config, watchdog=server.watchdog, max_restarts=server.max_restarts, build=build, verbose=server.verbose
        )

    return asyncio.run(_serve(config, server, backend or engine))


async def _serve(config: EngineConfig, options: ServerConfig, backend: Callable[[], Backend]) -> int:
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    server: Server | None = None
    service: Service | None = None
    draining: asyncio.Task[None] | None = None
    stopping = False

    def stop() -> None:
        nonlocal draining, stopping
        if server is None or service is None:
            if not stopping:
                main.cancel()
        elif draining is None:
            draining = asyncio.create_task(server.drain(service, options.drain_timeout))
        else:  # in a hurry: everyone gets an answer now
            draining.cancel()
            client.abort_all()
            server.should_exit = True
            loop.call_later(CLOSE_SECONDS, setattr, server, "force_exit", True)
        stopping = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    client = backend()
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_bind(options.host, options.port))
            (tokenizer, defaults), ready = await _start(client, config, options)
            llm = stack.enter_context(contextlib.closing(AsyncLLM(client, tokenizer, ready, defaults)))
            service = service_of(llm, options)
            web = uvicorn.Config(
                create_app(service, options),
                http="httptools",
                ws="none",
                timeout_keep_alive=options.connections.keep_alive,
                log_config=log_config(options.log_format),
                log_level="warning",
                access_log=False,  # RequestLog writes it
                root_path=options.root_path,
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile=options.ssl_keyfile,
                lifespan="off",
                timeout_graceful_shutdown=CLOSE_SECONDS,
                server_header=False,
            )
            server = Server(web, Guard(options.connections, service.metrics.drops, service.metrics.registry), client)
            host, port = listener.getsockname()[:2]
            scheme = "https" if options.ssl_certfile else "http"
            gc.collect()
            gc.set_threshold(*GARBAGE)
            gc.freeze()  # what imports have made stays: looking at it again stops all streams for a quarter of a second
            lines = (ready.weights, _memory(ready), _greeting(ready, service.names[0], host, port, scheme))
            say("\n".join(filter(None, lines)))
            await server.serve(sockets=[listener])
            if client.failure is not None and not stopping:
                raise EngineError(f"the engine has stopped: {client.failure}")
    except asyncio.CancelledError:
        if not stopping:
            raise
    finally:
        await client.close()
    return 0


async def _start(
    client: Backend, config: EngineConfig, options: ServerConfig
) -> tuple[tuple[Tokenizer, SamplingParams], EngineReady]:
    """Load the tokenizer, and how the model wants to be sampled, here while the engine process loads the model."""

    def load() -> tuple[Tokenizer, SamplingParams]:
        base, tokenizer = folders(config)
        return Tokenizer.load(tokenizer, options.chat_template), default_params(base)

    tokenizer = asyncio.create_task(Aside().do(load))
    engine = asyncio.create_task(client.start())
    try:
        return await asyncio.gather(tokenizer, engine)
    finally:
        tokenizer.cancel()
        engine.cancel()
        await asyncio.gather(engine, tokenizer, return_exceptions=True)


def _bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, so that a taken one is noticed at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where it sees that a socket speaks TCP; else the second chunk of a reply
    # on a connection that is used again waits for the client's delayed acknowledgement, 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # only now is the address ours; who connects early waits for the model
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from error
    return listener


def _greeting(ready: EngineReady, name: str, host: str, port: int, scheme: str) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    drafters = {None: "no Medusa heads", "medusa": f"{ready.draft_depth} Medusa heads"}
    drafter = drafters.get(ready.drafter, f"{ready.drafter} drafts")
    weights = f"{ready.quantization} weights, " if ready.quantization else ""
    weights += f"{ready.kv_cache_dtype} K/V, " if ready.kv_cache_dtype != "auto" else ""
    return (
        f"manyheads serves {name} ({drafter}, {weights}{ready.dtype} on {ready.device}) at {scheme}://{shown}:{port}  "
        "- Ctrl-C stops it"
    )


def _memory(ready: EngineReady) -> str:
    """Say where memory goes, and how much context fits."""
    use = ready.memory
    parts = [f"weights {format_size(use.weights)}"]
    parts += [f"heads {format_size(use.heads)}"] if use.heads else []
    parts += [f"K/V {format_size(use.kv_cache)} ({use.kv_cache_tokens:,} tokens)"]
    parts += [f"graphs {format_size(use.graphs)}"] if use.graphs else []
    text = f"memory: {', '.join(parts)}, rest {format_size(use.rest)}"
    if ready.max_model_len < ready.wanted_model_len:
        text += f"; a request may have {ready.max_model_len:,} tokens, for {ready.wanted_model_len:,} do not fit"
    return text
