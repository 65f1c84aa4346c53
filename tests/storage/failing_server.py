"""A real HTTP server that misbehaves on purpose, one behaviour per request, and remembers the requests."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


Behaviour = Callable[["_Handler"], None]


@dataclass
class FailingServer:
    """Answers the n-th request with the n-th behaviour, and every later one with the last."""

    endpoint: str
    behaviours: list[Behaviour]
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    bytes_sent: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def next_behaviour(self) -> Behaviour:
        return self.behaviours[min(len(self.requests), len(self.behaviours)) - 1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.script.connections += 1

    @property
    def script(self) -> FailingServer:
        return self.server.script

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.script.requests.append(Request(self.command, self.path, dict(self.headers), body))
        self.script.next_behaviour()(self)

    do_GET = do_PUT = do_HEAD = do_PATCH = do_POST = _serve

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.script.bytes_sent += len(data)

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    script: FailingServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the plan."""


@contextlib.contextmanager
def failing_server(*behaviours: Behaviour) -> Iterator[FailingServer]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.script = FailingServer(f"http://127.0.0.1:{server.server_port}", list(behaviours))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.script
        finally:
            server.script.stopping.set()
            server.shutdown()
            thread.join()


def answer(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Behaviour:
    def behave(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.send(body)

    return behave


def succeed(body: bytes = b"") -> Behaviour:
    """Answer as S3 does: with the body to a GET, with none to a PUT."""

    def behave(handler: _Handler) -> None:
        answer(200, b"" if handler.command == "PUT" else body)(handler)

    return behave


def s3_error(status: int, code: str, message: str = "") -> Behaviour:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return answer(status, body.encode(), {"Content-Type": "application/xml"})


def hang_up(handler: _Handler) -> None:
    handler.hang_up()


def never_answer(handler: _Handler) -> None:
    handler.script.stopping.wait(30)
    handler.hang_up()


def speak_no_http(handler: _Handler) -> None:
    handler.send(b"\x16\x03\x01 what is this?\r\n\r\n")
    handler.hang_up()


def break_off_body(sent: bytes, claimed_bytes: int) -> Behaviour:
    """Claim a length, send less, hang up."""

    def behave(handler: _Handler) -> None:
        answer(200, sent, {"Content-Length": str(claimed_bytes)})(handler)
        handler.hang_up()

    return behave


def stall_body(sent: bytes, claimed_bytes: int) -> Behaviour:
    """Claim a length, send less, then say nothing more."""

    def behave(handler: _Handler) -> None:
        answer(200, sent, {"Content-Length": str(claimed_bytes)})(handler)
        never_answer(handler)

    return behave


def drip_body(claimed_bytes: int, pause_s: float) -> Behaviour:
    """Send one byte at a time, each soon enough to please a timeout that counts from the last one."""

    def behave(handler: _Handler) -> None:
        answer(200, b"", {"Content-Length": str(claimed_bytes)})(handler)
        for _ in range(claimed_bytes):
            handler.send(b".")
            if handler.script.stopping.wait(pause_s):
                return

    return behave


def chunked_body(n_chunks: int, chunk: bytes) -> Behaviour:
    """Send a body of no announced length."""

    def behave(handler: _Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(n_chunks):
            handler.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        handler.send(b"0\r\n\r\n")

    return behave
