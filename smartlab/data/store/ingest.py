"""One image of a cohort -> its files in the store and its row of the index.

`ingest` runs in a worker. It reads, resamples, crops, compresses and writes; it never raises for a
bad image but returns the reason, cleaned of everything that identifies. Equal sources and settings
give equal bytes, so a rerun after a kill ends where an uninterrupted run would have.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from smartlab.core.errors import DataError
from smartlab.core.files import write_bytes
from smartlab.data.cohort.files import values_in
from smartlab.data.cohort.privacy import hashed, identifying_words, scrub
from smartlab.data.images.body import BLOCK, body_box, occupancy
from smartlab.data.images.grid import three
from smartlab.data.images.readers import Volume, read_channels, read_volume
from smartlab.data.images.resample import (
    LabelPainter,
    Mask,
    over_channels,
    resample,
    target_grid,
    to_hounsfield,
    uncovered,
)
from smartlab.data.store import flat, index
from smartlab.data.store.request import Failure, FlatSettings, Job, Outcome
from smartlab.data.store.rows import FileRow, ImageRow, LabelRow

# Blocks are what is decompressed, chunks are what is found in one step. 32³ int16 is 64 kB: source and
# result stay in a 512 kB L2 cache, and a 128³ region on the block grid is 64 whole blocks, none
# wasted. 16³ blocks make the file 11% larger and reading 1.8 times slower, 64³ blocks compress no
# better and make it 1.5 times slower. Chunks of 128³ (4 MB, in L3) hold a region in at most eight
# look-ups; smaller or larger ones measured the same.
CHUNKS, BLOCKS = (128,) * 3, (BLOCK,) * 3
FLAT_CHUNKS, FLAT_BLOCKS = (1024, 1024, 1), (128, 128, 1)  # of mammograms: 2 MB and 32 kB
# CT after resampling is smooth plus noise, so codecs that only find repeats fail. Share of the raw
# size and ms per 128³ region on one core, sarcoma CTs at 2 mm: LZ4 + bit shuffle 0.52 and 2.0,
# LZ4HC-9 + bit shuffle 0.48 and 1.9, Zstandard-1 + bit shuffle 0.45 and 3.6, Zstandard-1 + byte
# shuffle + byte delta 0.39 and 3.5 (Huffman codes the differences). Phantoms are written at level 5, one of
# 160³ in 0.07 s; level 8 takes eight times as long for 1% less.
CT_CODEC: dict[str, Any] = {"filters": [blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA], "clevel": 8}
LABEL_CODEC: dict[str, Any] = {"filters": [blosc2.Filter.NOFILTER], "clevel": 5}


def ingest(job: Job, previous: ImageRow | None = None) -> Outcome:
    """Build one image. `previous` is its row from an earlier run: kept when the content is the same."""
    try:
        content = job.content
        made_from = (job.request, content)
        same = previous and (previous["request"], previous["content"]) == made_from
        if previous and same and files_present(job.out, previous):  # copied or touched, not changed
            return _outcome({**previous, "stat": job.stat}, built=False)
        return _outcome(_build(job, content), built=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return Outcome(None, disk_full=True)
        return Outcome(None, (Failure(job.key, None, _reason(job, error)),))
    except MemoryError:
        return Outcome(None, (Failure(job.key, None, "not enough memory for this image; use fewer workers"),))
    except Exception as error:  # whatever one image does, the others go on
        return Outcome(None, (Failure(job.key, None, _reason(job, error)),))


def lost_lesions(row: ImageRow) -> tuple[Failure, ...]:
    """Cases of a stored image whose lesion could not be placed on it."""
    reasons = {case: place for case, place in row["lesions"].items() if isinstance(place, str)}
    return tuple(Failure(row["key"], case, reason) for case, reason in reasons.items())


def _outcome(row: ImageRow, built: bool) -> Outcome:
    return Outcome(row, lost_lesions(row), built)


def _build(job: Job, content: str) -> ImageRow:
    volume = _read(job)
    spacing: tuple[float, ...] = tuple(three(job.settings.spacing).tolist())
    shape, affine = target_grid(volume.shape, volume.affine, spacing)
    array = over_channels(
        lambda one: to_hounsfield(resample(one, volume.affine, shape, affine), one), volume.array
    )
    body = flat.FIND[volume.modality](array, spacing)
    start, stop = body_box(body, shape, spacing) if job.settings.crop_body else (np.zeros(3, int), shape)

    lesions = _place(job, volume)
    found = flat.outlines(job, volume, lesions)
    notes = [*volume.notes, *found.notes]
    lesions |= found.centers | {case: _reason(job, error) for case, error in found.faults.items()}
    masks = [_cut(value, mask, volume.affine) for value, mask in found.masks]
    masks = [*masks, *_masks(job, volume)] if job.settings.labels else []
    start, stop = _include(start, stop, affine, shape, lesions, masks)
    affine[:3, 3] = affine[:3, :3] @ start + affine[:3, 3]
    cut: Any = (..., *(slice(a, b) for a, b in zip(start, stop, strict=True)))
    array = np.ascontiguousarray(array[cut])

    # a changed source or setting gives a new name: a store in use is never written over
    name = f"{job.key}-{hashed(job.salt, 'file', job.request + content)[:12]}"
    stored = write_array(
        job.out, f"volumes/{name}.b2nd", array, CT_CODEC | ({"clevel": 5} if job.phantom else {})
    )
    row: ImageRow = {
        "key": job.key,
        **stored,
        "shape": list(array.shape[-3:]),
        "spacing": list(spacing),
        "affine": [[float(v) for v in line] for line in affine],
        "hu": _histogram(array),
        "body": base64.b64encode(occupancy(body, start, array.shape[-3:]).tobytes()).decode(),
        "body_found": body.found,
        "lesions": lesions,
        "labels": None,
        "source_shape": list(volume.shape),
        "source_spacing": [round(s, 6) for s in volume.spacing],
        "notes": [scrub(note, job.words) for note in notes],
        "content": content,
        "request": job.request,
        "stat": job.stat,
    }
    if volume.scale:
        row["scale"] = volume.scale
    if found.boxes:
        row["boxes"] = found.boxes
    if masks or (job.labels and job.settings.labels):
        row["labels"] = _write_labels(job, name, masks, array.shape[-3:], affine)
    return row


def _read(job: Job) -> Volume:
    if isinstance(job.settings, FlatSettings):
        return flat.read(job)
    how: Any = {"tilt": job.settings.tilt, "modality": getattr(job.settings, "modality", "CT")}
    if job.channels:
        return read_channels([job.path, *job.channels], **how)
    return read_volume(job.path, series=job.series, files=job.files, **how)


# ---- labels and lesions --------------------------------------------------------------------------


def _place(job: Job, volume: Volume) -> dict[str, Any]:
    """Case key -> lesion centre in RAS mm, or the reason why it has none on this scan."""
    placed: dict[str, Any] = {}
    for case, lesion in job.lesions:
        try:
            world = lesion.world(volume)
            placed[case] = [float(v) for v in world]
        except Exception as error:
            placed[case] = _reason(job, error)
    return placed


def _masks(job: Job, volume: Volume) -> Iterable[Mask]:
    """Every structure of every label source, cut to its bounding box: organs, then masks, the
    largest first, so that what is painted last and wins is the small structure inside the large."""
    organs, masks = [], []
    for source in job.labels:
        labels = source.read(volume)
        if source.value is not None:
            masks += [_cut(source.value, labels.array != 0, labels.affine)]
            continue
        values = values_in(labels, job.organs)
        organs += [_cut(value, labels.array == value, labels.affine) for value in values]
    for group in (organs, masks):
        yield from sorted((m for m in group if m[1].size), key=lambda m: (-int(m[1].sum()), m[0]))


def _cut(value: int, mask: np.ndarray, affine: np.ndarray) -> Mask:
    spans = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        spans.append(slice(used[0], used[-1] + 1) if len(used) else slice(0, 0))
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ [s.start for s in spans] + affine[:3, 3]
    return value, mask[tuple(spans)].copy(), moved


def _include(
    start: np.ndarray,
    stop: Any,
    affine: np.ndarray,
    shape: tuple[int, ...],
    lesions: dict[str, Any],
    masks: list[Mask],
) -> tuple[np.ndarray, np.ndarray]:
    """Widen the crop so that it loses no lesion and no labelled voxel, wherever the body was seen."""
    world = [np.array([p]) for p in lesions.values() if not isinstance(p, str)]
    for _, mask, placed in masks:
        corners = np.array(list(np.ndindex(2, 2, 2))) * np.array(mask.shape) - 0.5
        world.append(corners @ placed[:3, :3].T + placed[:3, 3])
    if not world:
        return np.asarray(start), np.asarray(stop)
    inverse = np.linalg.inv(affine)
    index = np.concatenate(world) @ inverse[:3, :3].T + inverse[:3, 3]
    low = np.minimum(start, np.floor(index.min(axis=0)).astype(int))
    high = np.maximum(stop, np.ceil(index.max(axis=0)).astype(int) + 1)
    return np.clip(low, 0, shape), np.clip(high, 0, shape)


def _write_labels(
    job: Job, name: str, masks: list[Mask], shape: tuple[int, ...], affine: np.ndarray
) -> LabelRow:
    painter = LabelPainter(shape, affine)
    for value, mask, placed in uncovered(masks):
        painter.paint(value, mask, placed)
    labels = painter.finish()
    stored = write_array(job.out, f"volumes/{name}.labels.b2nd", labels, LABEL_CODEC)
    counts = np.bincount(labels.ravel(), minlength=256)
    voxels = {str(v): int(counts[v]) for v in np.flatnonzero(counts) if v}
    return {**stored, "voxels": voxels}


def _histogram(array: np.ndarray) -> dict[str, int]:
    """Extremes and percentiles in HU (or what else is stored), exact, from counts."""
    low = int(array.min())
    counts = np.bincount(array.ravel().astype(np.int32) - low)
    share = np.cumsum(counts) / array.size
    wanted = {"p01": 0.01, "p50": 0.5, "p99": 0.99}
    found = {name: low + int(np.searchsorted(share, q)) for name, q in wanted.items()}
    return {"min": low, **found, "max": int(array.max())}


# ---- files ---------------------------------------------------------------------------------------


def write_array(out: Path, file: str, array: np.ndarray, codec: dict[str, Any]) -> FileRow:
    """One contiguous blosc2 frame, written whole or not at all."""
    is_flat, one = array.shape[2:] == (1,), (1,) * (array.ndim - 3)  # every channel in chunks of its own
    frame = blosc2.asarray(
        array,
        chunks=FLAT_CHUNKS if is_flat else one + CHUNKS,
        blocks=FLAT_BLOCKS if is_flat else one + BLOCKS,
        cparams=blosc2.CParams(
            codec=blosc2.Codec.ZSTD, typesize=array.itemsize, nthreads=1, splitmode=SPLIT, **codec
        ),
    ).to_cframe()
    write_bytes(out / file, frame)
    voxels = hashlib.sha256(array.tobytes()).hexdigest()
    return {"file": file, "bytes": len(frame), "crc32": zlib.crc32(frame), "array": voxels}


SPLIT = blosc2.SplitMode.ALWAYS_SPLIT  # low and high bytes have their own Huffman codes: 1% smaller


def files_present(out: Path, row: ImageRow) -> bool:
    """Whether the volumes of a row are there, whole (a rename made them, so size is proof enough)."""
    try:
        return all((out / part["file"]).stat().st_size == part["bytes"] for part in index.parts(row))
    except OSError:
        return False


def _reason(job: Job, error: BaseException) -> str:
    """The error in words that identify nobody: paths, ids, file names and header texts taken out.

    Never raises: this is what keeps one image, whatever is wrong with it, from stopping the others.
    """
    try:
        text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        text = getattr(error, "public", text)  # readers keep header texts out of this form
        words = {*job.words}
        for source, files in job.sources.items():
            words |= {str(source), str(source.resolve()), source.name}
            for file in filter(Path.exists, files):
                words |= {*Path(os.path.relpath(file, source)).parts} - {".."} | identifying_words(file)
        return scrub(text, words, instead="<image>")
    except Exception:  # without the words to take out, only the kind of error may be told
        return f"{type(error).__name__}, on an image whose files cannot be looked through"
