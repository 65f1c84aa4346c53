"""Every output says what was found to the reader that it is made for."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as pycocotools
from pycocotools.coco import COCO

from sam3_runner import drawing, outputs, palette, rle
from sam3_runner.drawing import Found
from sam3_runner.outputs import KINDS, Order, make_outputs
from sam3_runner.polygons import to_polygons
from tests.sam3_runner.found_instances import disc, many, ring, segmentation

SIZE = (120, 160)
EMPTY = np.zeros(SIZE, bool)
CATS = [disc(SIZE, 60, 40, 25), ring(SIZE, 60, 70, 30)]  # the second lies partly under the first
DOGS = [disc(SIZE, 20, 130, 12)]
FOUND: Found = [
    ("cat", segmentation(CATS, [0.75, 0.5])),
    ("nothing", segmentation([])),
    ("dog", segmentation(DOGS, [0.9])),
]
MASKS = [*CATS, *DOGS]
ANYTHING = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
SMALL_MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(np.bool_, shape))


def photo(size_hw: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)


def made(name: str, found: Found = FOUND, size_hw: tuple[int, int] = SIZE, **order: Any) -> bytes:
    return make_outputs(Order((name,), **order), found, size_hw, photo(size_hw))[name]


def document(name: str, found: Found = FOUND, size_hw: tuple[int, int] = SIZE, **order: Any) -> Any:
    return json.loads(made(name, found, size_hw, **order))


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


class TestOrder:
    def test_what_was_asked_for_is_made_and_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outputs, "coco", None)  # calling it would fail
        assert [*make_outputs(Order(("boxes", "rle")), FOUND, SIZE)] == ["boxes", "rle"]

    @pytest.mark.parametrize("name", KINDS)
    def test_every_kind_can_be_made_where_nothing_was_found(self, name: str) -> None:
        assert made(name, [("cat", segmentation([]))])
        assert made(name, [("cat", segmentation([EMPTY]))])

    @pytest.mark.parametrize("name", KINDS)
    def test_each_is_of_its_media_type(self, name: str) -> None:
        data, media_type = made(name), KINDS[name].media_type
        assert data[:1] == {"image/png": b"\x89", "image/jpeg": b"\xff", "application/json": b"{"}[media_type]

    def test_what_cannot_be_made_is_a_programming_error(self) -> None:
        with pytest.raises(ValueError, match="Expected outputs out of"):
            Order(("drawing",))
        with pytest.raises(ValueError, match="Expected a tolerance"):
            Order(("polygons",), polygon_tolerance_px=-1)
        with pytest.raises(ValueError, match="photo's pixels"):
            make_outputs(Order(("overlay",)), FOUND, SIZE)
        with pytest.raises(ValueError, match="image's size"):
            made("rle", size_hw=(10, 10))


class TestInstanceMap:
    def test_a_pixel_is_the_number_of_the_best_instance_there(self) -> None:
        image = picture(made("instance_map"))
        assert image.mode == "P" and image.size == SIZE[::-1]
        expected = np.zeros(SIZE, int)
        expected[CATS[1]], expected[CATS[0]], expected[DOGS[0]] = 2, 1, 3
        assert np.array_equal(np.asarray(image), expected)

    def test_the_best_is_by_score_not_by_prompt(self) -> None:
        found = [("a", segmentation([CATS[0]], [0.5])), ("b", segmentation([CATS[0]], [0.6]))]
        assert np.asarray(picture(made("instance_map", found)))[60, 40] == 2

    def test_its_palette_is_that_of_the_overlay(self) -> None:
        shown = np.asarray(picture(made("instance_map")).convert("RGB"))
        assert np.array_equal(shown[60, 40], palette.colors(3)[1])
        assert not shown[0, 0].any()

    @pytest.mark.parametrize(("count", "mode"), [(255, "P"), (256, "I;16"), (1000, "I;16")])
    def test_more_than_a_byte_of_instances_are_told_apart_too(self, count: int, mode: str) -> None:
        masks = []
        for index in range(count):
            mask = np.zeros((40, 50), bool)
            mask.flat[index] = True
            masks.append(mask)
        image = picture(made("instance_map", [("dot", segmentation(masks))], (40, 50)))
        assert image.mode == mode
        assert np.array_equal(np.asarray(image).ravel()[:count], np.arange(1, count + 1))


class TestCutout:
    def test_it_is_the_photo_where_anything_is_and_transparent_elsewhere(self) -> None:
        image = picture(made("cutout"))
        assert image.mode == "RGBA" and image.size == SIZE[::-1]
        shown, inside = np.asarray(image), np.any(MASKS, axis=0)
        assert np.array_equal(shown[inside, :3], photo()[inside])
        assert np.array_equal(shown[:, :, 3], inside * 255)
        assert not shown[~inside].any()


class TestRle:
    def test_pycocotools_decodes_every_mask(self) -> None:
        listed = document("rle")["instances"]
        assert [(one["number"], one["label"], one["score"]) for one in listed] == [
            (1, "cat", 0.75),
            (2, "cat", 0.5),
            (3, "dog", 0.9),
        ]
        for one, mask in zip(listed, MASKS, strict=True):
            assert np.array_equal(pycocotools.decode(one["mask_rle"]), mask)
            assert one["area_px"] == mask.sum()


class TestBoxes:
    def test_they_are_the_models(self) -> None:
        told = document("boxes")
        assert told["image_size"] == {"width": 160, "height": 120}
        boxes = [box for _, part in FOUND for box in part.boxes_xyxy_px.tolist()]
        assert [one["box_xyxy_px"] for one in told["instances"]] == boxes


class TestCoco:
    @pytest.fixture
    def coco(self, tmp_path: Path) -> COCO:
        path = tmp_path / "coco.json"
        path.write_bytes(made("coco", file_name="a photo.jpg"))
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(path))

    def test_pycocotools_gives_the_masks_to_the_pixel(self, coco: COCO) -> None:
        found = coco.loadAnns(coco.getAnnIds())
        assert [one["id"] for one in found] == [1, 2, 3]
        for one, mask in zip(found, MASKS, strict=True):
            assert np.array_equal(coco.annToMask(one), mask)
            assert one["area"] == mask.sum() == pycocotools.area(one["segmentation"])
            assert one["bbox"] == pycocotools.toBbox(one["segmentation"]).tolist()

    def test_labels_are_categories_found_or_not(self, coco: COCO) -> None:
        assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == ["cat", "nothing", "dog"]
        assert coco.getAnnIds(catIds=coco.getCatIds(catNms=["dog"])) == [3]
        assert coco.getAnnIds(catIds=coco.getCatIds(catNms=["nothing"])) == []

    def test_its_annotations_can_be_loaded_as_results(self, coco: COCO) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            results = coco.loadRes(coco.loadAnns(coco.getAnnIds()))
        assert [one["score"] for one in results.anns.values()] == [0.75, 0.5, 0.9]
        assert np.array_equal(results.annToMask(results.anns[2]), CATS[1])

    def test_the_image_is_there(self, coco: COCO) -> None:
        (image,) = coco.loadImgs(coco.getImgIds())
        assert image == {"id": 1, "file_name": "a photo.jpg", "width": 160, "height": 120}

    def test_one_label_twice_is_one_category_and_an_empty_mask_has_the_models_box(self) -> None:
        told = document("coco", [("cat", segmentation([EMPTY])), ("cat", segmentation([CATS[0]]))])
        assert [one["id"] for one in told["categories"]] == [1]
        assert [one["category_id"] for one in told["annotations"]] == [1, 1]
        assert told["annotations"][0]["bbox"] == [1, 2, 2, 2] and told["annotations"][0]["area"] == 0


def as_shape(coordinates: list[Any]) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([(rings[0], rings[1:]) for rings in coordinates])


def covered(outline: shapely.MultiPolygon, size_hw: tuple[int, int]) -> np.ndarray:
    """Pixels whose middle is inside."""
    y, x = np.mgrid[: size_hw[0], : size_hw[1]] + 0.5
    found: np.ndarray = shapely.contains_xy(outline, x, y)
    return found


class TestPolygons:
    @ANYTHING
    @given(SMALL_MASKS)
    def test_without_tolerance_they_are_the_mask(self, mask: np.ndarray) -> None:
        outline = as_shape(to_polygons(rle.encode_mask(mask), 0))
        assert outline.is_valid
        assert outline.area == mask.sum()
        assert np.array_equal(covered(outline, mask.shape), mask)

    @ANYTHING
    @given(SMALL_MASKS, st.floats(0, 5))
    def test_whatever_the_tolerance_they_are_valid_and_near(self, mask: np.ndarray, tolerance: float) -> None:
        exact = as_shape(to_polygons(rle.encode_mask(mask), 0))
        outline = as_shape(to_polygons(rle.encode_mask(mask), tolerance))
        assert outline.is_valid
        assert len(outline.geoms) == len(exact.geoms)
        assert sum(len(part.interiors) for part in outline.geoms) == sum(
            len(part.interiors) for part in exact.geoms
        )
        if mask.any():
            assert shapely.hausdorff_distance(outline.boundary, exact.boundary) <= 2 * tolerance + 1e-9

    def test_a_hole_is_a_hole(self) -> None:
        (_, listed, _) = document("polygons")["instances"]
        (polygon,) = listed["geometry"]["coordinates"]
        assert len(polygon) == 2
        outline = as_shape([polygon])
        assert not outline.contains(shapely.Point(70, 60))
        assert abs(outline.area / CATS[1].sum() - 1) < 0.03

    def test_it_is_geojson(self) -> None:
        for one, mask in zip(document("polygons")["instances"], MASKS, strict=True):
            outline = shapely.from_geojson(json.dumps(one["geometry"]))
            assert outline.geom_type == "MultiPolygon" and outline.is_valid
            assert one["area_px"] == mask.sum()

    def test_tolerance_saves_corners_and_stays_close(self) -> None:
        mask = disc((300, 300), 150, 150, 120)
        outlines = [as_shape(to_polygons(rle.encode_mask(mask), tolerance)) for tolerance in (0, 1, 4)]
        corners = [shapely.get_num_coordinates(outline) for outline in outlines]
        assert corners[0] > 4 * corners[1] > 4 * corners[2]
        assert all(abs(outline.area / mask.sum() - 1) < 0.03 for outline in outlines)

    def test_pixels_that_touch_at_a_corner_are_two_polygons(self) -> None:
        outline = as_shape(to_polygons(rle.encode_mask(np.eye(2, dtype=bool)), 0))
        assert (
            outline.normalize()
            == shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(1, 1, 2, 2)]).normalize()
        )


class TestDecodeTight:
    @ANYTHING
    @given(SMALL_MASKS)
    def test_it_is_what_the_mask_fills(self, mask: np.ndarray) -> None:
        inside, (left, top) = rle.decode_tight(rle.encode_mask(mask))
        again = np.zeros_like(mask)
        again[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        assert np.array_equal(again, mask)
        if mask.any():
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        else:
            assert inside.shape == (0, 0)


def test_two_hundred_instances_are_no_more_than_one_is() -> None:
    found = [("dot", many(200, (300, 400), (3, 20), ring))]
    everything = make_outputs(Order(tuple(KINDS)), found, (300, 400), photo((300, 400)))
    assert [*everything] == [*KINDS]
    for name in ("rle", "polygons", "boxes"):
        assert [one["number"] for one in json.loads(everything[name])["instances"]] == [*range(1, 201)]


def test_overlay_is_a_jpeg_of_what_is_drawn() -> None:
    drawn = drawing.draw_overlay(photo(), drawing.numbered(FOUND, SIZE))
    shown = np.asarray(picture(made("overlay")), np.int16)
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < 8  # of noise; another photo would be at 80
