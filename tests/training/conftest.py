"""A small store of phantoms, made once, and settings under which a step takes a blink."""

from __future__ import annotations

import pytest

from tests.shared import once, phantoms

SMALL = {
    "data.spacing": 4.0,
    "data.region": 48,
    "data.view": 32,
    "data.workers": 0,
    "encoder.embed_dim": 8,
    "encoder.num_heads": [1, 2, 2, 2],
    "semantic.heads": 2,
    "distill.hidden": 32,
    "distill.bottleneck": 16,
    "distill.prototypes": 32,
    "train.steps": 8,
    "train.batch": 2,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "train.picture_every": 1000,
    "mask.informativeness": 0.0,
    "mask.warmup_epochs": 0,
}


def places(folder):
    """(manifest path, image folder, store folder) of a cohort made by `phantoms`."""
    return folder / "images" / "manifest.json", folder / "images", folder / "store"


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """The places of six phantom patients, shared by all workers: look, change nothing."""
    make = phantoms("ct", n=6, shape=(80, 80, 80), spacing=4.0)
    return places(once(tmp_path_factory, "ct", make))


FLAT = {  # the same for methods that take images
    "encoder.preset": "vit-tiny",
    "encoder.patch": 4,
    "encoder.embed_dim": 16,
    "encoder.blocks": 2,
    "encoder.heads": 2,
    "data.spacing": 1.0,
    "data.view": 32,
    "data.workers": 0,
    "mae.input": 16,
    "mae.width": 16,
    "mae.heads": 2,
    "mae.depth": 1,
    "mae.landmarks": 8,
    "mae.kernel": 5,
} | {key: value for key, value in SMALL.items() if key.startswith("train.")}


@pytest.fixture(scope="session")
def flat_cohort(tmp_path_factory):
    """The same of six phantom mammography patients."""
    make = phantoms("mammo", n=6, shape=(256, 192), spacing=1.0)
    return places(once(tmp_path_factory, "mammo", make))


@pytest.fixture
def settings_of(request):
    """Method -> overrides of the tiny preset that train it on a cohort of its kind of image."""

    def choose(method):
        flat = method in ("mae", "miram")
        manifest, images, store = request.getfixturevalue("flat_cohort" if flat else "cohort")
        found = {"data.manifest": str(manifest), "data.root": str(images), "data.store": str(store)}
        return (FLAT if flat else SMALL) | found | {"method.preset": method}

    return choose


@pytest.fixture
def settings(cohort):
    """Overrides of the tiny preset for this cohort."""
    manifest, images, store = cohort
    return SMALL | {"data.manifest": str(manifest), "data.root": str(images), "data.store": str(store)}
