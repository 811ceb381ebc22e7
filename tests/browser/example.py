"""What the browser is shown, made the same way by the notebooks and by the tests that check the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIDE, UNIT, HEADS = 128, 16, 3
GRID = (SIDE // UNIT,) * 3

NOTEBOOKS = {
    "single": [
        "import smartlab as sl\nfrom tests.browser import example\nscan = example.scan('.')\nheads = example.attention()",
        "viewer = sl.view(scan, window='soft tissue', mask=example.masks()['random'], attention=heads,"
        " reconstruction=example.reconstruction(scan.array), labels=example.labels('.'),"
        " label_names=example.label_names(), title='One crop')\nviewer",
    ],
    "linked": [
        "import smartlab as sl\nfrom tests.browser import example\nscan = example.scan('.')",
        "viewer = sl.viewers.masks.compare(scan, example.masks(), attention=example.attention(),"
        " labels=example.labels('.'), label_names=example.label_names(), window='lung', title='Three strategies')\nviewer",
    ],
    "large": [
        "import time\nimport smartlab as sl\nfrom benchmarks.viewer import large\nimage = large((512, 512, 300))",
        "print('began', time.time())\nviewer = sl.view(image, spacing=(0.8, 0.8, 1.0), title='Large')\nviewer",
    ],
    "dicom": [
        "import os\nimport smartlab as sl\nscan = sl.read_volume(os.environ['SMARTLAB_REAL_DATA'] + '/ct_series/Pancreas-CT-CB_001')",
        "viewer = sl.view(scan, window='liver', title='Pancreas-CT-CB')\nviewer",
    ],
    "explorer": [
        "import smartlab as sl\nfrom tests.browser import example",
        "explorer = example.explorer('.')\nexplorer",
    ],
    "busy": [
        "import time\nimport smartlab as sl\nfrom tests.browser import example\nscan = example.scan('.')",
        "viewer = sl.view(scan, window='soft tissue')\nviewer",
        "time.sleep(30)\nprint('done')",
    ],
    "points": [
        "from smartlab.viewers.embedding import embedding\nfrom tests.browser import example",
        "viewer = embedding(example.points(), example.kinds(), example.crop, names=example.names(), title='UMAP')\nviewer",
    ],
}


def prepare(folder: Path) -> None:
    """One phantom patient below `folder`."""
    import smartlab as sl

    sl.make_phantom("ct", folder / "phantom", n=1, shape=(SIDE,) * 3, spacing=2.5, progress=False)


def scan(folder: str | Path):
    import smartlab as sl

    return sl.read_volume(Path(folder) / "phantom" / "images" / "ct-0000.nii.gz")


def labels(folder: str | Path) -> np.ndarray:
    import nibabel

    image = nibabel.load(Path(folder) / "phantom" / "labels" / "ct-0000.nii.gz")
    return np.asarray(nibabel.as_closest_canonical(image).dataobj).astype(np.uint8)


def label_names() -> dict[int, str]:
    from smartlab.data.phantoms.organs import ORGANS

    pairs = ORGANS.items() if isinstance(ORGANS, dict) else enumerate(ORGANS, 1)
    return {int(v): str(name) for v, name in ((b, a) if isinstance(a, str) else (a, b) for a, b in pairs)}


def explorer(folder: str | Path):
    """On the middle of the phantom, by the encoder that comes with smartlab."""
    import smartlab as sl

    return sl.explore(
        scan(folder),
        labels=labels(folder),
        label_names=label_names(),
        strategy="attention_high",
        seed=1,
        window="lung",
    )


def attention() -> np.ndarray:
    """(heads, d, h, w): a smooth hill in another place for each head."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in GRID], indexing="ij"), -1)
    centres = np.array([[2, 3, 3], [5, 4, 4], [4, 5, 2]])[:HEADS]
    hills = np.stack([np.exp(-((at - c) ** 2).sum(-1) / 6) + 0.05 for c in centres])
    return hills / hills.sum((1, 2, 3), keepdims=True)


def masks() -> dict[str, np.ndarray]:
    rng, mean = np.random.default_rng(5), attention().mean(0)
    k = int(np.ceil(0.7 * mean.size))

    def hide(order: np.ndarray) -> np.ndarray:
        mask = np.zeros(mean.size, bool)
        mask[order[:k]] = True
        return mask.reshape(GRID)

    return {
        "random": hide(rng.permutation(mean.size)),
        "attention_high": hide(np.argsort(-mean.ravel())),
        "attention_low": hide(np.argsort(mean.ravel())),
    }


def reconstruction(array: np.ndarray) -> np.ndarray:
    """The image in blocks of 8, as fractions, as a network would give it."""
    n = SIDE // 8
    small = array.reshape(n, 8, n, 8, n, 8).mean((1, 3, 5))
    return small.repeat(8, 0).repeat(8, 1).repeat(8, 2)


POINTS = 60


def points() -> np.ndarray:
    """(60, 2), no two closer than a tenth of the picture."""
    rng = np.random.default_rng(2)
    places = np.stack(np.meshgrid(np.arange(10), np.arange(6)), -1).reshape(-1, 2) + rng.uniform(
        -0.25, 0.25, (POINTS, 2)
    )
    return places.astype(float)


def kinds() -> list[str]:
    return [("heart", "liver", "lung", "spleen")[i % 4] for i in range(POINTS)]


def names() -> list[str]:
    return [f"case {i:03d}" for i in range(POINTS)]


def crop(number: int) -> np.ndarray:
    """(24, 24, 24) HU, each point's own."""
    rng = np.random.default_rng(number)
    return rng.integers(-150, 230, (24, 24, 24)).astype(np.int16)
