"""Read back what a picture of one drawn shape shows, by plain image analysis (no learned model).

`analyse_picture` names the background's colour, the shape's colour, the shape, its size and its
position, in the words of `drawn_shapes`. The colours come first: the background from the
picture's border, the shape's from the depth of whatever differs from it. They give a mask, and the
outline that `drawn_shapes` itself would draw is moved and scaled until it covers the mask best;
shape, size and position are read off the best outline.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from tools.demo.drawn_shapes import (
    COLORS,
    OFFSETS,
    PICTURE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    SUPERSAMPLING,
    _draw_shape,
)

BORDER = 4  # pixels: the frame that shows the background, whatever the shape
# About half of the smallest distance between two colours of the palette (orange and yellow: 90).
FIGURE_DISTANCE = 45.0
SMALLEST_AREA = 80  # pixels; the smallest drawn shape, a small star, covers about 300
# A component this small beside the largest one is a speckle and not a part of the figure.
PART_OF_LARGEST = 0.25
# Drawn shapes fit with an IoU above 0.85, also after a blur of 1.5 pixels.
SMALLEST_FIT = 0.75
RADII = (8, 60)  # pixels: the range in which outlines are tried


@dataclass(frozen=True, kw_only=True)
class PictureReading:
    """What a picture shows, in the words of `drawn_shapes`; None for what was not found.

    Without a figure only the background is named. A figure that no outline fits has a colour and
    a sharpness, but neither shape, size nor position.
    """

    background: str
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    position: str | None = None
    sharpness: float | None = None  # see `sharpness`
    fit: float | None = None  # intersection over union of the figure and the best outline


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """A picture split into background and figure."""

    color: np.ndarray  # [3] float
    coverage: np.ndarray  # [H, W] float: 0 at the background's colour, 1 at the figure's
    mask: np.ndarray  # [H, W] bool


def analyse_picture(pixels: np.ndarray) -> PictureReading:
    """Read one picture, [128, 128, 3] uint8. Raises ValueError for any other array."""
    _check(pixels)
    background = _background_color(pixels)
    figure = _find_figure(pixels, background)
    if figure is None:
        return PictureReading(background=_name_color(background))
    shape, (x, y, radius), fit = _fit_outline(figure.mask)
    found = fit >= SMALLEST_FIT
    size = min(SIZES, key=lambda name: abs(math.log(radius / SIZES[name])))
    middle = (PICTURE_SIZE - 1) / 2  # of the pixels' own coordinates, 0 … 127
    position = _name_position((x - middle) / OFFSETS[size], (y - middle) / OFFSETS[size])
    return PictureReading(
        background=_name_color(background),
        color=_name_color(figure.color),
        shape=shape if found else None,
        size=size if found else None,
        position=position if found else None,
        sharpness=_edge_slope(figure),
        fit=fit,
    )


def sharpness(pixels: np.ndarray) -> float | None:
    """Measure how sharp the figure's edge is; None where there is no figure.

    The median, over the pixels at the figure's outline, of |grad a|, where a is the pixel's colour
    projected onto the line from the background's colour (a = 0) to the figure's (a = 1), and the
    gradient is by central differences. So it is the same for every pair of colours, and in units
    of 1/pixel: about 0.5 for a step, 1 / (s sqrt(2 pi)) for an edge under a Gaussian blur of s
    pixels (0.13 at s = 3). Expects [128, 128, 3] uint8.
    """
    _check(pixels)
    figure = _find_figure(pixels, _background_color(pixels))
    return None if figure is None else _edge_slope(figure)


def _check(pixels: np.ndarray) -> None:
    expected = (PICTURE_SIZE, PICTURE_SIZE, 3)
    if pixels.shape != expected or pixels.dtype != np.uint8:
        raise ValueError(
            f"a picture has shape {list(pixels.shape)} and type {pixels.dtype}: give uint8 of "
            f"shape {list(expected)}, as the demo checkpoint makes them"
        )


# --- colours ------------------------------------------------------------------------------------


def _nearest_colors(colors: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour. [..., 3] to [...]."""
    palette = np.array(list(COLORS.values()), np.float64)
    return ((colors[..., None, :] - palette) ** 2).sum(-1).argmin(-1)


def _name_color(color: np.ndarray) -> str:
    return list(COLORS)[int(_nearest_colors(color))]


def _background_color(pixels: np.ndarray) -> np.ndarray:
    """The colour of the border: the median of those pixels that share the most frequent name."""
    inside = np.s_[BORDER:-BORDER]
    is_border = np.ones(pixels.shape[:2], bool)
    is_border[inside, inside] = False
    border = pixels[is_border].astype(np.float64)  # [N, 3]
    names = _nearest_colors(border)
    most_frequent = np.bincount(names, minlength=len(COLORS)).argmax()
    return np.median(border[names == most_frequent], axis=0)


