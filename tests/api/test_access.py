"""The key: several of them, none told by time, wrong ones slowed, and what a service without one lets in."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Any

import pytest

from api import access
from api.access import DELAY_S, FREE_FAILURES, MAX_ADDRESSES, MAX_DELAYED, WINDOW_S, FailureBudget, KeyCheck
from api.errors import Unauthorized

OLD, NEW = "the-old-key-of-24-chars-", "the-new-key-of-28-characters"


def request(peer: str = "203.0.113.7", **headers: str) -> dict[str, Any]:
    """An ASGI scope; the underscores of a header's name are hyphens."""
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "client": (peer, 1), "headers": raw}


async def passes(check: KeyCheck, scope: dict[str, Any]) -> bool:
    try:
        await check.require(scope)
    except Unauthorized:
        return False
    return True


@pytest.mark.parametrize("key", [OLD, NEW])
async def test_each_of_several_keys_opens(key: str) -> None:
    assert await passes(KeyCheck([OLD, NEW]), request(x_api_key=key))


@pytest.mark.parametrize(
    "sent", ["", ",", OLD + NEW, f"{OLD},{NEW}", OLD[:-1], OLD + "x", NEW.upper(), f" {OLD}", "\u00e9" * 24]
)
async def test_nothing_else_does(sent: str) -> None:
    assert not await passes(KeyCheck([OLD, NEW]), request(x_api_key=sent))


async def test_no_key_configured_is_never_an_empty_key() -> None:
    assert not await passes(KeyCheck([]), request(x_api_key=""))


@pytest.mark.parametrize("sent", [OLD, NEW, "wrong", "x" * 10_000])
async def test_every_key_is_compared_at_full_length_whatever_was_sent(
    monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    compared = []

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", watched)
    await passes(KeyCheck([OLD, NEW]), request(x_api_key=sent))
    assert compared == [(32, 32), (32, 32)]


# ------------------------------------------------------------------------------------------- too many failures


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def is_slowed(budget: FailureBudget, address: str) -> bool:
    """Whether one more failure of an address has to wait; does not wait itself."""
    task = asyncio.create_task(budget.spend(address))
    await asyncio.sleep(0)
    waits = not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return waits


async def test_the_first_failures_are_free_and_the_next_wait_until_the_window_is_over() -> None:
    clock = Clock()
    budget = FailureBudget(clock)
    assert not any([await is_slowed(budget, "203.0.113.7") for _ in range(FREE_FAILURES)])
    assert await is_slowed(budget, "203.0.113.7")
    assert not await is_slowed(budget, "203.0.113.8")
    clock.now_s += WINDOW_S + 1
    assert not await is_slowed(budget, "203.0.113.7")


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:203.0.113.7", "203.0.113.7", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("not an address", "", True),
    ],
)
async def test_a_subscriber_is_one_address_however_many_he_has(one: str, other: str, is_same: bool) -> None:
    budget = FailureBudget(Clock())
    for _ in range(FREE_FAILURES):
        await is_slowed(budget, one)
    assert await is_slowed(budget, other) == is_same


async def test_only_so_many_answers_wait_and_only_so_many_addresses_are_remembered() -> None:
    budget = FailureBudget(Clock())
    for _ in range(FREE_FAILURES):
        await is_slowed(budget, "203.0.113.7")
    waiting = [asyncio.create_task(budget.spend("203.0.113.7")) for _ in range(MAX_DELAYED + 20)]
    await asyncio.sleep(0)
    assert sum(not task.done() for task in waiting) == MAX_DELAYED
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await is_slowed(budget, "203.0.113.7")  # the places were given back
    for number in range(2 * MAX_ADDRESSES):
        await budget.spend(f"2001:db8:{number:x}::1")
    assert len(budget._windows) == MAX_ADDRESSES


async def test_a_right_key_is_not_slowed_by_the_failures_of_its_address() -> None:
    check = KeyCheck([OLD])
    for _ in range(FREE_FAILURES):
        await passes(check, request(x_api_key="wrong"))
    began = time.monotonic()
    assert not await passes(check, request(x_api_key="wrong"))
    assert time.monotonic() - began >= DELAY_S * 0.9
    began = time.monotonic()
    assert all([await passes(check, request(x_api_key=OLD)) for _ in range(100)])
    assert time.monotonic() - began < DELAY_S / 2


async def test_failures_are_logged_once_and_without_what_was_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "DELAY_S", 0)
    check = KeyCheck([OLD])
    for _ in range(3 * FREE_FAILURES):
        await passes(check, request(x_api_key="wrong-but-private"))
    (record,) = caplog.records
    assert vars(record)["address"] == "203.0.113.7"
    assert "wrong-but-private" not in str(vars(record))


# -------------------------------------------------------------------------------------------------- without a key


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        pytest.param({}, True, id="HTTP/1.0, without Host"),
        pytest.param({"host": "localhost:8000"}, True, id="localhost"),
        pytest.param({"host": "127.0.0.1"}, True, id="loopback"),
        pytest.param({"host": "[::1]:8000"}, True, id="loopback, IPv6"),
        pytest.param({"host": "studio.example"}, True, id="its own public host"),
        pytest.param({"host": "localhost", "origin": "http://localhost:5173"}, True, id="a page from here"),
        pytest.param({"host": "localhost", "origin": "https://app.example"}, True, id="an allowed origin"),
        pytest.param({"host": "evil.example:8000"}, False, id="a name that was bound anew to loopback"),
        pytest.param({"host": "localhost.evil.example"}, False, id="a name that begins with localhost"),
        pytest.param({"host": "localhost@evil.example"}, False, id="localhost as user-info"),
        pytest.param({"host": "[::1"}, False, id="half an address"),
        pytest.param({"host": ""}, False, id="an empty host"),
        pytest.param({"host": "localhost", "origin": "https://evil.example"}, False, id="a foreign page"),
        pytest.param({"host": "localhost", "origin": "null"}, False, id="a page without an origin"),
        pytest.param({"host": "localhost", "x_forwarded_for": "127.0.0.1"}, False, id="forwarded"),
        pytest.param({"host": "localhost", "forwarded": "for=127.0.0.1"}, False, id="forwarded, RFC 7239"),
    ],
)
async def test_without_a_key_only_programs_and_pages_of_this_machine_call(
    headers: dict[str, str], is_let_in: bool
) -> None:
    check = KeyCheck([], own_hosts=["studio.example"], origins=["https://app.example"])
    assert await passes(check, request("127.0.0.1", **headers)) == is_let_in
    assert not await passes(check, request("203.0.113.7", **headers))


async def test_without_a_key_every_page_may_call_where_cors_says_so() -> None:
    check = KeyCheck([], origins=["*"])
    assert await passes(check, request("127.0.0.1", host="localhost", origin="https://evil.example"))


async def test_with_a_key_neither_name_nor_origin_matter() -> None:
    check = KeyCheck([OLD])
    scope = request(
        x_api_key=OLD, host="any.example", origin="https://any.example", x_forwarded_for="1.2.3.4"
    )
    assert await passes(check, scope)
