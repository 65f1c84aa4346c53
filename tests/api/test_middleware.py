"""Whatever happens below, what leaves has the contract's form and the request's id."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from api.access import KeyCheck
from api.errors import BodyTooLarge, Overloaded
from api.limits import InFlight, read_body
from api.logs import JsonFormatter, configure_logs
from api.metrics import RequestMetrics
from api.middleware import EnvelopeMiddleware
from api.requests import current_request
from storage.errors import StorageUnavailable
from tests.conftest import ROOT

KEY = "a-secret-of-16-chars"


async def fine(request: Request) -> Response:
    logging.getLogger("tasks").info("deep below")
    return JSONResponse({"ok": True})


async def raises_bug(request: Request) -> Response:
    raise KeyError(f"secret {KEY}")


async def raises_domain_error(request: Request) -> Response:
    raise StorageUnavailable("inside")


async def is_cancelled(request: Request) -> Response:
    raise asyncio.CancelledError


async def writes_its_own_error(request: Request) -> Response:
    return PlainTextResponse(
        "overloaded, says someone else", 503, headers={"Retry-After": "7", "Server": "secret"}
    )


async def breaks_off(request: Request) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        raise KeyError("in the middle")

    return StreamingResponse(body())


async def reads(request: Request) -> Response:
    body = await read_body(request, 10, BodyTooLarge("more than 10"))
    return JSONResponse({"bytes": len(body)})


async def reads_briefly(request: Request) -> Response:
    return Response(await read_body(request, 10, BodyTooLarge("more than 10"), timeout_s=0.2))


ROUTES = [
    Route("/fine", fine),
    Route("/bug", raises_bug),
    Route("/domain", raises_domain_error),
    Route("/cancelled", is_cancelled),
    Route("/breaks-off", breaks_off),
    Route("/foreign", writes_its_own_error),
    Route("/read", reads, methods=["POST"]),
    Route("/read-briefly", reads_briefly, methods=["POST"]),
    Route("/api/v1/fine", fine),
    Route("/livez", fine),
    Route("/readyz", writes_its_own_error),
]


def client_of(
    *, key: str | None = KEY, cors: tuple[str, ...] = (), peer: str = "127.0.0.1"
) -> httpx.AsyncClient:
    class Bare(Starlette):
        def build_middleware_stack(self) -> Any:
            return self.router

    backend = SimpleNamespace(key_check=KeyCheck(() if key is None else (key,)), metrics=RequestMetrics())
    state = State({"backend": backend})
    below = Starlette(routes=[])  # as BentoML's: answers 404 and 405 in plain text
    below.router.routes = Bare(routes=ROUTES).routes
    below.middleware_stack = None
    app = EnvelopeMiddleware(_without_server_errors(below), state, cors)
    transport = httpx.ASGITransport(app=app, client=(peer, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")


def _without_server_errors(app: Starlette) -> Any:
    from starlette.middleware.exceptions import ExceptionMiddleware

    return ExceptionMiddleware(app.router)


@pytest.fixture
def lines() -> Iterator[Any]:
    written = io.StringIO()
    configure_logs("debug", (KEY,), written)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    for name in ("api", "tasks", "storage", "sam3_runner", "service"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "NOT_FOUND"),
        ("POST", "/fine", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/bug", 500, "INTERNAL_ERROR"),
        ("GET", "/domain", 502, "STORAGE_UNAVAILABLE"),
        ("GET", "/foreign", 503, "MODEL_NOT_READY"),
        ("GET", "/api/v1/fine", 401, "UNAUTHORIZED"),
        ("GET", "/api/v1/nope", 401, "UNAUTHORIZED"),
        ("GET", "/files/nope", 401, "UNAUTHORIZED"),
        ("GET", "/fine/", 404, "NOT_FOUND"),
        ("GET", "/readyz/", 404, "NOT_FOUND"),
    ],
)
async def test_an_error_of_any_layer_has_the_one_form(method: str, path: str, status: int, code: str) -> None:
    async with client_of() as client:
        response = await client.request(method, path)
    body = response.json()
    assert response.status_code == status
    assert (body["success"], body["data"], body["error"]["code"]) == (False, None, code)
    assert body["meta"]["request_id"] == response.headers["X-Request-ID"]
    assert response.headers.get_list("content-type") == ["application/json"]
    assert "location" not in response.headers


async def test_a_foreign_error_keeps_what_the_caller_needs_and_nothing_else() -> None:
    async with client_of() as client:
        foreign = await client.get("/foreign")
        wrong_method = await client.post("/fine")
    assert foreign.headers["Retry-After"] == "7"
    assert "server" not in foreign.headers and "someone else" not in foreign.text
    assert wrong_method.headers["Allow"] == "HEAD, GET" or wrong_method.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("sent", ["abc", "0c9f7f1e-51d1-4a1b-9a55-c0a1f5f3b7aa", "a:b.c_d-e", "x" * 128])
async def test_a_request_id_that_is_fit_for_it_is_kept(sent: str) -> None:
    async with client_of() as client:
        response = await client.get("/fine", headers={"X-Request-ID": sent})
    assert response.headers.get_list("X-Request-ID") == [sent]


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, '{"$ne":1}', "a;b", "<script>"])
async def test_a_request_id_that_is_not_is_replaced(sent: str) -> None:
    async with client_of() as client:
        response = await client.get("/fine", headers={"X-Request-ID": sent})
    assert response.headers["X-Request-ID"] != sent
    assert len(response.headers["X-Request-ID"]) == 36


@pytest.mark.parametrize("sent", [None, "", "wrong", KEY[:-1], KEY + "x", KEY.upper(), "\u00e4\u00f6"])
async def test_a_missing_or_wrong_key_is_refused(sent: str | None) -> None:
    headers = {} if sent is None else {b"X-API-Key": sent.encode("latin-1")}
    async with client_of() as client:
        assert (await client.get("/api/v1/fine", headers=headers)).status_code == 401


async def test_the_right_key_passes() -> None:
    async with client_of() as client:
        assert (await client.get("/api/v1/fine", headers={"X-API-Key": KEY})).status_code == 200


@pytest.mark.parametrize(("peer", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 401), ("", 401)])
async def test_without_a_key_only_this_machine_passes(peer: str, status: int) -> None:
    async with client_of(key=None, peer=peer) as client:
        assert (await client.get("/api/v1/fine")).status_code == status


async def test_every_log_line_of_a_request_has_its_id_and_no_secret(lines: Any) -> None:
    async with client_of() as client:
        await client.get("/api/v1/fine", headers={"X-API-Key": KEY, "X-Request-ID": "id-1"})
        await client.get("/bug", headers={"X-Request-ID": "id-2"})
    written = lines()
    assert KEY not in json.dumps(written)
    assert [line["message"] for line in written if line["request_id"] == "id-1"] == ["deep below", "request"]
    last = [line for line in written if line["message"] == "request"]
    assert [(line["status"], line["outcome"]) for line in last] == [(200, "ok"), (500, "INTERNAL_ERROR")]
    assert any("KeyError" in line.get("exception", "") for line in written)
    assert current_request.get() is None


async def test_a_request_that_got_no_answer_is_not_logged_as_ok(lines: Any) -> None:
    async with client_of() as client:
        with pytest.raises(asyncio.CancelledError):
            await client.get("/cancelled")
    (line,) = lines()
    assert (line["status"], line["outcome"]) == (0, "CANCELLED")


async def test_an_answer_that_breaks_off_is_cut_and_logged_as_what_it_is(lines: Any) -> None:
    async with client_of() as client:
        with pytest.raises(KeyError):
            await client.get("/breaks-off")
    assert (lines()[-1]["status"], lines()[-1]["outcome"]) == (200, "INTERNAL_ERROR")


def test_a_log_line_tells_everything_that_it_was_given(lines: Any) -> None:
    logging.getLogger("tasks").error("no row", extra={"task_id": "t-1", "code": "TIMED_OUT", "attempt": 2})
    (line,) = lines()
    assert line.keys() == {"time", "level", "logger", "message", "task_id", "code", "attempt"}
    assert (line["task_id"], line["code"], line["attempt"]) == ("t-1", "TIMED_OUT", 2)


async def test_probes_are_counted_but_not_logged(lines: Any) -> None:
    async with client_of() as client:
        await client.get("/livez")
    assert [line for line in lines() if line["message"] == "request"] == []


async def test_a_probe_that_says_not_ready_is_logged(lines: Any) -> None:
    async with client_of() as client:
        await client.get("/readyz")
    (line,) = [line for line in lines() if line["message"] == "request"]
    assert (line["route"], line["status"], line["outcome"]) == ("/readyz", 503, "MODEL_NOT_READY")
    assert "path" not in line


async def test_a_path_that_is_no_route_is_logged_but_not_its_query_nor_all_of_it(lines: Any) -> None:
    async with client_of() as client:
        await client.get("/nope?token=hunter2")
        await client.get("/" + "x" * 10_000)
        await client.get("/two%0Alines")
    assert "hunter2" not in json.dumps(lines())
    assert [(line["route"], line["path"]) for line in lines() if line["message"] == "request"] == [
        ("unmatched", "/nope"),
        ("unmatched", "/" + "x" * 199),
        ("unmatched", "/two\nlines"),
    ]


async def test_a_path_is_not_cut_in_the_middle_of_a_secret(lines: Any) -> None:
    for length in range(180, 200):
        async with client_of() as client:
            await client.get("/" + "x" * length + KEY)
    logged = [line["path"] for line in lines() if line["message"] == "request"]
    assert len(logged) == 20
    assert all(set(path) <= set("/x*") for path in logged)


def test_a_secret_is_blanked_out_even_where_json_escapes_it() -> None:
    secret = 'quo"te\\and\nline'
    record = logging.LogRecord("api", logging.INFO, "", 0, "it is %s", (secret,), None)
    text = JsonFormatter((secret,)).format(record)
    assert json.loads(text)["message"] == "it is ***"


async def test_pages_of_an_allowed_origin_may_read_errors_too() -> None:
    origin = "https://app.example"
    async with client_of(cors=(origin,)) as client:
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "X-API-Key",
        }
        preflight = await client.options("/api/v1/fine", headers=asked)
        refused = await client.get("/api/v1/fine", headers={"Origin": origin})
        foreign = await client.options("/api/v1/fine", headers={**asked, "Origin": "https://evil.example"})
    assert preflight.status_code == 200 and "X-API-Key" in preflight.headers["Access-Control-Allow-Headers"]
    assert refused.status_code == 401 and refused.headers["Access-Control-Allow-Origin"] == origin
    assert foreign.json()["error"]["code"] == "REQUEST_REFUSED"
    assert "Access-Control-Allow-Origin" not in foreign.headers


async def test_without_allowed_origins_there_is_no_cors() -> None:
    async with client_of() as client:
        response = await client.get("/fine", headers={"Origin": "https://app.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_body_is_limited_whether_or_not_it_says_how_long_it_is() -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"xx"

    async with client_of() as client:
        assert (await client.post("/read", content=b"x" * 10)).json() == {"bytes": 10}
        assert (await client.post("/read", content=chunks(5))).json() == {"bytes": 10}
        assert (await client.post("/read", content=b"x" * 11)).status_code == 413
        assert (await client.post("/read", content=chunks(6))).status_code == 413


async def test_a_body_that_stops_arriving_is_given_up() -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async with client_of() as client:
        response = await client.post("/read-briefly", content=stalls())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "BODY_INCOMPLETE")


def test_slots_are_given_back_whatever_happens() -> None:
    in_flight = InFlight(1)

    def fails_and_finds_no_second_slot() -> None:
        with in_flight.slot():
            with pytest.raises(Overloaded), in_flight.slot():
                pass
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails_and_finds_no_second_slot()


HOLDS_A_PLACE = """
import sys
from pathlib import Path
from api.limits import InFlight

with InFlight(2, Path(sys.argv[1])).slot():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_slots_are_counted_over_all_workers_and_come_back_when_one_dies(tmp_path: Path) -> None:
    shared = tmp_path / "in-flight"
    in_flight = InFlight(2, shared)
    command = [sys.executable, "-c", HOLDS_A_PLACE, str(shared)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with in_flight.slot(), pytest.raises(Overloaded), in_flight.slot():
            pass
        other.kill()
        other.wait()
        with in_flight.slot(), in_flight.slot(), pytest.raises(Overloaded), in_flight.slot():
            pass


async def test_requests_are_counted_by_route_and_never_by_what_callers_invent() -> None:
    from api.requests import RequestRecord

    metrics = RequestMetrics()
    metrics.observe(RequestRecord("1", "BREW", status=405, outcome="METHOD_NOT_ALLOWED"))
    text = metrics.exposition({}).decode()
    assert 's3_requests_total{method="other",route="unmatched",status="405"} 1.0' in text
    assert 's3_errors_total{code="METHOD_NOT_ALLOWED"} 1.0' in text
