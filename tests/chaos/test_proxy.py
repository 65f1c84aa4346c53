"""The proxy itself: each trouble is what it says, and nothing is left of it when it is over."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import wait_until
from tests.servers.proxy import Proxy, Trouble, running_proxy

TIMEOUT_S = 0.3


class Echo(BaseHTTPRequestHandler):
    """Answers with what was sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class EchoServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Connections are reset here all the time."""


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    server = EchoServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def proxy(echo: str) -> Iterator[Proxy]:
    with running_proxy(echo) as running:
        yield running


@pytest.fixture
def client(proxy: Proxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy.url, timeout=TIMEOUT_S, trust_env=False) as one:
        yield one


def test_what_is_sent_arrives_whole_and_comes_back_whole(proxy: Proxy, client: httpx.Client) -> None:
    for size in (0, 1, 64 * 1024, 3_000_001):
        body = bytes(n % 251 for n in range(size))
        assert client.post("/", content=body).content == body
    assert (proxy.counts["connections"], proxy.counts["requests"], proxy.counts["passed"]) == (1, 4, 4)


def test_a_share_of_requests_is_answered_with_an_error_and_a_share_hangs(
    proxy: Proxy, client: httpx.Client
) -> None:
    seen = []
    with proxy.trouble(error_share=0.3, hang_share=0.02):
        for _ in range(150):
            try:
                seen.append(client.post("/", content=b"x" * 1000).status_code)
            except httpx.ReadTimeout:
                seen.append(0)
    assert 30 <= seen.count(503) <= 60 and 1 <= seen.count(0) <= 8
    assert (seen.count(503), seen.count(0)) == (proxy.counts["answered 503"], proxy.counts["hung"])
    assert seen.count(200) == proxy.counts["passed"] == 150 - seen.count(503) - seen.count(0)
    assert client.post("/", content=b"x").status_code == 200


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        pytest.param(Trouble(refuses=True), httpx.ConnectError, id="refuses"),
        pytest.param(Trouble(is_cut=True), httpx.NetworkError, id="is cut"),
        pytest.param(Trouble(hangs=True), httpx.ReadTimeout, id="hangs"),
        pytest.param(Trouble(holds=True), httpx.ReadTimeout, id="holds"),
        pytest.param(Trouble(delay_s=2 * TIMEOUT_S), httpx.ReadTimeout, id="delays"),
    ],
)
def test_each_trouble_begins_at_once_and_ends_when_it_is_healed(
    proxy: Proxy, client: httpx.Client, trouble: Trouble, error: type[Exception]
) -> None:
    assert client.post("/", content=b"before").status_code == 200
    proxy.set(trouble)
    with pytest.raises(httpx.TransportError):  # on the connection that was open: any of several
        client.post("/", content=b"open before")
    with pytest.raises(error):
        client.post("/", content=b"new")
    proxy.heal()
    assert client.post("/", content=b"after").content == b"after"


def test_what_is_held_flows_on_when_the_network_is_back(proxy: Proxy, client: httpx.Client) -> None:
    proxy.set(Trouble(holds=True))
    threading.Timer(0.2, proxy.heal).start()
    began = time.monotonic()
    assert client.post("/", content=b"late").content == b"late"
    assert time.monotonic() - began > 0.15


def test_a_throttle_takes_its_time(proxy: Proxy, client: httpx.Client) -> None:
    with proxy.trouble(bytes_per_s=1_000_000):
        began = time.monotonic()
        assert len(client.post("/", content=bytes(100_000), timeout=5).content) == 100_000
    assert 0.15 < time.monotonic() - began < 2


def test_a_server_that_is_not_there_ends_connections() -> None:
    with running_proxy("http://127.0.0.1:9") as proxy, pytest.raises(httpx.TransportError):
        httpx.post(proxy.url, content=b"x", timeout=TIMEOUT_S, trust_env=False)


def test_nothing_is_left_of_it(echo: str) -> None:
    gc.collect()
    this = psutil.Process()
    fds, threads = this.num_fds(), threading.active_count()
    with running_proxy(echo) as proxy, httpx.Client(timeout=0.1, trust_env=False) as client:
        for trouble in (Trouble(), Trouble(hangs=True), Trouble(is_cut=True), Trouble(refuses=True)):
            proxy.set(trouble)
            for _ in range(5):
                try:
                    client.post(proxy.url, content=b"x")
                except httpx.TransportError:
                    continue
        assert proxy.open_connections == 0
    # The echo server's own threads end a moment later.
    wait_until(lambda: this.num_fds() <= fds, 5, "all files are given back")
    wait_until(lambda: threading.active_count() <= threads, 5, "all threads are given back")
