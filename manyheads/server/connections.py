"""Connections are limited in number and in time, so that clients which do not do their part hold up nobody.

uvicorn speaks HTTP and closes connections that were quiet after an answer. This module adds what it lacks: a time for
headers, one for clients that do not read, and a choice of who goes when there are too many.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import socket
import ssl
import struct
import termios
from collections.abc import Callable
from itertools import chain, takewhile
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Gauge
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from manyheads.server.config import ConnectionLimits
from manyheads.server.drops import Drops, OncePerMinute

MOST_FILES = 2**16
"""More open files are not asked for, whatever the system would allow: a connection takes about 30 kB of memory."""
RESERVED_FILES = 32
"""Connections leave so many file descriptors free: for the engine's sockets, should it be started again, for files,
and for connections that are being closed."""
FEWEST_CONNECTIONS = 8
"""There are at least so many, however few files may be open."""
ACCEPTS = 8
"""So many new connections are taken before the others get their turn."""
ACCEPT_PAUSE_SECONDS = 0.1
"""After the system refused a file descriptor, none is asked for so long."""
SWEEP_SECONDS = 0.2
"""So often is looked for connections whose time is over."""
UNSENT_BYTES = 2**17
"""The system takes so many bytes that are not yet on their way to the client; what is more waits here."""
MOST_HEAD_BYTES = 2**16
"""Headers may have about so many bytes, and so many may come between two pieces of a body, or behind it (trailers)."""
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def raise_file_limit() -> None:
    """Let this process open as many files as the system lets it choose."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections(wanted: int | None) -> int:
    """Return how many connections may be open, at most `wanted`, with the files that may be open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)
    fits = max(FEWEST_CONNECTIONS, files - len(os.listdir("/dev/fd")) - RESERVED_FILES)
    return fits if wanted is None else min(wanted, fits)


class Guard:
    """The guard knows what every connection is doing, and closes those whose time is over or whose place is needed."""

    def __init__(self, limits: ConnectionLimits, drops: Drops, registry: CollectorRegistry) -> None:
        self.limits = limits
        self.most = most_connections(limits.max_connections)
        """So many connections may be open."""
        self.drops = drops
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, float] = {}
        """These have not sent whole headers, since that time; the first one waits longest."""
        self.idle: dict[Connection, None] = {}
        """These have had an answer and sent nothing since; the first one is idle for longest."""
        self.unread: dict[Connection, tuple[int, float]] = {}
        """For these something is to be written that the system does not take: so many bytes are unsent, since then."""
        Gauge("manyheads_connections", "Open connections", registry=registry).set_function(lambda: len(self.open))

    def add(self, connection: Connection) -> None:
        """Take note of a new connection."""
        self.open.add(connection)
        self.waiting[connection] = connection.loop.time()

    def forget(self, connection: Connection) -> None:
        """Take note that a connection has ended."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self.idle.pop(connection, None)
        self.unread.pop(connection, None)

    def make_room(self) -> bool:
        """Close a connection that is in no request, the idle ones first, and tell whether there was one."""
        connection = next(chain(self.idle, self.waiting), None)
        if connection is not None:
            self.drops.count("room", "connections without a request closed to make room for others: %d")
            connection.drop()
        return connection is not None

    def sweep(self) -> None:
        """Close what has waited too long, and do so again in a while, as long as the event loop runs."""
        loop = asyncio.get_running_loop()
        loop.call_later(SWEEP_SECONDS, self.sweep)
        now, limits = loop.time(), self.limits
        for connection, _ in list(takewhile(lambda w: now - w[1] > limits.header_timeout, self.waiting.items())):
            text = f"connections dropped that sent no whole headers within {limits.header_timeout:g} s: %d"
            self.drops.count("headers", text)
            connection.drop()
        for connection, (size, since) in list(self.unread.items()):
            if (left := connection.unsent()) != size:
                self.unread[connection] = left, now
            elif now - since > limits.write_timeout:
                text = f"connections dropped whose clients read nothing for {limits.write_timeout:g} s: %d"
                self.drops.count("write", text)
                connection.drop(forgets=True)
        self.drops.write()


