"""Which file is the outline of a lesion: told by content, because names and descriptions are unreliable.

CBIS-DDSM gives every lesion two images, its outline on the whole mammogram and a cut-out of the lesion.
They lie in one series or two, their descriptions and file names are exchanged for many lesions, and some
have another size than their mammogram. Content tells them apart: an outline has two values only. What
does not fit is refused with what was found; nothing is guessed, and no other lesion's outline is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from smartlab.core.errors import DataError, SmartlabError
from smartlab.data.images.mammography import read_pixels

MOST = 0.5  # share of the image that an outline may cover
SAME = 0.6  # correlation above which a cut-out shows what the outline marks [ours]
_SMALL = 48  # rows of the cut-out when it is looked for


def find_outline(files: Sequence[Path], image: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The outline among `files` -> (mask (rows, columns) bool, remarks), on the mammogram `image`."""
    if not files:
        raise DataError("the outline is not below the data root", fix="run `smartlab data fetch`")
    masks: list[np.ndarray] = []
    crops: list[np.ndarray] = []
    seen: list[str] = []
    for file in files:
        try:
            pixels, _, _ = read_pixels(file)
        except SmartlabError as error:
            seen.append(f"one that {error.problem}")
            continue
        what = "two-valued" if is_outline(pixels) else "grey"
        seen.append(f"a {what} image of {pixels.shape[0]}×{pixels.shape[1]}")
        (masks if what == "two-valued" else crops).append(pixels)
    fitting = [mask for mask in masks if mask.shape == image.shape]
    if len(fitting) != 1 and not _all_equal(fitting):
        raise DataError(
            "no file is the outline of this lesion"
            if not fitting
            else "several files could be the outline of this lesion",
            found=", ".join(seen),
            expected=f"one two-valued image of {image.shape[0]}×{image.shape[1]}",
            fix="check the series in the manifest; the case is left out until then",
        )
    mask = fitting[0] > fitting[0].min()
    if not 0 < mask.mean() < MOST:
        raise DataError("the outline is not one of a lesion", found=f"{mask.mean():.0%} of the image marked")
    remarks = [f"{len(masks) - len(fitting)} two-valued image(s) of another size set aside"]
    remarks = remarks if len(masks) > len(fitting) else []
    for crop in crops:
        if (match := correlation(crop, image, mask)) < SAME:
            remarks.append(
                f"its cut-out shows something else (correlation {match:.2f}); the outline was used"
            )
    return mask, remarks


def is_outline(pixels: np.ndarray) -> bool:
    """Whether an image has exactly two values, whatever they are."""
    low, high = pixels.min(), pixels.max()
    return bool(low < high and ((pixels == low) | (pixels == high)).all())


def _all_equal(masks: list[np.ndarray]) -> bool:
    return bool(masks) and all(np.array_equal(masks[0] > 0, mask > 0) for mask in masks[1:])


def correlation(crop: np.ndarray, image: np.ndarray, mask: np.ndarray) -> float:
    """Best correlation, −1 to 1, of a cut-out with the mammogram around the marked lesion.

    On a coarse grid and after removing the mean, so that neither the window nor a pixel's shift matters.
    """
    from scipy import signal  # slow to import, and needed nowhere else

    step = max(1, min(crop.shape) // _SMALL)
    rows, columns = np.nonzero(mask)
    around = [
        slice(max(0, low - size // 2 - step), high + size // 2 + step + 1)
        for low, high, size in (
            (rows.min(), rows.max(), crop.shape[0]),
            (columns.min(), columns.max(), crop.shape[1]),
        )
    ]
    part, small = (
        ndimage.uniform_filter(x.astype(np.float32), step)[::step, ::step] for x in (image[*around], crop)
    )
    small = small[: part.shape[0], : part.shape[1]]
    small = small - small.mean()
    spread = float(np.sqrt((small**2).sum()))
    if spread == 0:
        return 0.0
    ones = np.ones_like(small)
    cross = signal.fftconvolve(part, small[::-1, ::-1], "valid")
    mean = signal.fftconvolve(part, ones, "valid") / small.size
    square = signal.fftconvolve(part**2, ones, "valid") - small.size * mean**2
    usable = square > 1e-3 * square.max()
    return float((cross[usable] / np.sqrt(square[usable])).max() / spread) if usable.any() else 0.0
