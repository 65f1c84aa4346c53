"""A real Chromium, and pages of it that notice what must not happen."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL_TIMEOUT_S = 300
# Nothing of a machine's: no GPU, no sandbox (root has none), no call home.
ARGUMENTS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-proxy-server"),
)
# What the page must not do is kept, and how often it drew is counted.
_OBSERVERS = """
    window.violations = [];
    addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) =>
        violations.push(`${violatedDirective} ${blockedURI}`));
    window.draws = 0;
    new PerformanceObserver((list) => (draws += list.getEntriesByName("draw").length)).observe({ type: "measure" });
"""


class NoChromium(Exception):
    """There is none, and it cannot be installed from here."""


def find_chromium() -> str:
    """Path of a Chromium; on Debian root installs it.

    Raises:
        NoChromium: says what to install.
    """
    with (Path(tempfile.gettempdir()) / f"install-chromium.{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may look at once
        if found := _on_path():
            return found
        if os.getuid() == 0 and shutil.which("apt-get"):
            _install()
        if found := _on_path():
            return found
    raise NoChromium(
        "the tests of the playground need Chromium: apt-get install chromium, or have chrome on PATH"
    )


def _on_path() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _install() -> None:
    for arguments in (
        ("update",),
        ("install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"),
    ):
        done = subprocess.run(
            ["apt-get", "-q", *arguments],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise NoChromium(f"apt-get {arguments[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser with a profile of its own."""
    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS])
        yield browser
        browser.close()


class Watched:
    """A page, and everything about it that should not have been.

    Attributes:
        page: The page.
        requests: All that it sent, in order.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self._url = url
        self._context = browser.new_context(**options)
        self._context.set_default_timeout(30_000)
        self.page: Page = self._context.new_page()
        self.requests: list[Request] = []
        self._errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self._errors.append(str(error)))
        self.page.add_init_script(_OBSERVERS)

    def open(self) -> Watched:
        """Go to the playground and wait until its script has begun."""
        self.page.goto(self._url)
        self.page.wait_for_selector("html[data-ready=true]")
        return self

    def close(self) -> None:
        """Close it; fails if a script failed, the policy was violated, or anything but this origin was asked."""
        violations = self.page.evaluate("window.violations")
        self._context.close()
        assert self._errors == []
        assert violations == []
        asked = {urlsplit(request.url) for request in self.requests}
        assert {f"{url.scheme}://{url.netloc}" for url in asked if url.scheme not in ("blob", "data")} == {
            self._url
        }

    def calls(self, path: str) -> list[Request]:
        """Requests to one path."""
        return [request for request in self.requests if urlsplit(request.url).path == path]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was sent to one path."""
        return [json.loads(request.post_data or "null") for request in self.calls(path)]

    def answers(self, path: str) -> list[dict[str, Any]]:
        """What was answered there, to all that is answered by now."""
        responses = [request.response() for request in self.calls(path)]
        return [json.loads(response.text()) for response in responses if response is not None]
