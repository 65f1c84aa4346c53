"""The client against a real server on a real socket, and the gate before the batcher."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from api.backend import make_backend
from api.config import Settings
from api.runner_link import BatchGate, RunnerAway, RunnerClient, RunnerLost, RunnerTimedOut
from sam3_runner.errors import InferenceFailed, RunnerError
from sam3_runner.types import ItemError, Prompt, SegmentItem, SegmentResult
from sam3_runner.wire import WireError, decode_items, encode_results


def an_item(text: str = "red circle", side: int = 2) -> SegmentItem:
    return SegmentItem(np.full((side, side, 3), 7, np.uint8), (48, 64), (Prompt(text),))


@dataclass
class FakeRunner:
    """Answers an item with its prompt, its bytes and the size of its request, or does as its prompt says."""

    requests: list[int] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def segment(self, request: web.Request) -> web.StreamResponse:
        items = decode_items(await request.read())
        self.requests.append(len(items))
        wish = str(items[0].prompts[0].text)
        if wish == "hang up":
            assert request.transport is not None
            request.transport.abort()
        if wish == "hang":
            await self.released.wait()
        if wish.isdigit():
            return web.Response(status=int(wish))
        if wish == "babble":
            return web.Response(body=b"what?")
        if wish == "lose one":
            items = items[1:]
        told = [
            ItemError(str(item.prompts[0].text), f"{item.pixels.sum()} of {len(items)}") for item in items
        ]
        return web.Response(body=b"".join(encode_results([SegmentResult(error=error) for error in told])))

    async def info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"model_name": "SAM3"})


@pytest.fixture
async def fake_runner(tmp_path: Path) -> AsyncIterator[FakeRunner]:
    fake = FakeRunner()
    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post("/segment", fake.segment), web.post("/info", fake.info)])
    server = web.AppRunner(app)
    await server.setup()
    await web.UnixSite(server, tmp_path / "runner.sock").start()
    yield fake
    fake.released.set()
    await server.cleanup()


@pytest.fixture
async def client(tmp_path: Path, fake_runner: FakeRunner) -> AsyncIterator[RunnerClient]:
    client = RunnerClient((tmp_path / "runner.sock").as_uri(), timeout_s=60)
    yield client
    await client.aclose()


def told(result: SegmentResult) -> tuple[str, str]:
    assert result.error is not None
    return result.error.code, result.error.message


async def test_each_caller_gets_the_answer_to_its_own_item(client: RunnerClient) -> None:
    prompts = [f"prompt {n}" for n in range(10)]
    results = await asyncio.gather(*(client.segment(an_item(prompt)) for prompt in prompts))
    assert [told(result)[0] for result in results] == prompts


async def test_items_of_one_moment_share_requests_of_at_most_four(
    client: RunnerClient, fake_runner: FakeRunner
) -> None:
    await asyncio.gather(*(client.segment(an_item()) for _ in range(10)))
    assert sorted(fake_runner.requests) == [2, 4, 4]


async def test_no_request_is_larger_than_a_batch(tmp_path: Path, fake_runner: FakeRunner) -> None:
    settings = Settings.model_validate({"s3_data_dir": tmp_path / "data", "s3_max_batch_size": 2})
    backend = make_backend(settings, (tmp_path / "runner.sock").as_uri(), "http://127.0.0.1:8000")
    await asyncio.gather(*(backend.client.segment(an_item()) for _ in range(5)))
    await backend.aclose()
    assert sorted(fake_runner.requests) == [1, 2, 2]


async def test_an_item_alone_is_sent_at_once(client: RunnerClient, fake_runner: FakeRunner) -> None:
    assert told(await client.segment(an_item())) == ("red circle", f"{7 * 12} of 1")
    assert fake_runner.requests == [1]


async def test_an_item_of_megabytes_arrives_whole(client: RunnerClient) -> None:
    results = await asyncio.gather(*(client.segment(an_item(side=1008)) for _ in range(3)))
    assert [told(result)[1] for result in results] == [f"{7 * 1008 * 1008 * 3} of 3"] * 3


@pytest.mark.parametrize(
    "wish, expected",
    [
        ("hang up", RunnerLost),
        ("503", RunnerAway),
        ("429", RunnerAway),
        ("504", RunnerTimedOut),
        ("500", InferenceFailed),
        ("404", InferenceFailed),
        ("babble", WireError),
        ("lose one", WireError),
    ],
)
async def test_what_the_runner_does_wrong_reaches_every_caller_of_that_request(
    client: RunnerClient, wish: str, expected: type[RunnerError]
) -> None:
    both = await asyncio.gather(
        client.segment(an_item(wish)), client.segment(an_item()), return_exceptions=True
    )
    assert [type(one) for one in both] == [expected, expected]
    assert both[0] is not both[1]  # a caller may annotate the error it catches
    assert told(await client.segment(an_item("and after")))[0] == "and after"


async def test_a_runner_that_is_not_there_is_lost_and_its_path_stays_secret(tmp_path: Path) -> None:
    client = RunnerClient((tmp_path / "nobody.sock").as_uri())
    with pytest.raises(RunnerLost) as caught:
        await client.segment(an_item())
    assert "nobody" not in str(caught.value)
    await client.aclose()


async def test_a_runner_that_hangs_times_out(tmp_path: Path, fake_runner: FakeRunner) -> None:
    client = RunnerClient((tmp_path / "runner.sock").as_uri(), timeout_s=0.3)
    with pytest.raises(RunnerTimedOut):
        await client.segment(an_item("hang"))
    await client.aclose()


async def test_a_caller_that_gives_up_takes_nothing_from_its_neighbour(
    client: RunnerClient, fake_runner: FakeRunner
) -> None:
    leaving = asyncio.create_task(client.segment(an_item("hang")))
    staying = asyncio.create_task(client.segment(an_item("staying")))
    await until(lambda: fake_runner.requests == [2])
    leaving.cancel()
    fake_runner.released.set()
    assert told(await staying)[0] == "staying"
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_information_that_is_not_a_models_is_refused(client: RunnerClient) -> None:
    with pytest.raises(WireError):
        await client.info()


async def until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


@dataclass
class Queue:
    """Enters requests of the given sizes, in order, and notes who is let in."""

    gate: BatchGate
    inside: list[int] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def add(self, *sizes: int) -> list[int]:
        for size in sizes:
            self.tasks.append(asyncio.create_task(self._enter(size)))
        return await self.settle()

    async def next_batch(self) -> list[int]:
        self.inside.clear()
        self.gate.batch_done()
        return await self.settle()

    async def settle(self) -> list[int]:
        for _ in range(5):  # turns of the event loop; the gate needs two
            await asyncio.sleep(0)
        return self.inside

    async def _enter(self, size: int) -> None:
        await self.gate.enter(size)
        self.inside.append(size)


@pytest.fixture
async def queue() -> AsyncIterator[Queue]:
    queue = Queue(BatchGate(16, company_wait_s=0))
    yield queue
    for task in queue.tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_lone_request_is_let_in_at_once(queue: Queue) -> None:
    assert await queue.add(1) == [1]


async def test_requests_of_one_moment_go_in_together_up_to_a_batch(queue: Queue) -> None:
    assert await queue.add(*[4] * 6) == [4, 4, 4, 4]
    assert await queue.next_batch() == [4, 4]
    assert await queue.next_batch() == []


async def test_who_comes_while_a_batch_runs_waits_for_its_end(queue: Queue) -> None:
    await queue.add(1)
    assert await queue.add(2, 3) == [1]
    assert await queue.next_batch() == [2, 3]


async def test_a_smaller_request_takes_the_room_that_a_larger_one_leaves(queue: Queue) -> None:
    assert await queue.add(4, 10, 4, 2, 1) == [4, 10, 2]
    assert await queue.next_batch() == [4, 1]


async def test_a_request_larger_than_a_batch_goes_alone(queue: Queue) -> None:
    assert await queue.add(40, 1) == [40]
    assert await queue.next_batch() == [1]


async def test_a_request_whose_caller_gave_up_takes_no_room(queue: Queue) -> None:
    await queue.add(1)
    await queue.add(16, 2)
    queue.tasks[1].cancel()
    assert await queue.next_batch() == [2]


async def test_a_request_that_gives_up_as_it_is_let_in_holds_nobody_up(queue: Queue) -> None:
    await queue.add(1)
    await queue.add(16, 2)
    queue.inside.clear()
    queue.gate.batch_done()  # lets 16 in …
    queue.tasks[1].cancel()  # … which leaves before it knows
    assert await queue.settle() == [2]


async def test_a_batch_that_never_ends_does_not_close_the_gate_for_ever() -> None:
    queue = Queue(BatchGate(16, company_wait_s=0, stuck_after_s=0))
    await queue.add(1)
    assert await queue.add(2) == [1, 2]


HOUR_S = 3600.0


async def test_a_client_that_comes_back_alone_never_waits_for_company() -> None:
    queue = Queue(BatchGate(16, company_wait_s=HOUR_S))
    for _ in range(3):
        assert await queue.add(1) == [1]
        assert await queue.next_batch() == []


async def test_a_batch_with_room_waits_for_those_who_were_just_answered() -> None:
    queue = Queue(BatchGate(16, company_wait_s=HOUR_S))
    await queue.add(4)
    await queue.add(1, 2)
    assert await queue.next_batch() == []
    assert await queue.add(3) == []
    assert await queue.add(1) == [1, 2, 3, 1]  # all of the seven are back: no need to wait on


async def test_a_batch_that_is_full_waits_for_nobody() -> None:
    queue = Queue(BatchGate(16, company_wait_s=HOUR_S))
    await queue.add(4)
    await queue.add(10, 6, 3)
    assert await queue.next_batch() == [10, 6]


async def test_the_wait_for_company_ends_in_time() -> None:
    queue = Queue(BatchGate(16, company_wait_s=0.01))
    await queue.add(4)
    await queue.add(1)
    await queue.next_batch()
    await until(lambda: queue.inside == [1])


async def test_after_a_wait_in_vain_the_next_batches_do_without() -> None:
    queue = Queue(BatchGate(16, company_wait_s=0.01))
    await queue.add(4)
    await queue.add(1)
    await queue.next_batch()
    await until(lambda: queue.inside == [1])
    await queue.add(2)
    assert await queue.next_batch() == [2]


async def test_many_requests_in_any_order_all_get_through_in_full_batches() -> None:
    gate, batches = BatchGate(16, company_wait_s=0), list[int]()
    running = 0

    async def request(size: int) -> None:
        nonlocal running
        await gate.enter(size)
        running += size

    async def run_batches() -> None:
        nonlocal running
        while sum(batches) < total:
            await asyncio.sleep(0)
            if running:
                batches.append(running)
                running = 0
                gate.batch_done()

    sizes = [int(size) for size in np.random.default_rng(3).integers(1, 5, 400)]
    total = sum(sizes)
    work: list[Awaitable[None]] = [request(size) for size in sizes]
    async with asyncio.timeout(60):
        await asyncio.gather(*work, run_batches())
    assert max(batches) <= 16
    assert sum(batches) / len(batches) > 15
