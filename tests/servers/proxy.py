"""A small proxy in front of an HTTP server of the tests, that makes the network as bad as a test asks for.

    with running_proxy(s3.endpoint) as proxy:
        client(proxy.url)
        with proxy.trouble(error_share=0.2, hang_share=0.05): ...
        with proxy.trouble(is_cut=True): ...
        proxy.counts["answered 503"]

It runs an event loop in a thread of its own and may be switched by any other. Requests are framed by their
`Content-Length`, so that a share of *requests* can be refused, however many share a connection; answers pass as bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

CHUNK_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
LAST_BYTES_S = 5.0  # how long a client that was answered with an error may take to hang up
SWITCH_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Trouble:
    """What befalls connections; by default nothing does.

    Attributes:
        refuses: Nobody listens, and every open connection is reset.
        is_cut: New connections are taken and reset at once, open ones are reset.
        holds: Bytes stay on their way, in both directions, until this is over; nobody is told.
        hangs: A request is taken, and never passed on nor answered.
        delay_s: Before a request is passed on.
        bytes_per_s: Of each direction of each connection.
        error_share: Of requests, that are answered with `error_status` and never passed on.
        hang_share: Of requests, that are taken and neither passed on nor answered.
    """

    refuses: bool = False
    is_cut: bool = False
    holds: bool = False
    hangs: bool = False
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    error_share: float = 0.0
    error_status: int = 503
    hang_share: float = 0.0


CLEAR = Trouble()


class Proxy:
    """One listening port of 127.0.0.1 before one server.

    Attributes:
        url: `http://127.0.0.1:PORT`; the same for as long as it runs.
        counts: What happened so far: `connections`, `requests`, `passed`, `hung`, `reset`, `answered STATUS`.
    """

    def __init__(self, target_url: str, seed: int = 0) -> None:
        self._target = urlsplit(target_url)
        self._random = random.Random(seed)
        self._trouble = CLEAR
        self._open: set[_Connection] = set()
        self._listener: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        # Bound and never listening: while nobody listens the port stays ours, and connections are refused.
        self._place = _bound(0)
        self._port: int = self._place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.counts: Counter[str] = Counter()

    @property
    def open_connections(self) -> int:
        """Of clients, at this moment."""
        return len(self._open)

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self._on_loop(self._apply(CLEAR))

    def stop(self) -> None:
        """Drop every connection and end the thread."""
        self._on_loop(self._apply(Trouble(refuses=True)))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SWITCH_DEADLINE_S)
        self._loop.close()
        self._place.close()

    def set(self, trouble: Trouble) -> None:
        """Let this befall connections from now on, those that are open included."""
        self._on_loop(self._apply(trouble))

    def heal(self) -> None:
        """All is well again. Requests that hung are reset: nobody will answer them."""
        self.set(CLEAR)

    @contextlib.contextmanager
    def trouble(self, **what: Any) -> Iterator[None]:
        """A `Trouble` for as long as the block runs."""
        self.set(Trouble(**what))
        try:
            yield
        finally:
            self.heal()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(SWITCH_DEADLINE_S)

    async def _apply(self, trouble: Trouble) -> None:
        self._trouble = trouble
        if trouble.refuses and self._listener is not None:
            self._listener.close()
            self._listener = None
        if trouble.refuses or trouble.is_cut:
            await self._reset([*self._open])
        else:
            await self._reset([connection for connection in self._open if connection.hangs])
        if trouble.holds:
            self._flows.clear()
        else:
            self._flows.set()
        if not trouble.refuses and self._listener is None:
            self._listener = await asyncio.start_server(
                self._serve, sock=_bound(self._port), limit=MAX_HEAD_BYTES
            )

    async def _reset(self, connections: list[_Connection]) -> None:
        for connection in connections:
            self.counts["reset"] += 1
            connection.reset()
        await asyncio.gather(*(connection.ended.wait() for connection in connections))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        if self._trouble.is_cut:
            self.counts["reset"] += 1
            _abort(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(task, writer)
        self._open.add(connection)
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
                await self._pass_on(connection, reader, writer)
        finally:
            self._open.discard(connection)
            writer.close()
            connection.ended.set()

    async def _pass_on(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        async with self._connected() as (answers, requests):
            back = asyncio.create_task(self._pump(answers, writer))
            there = asyncio.create_task(self._pass_requests(connection, reader, writer, requests))
            try:
                await asyncio.wait((back, there), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for half in (back, there):
                    half.cancel()
                await asyncio.gather(back, there, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        assert self._target.hostname is not None
        reader, writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        try:
            yield reader, writer
        finally:
            _abort(writer)

    async def _pass_requests(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: asyncio.StreamWriter,
    ) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await self._flows.wait()
            self.counts["requests"] += 1
            lot, trouble = self._random.random(), self._trouble
            if lot < trouble.error_share:
                return await self._answer_error(head, reader, writer, trouble.error_status)
            if trouble.hangs or lot < trouble.error_share + trouble.hang_share:
                self.counts["hung"] += 1
                connection.hangs = True
                while await reader.read(CHUNK_BYTES):  # until the client has enough of it
                    pass
                return None
            self.counts["passed"] += 1
            await asyncio.sleep(trouble.delay_s)
            server.write(head)
            await self._pump(reader, server, _body_bytes(head))

    async def _answer_error(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int
    ) -> None:
        self.counts[f"answered {status}"] += 1
        if b"\r\nexpect:" not in head.lower():  # who expects 100 Continue sends no body after a final answer
            await reader.readexactly(_body_bytes(head))
        writer.write(f"HTTP/1.1 {status} Trouble\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        writer.write_eof()
        with contextlib.suppress(
            TimeoutError
        ):  # closed before it has read all, the client sees a reset instead
            async with asyncio.timeout(LAST_BYTES_S):
                while await reader.read(CHUNK_BYTES):
                    pass

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int | None = None
    ) -> None:
        """Pass so many bytes on, or all until the end."""
        left = length
        while left is None or left > 0:
            chunk = await reader.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
            if not chunk:
                return
            await self._flows.wait()
            if (rate := self._trouble.bytes_per_s) is not None:
                await asyncio.sleep(len(chunk) / rate)
            writer.write(chunk)
            await writer.drain()
            left = None if left is None else left - len(chunk)


class _Connection:
    """A client's connection, and the task that serves it."""

    def __init__(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self._task = task
        self._writer = writer
        self.hangs = False
        self.ended = asyncio.Event()

    def reset(self) -> None:
        """Drop it; the client sees a reset."""
        _abort(self._writer)
        self._task.cancel()


@contextlib.contextmanager
def running_proxy(target_url: str, seed: int = 0) -> Iterator[Proxy]:
    """A proxy before `target_url`, in a thread of its own.

    Args:
        target_url: `http://HOST:PORT`; the server may be down, then connections end at once.
        seed: Decides which requests are the unlucky ones.
    """
    proxy = Proxy(target_url, seed)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with a reset."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _body_bytes(head: bytes) -> int:
    """How long the body is that follows.

    Raises:
        EOFError: it does not say, as none of the clients here does; the connection ends.
    """
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if b"transfer-encoding" in fields:
        raise EOFError("a request without Content-Length")
    return int(fields.get(b"content-length", b"0"))
