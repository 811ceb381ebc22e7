"""The methods that the one training loop runs, and what it must know of each.

`method.family` names the method; its encoder's kind of image says what it is fed. A method is a module with `student` (its `encoder` is saved apart), `teacher` (or
None), `forward(views, clock, generator, shares) -> loss, metrics`, `told(clock, momentum)` for further columns
of metrics.csv, and `update_teacher(momentum)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from smartlab.core.config import Config
from smartlab.core.errors import UseError
from smartlab.data.crops.flat import ImageDataset
from smartlab.data.crops.views import CropDataset, ViewDataset
from smartlab.data.images.mr import WINDOW
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.methods.multiscale_mae import MultiscaleMAE
from smartlab.training.picture import reconstruction_picture, scales_picture
from smartlab.training.views import prepare, prepare_images

if TYPE_CHECKING:
    from smartlab.data.store.store import Store


class Family(NamedTuple):
    """What differs between methods, as the loop sees it."""

    method: Callable[[Config], Any]
    dataset: Callable[[Store, Config, list[int], int], CropDataset]  # store, config, images, least items
    prepare: Callable[..., Any]  # a batch -> what the method takes
    picture: Callable[..., Any]  # method, one view, path, title, guided -> PNG
    views: int  # per item


def _scans(store: Store, config: Config, images: list[int], least: int) -> CropDataset:
    d = config.data
    return ViewDataset(
        store,
        region=d.region,
        view=d.view,
        seed=config.seed,
        min_overlap=d.min_overlap,
        draws=max(1, -(-least // max(1, len(images)))),
        images=images,
        labels=bool(store.label_names),
    )


def _images(store: Store, config: Config, images: list[int], least: int) -> CropDataset:
    d = config.data
    dataset = ImageDataset(
        store, view=d.view, crop=d.crop, margin=d.margin, seed=config.seed, flip=d.flip, images=images
    )
    dataset.draws = max(1, -(-least // len(dataset)))
    return dataset


METHODS: dict[str, tuple[Callable[[Config], Any], Callable[..., Any]]] = {
    "masked_distillation": (MaskedDistillation, reconstruction_picture),
    "multiscale_mae": (MultiscaleMAE, scales_picture),
}


def fitted(config: Config, store: Store) -> Config:
    """The configuration for these data: their modality and number of channels, and for MR its own window.

    What was asked for and does not fit them is refused.
    """
    data, encoder, many = config.data, config.encoder, max(1, len(store.channels))
    if "in_channels" in encoder.model_fields_set and encoder.in_channels != many:
        raise UseError(
            f"encoder.in_channels={encoder.in_channels} does not fit the data",
            path=store.path,
            found=", ".join(store.channels) or "one channel",
            fix=f"leave it out, or set encoder.in_channels={many}",
        )
    update: dict[str, Any] = {"modality": store.modality, "channels": tuple(store.channels)}
    if store.modality == "MR":
        if "window" not in data.model_fields_set:
            update["window"] = WINDOW
        elif data.window[0] < 0:
            raise UseError(
                f"data.window={list(data.window)} is one of HU, and these data are MR",
                path=store.path,
                expected="0 for the 0.5th and 4095 for the 99.5th percentile of a scan",
                fix="leave data.window out, or set data.window=[0, 4095]",
            )
    changes = {
        "data": data.model_copy(update=update),
        "encoder": encoder.model_copy(update={"in_channels": many}),
    }
    return config.model_copy(update=changes)


def family_of(config: Config) -> Family:
    method, picture = METHODS[config.method.family]
    if config.flat:
        return Family(method, _images, prepare_images, picture, 1)
    return Family(method, _scans, prepare, picture, 2)
