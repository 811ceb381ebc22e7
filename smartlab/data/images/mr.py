"""MR intensities have no unit: every scan is put on one scale by two of its own percentiles.

0 and 4095 stand for the 0.5th and the 99.5th percentile of what is not background. In between and beyond, to eight
times that range, the map is linear, so that the values of the file can be had back (`Volume.scale`). It starts from
the values as the file has them, floats too, before they become int16: a scan between 0 and 0.001 keeps its 4,096
steps. Background is what lies outside the body and is darker than a tenth of the range; or, where all eight corners
share a value that is not the darkest (z-scored, skull-stripped scans), that value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smartlab.core.errors import DataError
from smartlab.data.images.body import Body, find_body
from smartlab.data.images.grid import check_numbers

WHITE = 4095
NOTE = f"MR: the 0.5th to 99.5th percentile became 0 to {WHITE}"
WINDOW = (0.0, float(WHITE))
PERCENTILES = (0.5, 99.5)  # of what is not background [ours]
DENSE = 410  # on the new scale: a tenth of the range, brighter than air
_SAME = 8  # on the new scale: a constant background stays within this when it is resampled
_RANGE = (2, 98)  # percentiles of the whole scan, between which that tenth is looked for


def normalise(
    values: np.ndarray, spacing: tuple[float, ...], path: str | Path
) -> tuple[np.ndarray, tuple[float, float], list[str]]:
    """A scan (X, Y, Z) of numbers -> int16, the values that became 0 and 4095, and notes."""
    check_numbers(values, path)
    values = values.astype(np.float32, copy=False)
    low, high = np.percentile(_foreground(values, spacing), PERCENTILES).tolist()
    if not low < high:
        raise DataError(
            "holds next to one value only",
            path=path,
            found=f"{low:g} at the 0.5th and the 99.5th percentile",
            expected="an image",
            fix="give the scan itself; masks are named as such",
        )
    scaled = np.rint((values - low) * (WHITE / (high - low)))
    beyond = int((np.abs(scaled) > 32767).sum())
    notes = [NOTE] + ([f"{beyond} voxels beyond eight times that range clipped"] if beyond else [])
    return np.clip(scaled, -32768, 32767).astype(np.int16), (low, high), notes


def find_tissue(array: np.ndarray, spacing: tuple[float, ...]) -> Body:
    """What is not background in a normalised scan (…, X, Y, Z), in any of its channels; as `find_body` finds a body."""
    return find_body(np.stack([_tissue(one) for one in array.reshape(-1, *array.shape[-3:])]), spacing, DENSE)


def _tissue(array: np.ndarray) -> np.ndarray:
    """A channel, or where its background is constant and not dark, as of z-scores, white wherever it differs from that."""
    value = _background(array)
    if value is None or value < DENSE:
        return array
    return np.where(np.abs(array.astype(np.int32) - int(value)) > _SAME, WHITE, 0)


def _background(array: np.ndarray) -> float | None:
    """The value of all eight corners, or None where they differ."""
    corners = np.unique(array[np.ix_(*[(0, n - 1) for n in array.shape])])
    return float(corners[0]) if len(corners) == 1 else None


def _foreground(values: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """The values that are not background, of voxels some 4 mm apart where these must be found; never none."""
    background = _background(values)
    inside = values if background is None else values[values != background]
    if not len(inside) or (background is not None and background > values.min()):
        return inside if len(inside) else values
    low, high = np.percentile(inside, _RANGE).tolist()
    low = low if background is None else background
    body = find_body(values, spacing, low + 0.1 * (high - low))
    every = values[tuple(slice(None, None, n) for n in body.step)]
    return every[body.mask] if body.found else every