def _find_figure(pixels: np.ndarray, background: np.ndarray) -> _Figure | None:
    """Separate the figure from the background; None where nothing large enough differs from it."""
    difference = pixels - background  # [H, W, 3]
    differs = np.linalg.norm(difference, axis=-1) > FIGURE_DISTANCE
    # Opening takes away speckles and the threads by which noise joins them.
    rough = _large_components(ndimage.binary_opening(differs, np.ones((3, 3))))
    if rough.sum() < SMALLEST_AREA:
        return None
    # The colour is read in the depth of the figure: its edge mixes into other colours' ranges
    # (red turns to orange on its way to yellow).
    depth = ndimage.distance_transform_edt(rough)
    color = np.median(pixels[depth >= 0.5 * depth.max()], axis=0)
    line = color - background
    coverage = difference @ line / (line @ line)
    mask = _large_components(coverage > 0.5)
    # A second figure of another colour may lie below 0.5 on this line; it must spoil the fit too.
    labels, _ = ndimage.label(rough)
    apart = rough & ~np.isin(labels, labels[mask])
    return _Figure(color=color, coverage=coverage, mask=mask | apart)


def _large_components(mask: np.ndarray) -> np.ndarray:
    """Keep the largest connected component, and those not much smaller."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    areas = np.bincount(labels.ravel())
    areas[0] = 0  # the background
    return (areas >= PART_OF_LARGEST * areas.max())[labels] & mask


def _edge_slope(figure: _Figure) -> float:
    mask = figure.mask
    at_edge = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask, border_value=1)
    slope = np.hypot(*np.gradient(figure.coverage))
    return float(np.median(slope[at_edge]))


# --- outlines -----------------------------------------------------------------------------------


def _name_position(right: float, down: float) -> str:
    """The position whose own place, in units of the size's offset, is nearest."""
    return min(POSITIONS, key=lambda name: math.dist((right, down), POSITIONS[name]))


@functools.cache
def _outline(shape: str, radius: int) -> np.ndarray:
    """A shape as `drawn_shapes` draws it. Returns [2R + 1, 2R + 1] bool, R a little over radius."""
    reach = radius + 2
    side = (2 * reach + 1) * SUPERSAMPLING
    image = Image.new("RGB", (side, side))
    centre = reach + 0.5
    _draw_shape(ImageDraw.Draw(image), shape, centre, centre, radius, (255, 255, 255), (0, 0, 0))
    return np.asarray(image.convert("L").reduce(SUPERSAMPLING)) >= 128


def _fit_outline(mask: np.ndarray) -> tuple[str, tuple[int, int, int], float]:
    """Find the shape, its (x, y, radius) in pixels, and the IoU of the outline that fits best."""
    fits = [(shape, *_fit_shape(mask, shape)) for shape in SHAPES]
    return max(fits, key=lambda fit: fit[2])


def _fit_shape(mask: np.ndarray, shape: str) -> tuple[tuple[int, int, int], float]:
    """Climb from the place and radius that area and centroid suggest to the best IoU nearby."""
    area = int(mask.sum())
    example = _outline(shape, 40)
    example_y, example_x = ndimage.center_of_mass(example)
    scale = math.sqrt(area / example.sum())
    y, x = ndimage.center_of_mass(mask)
    place = (
        round(x - scale * (example_x - example.shape[1] // 2)),
        round(y - scale * (example_y - example.shape[0] // 2)),
        min(max(round(40 * scale), RADII[0]), RADII[1]),
    )
    best = _overlap(mask, area, shape, place)
    # Large steps first: the border may have cut off much of the shape.
    for step in (4, 2, 1):
        improved = True
        while improved:
            improved = False
            for candidate in _neighbours(place, step):
                overlap = _overlap(mask, area, shape, candidate)
                if overlap > best:
                    place, best, improved = candidate, overlap, True
    return place, best


def _neighbours(place: tuple[int, int, int], step: int) -> Iterator[tuple[int, int, int]]:
    x, y, radius = place
    for sign in (-step, step):
        yield x + sign, y, radius
        yield x, y + sign, radius
        if RADII[0] <= radius + sign <= RADII[1]:
            yield x, y, radius + sign


def _overlap(mask: np.ndarray, area: int, shape: str, place: tuple[int, int, int]) -> float:
    """Intersection over union of a mask and an outline, of which the part in the picture counts."""
    x, y, radius = place
    outline = _outline(shape, radius)
    reach = len(outline) // 2
    height, width = mask.shape
    top, left = y - reach, x - reach
    rows = slice(max(top, 0), min(y + reach + 1, height))
    columns = slice(max(left, 0), min(x + reach + 1, width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return 0.0
    visible = outline[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    shared = np.count_nonzero(mask[rows, columns] & visible)
    return float(shared / (area + np.count_nonzero(visible) - shared))
