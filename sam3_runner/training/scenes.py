"""Synthetic scenes of coloured shapes, with exact masks and text prompts.

A scene is a few shapes on a backdrop, photographed badly: perspective, overlap, blur, noise, JPEG. Prompts name a
colour, a shape or both; about half of them name what is not there. Everything follows from the `rng` passed in.

Pixel frame everywhere: origin top left, x to the right, y down, pixel (0, 0) covers [0, 1) × [0, 1).
"""

import colorsys
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

T = TypeVar("T")
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ColourRange:
    """The part of HSV space that people call by one name.

    Attributes:
        hue_deg: Lowest and highest hue in degrees; the lowest may be negative.
        saturation: Lowest and highest, in [0, 1].
        value: Lowest and highest, in [0, 1].
    """

    hue_deg: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]

    def at(self, hue: float, saturation: float, value: float) -> FloatArray:
        """Give the RGB colour, (3,) in [0, 255], at fractions [0, 1] of the way along each range."""
        low, high = zip(self.hue_deg, self.saturation, self.value, strict=True)
        h, s, v = (a + (b - a) * t for a, b, t in zip(low, high, (hue, saturation, value), strict=True))
        return np.array(colorsys.hsv_to_rgb(h / 360 % 1, s, v), np.float32) * 255

    def sample(self, rng: np.random.Generator) -> FloatArray:
        """Draw an RGB colour, (3,) in [0, 255]."""
        return self.at(*rng.random(3).tolist())

    @property
    def centre_rgb(self) -> FloatArray:
        """The middle of the range, (3,) in [0, 255]."""
        return self.at(0.5, 0.5, 0.5)


