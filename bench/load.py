"""A closed loop of clients in a process of its own: each sends its next request when its last is answered.

Run as `python -m bench.load PORT PATH CONCURRENCY REQUESTS BODY [HEADERS [IMAGES [FIRST_TASK]]]`; prints one JSON
object. It speaks HTTP/1.1 over plain sockets, because a client library would take more of the machine than the
servers under test.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import uvloop

ANSWER_WITHIN_S = 120.0


@dataclass
class Load:
    """What came of it.

    Attributes:
        seconds: From the first request to the last answer.
        latencies_ms: Of every answer with status 200.
        batch_sizes: As the answers told, one entry per item.
        errors: How often each status other than 200, or each exception of the connection, came.
    """

    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Bodies:
    """What each request says.

    Attributes:
        text: With `{task_id}` and `{image}` where those go.
        images: `{image}` counts through so many, from 0.
        first_task: Request n is about the task of this number plus n; about a new random one if it is None.
    """

    text: str
    images: int = 1
    first_task: int | None = None

    def of(self, number: int) -> bytes:
        """The body of request `number`, counted from 0."""
        task_id = uuid4() if self.first_task is None else UUID(int=self.first_task + number)
        body = self.text.replace("{task_id}", str(task_id)).replace("{image}", str(number % self.images))
        return body.encode()


class Client:
    """One connection, kept open."""

    def __init__(self, port: int, path: str, headers: str = "") -> None:
        self._port, self._path, self._headers = port, path, headers
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        """Send one request."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        return int(head[9:12]), await self._read_body(reader, head)

    async def _read_body(self, reader: asyncio.StreamReader, head: str) -> bytes:
        _, found, rest = head.partition("content-length:")
        if found:
            return await reader.readexactly(int(rest[: rest.index("\r\n")]))
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return body

    def close(self) -> None:
        """Drop the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _repeat(client: Client, numbers: Iterator[int], bodies: Bodies, load: Load) -> None:
    for number in numbers:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                status, body = await client.ask(bodies.of(number))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            load.errors[type(error).__name__] += 1
            client.close()
            continue
        if status != 200:
            load.errors[str(status)] += 1
            continue
        load.latencies_ms.append((time.perf_counter() - began) * 1e3)
        if b'"batch_size"' in body:
            load.batch_sizes.append(json.loads(body)["batch_size"])
    client.close()


async def run(
    port: int, path: str, concurrency: int, requests: int, bodies: Bodies, headers: str = ""
) -> Load:
    """Send `requests` requests with `concurrency` of them under way at any time."""
    load, numbers = Load(), iter(range(requests))
    began = time.perf_counter()
    clients = [Client(port, path, headers) for _ in range(concurrency)]
    await asyncio.gather(*(_repeat(client, numbers, bodies, load) for client in clients))
    load.seconds = time.perf_counter() - began
    return load


def main() -> None:
    """Read the command line, run, print."""
    port, path, concurrency, requests, body, *more = sys.argv[1:]
    headers, images, first_task = (*more, *("", "1", "")[len(more) :])
    bodies = Bodies(body, int(images), int(first_task) if first_task else None)
    print(
        json.dumps(vars(uvloop.run(run(int(port), path, int(concurrency), int(requests), bodies, headers))))
    )


if __name__ == "__main__":
    main()
