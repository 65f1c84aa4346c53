"""Everything that can be made of the instances found in an image, beside the union of their masks.

Instances are numbered from 1 through all prompts, in order, each prompt's best first; where several lie on one
pixel, a picture shows the one that scored best. Nothing is made, decoded or imported that was not asked for.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from sam3_runner import drawing, palette, rle
from sam3_runner.drawing import Found, Instance, number_map, numbered
from sam3_runner.polygons import to_polygons

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]

_JPEG_QUALITY: Final = 90
_PNG_LEVEL: Final = 1  # of a photo with an alpha channel, level 6 saves 3 % and takes four times as long


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of output.

    Attributes:
        suffix: Of its name, without a dot in front.
        media_type: Of its bytes.
        needs_pixels: Whether the photo itself is in it.
    """

    suffix: str
    media_type: str
    needs_pixels: bool = False

    @property
    def is_document(self) -> bool:
        """Whether it is JSON, which needs no photo and no child process."""
        return self.media_type == "application/json"


KINDS: Final = {
    "instance_map": Kind("instance_map.png", "image/png"),
    "overlay": Kind("overlay.jpg", "image/jpeg", needs_pixels=True),
    "cutout": Kind("cutout.png", "image/png", needs_pixels=True),
    "rle": Kind("rle.json", "application/json"),
    "polygons": Kind("polygons.json", "application/json"),
    "boxes": Kind("boxes.json", "application/json"),
    "coco": Kind("coco.json", "application/json"),
}


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be made.

    Attributes:
        names: Of `KINDS`.
        polygon_tolerance_px: See `polygons.to_polygons`.
        file_name: That the COCO document gives the image.
    """

    names: tuple[str, ...]
    polygon_tolerance_px: float = 1.0
    file_name: str = "image"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.names if name not in KINDS]:
            raise ValueError(f"Expected outputs out of {', '.join(KINDS)}, got {unknown[0]!r}.")
        if not 0 <= self.polygon_tolerance_px < float("inf"):
            raise ValueError(f"Expected a tolerance of 0 or more, got {self.polygon_tolerance_px}.")

    @property
    def needs_pixels(self) -> bool:
        """Whether the photo itself is in any of them."""
        return any(KINDS[name].needs_pixels for name in self.names)


def make_outputs(order: Order, found: Found, size_hw: Size, pixels: Pixels | None = None) -> dict[str, bytes]:
    """Make each output that is ordered.

    Args:
        order: What to make.
        found: Label and instances of each prompt.
        size_hw: Height and width of the upright image.
        pixels: (H, W, 3) RGB, the upright image, if the order needs it.
    Returns:
        By name: the bytes of a file of the output's media type. JSON is UTF-8.
    """
    if pixels is None and order.needs_pixels:
        raise ValueError(f"Expected the photo's pixels for {', '.join(order.names)}.")
    instances = numbered(found, size_hw)
    labels = [label for label, _ in found]
    made = {}
    for name in order.names:
        if name == "instance_map":
            made[name] = instance_map(instances, size_hw)
        elif name in ("overlay", "cutout"):
            assert pixels is not None
            made[name] = overlay(pixels, instances) if name == "overlay" else cutout(pixels, instances)
        else:
            made[name] = _json(_document(name, order, instances, labels, size_hw))
    return made


def _document(
    name: str, order: Order, instances: Sequence[Instance], labels: Sequence[str], size_hw: Size
) -> dict[str, Any]:
    if name == "coco":
        return coco(instances, labels, size_hw, order.file_name)
    if name == "polygons":
        return polygons(instances, size_hw, order.polygon_tolerance_px)
    return rles(instances, size_hw) if name == "rle" else boxes(instances, size_hw)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


# --- pictures -----------------------------------------------------------------------------------------------


def instance_map(instances: Sequence[Instance], size_hw: Size) -> bytes:
    """A PNG whose pixels are instance numbers, 0 where there is none.

    Up to 255 instances it has a palette, 8 bits per pixel, and looks as the overlay's tints; with more it is
    greyscale of 16 bits, which viewers show as black: it is for programs then.
    """
    numbers, _ = number_map(instances, size_hw)
    image = Image.fromarray(numbers)
    if numbers.dtype == np.uint8:
        image.putpalette(palette.colors(len(instances)).tobytes())
    return _png(image)


def overlay(pixels: Pixels, instances: Sequence[Instance]) -> bytes:
    """The photo with its instances in colour, as `drawing.draw_overlay` draws them, as a JPEG."""
    drawn = drawing.draw_overlay(pixels, instances)
    jpeg: bytes = simplejpeg.encode_jpeg(
        drawn, _JPEG_QUALITY, "RGB", "444"
    )  # 420 would smear thin coloured lines
    return jpeg


def cutout(pixels: Pixels, instances: Sequence[Instance]) -> bytes:
    """A PNG of the photo's size with its pixels where any instance is, and transparent black elsewhere."""
    height, width = pixels.shape[:2]
    inside = rle.union([instance.mask for instance in instances], (height, width))
    rgba = np.zeros((height, width, 4), np.uint8)
    np.copyto(rgba[:, :, :3], pixels, where=inside[:, :, None])
    rgba[:, :, 3] = inside.view(np.uint8) * np.uint8(255)
    return _png(Image.fromarray(rgba))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=_PNG_LEVEL)
    return out.getvalue()


