"""A small store of phantoms, made once, and settings under which a step takes a blink."""

from __future__ import annotations

import os

import pytest

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


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """(manifest path, image folder, store folder) of six phantom patients."""
    from smartlab import build_store, make_phantom

    os.environ["SMARTLAB_SALT"] = "tests-only-no-secret"
    root = tmp_path_factory.mktemp("cohort")
    man = make_phantom("ct", root / "images", n=6, shape=(80, 80, 80), spacing=4.0, progress=False)
    build_store(man, root / "images", root / "store", workers=0, spacing=4.0, progress=False)
    return root / "images" / "manifest.json", root / "images", root / "store"


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
    from smartlab import build_store, make_phantom

    os.environ["SMARTLAB_SALT"] = "tests-only-no-secret"
    root = tmp_path_factory.mktemp("flat_cohort")
    man = make_phantom("mammo", root / "images", n=6, shape=(256, 192), spacing=1.0, progress=False)
    build_store(man, root / "images", root / "store", workers=0, spacing=1.0, progress=False)
    return root / "images" / "manifest.json", root / "images", root / "store"


@pytest.fixture
def settings_of(request):
    """Method -> overrides of the tiny preset that train it on a cohort of its kind of image."""

    def choose(method):
        flat = method in ("mae", "miram")
        manifest, images, store = request.getfixturevalue("flat_cohort" if flat else "cohort")
        places = {"data.manifest": str(manifest), "data.root": str(images), "data.store": str(store)}
        return (FLAT if flat else SMALL) | places | {"method.preset": method}

    return choose


@pytest.fixture
def settings(cohort):
    """Overrides of the tiny preset for this cohort."""
    manifest, images, store = cohort
    return SMALL | {"data.manifest": str(manifest), "data.root": str(images), "data.store": str(store)}
