"""The pictures of the playground in the README, taken anew: wide, narrow, dark, and an error.

    python -m tests.playground.screenshots [folder]

Starts the service on its embedded defaults, and a Chromium.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page

from tests.conftest import ROOT, Served
from tests.playground.browser import running_browser

FOLDER = ROOT / "docs" / "images"
PROMPTS = ("red circle", "blue square", "green star", "yellow ring")
SHINE_MS = 1200  # what has come lights up; a picture is taken of what stays
WIDE = {"width": 1280, "height": 860}
NARROW = {"width": 390, "height": 1290}
COLOURS = 176


def take(browser: Browser, url: str, path: Path, prompts: tuple[str, ...], **options: Any) -> None:
    """Open the sample, ask, and save what is seen."""
    context = browser.new_context(**{"viewport": WIDE, "device_scale_factor": 1.25, **options})
    page = context.new_page()
    page.goto(url)
    page.locator("#sample").click()
    for prompt in prompts:
        page.locator("#prompt").fill(prompt)
        page.keyboard.press("Enter")
        page.locator(f'.chip[data-label="{prompt}"]:is([data-status=done], [data-status=error])').wait_for()
    page.wait_for_timeout(SHINE_MS)
    point_at(page)
    save(page.screenshot(), path)
    context.close()


def point_at(page: Page) -> None:
    """At the largest red circle, so that score and size are in the picture."""
    frame = page.locator("#frame").bounding_box()
    assert frame is not None
    page.mouse.move(frame["x"] + frame["width"] * 0.22, frame["y"] + frame["height"] * 0.36)
    page.wait_for_timeout(200)


def save(png: bytes, path: Path) -> None:
    """With a palette: a third of the size, and nobody sees it."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLOURS, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main(folder: Path = FOLDER) -> None:
    """Take all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, running_browser() as browser:
        service = Served(Path(home), {})
        try:
            url = service.wait_ready().url
            take(browser, url, folder / "playground-wide.png", PROMPTS)
            take(browser, url, folder / "playground-dark.png", PROMPTS, color_scheme="dark")
            narrow = {"viewport": NARROW, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
            take(browser, url, folder / "playground-narrow.png", PROMPTS[:2], **narrow)
            take(browser, url, folder / "playground-error.png", ("red circle", "<|endoftext|>"))
        finally:
            service.stop()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
