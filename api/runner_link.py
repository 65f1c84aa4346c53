"""The way from `S3Backend` to `Sam3Runner` and back: client, wire format and the gate before the batcher.

BentoML's own proxy (`depends()`) would do, at a price that docs/decisions/0001-two-services-and-batching.md
measures. This uses the same socket, route and adaptive batching for less than half of the processor time:

- items that arrive in one turn of the event loop travel in one request (a batchable API takes lists);
- arrays travel as they are (see `sam3_runner.wire`), neither pickled nor passed through pydantic;
- `BatchGate` keeps the queue before BentoML's batcher instead of in it. The batcher learns how long items
  waited and holds later ones back as long: after a busy spell, a lone request waited 90 ms for nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import aiohttp
import bentoml
from bentoml import get_current_service
from starlette.responses import Response

from sam3_runner.errors import InferenceFailed, RunnerError
from sam3_runner.types import ModelInfo, SegmentItem, SegmentResult
from sam3_runner.wire import Chunk, WireError, decode_items, decode_results, encode_items, encode_results

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

MEDIA_TYPE = "application/octet-stream"
# What the runner's two routes are sent. BentoML would choose a reader by this header, and one of them unpickles.
BODY_TYPES = {"/segment": MEDIA_TYPE.encode(), "/info": b"application/json"}
# uvicorn closes connections idle for 5 s; a request sent at that moment is lost. Leave before it does.
IDLE_CONNECTION_S = 4.0
# A fourth of the requests, and a batch of 16 still fills from requests of any size up to four.
ITEMS_PER_REQUEST = 4
# Answers reach clients, and their next requests come back, in 2 to 4 ms on two busy cores.
COMPANY_WAIT_S = 0.005
BATCHES_WITHOUT_WAIT = 16  # after a wait in vain
SMALL_REQUEST_BYTES = 65_536  # below this, one write of a copy is faster than several of views


class RunnerLost(RunnerError):
    """The runner's process is not there, or went away: the work is lost, a later call may succeed."""


class RunnerAway(RunnerLost):
    """The runner's process cannot be reached: nothing was sent."""


class RunnerTimedOut(RunnerError):
    """The runner did not answer in time."""


