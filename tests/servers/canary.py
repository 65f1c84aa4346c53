"""A listener that nobody should call: it answers like a web server with an image, and remembers every connection."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 4\r\nConnection: close\r\n\r\n\x89PNG"
)


@dataclass
class Canary:
    """Listens on one port of loopback, on IPv4 and, where there is one, on IPv6.

    Attributes:
        port: Of both.
        calls: The first bytes of each connection, in order.
    """

    port: int
    calls: list[bytes] = field(default_factory=list)


class _Handler(socketserver.BaseRequestHandler):
    canary: Canary

    def handle(self) -> None:
        self.request.settimeout(1)
        with contextlib.suppress(OSError):
            self.canary.calls.append(b"")
            self.canary.calls[-1] = self.request.recv(1000)
            self.request.sendall(ANSWER)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class _ServerIPv6(_Server):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def listening_canary() -> Iterator[Canary]:
    """A canary, until the block ends."""

    class Handler(_Handler):
        pass

    with contextlib.ExitStack() as stack:
        servers: list[_Server] = [stack.enter_context(_Server(("127.0.0.1", 0), Handler))]
        canary = Handler.canary = Canary(servers[0].server_address[1])
        with contextlib.suppress(OSError):  # a machine without IPv6
            servers.append(stack.enter_context(_ServerIPv6(("::1", canary.port), Handler)))
        for server in servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            stack.callback(server.shutdown)
        yield canary