# --- documents ----------------------------------------------------------------------------------------------


def rles(instances: Sequence[Instance], size_hw: Size) -> dict[str, Any]:
    """Every mask in COCO's compressed run lengths, as `pycocotools.mask.decode` takes them."""
    return _listed(
        instances,
        size_hw,
        lambda one: {"area_px": rle.area_px(one.mask), "mask_rle": rle.to_coco(one.mask)},
    )


def polygons(instances: Sequence[Instance], size_hw: Size, tolerance_px: float) -> dict[str, Any]:
    """Every mask as a GeoJSON geometry in pixels of the image, see `polygons.to_polygons`."""
    return {
        "tolerance_px": tolerance_px,
        **_listed(
            instances,
            size_hw,
            lambda one: {
                "area_px": rle.area_px(one.mask),
                "geometry": {"type": "MultiPolygon", "coordinates": to_polygons(one.mask, tolerance_px)},
            },
        ),
    }


def boxes(instances: Sequence[Instance], size_hw: Size) -> dict[str, Any]:
    """Every box as the model gave it: left, top, right and bottom edge in pixels."""
    return _listed(
        instances, size_hw, lambda one: {"box_xyxy_px": [round(edge, 2) for edge in one.box_xyxy_px]}
    )


def _listed(
    instances: Sequence[Instance], size_hw: Size, more: Callable[[Instance], dict[str, Any]]
) -> dict[str, Any]:
    height, width = size_hw
    return {
        "image_size": {"width": width, "height": height},
        "instances": [
            {"number": one.number, "label": one.label, "score": _score(one), **more(one)} for one in instances
        ],
    }


def _score(instance: Instance) -> float:
    return round(instance.score, 6)  # float32 has no more


def coco(
    instances: Sequence[Instance], labels: Sequence[str], size_hw: Size, file_name: str
) -> dict[str, Any]:
    """A COCO annotation document of this one image: `pycocotools.coco.COCO` reads it, and `loadRes` its annotations.

    Masks are run lengths, so that `annToMask` gives them to the pixel; `iscrowd` is 0 all the same: each is one
    object, and what trains on COCO drops crowds. `bbox` is the rectangle that the mask fills, of an empty mask the
    model's box. The annotation's id is the instance's number; each label is one category, found or not.
    """
    height, width = size_hw
    ids = {label: index for index, label in enumerate(dict.fromkeys(labels), start=1)}
    return {
        "info": {"description": "Instances found by SAM3 in one image", "version": "1.0"},
        "licenses": [],
        "images": [{"id": 1, "file_name": file_name, "width": width, "height": height}],
        "categories": [
            {"id": index, "name": label, "supercategory": "object"} for label, index in ids.items()
        ],
        "annotations": [
            {
                "id": one.number,
                "image_id": 1,
                "category_id": ids[one.label],
                "segmentation": rle.to_coco(one.mask),
                "area": rle.area_px(one.mask),
                "bbox": _bbox_xywh(one),
                "iscrowd": 0,
                "score": _score(one),
            }
            for one in instances
        ],
    }


def _bbox_xywh(instance: Instance) -> list[float]:
    columns, tops, bottoms = rle.column_intervals(instance.mask)
    if len(columns) == 0:
        x0, y0, x1, y1 = instance.box_xyxy_px
        return [round(edge, 2) for edge in (x0, y0, x1 - x0, y1 - y0)]
    left, top = int(columns[0]), int(tops.min())
    return [left, top, int(columns[-1]) + 1 - left, int(bottoms.max()) - top]
