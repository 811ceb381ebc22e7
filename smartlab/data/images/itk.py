"""NRRD and MetaImage by SimpleITK, after their text headers have been checked.

What SimpleITK would default without a word is refused, and so is voxel data outside the header's folder.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from smartlab.core.errors import DataError
from smartlab.data.images.grid import LPS_TO_RAS, by, check_size, cut_short

SUFFIXES = (".nrrd", ".nhdr", ".mhd", ".mha")
_USUAL_HEADER, LONGEST_HEADER = 1 << 14, 1 << 20  # bytes of the text header
_SPACES = {
    *("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"),
    *("lps", "ras", "las"),
}


def read(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """NRRD and MetaImage, by SimpleITK."""
    import SimpleITK as sitk

    reader = _reader(path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _error(path, str(error)) from error
    return sitk.GetArrayFromImage(image).T, _affine(image), []


def header(path: Path) -> tuple[tuple[int, ...], Any, np.ndarray, list[str]]:
    """(shape, type of the values, RAS affine in mm, notes) without the voxels."""
    import SimpleITK as sitk

    reader = _reader(path)
    small = reader.GetPixelID() in (sitk.sitkUInt8, sitk.sitkInt8)
    return reader.GetSize(), np.int8 if small else np.int16, _affine(reader), []


def _reader(path: Path) -> Any:
    """SimpleITK's reader of this file, its header read and checked."""
    import SimpleITK as sitk

    _check_text_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _error(path, str(error)) from error
    components, dimension = reader.GetNumberOfComponents(), reader.GetDimension()
    if components != 1 or dimension != 3:
        raise DataError(
            "a colour (RGB) or vector image" if components != 1 else f"a {dimension}D image, not a volume",
            path=path,
            found=by(reader.GetSize(), " × ") + f" voxels of {components} values",
            expected="three axes, one value per voxel",
            fix="give the original scan; split a 4D image into one file per time point",
        )
    bits = re.search(r"(\d+)-bit", sitk.GetPixelIDValueAsString(reader.GetPixelID()))
    check_size(math.prod(reader.GetSize()) * int(bits[1] if bits else 64) / 8, path)
    return reader


def _affine(image: Any) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine


def data_files(path: Path) -> list[Path]:
    """The files beside a NRRD or MetaImage header that hold its voxels; none where they follow the header."""
    return _text_header(path)[1]


def _text_header(path: Path) -> tuple[str, list[Path]]:
    """(header, its data files), every way to name other files refused that SimpleITK would take.

    MetaIO takes any field whose name begins with ElementDataFile, behind "=" or ":"; teem takes "data file" in
    any case. So the field must be there once, in its plain form, before the header ends.
    """
    meta = path.suffix.lower() in (".mhd", ".mha")
    with path.open("rb") as stream:
        raw = stream.read(_USUAL_HEADER)
        ends = re.search(rb"(?i)elementdatafile" if meta else rb"\n\r?\n", raw) and b"LIST" not in raw
        if not ends or path.suffix.lower() == ".mhd":
            raw += stream.read(LONGEST_HEADER)
        more = bool(stream.read(1))
    start = raw.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")
    text, blank, _ = (start, "", "") if meta else start.partition("\n\n")
    named = list(
        re.finditer("ElementDataFile" if meta else r"^[ \t]*data ?file", text, re.IGNORECASE | re.MULTILINE)
    )
    plain = re.compile(r"^ElementDataFile *=(.*)$" if meta else r"^data ?file:(.*)$", re.MULTILINE)
    field = plain.search(text)
    header = text[: field.start()] if field and meta else text
    strange = [line for line in header.splitlines() if meta and line.strip() and not re.search("[=:]", line)]
    if strange or len(named) > 1 or (named and (field is None or field.start() != named[0].start())):
        raise DataError(
            "the header names its voxel data in a way that is not clear",
            path=path,
            found="; ".join(text[one.start() :].splitlines()[0][:60] for one in named) or strange[0][:60],
            expected=f"one line {'ElementDataFile = …' if meta else 'data file: …'}",
            fix="write the header again",
        )
    if more and not (field if meta else blank):
        raise DataError(
            "the header is too long",
            path=path,
            expected=f"its end within {LONGEST_HEADER} bytes",
            fix="fetch it again",
        )
    name = field.group(1).strip() if field else ""
    if field is None or (meta and name in ("LOCAL", "Local", "local")):
        return text, []
    listed = name.split()[:1] == ["LIST"]
    names = [line.strip() for line in text[field.end() :].splitlines() if line.strip()] if listed else [name]
    return text, [file for one in names for file in _beside(path, one)]


