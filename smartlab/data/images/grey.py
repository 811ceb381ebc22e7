"""From stored values to 12-bit grey values: what a mammogram looks like on a reading screen.

The display chain of DICOM: modality LUT, VOI LUT or window, inversion of MONOCHROME1. Without a
usable window, the 0.5th and 99.5th percentile of the breast become black and white; that is noted.

A header that calls a negative a positive is caught by the air around the breast: a large region
at the border that is near white, in an image without any near black, means the polarity is wrong; the
image is inverted and that is noted. No view has that by nature, because air is black.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut
from scipy import ndimage

from smartlab.core.errors import DataError
from smartlab.data.images.body import Body

MODES = ("voi", "percentile", "stored")
WHITE = 4095
PERCENTILES = (0.5, 99.5)  # of the breast [ours]
COARSE_MM = 2.0  # the breast is found on pixels of about this size
_COARSE = 192  # … or on about so many rows, where the size of a pixel is not known
_AIR_SHARE, _DARK_SHARE = 0.2, 0.02  # of the image: near white at the border, near black anywhere


def to_grey(pixels: np.ndarray, header: Dataset, mode: str, path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Stored values (rows, columns) -> uint16, brighter = denser, and what was done beyond the standard."""
    low, high = int(pixels.min()), int(pixels.max())
    if low == high:
        raise DataError(
            "holds the same value everywhere", path=path, found=low, expected="an image", fix="fetch it again"
        )
    inverse = header.get("PhotometricInterpretation") == "MONOCHROME1"
    notes = ["MONOCHROME1 inverted"] if inverse else []
    if mode == "stored":
        return _stored(pixels, header, inverse, path), notes
    padding = _padding(pixels, header)
    grey: np.ndarray | None = None
    if mode == "voi":
        grey, reason = _by_voi(pixels, header)
        if grey is None:
            notes.append(f"{reason}: windowed by percentiles of the breast")
    values = WHITE - grey if grey is not None and inverse else grey
    if values is None:
        values = pixels.astype(np.float32)
        values = -values if inverse else values
        if wrong := _looks_negative(values, padding):  # before the breast is looked for: it would be the air
            values = -values
        values = _by_percentiles(values, padding)
    elif wrong := _is_negative(np.where(padding, 0, values), padding):
        values = WHITE - np.rint(values)
    if wrong:
        notes.append("bright air: the photometric interpretation was wrong, inverted")
    values[padding] = 0
    return np.rint(values).astype(np.uint16), notes


def _stored(pixels: np.ndarray, header: Dataset, inverse: bool, path: str | Path) -> np.ndarray:
    top = (1 << int(header.get("BitsStored", 16))) - 1
    if (pixels.dtype.kind != "u" and int(pixels.min()) < 0) or int(pixels.max()) > 65535:
        raise DataError(
            "stored values do not fit 16 bits without sign",
            path=path,
            found=f"{pixels.min()} to {pixels.max()}",
            fix="read it with grey='voi' or 'percentile'",
        )
    return np.ascontiguousarray(top - pixels.astype(np.int32) if inverse else pixels).astype(np.uint16)


def _padding(pixels: np.ndarray, header: Dataset) -> np.ndarray:
    """Where the detector saw nothing: a value, or a range of values."""
    if (value := header.get("PixelPaddingValue")) is None:
        return np.zeros(pixels.shape, bool)
    limit = header.get("PixelPaddingRangeLimit", value)
    return (pixels >= min(value, limit)) & (pixels <= max(value, limit))


def _by_voi(pixels: np.ndarray, header: Dataset) -> tuple[np.ndarray | None, str]:
    """Grey values by the first VOI LUT or window, float32 0 to 4095, or None and why not."""
    values = apply_modality_lut(pixels, header)
    if header.get("VOILUTSequence"):
        try:
            table, first = _lut(header.VOILUTSequence[0])
        except (AttributeError, TypeError, ValueError, IndexError):
            return None, "unusable VOI LUT in the file"
        place = np.clip(np.rint(values).astype(np.int32) - first, 0, len(table) - 1)
        # the LUT's own white, whatever bits it claims
        grey = table[place].astype(np.float32) * (WHITE / max(1, int(table.max())))
    elif header.get("WindowCenter") is not None and header.get("WindowWidth") is not None:
        center, width = (_first(header[name].value) for name in ("WindowCenter", "WindowWidth"))
        kind = str(header.get("VOILUTFunction") or "LINEAR").upper()
        if not np.isfinite([center, width]).all() or width < 1 or kind not in _FUNCTIONS:
            return None, "unusable window in the file"
        grey = _FUNCTIONS[kind](values.astype(np.float32), center, width)
        grey = np.clip(grey, 0, 1) * WHITE
    else:
        return None, "no window in the file"
    if np.mean((grey > 0) & (grey < WHITE)) < 0.01:
        return None, "the window in the file leaves black and white only"
    return grey, ""


