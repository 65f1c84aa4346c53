"""Draws `shapes.jpg`, the picture of the demo, and knows the true mask of everything on it.

    python -m examples.draw_shapes

Pixel frame: origin top left, x to the right, y down.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

SHAPES_JPG = Path(__file__).with_name("shapes.jpg")
SIZE_HW = (600, 800)
_SUPERSAMPLING = 4

# RGB; each well inside what the demo checkpoint was taught to call by that name.
_COLOURS = {
    "red": (222, 30, 38),
    "green": (38, 166, 60),
    "blue": (30, 84, 220),
    "yellow": (250, 224, 30),
}


@dataclass(frozen=True)
class Drawn:
    """One shape of the picture: what people call it, its centre, and how far it reaches from there."""

    colour: str
    shape: str
    centre_xy_px: tuple[float, float]
    radius_px: float
    turn_deg: float = 0.0


# Three red circles, and what must not be taken for one: a red square and a blue circle.
DRAWN = (
    Drawn("red", "circle", (170, 178), 104),
    Drawn("blue", "square", (402, 160), 112, 57),
    Drawn("green", "star", (640, 172), 112, 8),
    Drawn("yellow", "ring", (168, 438), 100),
    Drawn("red", "circle", (372, 452), 76),
    Drawn("blue", "circle", (538, 352), 54),
    Drawn("red", "square", (680, 470), 92, 28),
    Drawn("red", "circle", (520, 530), 40),
)


def mask_of(colour: str, shape: str) -> npt.NDArray[np.bool_]:
    """The union, (H, W), of all that has this colour and shape; a pixel belongs to what covers half of it."""
    coverage = np.zeros(SIZE_HW, np.float32)
    for drawn in DRAWN:
        if (drawn.colour, drawn.shape) == (colour, shape):
            coverage = np.maximum(coverage, _coverage(drawn))
    return coverage >= 0.5


def draw() -> Image.Image:
    """Draw the whole picture: shaded shapes with soft shadows on a pale backdrop."""
    height, width = SIZE_HW
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    canvas = np.array([236, 233, 226]) - across * np.array([14, 16, 18]) - down * np.array([26, 24, 16])
    for drawn in DRAWN:
        coverage = _coverage(drawn)
        canvas *= 1 - 0.16 * _shadow(coverage)[..., None]
        x, y = drawn.centre_xy_px
        # Lit from the top left.
        light = 1 - 0.09 * ((across * width - x) + (down * height - y)) / drawn.radius_px
        alpha = coverage[..., None]
        canvas = canvas * (1 - alpha) + np.clip(light * _COLOURS[drawn.colour], 0, 255) * alpha
    canvas += np.random.default_rng(3).normal(0, 2.0, (height, width, 1))
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _coverage(drawn: Drawn) -> npt.NDArray[np.float32]:
    height, width = SIZE_HW
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    for outline, ink in zip(_outlines(drawn), (255, 0), strict=False):
        pen.polygon([value * _SUPERSAMPLING - 0.5 for point in outline for value in point], fill=ink)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32) / np.float32(255)


def _shadow(coverage: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    moved = np.roll(coverage, (7, 5), axis=(0, 1))
    blurred = Image.fromarray((moved * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(7))
    return np.asarray(blurred, np.float32) / np.float32(255)


def _outlines(drawn: Drawn) -> list[list[tuple[float, float]]]:
    """The outer outline, then that of the hole if there is one."""
    reaches = {"square": [1.0], "star": [1.0, 0.44], "ring": [1.0], "circle": [1.0]}[drawn.shape]
    points = {"square": 4, "star": 10}.get(drawn.shape, 120)
    scales = (1.0, 0.56) if drawn.shape == "ring" else (1.0,)
    return [
        [_on_circle(drawn, 360 * n / points, reaches[n % len(reaches)] * scale) for n in range(points)]
        for scale in scales
    ]


def _on_circle(drawn: Drawn, angle_deg: float, reach: float) -> tuple[float, float]:
    angle = math.radians(angle_deg + drawn.turn_deg - 90)
    x, y = drawn.centre_xy_px
    return (x + reach * drawn.radius_px * math.cos(angle), y + reach * drawn.radius_px * math.sin(angle))


if __name__ == "__main__":
    draw().save(SHAPES_JPG, quality=88)
    print(SHAPES_JPG)