def _beside(path: Path, name: str) -> list[Path]:
    """The data files that a header means by a name; links are followed, and none may leave the header's folder."""
    away = Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name
    pattern, *numbers = name.split() or [""]
    files = [] if away else [path.parent / name]
    if not away and "%" in pattern and numbers:  # slices by number: name%03d.raw 1 20 1
        slices = re.compile(re.sub(r"%\d*d", r"\\d+", re.escape(pattern)))
        files = sorted(file for file in path.parent.iterdir() if slices.fullmatch(file.name)) or files
    homes = {
        path.parent.resolve(),
        path.resolve().parent,
    }  # a header that is a link has its data where it leads
    if away or not all(any(file.resolve().is_relative_to(home) for home in homes) for file in files):
        raise DataError(  # it could be any file of the machine
            "the header names voxel data outside its own folder",
            path=path,
            found=name,
            expected="a file beside the header",
            fix="put the data file beside the header and name it there",
        )
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            "the data file of this header is missing",
            path=path,
            expected=str(missing[0]),
            fix="put it beside the header; header and data are moved together",
        )
    return files


def _check_text_header(path: Path) -> None:
    """What SimpleITK would silently default or report obscurely: orientation, spacing, data file."""
    text, _ = _text_header(path)
    meta = path.suffix.lower() in (".mhd", ".mha")
    needed = r"Element(Spacing|Size)\s*=" if meta else r"space directions:"
    line = re.search(rf"^\s*{needed}(.*)$", text, re.MULTILINE)
    if line is None:
        raise DataError(
            "the header stores no voxel spacing" if meta else "the header stores no orientation",
            path=path,
            expected="ElementSpacing" if meta else "space directions",
            fix="write it again from the original scan; defaults are not guessed",
        )
    if re.search(r"\bnan\b", line.group(), re.IGNORECASE):
        raise DataError(
            "zero or NaN voxel spacing", path=path, found=line.group().strip(), fix="correct the header"
        )
    space = re.search(r"^space:\s*(.*?)\s*$", text, re.MULTILINE | re.IGNORECASE)
    flat = re.search(
        r"^space dimension:\s*([0-24-9])", text, re.MULTILINE
    )  # no volume, which is said elsewhere
    if not (meta or flat) and (
        space is None or space[1].lower() not in _SPACES
    ):  # SimpleITK takes any other for LPS
        raise DataError(
            "the header does not say which way is left",
            path=path,
            found=f"space {space[1][:40]}" if space else "no space",
            expected=", ".join(sorted(_SPACES)),
            fix="once you know the orientation, write it into the header",
        )


def _error(path: Path, message: str) -> DataError:
    if "Zero-valued spacing" in message:
        return DataError("zero or NaN voxel spacing", path=path, fix="correct the header")
    if "determinant is 0" in message:
        return DataError("the direction matrix is singular", path=path, fix="correct the header")
    reason = message.strip().splitlines()[-1].split(str(path))[-1].strip(" :")
    if reason.startswith("Reason:"):  # MetaIO gives the last system error, whatever that was
        reason = "header and voxel data do not fit together"
    return cut_short(path, f"SimpleITK: {reason}")