class BatchGate:
    """Lets requests through to the batcher one batch at a time; the others wait here, in order.

    Clients that send their next request when their last is answered come back all at once, a moment after a batch
    ends. A next batch that would not be full waits that moment for them: eight such clients then share batches of
    eight instead of taking turns in two of four. A client alone never waits, and a wait in which few came is not
    tried again for some batches.

    Args:
        max_batch_size: Items that one batch holds.
        company_wait_s: The longest such moment; 0 for none.
        stuck_after_s: A batch that takes longer is not coming back; the gate opens without it.
    """

    def __init__(
        self,
        max_batch_size: int,
        company_wait_s: float = COMPANY_WAIT_S,
        stuck_after_s: float = 120.0,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._company_wait_s = company_wait_s
        self._stuck_after_s = stuck_after_s
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._is_busy = False
        self._busy_since_s = 0.0
        self._items_inside = 0
        self._opening: asyncio.Handle | None = None
        self._is_waiting_for_company = False
        self._items_before = 0  # … when that wait began
        self._items_expected = 0  # … and at its end
        self._batches_without_wait = 0

    async def enter(self, items: int) -> None:
        """Wait until a batch is formed that has room for this request's items."""
        loop = asyncio.get_running_loop()
        if self._is_busy and loop.time() - self._busy_since_s > self._stuck_after_s:
            self._is_busy = False
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append((items, turn))
        if self._is_waiting_for_company and self._items_waiting() >= self._items_expected:
            self._end_wait()
        if not self._is_busy and self._opening is None:  # others of this turn of the loop may still join
            self._opening = loop.call_soon(self._let_in)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in, but gone: nobody must wait for it
                self._is_busy = False
                self._let_in()
            raise

    def batch_done(self) -> None:
        """Say that the batch is through: the next may form."""
        self._is_busy = False
        waiting = self._items_waiting()
        expected = min(self._max_batch_size, waiting + self._items_inside)
        self._batches_without_wait -= 1
        if waiting >= expected or expected < 2 or self._company_wait_s == 0 or self._batches_without_wait > 0:
            self._let_in()
            return
        self._is_waiting_for_company = True
        self._items_before, self._items_expected = waiting, expected
        self._opening = asyncio.get_running_loop().call_later(self._company_wait_s, self._let_in)

    def _items_waiting(self) -> int:
        return sum(items for items, turn in self._waiting if not turn.done())

    def _end_wait(self) -> None:
        came, missing = self._items_waiting() - self._items_before, self._items_expected - self._items_before
        if 2 * came < missing:
            self._batches_without_wait = BATCHES_WITHOUT_WAIT
        self._is_waiting_for_company = False
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None

    def _let_in(self) -> None:
        if self._is_waiting_for_company:
            self._end_wait()
        self._opening = None
        if self._is_busy:
            return
        room, held_back = self._max_batch_size, deque[tuple[int, asyncio.Future[None]]]()
        while self._waiting and room > 0:
            items, turn = self._waiting.popleft()
            if turn.done():  # its caller gave up
                continue
            if items <= room or room == self._max_batch_size:  # more than one batch holds: BentoML splits it
                room -= items
                turn.set_result(None)
                self._is_busy = True
            else:
                held_back.append((items, turn))
        self._waiting.extendleft(reversed(held_back))
        if self._is_busy:
            self._busy_since_s = asyncio.get_running_loop().time()
            self._items_inside = self._max_batch_size - room


class OnlyOurBodies:
    """ASGI middleware of the runner: whatever says that it is something else than `RunnerClient` sends is 415.

    Args:
        app: Everything below.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http" and scope["method"] == "POST":
            sent = [value for name, value in scope["headers"] if name == b"content-type"]
            if sent != [BODY_TYPES.get(scope["path"])]:
                await Response(status_code=415)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class SegmentRequest(bentoml.IODescriptor):  # type: ignore[misc]  # bentoml loads it lazily: Any to mypy
    """What `Sam3Runner.segment` takes: a frame of items. They pass the service's `gate` on their way in."""

    items: list[Any]

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> SegmentRequest:
        """Read the items, then wait for a batch with room for them."""
        try:
            items = decode_items(await request.body())
        except WireError as error:
            raise bentoml.exceptions.InvalidArgument(str(error)) from error
        await get_current_service().gate.enter(len(items))
        read: SegmentRequest = cls.model_construct(items=items)
        return read


class SegmentResponse(bentoml.IODescriptor):  # type: ignore[misc]  # as above
    """What `Sam3Runner.segment` answers: a frame of results."""

    items: list[Any]

    @classmethod
    async def to_http_response(cls, obj: Any, serde: Any) -> Response:
        """Results as a frame."""
        return Response(b"".join(encode_results(obj)), media_type=MEDIA_TYPE)


class RunnerClient:
    """Calls `Sam3Runner` in its own process; the `Runner` that the pipeline works with.

    Every call is one item to the caller; on the way, items of one moment share a request.

    Args:
        url: Of the runner's service (`Sam3Runner.url`): `file:///path/to.sock`, or http.
        timeout_s: From a call to its answer, queueing included.
        items_per_request: At most so many items travel together.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 60.0, items_per_request: int = ITEMS_PER_REQUEST
    ) -> None:
        self._url = urlsplit(url)
        self._timeout_s = timeout_s
        self._items_per_request = items_per_request
        self._pending: list[tuple[SegmentItem, asyncio.Future[SegmentResult]]] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def segment(self, item: SegmentItem) -> SegmentResult:
        """Segment one image; what is wrong with this item alone comes back as `error`.

        Raises:
            RunnerAway: the process is not there; it never saw this item.
            RunnerLost: it died with this item in it.
            RunnerTimedOut: no answer within `timeout_s`.
            InferenceFailed: it answered, but not with results.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[SegmentResult] = loop.create_future()
        self._pending.append((item, answer))
        if len(self._pending) == 1:
            loop.call_soon(self._flush)
        return await answer

    async def info(self) -> ModelInfo:
        """What the runner has loaded. Raises as `segment` does."""
        answer = await self._ask("/info", b"{}", {"Content-Type": "application/json"})
        try:
            return ModelInfo(**json.loads(answer))
        except (TypeError, ValueError) as error:
            raise WireError(f"expected model information: {error}") from error

    async def aclose(self) -> None:
        """Wait for the calls under way, then close the connections."""
        if self._sending:
            await asyncio.gather(*self._sending, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """The pool of connections, made on the first call because it belongs to the running event loop."""
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self._url.scheme == "file":
                base = "http://runner"
                connector = aiohttp.UnixConnector(
                    url2pathname(self._url.path), limit=0, keepalive_timeout=IDLE_CONNECTION_S
                )
            else:
                base = self._url.geturl()
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
            self._session = aiohttp.ClientSession(
                base,
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
                auto_decompress=False,
            )
        return self._session

    def _flush(self) -> None:
        waiting = [(item, answer) for item, answer in self._pending if not answer.done()]
        self._pending.clear()
        for start in range(0, len(waiting), self._items_per_request):
            task = asyncio.create_task(self._send(waiting[start : start + self._items_per_request]))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self, calls: Sequence[tuple[SegmentItem, asyncio.Future[SegmentResult]]]) -> None:
        try:
            results = await self._post([item for item, _ in calls])
            for (_, answer), result in zip(calls, results, strict=True):
                if not answer.done():  # its caller may have given up
                    answer.set_result(result)
        except RunnerError as error:
            for _, answer in calls:
                if not answer.done():
                    copy = type(error)(str(error))  # callers may annotate what they catch: to each its own
                    copy.__cause__ = error
                    answer.set_exception(copy)
        finally:
            for _, answer in calls:  # a bug, or the loop is ending: nobody may wait for ever
                if not answer.done():
                    answer.set_exception(InferenceFailed("the call to the runner broke off"))

    async def _post(self, items: Sequence[SegmentItem]) -> list[SegmentResult]:
        chunks = encode_items(items)
        size = sum(len(chunk) for chunk in chunks)
        body = b"".join(chunks) if size < SMALL_REQUEST_BYTES else _each(chunks)
        frame = await self._ask("/segment", body, {"Content-Type": MEDIA_TYPE, "Content-Length": str(size)})
        results = decode_results(frame)
        if len(results) != len(items):
            raise WireError(f"expected {len(items)} results, got {len(results)}")
        return results

    async def _ask(self, path: str, body: bytes | AsyncIterator[Chunk], headers: dict[str, str]) -> bytes:
        """One request and its answer, with the errors of both in our own words."""
        try:
            async with self._open().post(path, data=body, headers=headers) as response:
                answer = await response.read()
        except TimeoutError as error:
            raise RunnerTimedOut(f"the runner did not answer within {self._timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise RunnerAway(f"the runner is not there ({type(error).__name__})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RunnerLost(f"the runner went away ({type(error).__name__})") from error
        if response.status in (429, 503):
            raise RunnerAway(f"the runner takes no more work: status {response.status}")
        if response.status == 504:
            raise RunnerTimedOut("the runner gave up: its own time limit")
        if response.status != 200:
            raise InferenceFailed(f"the runner answered with status {response.status}")
        return answer


async def _each(chunks: Sequence[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk
