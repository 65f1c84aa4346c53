"""Masks as polygons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sam3_runner import rle
from sam3_runner.types import RunLengthMask

if TYPE_CHECKING:
    import shapely

Ring = list[list[int]]  # of [x, y], the last as the first
MultiPolygon = list[list[Ring]]  # of polygons: the exterior, then the holes


def to_polygons(mask: RunLengthMask, tolerance_px: float) -> MultiPolygon:
    """The outline of a mask, as coordinates of a GeoJSON MultiPolygon.

    Corners lie on the corners of pixels: the polygon of one pixel at (x, y) goes from (x, y) to (x + 1, y + 1), and
    with a tolerance of 0 the polygons cover the mask's pixels and nothing else. Pixels that touch at a corner alone
    belong to different polygons. Whatever the tolerance, the result is valid as OGC has it (rings do not cross,
    polygons do not overlap), and no polygon and no hole is lost.

    Args:
        mask: An empty one has no polygons.
        tolerance_px: Douglas and Peucker's: how far a corner that is left out may lie from the simplified outline;
            where a ring begins, up to twice that.
    """
    import shapely  # not for processes that make no polygons

    inside, (left, top) = rle.decode_tight(mask)
    # Every area that the border encloses, holes too; a fifth of the time that the union of all columns takes.
    areas = shapely.get_parts(shapely.polygonize(shapely.linestrings(rle.outline(mask))))
    x, y = np.floor(shapely.get_coordinates(shapely.point_on_surface(areas))).astype(np.int64).T
    outline = shapely.multipolygons(areas[inside[y - top, x - left]])
    outline = shapely.simplify(outline, tolerance_px, preserve_topology=True)
    return [
        [_ring(polygon.exterior), *(_ring(hole) for hole in polygon.interiors)]
        for polygon in shapely.get_parts(outline)
    ]


def _ring(ring: shapely.LinearRing) -> Ring:
    import shapely

    corners: Ring = shapely.get_coordinates(ring).astype(np.int64).tolist()  # simplified ones are corners too
    return corners
