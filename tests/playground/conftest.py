"""One browser for each file, and the pages of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.playground.browser import NoChromium, Watched, running_browser

OpenPage = Callable[..., Watched]

# Without motion nothing has to be waited for.
USUAL = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}


# Not of the session: while Playwright's loop is there, no other test of the process could run a loop of its own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        with running_browser() as browser:
            yield browser
    except NoChromium as error:
        pytest.fail(str(error))


@pytest.fixture
def open_page(browser: Browser, page_url: str) -> Iterator[OpenPage]:
    """Opens pages of the file's own `page_url`; at the end each is looked through for what must not happen."""
    opened: list[Watched] = []

    def open_one(**options: Any) -> Watched:
        watched = Watched(browser, page_url, **{**USUAL, **options})
        opened.append(watched)
        return watched.open()

    yield open_one
    for watched in opened:
        watched.close()
