"""Pictures of two shapes each, and what is true about them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Mask = npt.NDArray[np.bool_]

SIZE = (320, 240)
BACKDROP = (205, 205, 200)
COLOURS = {
    "red": (214, 36, 38),
    "blue": (36, 70, 200),
    "green": (40, 160, 60),
    "yellow": (245, 220, 40),
}
SHAPES = {"circle": "ellipse", "square": "rectangle"}
PAIRS = (
    ("red circle", "blue square"),
    ("blue circle", "red square"),
    ("green circle", "red square"),
    ("yellow circle", "blue square"),
)
FORMATS = ("PNG", "JPEG")
# Where the two are, moved a little from picture to picture.
LEFT, RIGHT, STEP = (40, 60, 130, 150), (195, 80, 275, 160), (6, 9)


@dataclass(frozen=True, eq=False)
class Picture:
    """A file, and where things are on it.

    Attributes:
        key: In object storage.
        file: PNG or JPEG.
        masks: Prompt → (240, 320) bool.
        absent: A prompt for which there is nothing.
    """

    key: str
    file: bytes
    masks: dict[str, Mask]
    absent: str

    def truth(self, prompt: str) -> Mask:
        """Where it is; nowhere, for what is not there."""
        return self.masks.get(prompt, np.zeros(SIZE[::-1], np.bool_))


def draw_pictures() -> list[Picture]:
    """Eight, no two alike."""
    return [_draw(number) for number in range(len(PAIRS) * len(FORMATS))]


def _draw(number: int) -> Picture:
    pair, kind = PAIRS[number % len(PAIRS)], FORMATS[number // len(PAIRS)]
    image, masks = Image.new("RGB", SIZE, BACKDROP), {}
    for prompt, (x0, y0, x1, y1) in zip(pair, (LEFT, RIGHT), strict=True):
        colour, shape = prompt.split()
        right, down = number % 3 * STEP[0], number % 4 * STEP[1]
        box = (x0 + right, y0 + down, x1 + right, y1 + down)
        mask = Image.new("1", SIZE)
        getattr(ImageDraw.Draw(image), SHAPES[shape])(box, fill=COLOURS[colour])
        getattr(ImageDraw.Draw(mask), SHAPES[shape])(box, fill=1)
        masks[prompt] = np.asarray(mask)
    file = io.BytesIO()
    image.save(file, kind, quality=95)
    return Picture(f"uploads/{number}.{kind.lower()}", file.getvalue(), masks, _absent(pair))


def _absent(pair: tuple[str, str]) -> str:
    """The first shape in the second's colour."""
    return f"{pair[1].split()[0]} {pair[0].split()[1]}"


def read_mask(png: bytes) -> Mask:
    """A mask as others read it: exactly 0 and 255."""
    values = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    if not set(np.unique(values)) <= {0, 255}:
        raise ValueError("a mask with other values than 0 and 255")
    return values == 255


def iou(one: Mask, other: Mask) -> float:
    """Intersection over union; 1 where both are empty."""
    union = np.logical_or(one, other).sum()
    return float(np.logical_and(one, other).sum() / union) if union else 1.0
