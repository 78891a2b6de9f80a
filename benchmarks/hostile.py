"""Clients that do not do their part: they send nothing, half of a request, or never read the answer.

A server that holds must serve the others meanwhile, and get rid of these. Tests and benchmarks open them:

    with half_open(("127.0.0.1", 8000), 1200) as clients:
        clients.drip()
        print(clients.num_open())
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from types import TracebackType

Address = tuple[str, int]


class Clients:
    """These are connections of one kind, which their owner closes in the end.

    Args:
        count: how many to open.
        first: what each sends at once.
        receive_buffer: bytes that the system keeps for a client that does not read (default: the system's choice).
    """

    def __init__(self, address: Address, count: int, first: bytes = b"", receive_buffer: int | None = None) -> None:
        self._sockets: list[socket.socket] = []
        try:
            for _ in range(count):
                s = socket.socket()
                self._sockets.append(s)
                if receive_buffer is not None:  # before it is connected: the window is agreed on then
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
                s.settimeout(30)
                s.connect(address)
                with contextlib.suppress(ConnectionError):  # closed again already: `num_open` tells
                    s.sendall(first)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all."""
        for s in self._sockets:
            s.close()

    def drip(self, data: bytes = b"x") -> None:
        """Send a little more on each connection that takes it."""
        for s in self._sockets:
            with contextlib.suppress(OSError):
                s.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def num_open(self) -> int:
        """Count those that the server has not closed."""
        poll = select.poll()
        for s in self._sockets:
            poll.register(s, select.POLLRDHUP)
        return len(self._sockets) - len(poll.poll(0))


def idle(address: Address, count: int) -> Clients:
    """Open connections that say nothing."""
    return Clients(address, count)


def half_open(address: Address, count: int) -> Clients:
    """Open connections with half of a request line; `drip` makes it longer."""
    return Clients(address, count, b"GET /hea")


def unread(address: Address, count: int, **body: object) -> Clients:
    """Ask /v1/completions for streams that nobody reads.

    Args:
        body: the request's fields.
    """
    return Clients(address, count, completion(**{"stream": True, **body}), receive_buffer=2048)


def completion(**body: object) -> bytes:
    """Write a request to /v1/completions as it goes over the wire."""
    text = json.dumps(body).encode()
    head = f"Host: here\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + text