def _lut(item: Dataset) -> tuple[np.ndarray, int]:
    """The entries of a LUT and the value that the first one is for; 8-bit entries may be packed."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries, data = entries or 1 << 16, item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "u1" if bits <= 8 and len(data) < 2 * entries else "<u2")
    table = np.asarray(data)[:entries]
    if len(table) < entries:
        raise ValueError("a LUT with too few entries")
    return table, first


# PS3.3 C.11.2.1: value -> share of white
_FUNCTIONS = {
    "LINEAR": lambda x, c, w: (x - (c - 0.5)) / max(w - 1, 1e-3) + 0.5,
    "LINEAR_EXACT": lambda x, c, w: (x - c) / w + 0.5,
    "SIGMOID": lambda x, c, w: 1 / (1 + np.exp(np.clip(-4 * (x - c) / w, -60, 60))),
}


def _first(value: object) -> float:
    try:
        return float(value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value)  # type: ignore[index, arg-type]
    except (TypeError, ValueError, IndexError):
        return float("nan")


def _by_percentiles(values: np.ndarray, padding: np.ndarray) -> np.ndarray:
    inside = values[~padding] if padding.any() else values
    floor = float(inside.min()) if inside.size else 0.0
    values = np.where(padding, floor, values)
    step = max(1, values.shape[0] // _COARSE)
    breast = find_breast(values, step).mask[:, :, 0]
    sample = values[::step, ::step]
    chosen = sample[breast] if breast.any() else sample
    low, high = np.percentile(chosen, PERCENTILES)
    if high <= low:
        low, high = float(values.min()), float(values.max())
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32) * WHITE


def _is_negative(array: np.ndarray, padding: np.ndarray) -> bool:
    step = max(1, array.shape[0] // _COARSE)
    small, padded = array[::step, ::step], padding[::step, ::step]
    dark = np.mean((small < 0.1 * WHITE) | padded) > _DARK_SHARE
    return not dark and _at_border(small > 0.9 * WHITE) > _AIR_SHARE * small.size


def _looks_negative(values: np.ndarray, padding: np.ndarray) -> bool:
    """The same of values without a window: noise smoothed away, black and white as they come."""
    floor = float(values[~padding].min()) if not padding.all() else 0.0
    small = _share_of_range(np.where(padding, floor, values), max(1, values.shape[0] // _COARSE))
    air = _at_border(small > 0.9)
    return air > _AIR_SHARE * small.size and 2 * int((small < 0.1).sum()) < air


def _at_border(bright: np.ndarray) -> int:
    """Pixels of the largest bright part that touches the border."""
    parts, _ = ndimage.label(bright)
    border = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    sizes = np.bincount(parts.ravel())
    return max((int(sizes[part]) for part in border if part), default=0)


def _share_of_range(values: np.ndarray, step: int) -> np.ndarray:
    """Every `step`th pixel, noise smoothed away, in shares of the range from the 0.1th to the 99.9th percentile."""
    small = ndimage.uniform_filter(values, step)[::step, ::step]
    low, high = np.percentile(small, (0.1, 99.9))
    return (small - low) / max(float(high - low), 1e-6)


def find_breast(grey: np.ndarray, step: int) -> Body:
    """The breast in an image (rows, columns) that is bright where dense: the largest bright part.

    Looks at every `step`th pixel. Bright is above Otsu's threshold between air and tissue (square roots,
    so that fat counts as tissue). The mask has a unit third axis, as the stored image has.
    """
    root = np.sqrt(np.clip(_share_of_range(grey.astype(np.float32), step), 0, 1))
    bright = root > _otsu(root)
    bright = ndimage.binary_opening(bright, iterations=2) if min(bright.shape) > 16 else bright
    parts, count = ndimage.label(bright)
    mask = np.zeros(bright.shape, bool)
    if count:
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        mask = ndimage.binary_fill_holes(parts == sizes.argmax())
    return Body(mask[:, :, None], (step, step, 1))


def _otsu(values: np.ndarray) -> float:
    """The threshold that splits values in [0, 1] with the least variance within the two parts."""
    counts, edges = np.histogram(values, 256, (0, 1))
    middle = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    mass = np.cumsum(counts * middle)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below / total - mass) ** 2 / (below * above)
    return float(middle[int(np.nanargmax(np.where((below > 0) & (above > 0), between, -1)))])


def wall_on_right(breast: Body) -> bool:
    """Whether the chest wall is on the right: there the breast is tall, towards the nipple it is not."""
    columns = np.trim_zeros(breast.mask[:, :, 0].sum(axis=0))
    edge = max(1, len(columns) // 8)
    return bool(columns[-edge:].sum() > columns[:edge].sum())
