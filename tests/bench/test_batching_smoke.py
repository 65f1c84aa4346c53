"""The load test itself: what it counts, and a short run of it against our services with the fake model."""

import argparse
import asyncio
import csv
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.batching import Row, ideal_of, levels_of, main, parse, systems_of, table
from bench.load import Bodies, Load, run

ANSWER = b'{"batch_size": 4}'


class Scripted:
    """A server that gives its answers in turn, whatever is asked."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.bodies.append(await reader.readexactly(length))
                writer.write(self.answers[(len(self.bodies) - 1) % len(self.answers)])
                if not self.answers[(len(self.bodies) - 1) % len(self.answers)]:
                    break
        except EOFError:
            pass
        finally:
            writer.close()


def with_length(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n%s\r\n9\r\n%s\r\n0\r\n\r\n" % (
    ANSWER[:8],
    ANSWER[8:],
)


@pytest.fixture
async def ports() -> AsyncIterator[dict[Scripted, int]]:
    servers: list[asyncio.Server] = []

    class Ports(dict[Scripted, int]):
        async def open(self, scripted: Scripted) -> int:
            server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
            servers.append(server)
            port: int = server.sockets[0].getsockname()[1]
            return port

    yield Ports()
    for server in servers:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    "answers, sizes, errors",
    [
        pytest.param([with_length("200 OK", ANSWER)], 6, {}, id="answers with a length"),
        pytest.param([CHUNKED], 6, {}, id="answers in chunks"),
        pytest.param(
            [with_length("200 OK", ANSWER), with_length("500 Oh", b"no")], 3, {"500": 3}, id="errors"
        ),
    ],
)
async def test_the_load_counts_answers_and_errors(ports, answers, sizes, errors) -> None:
    scripted = Scripted(*answers)
    load = await run(await ports.open(scripted), "/predict", 1, 6, Bodies("{}"))
    assert load.batch_sizes == [4] * sizes
    assert load.errors == errors
    assert len(load.latencies_ms) == sizes  # an error is not a fast answer


async def test_a_connection_that_breaks_is_an_error_and_the_rest_goes_on(ports) -> None:
    scripted = Scripted(with_length("200 OK", ANSWER), b"")
    load = await run(await ports.open(scripted), "/predict", 1, 6, Bodies("{}"))
    assert (len(load.batch_sizes), load.errors) == (3, {"IncompleteReadError": 3})


async def test_every_request_names_a_task_of_its_own(ports) -> None:
    scripted = Scripted(with_length("200 OK", ANSWER))
    await run(await ports.open(scripted), "/predict", 3, 9, Bodies('{"task_id":"{task_id}"}'))
    assert len({json.loads(body)["task_id"] for body in scripted.bodies}) == 9


async def test_tasks_and_images_are_the_ones_that_were_prepared(ports) -> None:
    scripted = Scripted(with_length("200 OK", ANSWER))
    bodies = Bodies('{"task_id":"{task_id}","image":"{image}"}', images=2, first_task=16)
    await run(await ports.open(scripted), "/predict", 2, 4, bodies)
    seen = {(body["task_id"][-2:], body["image"]) for body in map(json.loads, scripted.bodies)}
    assert seen == {("10", "0"), ("11", "1"), ("12", "0"), ("13", "1")}


def options(*arguments: str) -> argparse.Namespace:
    return parse(list(arguments))


def test_a_mean_batch_counts_batches_and_not_items() -> None:
    row = Row("x", 1, "8")
    row.add(Load(1.0, [1.0] * 9, [8] * 8 + [1]), 9, 0.9)  # one batch of eight and one of one
    assert row.mean_batch() == 4.5
    assert row.figures()["cpu_ms_per_request"] == "100.00"


def test_the_ideal_is_what_the_model_alone_allows() -> None:
    chosen = options("--concurrency", "1", "8", "64")
    ideal = [ideal_of(Row("x", 1, level.name), chosen) for level in levels_of(chosen)]
    assert ideal == ["83.3", "307.7", "381.0", "83.3"]


def test_after_the_busiest_level_a_lone_client_comes_back() -> None:
    levels = levels_of(options("--rounds", "2", "--requests", "1600"))
    assert [level.name for level in levels] == ["1", "8", "32", "64", "1 after 64"]
    assert [level.requests for level in levels] == [800, 800, 800, 800, 100]


def test_the_table_has_a_line_for_each_system_at_each_level() -> None:
    chosen = options("--concurrency", "8")
    row = Row("tuned", 1, "8")
    row.add(Load(2.0, [10.0, 20.0], [2, 2]), 2, 0.001)
    assert table([row], chosen).splitlines()[2:] == [
        "| tuned | 1 px | 8 | 1.0 | 307.7 | 20.0 | 20.0 | 2.00 | 0.50 | 0 of 2 |"
    ]


def test_the_real_service_is_what_the_demo_model_is_measured_with() -> None:
    (system,) = systems_of(options("--model", "demo"))
    assert "service:S3Backend" in system.command and system.path == "/api/v1/predict"


def test_our_services_batch_without_an_error(tmp_path: Path) -> None:
    arguments = ["--systems", "tuned", "--rounds", "1", "--requests", "128", "--concurrency", "1", "32"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "batching.csv").open() as file:
        rows = {row["concurrency"]: row for row in csv.DictReader(file)}
    assert {row["errors"] for row in rows.values()} == {"0"}
    assert float(rows["1"]["mean_batch"]) == 1
    assert float(rows["32"]["mean_batch"]) > 8  # 12 and more where the machine has time; see bench/README.md
    assert "| tuned |" in (tmp_path / "batching.md").read_text()