# The gaps between hues (red 6 | 23 orange 33 | 52 yellow, blue 234 | 270 purple) keep neighbours apart after jitter;
# orange stays bright, since dark orange is brown.
COLOURS = {
    "red": ColourRange((-8, 6), (0.82, 1.0), (0.72, 1.0)),
    "green": ColourRange((98, 142), (0.65, 1.0), (0.5, 0.9)),
    "blue": ColourRange((214, 234), (0.8, 1.0), (0.68, 1.0)),
    "yellow": ColourRange((52, 60), (0.78, 1.0), (0.92, 1.0)),
    "orange": ColourRange((23, 33), (0.85, 1.0), (0.93, 1.0)),
    "purple": ColourRange((270, 292), (0.6, 0.95), (0.5, 0.8)),
    "white": ColourRange((0, 360), (0.0, 0.05), (0.93, 1.0)),
    "black": ColourRange((0, 360), (0.0, 0.3), (0.0, 0.12)),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")

MAX_OBJECTS = 8
# Object diameter as a share of sqrt(H·W).
DIAMETER_SHARE = (0.06, 0.40)
# Fewer pixels than this and a star is no longer a star; matters only for areas under 160 px a side.
MIN_DIAMETER_PX = 10.0
MIN_SHARE_INSIDE_IMAGE = 0.6
MIN_SHARE_UNCOVERED = 0.7
# CIE76 distance in Lab between any shade of an object's colour and any shade of the backdrop; ~2 is just noticeable.
MIN_CONTRAST_LAB = 32.0
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        colour: A key of `COLOURS`.
        shape: One of `SHAPES`.
        mask: (H, W) bool, the visible part only; a pixel belongs to it when the shape covers at least half of it.
        box_xyxy_px: Tight box of `mask`; x1 and y1 lie one past the last pixel.
    """

    colour: str
    shape: str
    mask: BoolArray
    box_xyxy_px: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """One image and what is on it.

    Attributes:
        image: (H, W, 3) uint8, RGB, C-contiguous and writable.
        objects: 1 to `MAX_OBJECTS`, later ones in front of earlier ones; their masks are disjoint.
    """

    image: ByteArray
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Exemplar:
    """A box drawn into a scene: "like this", or "not like this".

    Attributes:
        box_xyxy_px: Roughly around what it shows, inside the image.
        is_positive: Whether what is wanted is like it.
        shows: Index into `Scene.objects`; None: a piece of backdrop.
    """

    box_xyxy_px: tuple[float, float, float, float]
    is_positive: bool
    shows: int | None


@dataclass(frozen=True)
class ScenePrompt:
    """A question, and the objects of its scene that answer it.

    Attributes:
        text: For instance "red circle", "the red circles", "Red", "RING". None: the exemplars say it all.
        matches: Ascending indices into `Scene.objects`; empty when the scene has no such object.
        exemplars: Boxes that are part of the question.
        forbidden: The objects that are like a negative exemplar; none of them is in `matches`.
    """

    text: str | None
    matches: tuple[int, ...]
    exemplars: tuple[Exemplar, ...] = ()
    forbidden: tuple[int, ...] = ()


# --- scene ---------------------------------------------------------------------------------------------------------


def draw_scene(
    rng: np.random.Generator,
    area_side_px: tuple[int, int] = (192, 320),
    min_objects: int = 1,
    share_repeated: float | None = None,
) -> Scene:
    """Draw one scene.

    Args:
        rng: The only source of chance; the same state gives the same scene.
        area_side_px: Range of sqrt(H·W), drawn uniformly. The aspect ratio lies within 1:2 and 2:1, for one scene
            in ten within 1:3 and 3:1.
        min_objects: Try to place this many at least; it may be fewer, since they must fit.
        share_repeated: Of the objects, those that repeat another's colour and shape, in [0, 1); more come out alike
            by chance. None: few in most scenes, many in some.
    Returns:
        A scene with at least one object. The masks are those of the sharp geometry: blur, noise and JPEG come after.
    """
    height, width = _draw_size_hw(rng, area_side_px)
    backdrop, colours = _draw_backdrop(rng, height, width)
    kinds = _draw_kinds(rng, colours, int(rng.integers(min_objects, MAX_OBJECTS + 1)), share_repeated)
    canvas = _Canvas(backdrop)
    for colour, shape in kinds:
        canvas.place(rng, colour, shape, _draw_diameter_px(rng, math.sqrt(height * width), len(kinds)))
    # Pillow lends its buffers read-only, which torch.from_numpy warns about.
    return Scene(np.require(_degrade(rng, canvas.image), requirements="W"), canvas.objects())


def _draw_size_hw(rng: np.random.Generator, area_side_px: tuple[int, int]) -> tuple[int, int]:
    side = rng.uniform(*area_side_px)
    log_limit = math.log(3.0 if rng.random() < 0.1 else 2.0)
    stretch = math.exp(rng.uniform(-log_limit, log_limit) / 2)
    return max(1, round(side / stretch)), max(1, round(side * stretch))


def _draw_kinds(
    rng: np.random.Generator, colours: list[str], count: int, share_repeated: float | None
) -> list[tuple[str, str]]:
    """Choose (colour, shape) of every object from a small palette, so that kinds repeat and nearly repeat."""
    # Two or three of each are best for near misses: red circle, blue square, but no blue circle.
    some_colours = rng.permutation(colours)[: pick(rng, (1, 2, 2, 3, 3, 4))].tolist()
    some_shapes = rng.permutation(SHAPES)[: pick(rng, (1, 2, 2, 3, 3, 4))].tolist()
    if share_repeated is None:
        # A quarter of the scenes repeat whole kinds often: several red circles next to something else.
        share_repeated = 0.7 if rng.random() < 1 / 4 else 0.1
    kinds: list[tuple[str, str]] = []
    for _ in range(count):
        if kinds and rng.random() < share_repeated:
            kinds.append(kinds[rng.integers(len(kinds))])
        else:
            kinds.append((pick(rng, some_colours), pick(rng, some_shapes)))
    return kinds


def _draw_diameter_px(rng: np.random.Generator, side_px: float, object_count: int) -> float:
    smallest, largest = DIAMETER_SHARE
    # Eight discs of 0.32 would fill 64 % of the area; as most are smaller they fill a quarter and fit.
    largest = min(largest, 0.9 / math.sqrt(object_count))
    # Log-uniform but for the exponent, which makes the tiniest somewhat rarer.
    share = smallest * math.pow(largest / smallest, rng.random() ** 0.75)
    return max(MIN_DIAMETER_PX, share * side_px)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`."""
    # rng.choice costs 20 µs a call, ten times this.
    return items[int(rng.integers(len(items)))]


def pick_weighted(rng: np.random.Generator, options: Sequence[tuple[T, float]]) -> T:
    """One of (option, weight), drawn in proportion to its weight."""
    point = rng.random() * sum(weight for _, weight in options)
    for option, weight in options:
        point -= weight
        if point < 0:
            return option
    return options[-1][0]


# --- objects -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patch:
    """A drawn shape: float32 (h, w) coverage and edge, both in [0, 1], with its top left corner in the image."""

    left: int
    top: int
    coverage: FloatArray
    edge: FloatArray | None


class _Canvas:
    """The image under way, and which object owns each pixel."""

    def __init__(self, backdrop: ByteArray) -> None:
        self.image = backdrop
        self._owner: npt.NDArray[np.int8] = np.full(backdrop.shape[:2], -1, np.int8)
        self._kinds: list[tuple[str, str]] = []
        self._discs: list[tuple[float, float, float]] = []  # centre x, centre y, radius
        self._areas_px: list[int] = []  # inside the image, before anything covers them

    def place(self, rng: np.random.Generator, colour: str, shape: str, diameter_px: float) -> None:
        """Put an object where it fits; leave it out when 24 tries fail, unless it would be the first."""
        height, width = self._owner.shape
        outlines = _draw_outlines(rng, shape)
        edge_share = rng.uniform(0.02, 0.04) if rng.random() < 0.25 else 0.0
        for _ in range(24):
            x, y = _draw_centre(rng, height, width, diameter_px / 2)
            if not self._has_room(colour, x, y, diameter_px / 2):
                continue
            placed = [points * (diameter_px / 2) + np.array([x, y]) for points in outlines]
            patch = _rasterise(placed, diameter_px * edge_share)
            if self._try_add(rng, patch, colour, shape):
                self._discs.append((x, y, diameter_px / 2))
                return
        if not self._kinds:
            raise RuntimeError(
                f"no room for a {diameter_px:.0f} px {shape} on an empty {width}×{height} image"
            )

    def objects(self) -> tuple[SceneObject, ...]:
        """List what was placed, with the masks that are left of them."""
        masks = [self._owner == index for index in range(len(self._kinds))]
        return tuple(
            SceneObject(colour, shape, mask, _tight_box(mask))
            for (colour, shape), mask in zip(self._kinds, masks, strict=True)
        )

    def _has_room(self, colour: str, x: float, y: float, radius: float) -> bool:
        """Allow a slight overlap of enclosing circles; none for equal colours, whose shapes would melt together."""
        return all(
            math.hypot(x - other_x, y - other_y)
            > (radius + other_radius) * (1.04 if colour == kind[0] else 0.82)
            for (other_x, other_y, other_radius), kind in zip(self._discs, self._kinds, strict=True)
        )

    def _try_add(self, rng: np.random.Generator, patch: _Patch, colour: str, shape: str) -> bool:
        whole_area = int((patch.coverage >= 0.5).sum())
        height, width = self._owner.shape
        patch = _crop(patch, height, width)
        mask = patch.coverage >= 0.5
        area = int(mask.sum())
        window = np.s_[patch.top : patch.top + mask.shape[0], patch.left : patch.left + mask.shape[1]]
        if area == 0 or area < MIN_SHARE_INSIDE_IMAGE * whole_area or self._covers_too_much(window, mask):
            return False
        self._owner[window][mask] = len(self._kinds)
        self._kinds.append((colour, shape))
        self._areas_px.append(area)
        _paint(rng, self.image[window], patch, COLOURS[colour].sample(rng))
        return True

    def _covers_too_much(self, window: tuple[slice, slice], mask: BoolArray) -> bool:
        hidden = np.unique(self._owner[window][mask])
        return any(
            int((self._owner == index).sum()) - int((self._owner[window][mask] == index).sum())
            < MIN_SHARE_UNCOVERED * self._areas_px[index]
            for index in hidden.tolist()
            if index >= 0
        )


def _draw_centre(rng: np.random.Generator, height: int, width: int, radius: float) -> tuple[float, float]:
    margin = 0.3 * radius if rng.random() < 0.2 else radius + 1  # one in five may be cut by the border
    x, y = (rng.uniform(min(margin, side / 2), max(side - margin, side / 2)) for side in (width, height))
    return x, y


def _unit_outlines(rng: np.random.Generator, shape: str) -> list[npt.NDArray[np.float64]]:
    """Give the outline of a shape about the origin, (vertices, 2), and that of its hole if it has one."""
    if shape == "circle":
        return [_regular(40)]
    if shape == "ring":
        return [_regular(40), _regular(40) * rng.uniform(0.45, 0.65)]
    if shape == "star":
        star = _regular(10)
        star[1::2] *= rng.uniform(0.38, 0.48)
        return [star]
    if shape == "cross":
        arm = rng.uniform(0.24, 0.36)
        quarter = np.array([[arm, arm], [arm, 1], [-arm, 1]])
        turns = [np.array([[1, 0], [0, 1]]), np.array([[0, 1], [-1, 0]])]
        return [np.concatenate([quarter @ turn * sign for sign in (1, -1) for turn in turns])]
    return [_regular({"triangle": 3, "square": 4}[shape])]


def _regular(vertices: int) -> npt.NDArray[np.float64]:
    angle = np.arange(vertices) * (2 * math.pi / vertices)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _draw_outlines(rng: np.random.Generator, shape: str) -> list[npt.NDArray[np.float64]]:
    """Rotate, stretch and tilt a shape; the result touches, and lies in, the unit circle about the origin."""
    outlines = _unit_outlines(rng, shape)
    first, second = rng.uniform(0, 2 * math.pi, 2)
    stretch = math.exp(rng.uniform(-0.11, 0.11))
    linear = _rotation(first) @ np.diag([stretch, 1 / stretch]) @ _rotation(second)
    tilt = rng.uniform(-0.14, 0.14, 2)
    # Homography [[linear, 0], [tilt, 1]]; |tilt| < 0.2 keeps the denominator positive over the unit disc.
    outlines = [(points @ linear.T) / (1 + points @ tilt)[:, None] for points in outlines]
    centre = (outlines[0].min(axis=0) + outlines[0].max(axis=0)) / 2
    radius = np.linalg.norm(outlines[0] - centre, axis=1).max()
    return [(points - centre) / radius for points in outlines]


def _rotation(angle: float) -> npt.NDArray[np.float64]:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _rasterise(outlines: list[npt.NDArray[np.float64]], edge_width_px: float) -> _Patch:
    """Draw an outline, minus its hole, at `_SUPERSAMPLING` times the size and average down to coverage."""
    left, top = np.floor(outlines[0].min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(outlines[0].max(axis=0)).astype(int) + 1
    # Pillow's integer coordinates are pixel centres, ours are pixel corners.
    polygons = [((points - (left, top)) * _SUPERSAMPLING - 0.5).ravel().tolist() for points in outlines]
    size = (int(right - left) * _SUPERSAMPLING, int(bottom - top) * _SUPERSAMPLING)
    filled = Image.new("L", size)
    draw = ImageDraw.Draw(filled)
    for polygon, ink in zip(polygons, (255, 0), strict=False):
        draw.polygon(polygon, fill=ink)
    edge = None
    if edge_width_px:
        stroke = Image.new("L", size)
        draw = ImageDraw.Draw(stroke)
        for polygon in polygons:
            # Half of the stroke falls outside the shape, where coverage hides it.
            draw.line([*polygon, *polygon[:4]], fill=255, width=round(2 * edge_width_px * _SUPERSAMPLING))
        edge = _unit_floats(stroke.reduce(_SUPERSAMPLING))
    return _Patch(int(left), int(top), _unit_floats(filled.reduce(_SUPERSAMPLING)), edge)


def _unit_floats(image: Image.Image) -> FloatArray:
    return np.asarray(image, np.float32) / np.float32(255)


def _crop(patch: _Patch, height: int, width: int) -> _Patch:
    left, top = max(0, -patch.left), max(0, -patch.top)
    inside = np.s_[top : max(top, height - patch.top), left : max(left, width - patch.left)]
    edge = None if patch.edge is None else patch.edge[inside]
    return _Patch(patch.left + left, patch.top + top, patch.coverage[inside], edge)


def _paint(rng: np.random.Generator, window: ByteArray, patch: _Patch, rgb: FloatArray) -> None:
    """Blend an object of colour `rgb`, (3,), into `window`, (h, w, 3), in place."""
    shade = _draw_shade(rng, *patch.coverage.shape)
    if patch.edge is not None:
        shade *= 1 - patch.edge * np.float32(rng.uniform(0.35, 0.6))
    alpha = patch.coverage[..., None]
    blended = np.minimum(shade[..., None] * rgb, 255) * alpha + window * (1 - alpha)
    window[...] = (blended + 0.5).astype(np.uint8)


def _draw_shade(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    """Draw brightness factors (h, w) about 1: a slope, and for half of the objects a soft texture."""
    slope_x, slope_y = rng.uniform(-0.09, 0.09, 2)
    across = np.linspace(-slope_x, slope_x, width, dtype=np.float32)
    shade = across + np.linspace(1 - slope_y, 1 + slope_y, height, dtype=np.float32)[:, None]
    if rng.random() < 0.5:
        cells = int(rng.integers(3, 12))
        shade += (_smooth_noise(rng, cells, cells, height, width) - np.float32(127.5)) * np.float32(
            0.09 / 127.5
        )
    return shade


def _tight_box(mask: BoolArray) -> tuple[float, float, float, float]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


# --- backdrop ------------------------------------------------------------------------------------------------------


def _draw_backdrop(rng: np.random.Generator, height: int, width: int) -> tuple[ByteArray, list[str]]:
    """Draw the image (H, W, 3) behind the objects, and name the colours that stand out from all of it."""
    weave = pick(rng, (None, None, *_WEAVES))
    ramp, colours = _draw_ramp(rng, is_plain=weave is None)
    if weave is None:
        return np.broadcast_to(ramp[0], (height, width, 3)).copy(), colours
    # Through a palette image: Pillow looks colours up five times as fast as NumPy does.
    indexed = Image.fromarray(weave(rng, height, width))
    indexed.putpalette(ramp.tobytes())
    return np.array(indexed.convert("RGB")), colours


def _draw_ramp(rng: np.random.Generator, is_plain: bool) -> tuple[ByteArray, list[str]]:
    """Draw 256 RGB steps between two backdrop colours, (256, 3), from which at least four named colours stand out."""
    while True:
        start = _draw_backdrop_rgb(rng)
        stop = (
            start
            if is_plain
            else start + (_draw_backdrop_rgb(rng) - start) * np.float32(rng.uniform(0.15, 1))
        )
        ramp = start + (stop - start) * np.linspace(0, 1, 256, dtype=np.float32)[:, None]
        colours = _contrasting_colours(ramp[::51])
        if len(colours) >= 4:
            return ramp.astype(np.uint8), colours


def _draw_backdrop_rgb(rng: np.random.Generator) -> FloatArray:
    rgb = rng.random(3, np.float32)
    if rng.random() < 0.5:  # the world has more greys and muted tones than a uniform cube
        rgb = rgb.mean() + (rgb - rgb.mean()) * np.float32(0.25) + np.float32(rng.uniform(-0.4, 0.4))
    return np.clip(rgb, 0, 1) * 255


def _contrasting_colours(backdrop_rgb: FloatArray) -> list[str]:
    """Name the colours whose every shade is `MIN_CONTRAST_LAB` away from every one of `backdrop_rgb`, (K, 3)."""
    backdrop_lab = rgb_to_lab(backdrop_rgb)
    names, shades_lab = _shades_lab()
    # (colours, shades, 1, 3) - (K, 3) -> (colours, shades, K)
    distance = np.linalg.norm(shades_lab[:, :, None] - backdrop_lab, axis=-1)
    return [
        name
        for name, nearest in zip(names, distance.min(axis=(1, 2)), strict=True)
        if nearest > MIN_CONTRAST_LAB
    ]


@cache
def _shades_lab() -> tuple[tuple[str, ...], FloatArray]:
    """The names, and Lab of the corners and the centre of each colour's range, (colours, 9, 3)."""
    corners = [(h, s, v) for h in (0, 1) for s in (0, 1) for v in (0, 1)]
    shades = [[r.at(*corner) for corner in corners] + [r.centre_rgb] for r in COLOURS.values()]
    return tuple(COLOURS), rgb_to_lab(np.array(shades, np.float32))


def rgb_to_lab(rgb: FloatArray) -> FloatArray:
    """Convert sRGB in [0, 255] to CIE L*a*b* under D65, both (..., 3); L is in [0, 100]."""
    unit = np.asarray(rgb, np.float32) / 255
    linear = np.where(unit > 0.04045, ((unit + 0.055) / 1.055) ** 2.4, unit / 12.92)
    # IEC 61966-2-1 matrix, rows divided by the D65 white point.
    to_xyz = np.array(
        [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]], np.float32
    )
    xyz = linear @ to_xyz.T
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), xyz * 7.787 + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


# A weave gives (H, W) uint8: how far along the ramp of backdrop colours each pixel lies.


def _gradient(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    corners = Image.fromarray(rng.integers(0, 256, (2, 2), np.uint8))
    return np.asarray(corners.resize((width, height), Image.Resampling.BILINEAR))


def _blotches(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    cell_px = math.sqrt(height * width) / rng.uniform(3, 14)
    return _smooth_noise(rng, max(2, round(height / cell_px)), max(2, round(width / cell_px)), height, width)


def _grain(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    cell_px = rng.uniform(1.5, 4)
    return _smooth_noise(rng, round(height / cell_px) + 1, round(width / cell_px) + 1, height, width)


def _smooth_noise(rng: np.random.Generator, rows: int, columns: int, height: int, width: int) -> ByteArray:
    coarse = np.frombuffer(rng.bytes(rows * columns), np.uint8).reshape(rows, columns)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _stripes(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    phase = _slanted_phase(height, width, rng.uniform(0, math.pi), _draw_period_px(rng, height, width))
    softness = np.float32(rng.uniform(0.5, 6))
    return (np.clip(np.sin(phase) * softness, -1, 1) * np.float32(127) + np.float32(128)).astype(np.uint8)


def _checks(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    angle = rng.uniform(0, math.pi / 2)
    period_px = _draw_period_px(rng, height, width)
    across = np.sin(_slanted_phase(height, width, angle, period_px))
    along = np.sin(_slanted_phase(height, width, angle + math.pi / 2, period_px))
    return np.where(across * along > 0, np.uint8(255), np.uint8(0))


def _draw_period_px(rng: np.random.Generator, height: int, width: int) -> float:
    return math.sqrt(height * width) * math.exp(rng.uniform(math.log(0.03), math.log(0.3)))


def _slanted_phase(height: int, width: int, angle: float, period_px: float) -> FloatArray:
    """Give the phase in radians, (H, W), of a wave that runs along `angle`."""
    step = 2 * math.pi / period_px
    x = np.arange(width, dtype=np.float32) * np.float32(step * math.cos(angle))
    y = np.arange(height, dtype=np.float32) * np.float32(step * math.sin(angle))
    return x + y[:, None]


_WEAVES: tuple[Callable[[np.random.Generator, int, int], ByteArray], ...] = (
    _gradient,
    _gradient,
    _blotches,
    _blotches,
    _grain,
    _stripes,
    _checks,
)


# --- camera --------------------------------------------------------------------------------------------------------


def _degrade(rng: np.random.Generator, image: ByteArray) -> ByteArray:
    """Blur, re-expose, add noise and compress (H, W, 3), each only sometimes and never past naming the colours."""
    if rng.random() < 0.35:
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.3)))
        image = np.asarray(blurred)
    if rng.random() < 0.6:
        image = np.asarray(Image.fromarray(image).point(_exposure_curve(rng).tolist() * 3))
    if rng.random() < 0.5:
        image = _add_noise(rng, image)
    if rng.random() < 0.5:
        image = _through_jpeg(image, int(rng.integers(40, 96)))
    return image


def _exposure_curve(rng: np.random.Generator) -> ByteArray:
    contrast, brightness = rng.uniform(0.85, 1.12), rng.uniform(-14, 14)
    curve = (np.arange(256, dtype=np.float32) - 128) * np.float32(contrast) + np.float32(128 + brightness)
    exposed: ByteArray = np.clip(curve, 0, 255).astype(np.uint8)
    return exposed


def _add_noise(rng: np.random.Generator, image: ByteArray) -> ByteArray:
    # Random bytes cost 0.1 ms where 200 000 normal variates cost 2 ms; uniform noise looks the same to a network.
    amplitude = int(rng.integers(4, 26))
    noise = np.frombuffer(rng.bytes(image.size), np.uint8).astype(np.int16).reshape(image.shape)
    noise = (noise * np.int16(amplitude) >> 7) - np.int16(amplitude)
    noisy: ByteArray = np.clip(image + noise, 0, 255).astype(np.uint8)
    return noisy


def _through_jpeg(image: ByteArray, quality: int) -> ByteArray:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=quality)
    return np.asarray(Image.open(encoded))


# --- prompts -------------------------------------------------------------------------------------------------------

# Each way to write a prompt, with its weight.
PROMPT_CASES: tuple[tuple[Callable[[str], str], float], ...] = (
    (str.lower, 0.8),
    (str.capitalize, 0.08),
    (str.title, 0.05),
    (str.upper, 0.07),
)
_ANY_SHAPE = ("shape", "object")


def draw_prompt(rng: np.random.Generator, scene: Scene, absent_share: float = 0.5) -> ScenePrompt:
    """Draw a prompt for a scene.

    Args:
        rng: The only source of chance.
        scene: Has at least one object.
        absent_share: Probability, in [0, 1], that the prompt names what the scene lacks. Such a prompt is mostly a
            near miss: the colour and the shape are both there, but on different objects.
    """
    draw = _draw_absent if rng.random() < absent_share else _draw_present
    colour, shape = draw(rng, scene)
    return ScenePrompt(render_prompt(rng, colour, shape), match_prompt(colour, shape, scene))


def match_prompt(colour: str | None, shape: str | None, scene: Scene) -> tuple[int, ...]:
    """List the objects of a colour and a shape, as ascending indices into `scene.objects`; None means any."""
    return tuple(
        index
        for index, item in enumerate(scene.objects)
        if colour in (None, item.colour) and shape in (None, item.shape)
    )


def render_prompt(rng: np.random.Generator, colour: str | None, shape: str | None) -> str:
    """Put a colour, a shape or both into words; one of `all_prompt_texts()`.

    Raises:
        ValueError: both are None.
    """
    phrases = _phrases(colour, shape)
    # The first phrase is the plain one: "red circle".
    phrase = phrases[0] if rng.random() < 0.45 else pick(rng, phrases)
    return pick_weighted(rng, PROMPT_CASES)(phrase)


def all_prompt_texts() -> tuple[str, ...]:
    """Every text that `render_prompt` can return, sorted, without duplicates."""
    subjects = [
        (colour, shape) for colour in (None, *COLOURS) for shape in (None, *SHAPES) if colour or shape
    ]
    phrases = [phrase for subject in subjects for phrase in _phrases(*subject)]
    return tuple(sorted({write(phrase) for phrase in phrases for write, _ in PROMPT_CASES}))


@cache
def _phrases(colour: str | None, shape: str | None) -> tuple[str, ...]:
    """Every lower-case wording of a subject, the plainest first."""
    if colour is None and shape is None:
        raise ValueError("a prompt names a colour, a shape or both")
    phrases = [] if shape else [f"{colour}"]
    for noun in (shape,) if shape else _ANY_SHAPE:
        singular, plural = (
            f"{colour} {form}" if colour else form for form in (f"{noun}", _plural(f"{noun}"))
        )
        article = "an" if singular[0] in "aeiou" else "a"
        phrases += [singular, plural, f"{article} {singular}", f"the {singular}", f"the {plural}"]
    return tuple(phrases)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _draw_present(rng: np.random.Generator, scene: Scene) -> tuple[str | None, str | None]:
    item = pick(rng, scene.objects)
    point = rng.random()
    if point < 0.2:
        return item.colour, None
    return (None if point < 0.4 else item.colour), item.shape


def _draw_absent(rng: np.random.Generator, scene: Scene) -> tuple[str | None, str | None]:
    """Draw a (colour, shape) that no object has, near misses first."""
    present = {(item.colour, item.shape) for item in scene.objects}
    colours, shapes = sorted({c for c, _ in present}), sorted({s for _, s in present})
    other_colours = [c for c in COLOURS if c not in colours]
    other_shapes = [s for s in SHAPES if s not in shapes]
    swapped = [(c, s) for c in colours for s in shapes if (c, s) not in present]
    weighted: tuple[tuple[Sequence[tuple[str | None, str | None]], float], ...] = (
        (swapped, 0.7),
        ([(c, s) for c in other_colours for s in shapes], 0.15),
        ([(c, s) for c in colours for s in other_shapes], 0.15),
        ([(c, None) for c in other_colours], 0.08),
        ([(None, s) for s in other_shapes], 0.07),
        ([(c, s) for c in other_colours for s in other_shapes], 0.05),
    )
    groups = [(group, weight) for group, weight in weighted if group]
    return pick(rng, pick_weighted(rng, groups))