class Connection(HttpToolsProtocol):
    """A connection tells the guard what it does: it is in a request, idle, or its headers are not whole yet."""

    def __init__(self, guard: Guard, client: socket.socket, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._guard = guard
        self._client = client
        self._is_made = False
        self._num_held = 0
        """Bytes that have come since the parser had whole headers or a piece of a body; it would keep any number."""
        self.opening: asyncio.Task[None] | None = None
        """This task makes the connection's transport."""

    def unsent(self) -> int:
        """Count the bytes that the client's system has not taken; where that cannot be asked, those that wait here."""
        with contextlib.suppress(OSError):
            (sent,) = struct.unpack("i", fcntl.ioctl(self._client, termios.TIOCOUTQ, bytes(4)))
            return self.transport.get_write_buffer_size() + int(sent)
        return self.transport.get_write_buffer_size()

    def drop(self, forgets: bool = False) -> None:
        """Close at once.

        Args:
            forgets: what the system was given and could not send is forgotten, too.
        """
        self._guard.forget(self)
        with contextlib.suppress(OSError):  # the client may have closed it before
            if forgets:
                self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if not self._is_made:  # a handshake, which fails when it finds this
                self._client.shutdown(socket.SHUT_RDWR)
        if self._is_made:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self._is_made = True
        if self not in self._guard.open:  # dropped meanwhile
            transport.abort()
            return
        # every byte that the system does not take pauses the writer: so little waits here, and it is seen when a
        # client does not read
        transport.set_write_buffer_limits(high=1, low=0)
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._guard.forget(self)

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        self._num_held += len(data)
        super().data_received(data)
        if self._num_held > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.logger.warning("Headers or trailers of a request are too large.")
            self.send_400_response(f"this server reads headers of at most {MOST_HEAD_BYTES} bytes")
        self._settle()

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._num_held = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a request's body."""
        self._num_held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        self._num_held = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._settle()

    def pause_writing(self) -> None:
        """Wait: the client does not read as fast as there is something to write."""
        super().pause_writing()
        self._guard.unread[self] = self.unsent(), self.loop.time()
        self._settle()

    def resume_writing(self) -> None:
        """Go on: all has been written."""
        super().resume_writing()
        self._guard.unread.pop(self, None)
        self._settle()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        if not self._in_request:  # uvicorn forgets to stop this clock for a request that was sent before the answer
            self._guard.drops.count("idle")
            super().timeout_keep_alive_handler()

    @property
    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _settle(self) -> None:
        guard = self._guard
        guard.idle.pop(self, None)
        if self not in guard.open or self._in_request or self.transport.is_closing() or self in guard.unread:
            guard.waiting.pop(self, None)
        elif self.timeout_keep_alive_task is None:
            guard.waiting.setdefault(self, self.loop.time())
        else:
            guard.waiting.pop(self, None)
            guard.idle[self] = None


class Listener:
    """A listener accepts connections, as asyncio's server does, but only as many as the guard has room for.

    asyncio's own goes on asking, and writes a traceback each time, when the system has no more file descriptors.
    """

    def __init__(
        self, at: socket.socket, guard: Guard, make: Callable[[socket.socket], Connection], config: uvicorn.Config
    ) -> None:
        self._at = at
        self._guard = guard
        self._make = make
        self._ssl: ssl.SSLContext | None = config.ssl
        self._loop = asyncio.get_running_loop()
        at.setblocking(False)
        at.listen(config.backlog)
        self._loop.add_reader(at, self._accept)
        self._pause: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._at)
        if self._pause is not None:
            self._pause.cancel()

    async def wait_closed(self) -> None:
        """Return: closing takes no time."""

    def _accept(self) -> None:
        guard = self._guard
        for _ in range(ACCEPTS):
            try:
                client, _address = self._at.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                guard.drops.tell(f"times that no connection could be accepted ({error.strerror}): %d")
                guard.make_room()
                self._loop.remove_reader(self._at)
                self._pause = self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._loop.add_reader, self._at, self._accept)
                return
            client.setblocking(False)
            if len(guard.open) >= guard.most and not guard.make_room():
                self._refuse(client)
                continue
            connection = self._make(client)
            guard.add(connection)
            connection.opening = self._loop.create_task(self._open(connection, client))

    def _refuse(self, client: socket.socket) -> None:
        text = f"connections refused because {self._guard.most} are in requests (see --max-connections): %d"
        self._guard.drops.count("refused", text)
        with client, contextlib.suppress(OSError):
            if self._ssl is None:
                client.send(_REFUSAL)

    async def _open(self, connection: Connection, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, client, ssl=self._ssl)
        except OSError:  # the client has left, or does not speak TLS
            self._guard.forget(connection)


class GuardedServer(uvicorn.Server):
    """This is uvicorn's server with a guard over its connections."""

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self.guard = guard
        logging.getLogger("uvicorn.error").addFilter(OncePerMinute())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets=[])

        def make(client: socket.socket) -> Connection:
            uvicorns = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
            return Connection(self.guard, client, **uvicorns)

        self.servers = [Listener(at, self.guard, make, self.config) for at in sockets or []]  # type: ignore[misc]
        self.guard.sweep()
