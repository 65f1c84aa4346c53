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
        tolerance_px: No corner that is left out is further than this from the simplified outline.
    """
    columns, tops, bottoms = rle.column_intervals(mask)
    if len(columns) == 0:
        return []
    import shapely  # not for processes that make no polygons

    outline = shapely.union_all(shapely.box(columns, tops, columns + 1, bottoms))
    # Along straight lines there are corners of every column: without a tolerance, those go nevertheless.
    outline = shapely.simplify(outline, tolerance_px, preserve_topology=True)
    return [
        [_ring(polygon.exterior), *(_ring(hole) for hole in polygon.interiors)]
        for polygon in shapely.get_parts(outline)
    ]


def _ring(ring: shapely.LinearRing) -> Ring:
    import shapely

    corners: Ring = shapely.get_coordinates(ring).astype(np.int64).tolist()  # simplified ones are corners too
    return corners
