"""An open loop of clients in a process of its own: requests leave at a fixed rate, whether or not the last is answered.

Run as `python -m bench.open_load PORT PATH RATE_PER_S SECONDS BODY [HEADERS [IMAGES [FIRST_TASK]]]`; prints one JSON
object. Latencies count from the moment at which a request was due. Now and then one more request sends its body slowly:
a refusal must not wait for the rest of it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field

import uvloop

from bench.load import Bodies, Client

ANSWER_WITHIN_S = 120.0
MAX_UNDER_WAY = 1000  # of this process; a server that keeps its limits never has so many
SLOW_EVERY_S, SLOW_GAP_S = 2.0, 0.5
SLOW_BYTES, SLOW_PIECES, SLOW_PAUSE_S = 900_000, 10, 0.1
READ_ERRORS = (OSError, EOFError, TimeoutError, ValueError)


@dataclass
class OpenLoad:
    """What came of it.

    Attributes:
        answers: Seconds since the start when it was due, status or exception, latency in ms; one a request.
        slow: Kind and ms from the end of the head to the answer, of each request with a slow body.
        unsent: Requests that were not sent because too many were under way.
    """

    answers: list[tuple[float, str, float]] = field(default_factory=list)
    slow: list[tuple[str, float]] = field(default_factory=list)
    unsent: int = 0

    def kinds(self) -> Counter[str]:
        """How often each status or exception came."""
        return Counter(kind for _, kind, _ in self.answers)


@dataclass(frozen=True)
class Target:
    """Where requests go and what they say."""

    port: int
    path: str
    bodies: Bodies
    headers: str = ""


async def press(target: Target, rate_per_s: float, seconds: float) -> OpenLoad:
    """Send at a rate for so long, then wait for the last answers."""
    load, loop, idle = OpenLoad(), asyncio.get_running_loop(), list[Client]()
    began, count, under_way = loop.time(), round(rate_per_s * seconds), set[asyncio.Task[None]]()
    slow = asyncio.create_task(_send_slowly(target, load, count, seconds))
    for number in range(count):
        due = began + number / rate_per_s
        await asyncio.sleep(due - loop.time())
        if len(under_way) >= MAX_UNDER_WAY:
            load.unsent += 1
            continue
        task = asyncio.create_task(_send(target, number, load, began, due, idle))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(slow, *under_way)
    for client in idle:
        client.close()
    return load


async def _send(
    target: Target, number: int, load: OpenLoad, began: float, due: float, idle: list[Client]
) -> None:
    client = idle.pop() if idle else Client(target.port, target.path, target.headers)
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            status, _ = await client.ask(target.bodies.of(number))
        kind = str(status)
    except READ_ERRORS as error:
        kind = type(error).__name__
    if kind == "200":
        idle.append(client)
    else:  # a server may close after it refused
        client.close()
    load.answers.append((due - began, kind, (asyncio.get_running_loop().time() - due) * 1e3))


async def _send_slowly(target: Target, load: OpenLoad, first: int, seconds: float) -> None:
    """One after the other, about the tasks behind those of the others."""
    loop, number = asyncio.get_running_loop(), 0
    stops = loop.time() + seconds - SLOW_EVERY_S
    while loop.time() < stops:
        ends = loop.time() + SLOW_EVERY_S
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                load.slow.append(await _ask_slowly(target, target.bodies.of(first + number)))
        except READ_ERRORS as error:
            load.slow.append((type(error).__name__, 0.0))
        # Not at the moment of its own answer, when the place that it had is free.
        await asyncio.sleep(max(SLOW_GAP_S, ends - loop.time()))
        number += 1


async def _ask_slowly(target: Target, body: bytes) -> tuple[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        head = (
            f"POST {target.path} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n{target.headers}"
            f"Content-Type: application/json\r\nContent-Length: {SLOW_BYTES}\r\n\r\n"
        )
        writer.write(head.encode())
        loop = asyncio.get_running_loop()
        sent = loop.time()
        answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        padded = body.ljust(SLOW_BYTES)
        for start in range(0, SLOW_BYTES, SLOW_BYTES // SLOW_PIECES):
            await asyncio.wait({answer}, timeout=SLOW_PAUSE_S)
            if answer.done():
                break
            writer.write(padded[start : start + SLOW_BYTES // SLOW_PIECES])
        status = (await answer)[9:12].decode()
        return status, (loop.time() - sent) * 1e3
    finally:
        writer.transport.abort()


def main() -> None:
    """Read the command line, run, print."""
    port, path, rate_per_s, seconds, body, *more = sys.argv[1:]
    headers, images, first_task = (*more, *("", "1", "")[len(more) :])
    bodies = Bodies(body, int(images), int(first_task) if first_task else None)
    target = Target(int(port), path, bodies, headers)
    print(json.dumps(vars(uvloop.run(press(target, float(rate_per_s), float(seconds))))))


if __name__ == "__main__":
    main()
