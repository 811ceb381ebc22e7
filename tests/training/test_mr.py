"""MR, several channels and anisotropic voxels, all the way: from phantoms through store and crops to runs and judges."""

from __future__ import annotations

import numpy as np
import papermill
import pytest
import torch

import smartlab as sl
from smartlab.core.errors import UseError
from smartlab.data.crops.views import LesionDataset, ViewDataset
from smartlab.data.images.readers import read_channels
from smartlab.data.images.resample import at_spacing
from smartlab.evaluation.features.baselines import lesion_baselines
from smartlab.evaluation.features.encoders import identity
from smartlab.evaluation.features.features import lesion_features
from smartlab.models.build import make_encoder
from smartlab.training.families import fitted
from smartlab.training.views import prepare
from tests.conftest import REPO
from tests.shared import once, phantoms
from tests.training.conftest import SMALL, places

THREE = {**SMALL, "train.steps": 3, "train.checkpoint_every": 3, "train.picture_every": 3}
METHODS = {
    "simmim": {},
    "dagman": {},
    "smart": {"loss.coarse": 1.0},
    "mae": {"encoder.preset": "primus-tiny", "encoder.embed_dim": 24, "encoder.heads": 2, "encoder.blocks": 2}
    | {"mae.input": 32, "mae.width": 24, "mae.heads": 2, "mae.depth": 1, "mae.scales": [1]},
}


@pytest.fixture(scope="module")
def mr(tmp_path_factory):
    """The places of six phantom patients in two MR contrasts."""
    make = phantoms("mr", n=6, shape=(80, 80, 80), spacing=4.0)
    return places(once(tmp_path_factory, "mr", make))


@pytest.fixture(scope="module")
def given(mr):
    return THREE | dict(zip(("data.manifest", "data.root", "data.store"), map(str, mr), strict=True))


def pretrained(method, given, tmp_path):
    few = {k: v for k, v in given.items() if method != "mae" or not k.startswith(("encoder.", "semantic."))}
    config = sl.load_config("tiny", few | METHODS[method] | {"method.preset": method})
    return sl.pretrain(config, tmp_path / method, progress=False)


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    """Three steps on two channels; look, change nothing."""
    return pretrained("dagman", given, tmp_path_factory.mktemp("runs"))


# ---- what is stored


def test_a_store_of_two_contrasts_holds_each_scan_as_it_is_read(mr):
    manifest, images, store = sl.load_manifest(mr[0]), mr[1], sl.open_store(mr[2])
    assert store.modality == "MR" and store.channels == ("t1", "t2") and len(store) == 6
    paths = [images / path for path in manifest.cases[0].channels.values()]
    volume = read_channels(paths, modality="MR")
    assert store.rows[0]["scale"] == [list(ends) for ends in volume.scale]
    stored = store.array(0)[:]
    assert stored.dtype == np.int16 and stored.shape == (2, *store.shape(0))
    start = np.rint(volume.to_index(store.affine(0)[:3, 3])).astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, store.shape(0), strict=True))
    assert np.array_equal(stored, volume.array[(..., *box)])
    assert not np.array_equal(stored[0], stored[1]) and store.verify() == []


@pytest.mark.parametrize("kind", ["mr", "cohort", "flat_cohort"])
def test_a_store_knows_where_the_body_is(kind, request):
    store = sl.open_store(request.getfixturevalue(kind)[2])
    body, labels = store.body_mask(0), store.labels(0)
    assert body.shape == store.shape(0) and body.dtype == bool and 0.2 < body.mean() < 0.95
    if kind == "flat_cohort":  # nothing is brighter than breast
        assert store.array(0)[:][body].mean() > 10 * store.array(0)[:][~body].mean()
    else:
        assert body[labels[:] > 0].mean() > 0.98 and not body[0, 0].any()


def test_views_are_parts_of_all_channels_and_mirrored_together(mr):
    store = sl.open_store(mr[2])
    item = ViewDataset(store, region=48, view=32, labels=True)[0]
    assert item["views"].shape == (2, 2, 32, 32, 32) and item["view_labels"].shape == (2, 32, 32, 32)
    whole = np.pad(store.array(item["image"])[:], [(0, 0), *[(40, 40)] * 3], constant_values=-1024)
    for view, at in zip(item["views"], item["offsets"] + 40, strict=True):
        assert np.array_equal(view, whole[(..., *(slice(a, a + 32) for a in at))])
    config = sl.load_config("tiny", {"data.flip": True, "data.intensity": 0.0, "data.window": (0, 4095)})
    hu = torch.randint(0, 4095, (4, 2, 1, 64, 64, 64), dtype=torch.int16).expand(-1, -1, 2, -1, -1, -1)
    x, _ = prepare({"views": hu}, config, torch.device("cpu"), torch.Generator().manual_seed(1), (0, 1))
    assert x.shape == hu.shape and torch.equal(x[:, :, 0], x[:, :, 1])
    assert not torch.equal(x, hu.float() / 4095)  # some were mirrored
    lesion = LesionDataset(store, size=16, spacing=(4.0, 2.0, 4.0))[0]
    assert lesion["crop"].shape == (2, 16, 16, 16) and len(np.unique(lesion["crop"])) > 500


# ---- what is trained


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_of_the_papers_train_on_two_channels(method, given, run, tmp_path):
    done = run if method == "dagman" else pretrained(method, given, tmp_path)
    data, losses = done.config.data, done.history.filter(like="loss")
    assert (data.modality, data.window, done.config.encoder.in_channels) == ("MR", (0, 4095), 2)
    assert np.isfinite(losses.loss).all() and len(losses) == 3 and list((done.path / "figures").glob("*.png"))
    stored = sl.open_store(given["data.store"]).array(0)[:]
    found = [done.encoder().features(x)["cls"] for x in (stored, torch.from_numpy(stored[None]).float())]
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("heads", {"views": 1, "draws": 100}),
        ("localize", {"draws": 100}),
        ("unsupervised", {"draws": 100, "folds": 2}),
        ("classify", {"label": "malignancy", "split": "cross", "folds": 2, "steps": 1, "size": 32}),
        pytest.param(
            "segment", {"labels": ["liver"], "split": "cross", "folds": 2, "steps": 1}, marks=pytest.mark.slow
        ),
    ],
)
def test_tasks_take_two_channels(task, more, given, run, tmp_path):
    if task == "segment":  # SwinUNETR has multiples of 12
        run = pretrained("simmim", given | {"encoder.embed_dim": 12}, tmp_path)
    result = sl.evaluate(run, task, out=tmp_path / task, progress=False, **more)
    assert (
        np.isfinite([m.value for m in result.metrics.values()]).any()
        and (tmp_path / task / "figure.png").exists()
    )


def test_a_probe_on_two_channels_names_nothing_hu(run):
    result = sl.evaluate(run, "probe", label="malignancy", split="cross", folds=2, draws=100, progress=False)
    assert "intensity histogram" in " ".join(result.metrics) and "HU" not in " ".join(result.metrics)


def test_units_are_hidden_and_predicted_in_all_channels(run):
    method, x = run.method(), torch.rand(2, 2, 32, 32, 32)
    encoder = method.student.encoder
    hidden = torch.zeros(2, encoder.units((32,) * 3), dtype=torch.bool)
    hidden[:, 0] = True
    changed = x.clone()
    changed[:, :, : encoder.stride, : encoder.stride, : encoder.stride] = 0
    seen, same = (encoder(one, hidden=hidden) for one in (x, changed))
    assert torch.equal(seen.cls, same.cls)
    error = (method.reconstruct(seen.stages[-1]) - x).abs()[
        :, :, : encoder.stride, : encoder.stride, : encoder.stride
    ]
    torch.testing.assert_close(method.predict_voxels(seen, x, hidden), error.mean())


def test_settings_that_do_not_fit_the_data_are_refused(given, tmp_path):
    for change, words in (
        ({"encoder.in_channels": 1}, "in_channels=1 does not fit.*t1, t2"),
        ({"data.window": (-1000, 400)}, "one of HU, and these data are MR"),
    ):
        with pytest.raises(UseError, match=words):
            sl.pretrain(sl.load_config("tiny", given | change), tmp_path / "r", progress=False)
    mine = sl.load_config("tiny", given | {"data.window": (0, 3000), "encoder.in_channels": 2})
    assert fitted(mine, sl.open_store(given["data.store"])).data.window == (0, 3000)


def test_the_window_of_a_preset_is_no_choice_also_where_a_file_extends_it(given, tmp_path):
    store = sl.open_store(given["data.store"])
    for number, (text, window) in enumerate(
        (
            ("extends: tiny", (0, 4095)),
            ("extends: 0.yaml", (0, 4095)),
            ("extends: 0.yaml\ndata.window: [0, 99]", (0, 99)),
        )
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text.replace("0.yaml", str(tmp_path / "0.yaml")) + "\ntrain.lr: 1.0e-4\n")
        assert fitted(sl.load_config(path), store).data.window == window


def test_an_encoder_of_mr_takes_no_ct_nor_one_channel_of_two(given, run, cohort):
    with pytest.raises(UseError, match=r"cannot take phantom-ct.*MR, t1, t2 channels"):
        sl.evaluate(run, "heads", str(cohort[0]), root=str(cohort[1]), progress=False)
    t1 = sl.load_manifest(given["data.manifest"]).cases[0].image
    image = str(given["data.root"]) + "/" + t1
    with pytest.raises(UseError, match="encoder of MR cannot encode CT"):
        run.encoder().features(sl.read_volume(image))
    with pytest.raises(UseError, match="list of paths, one per channel"):
        sl.explore(image, run)


# ---- what is seen


def test_an_encoder_is_bound_to_the_order_of_its_channels(given, run, mr):
    assert run.config.data.channels == ("t1", "t2")
    other = sl.load_manifest(mr[0])
    for case in other.cases:
        case.channels = dict(reversed(case.channels.items()))
    with pytest.raises(UseError, match=r"found MR, channels t2, t1; expected MR, t1, t2 channels"):
        sl.evaluate(run, "probe", other, root=mr[1], label="malignancy", progress=False)


def test_what_there_is_for_mr_changes_no_name_of_ct():
    """Caches and fine-tunings of before go by it."""
    encoder = make_encoder(sl.load_config("tiny"))
    name = identity(encoder)
    encoder.config = encoder.config.model_copy(
        update={"data": encoder.config.data.model_copy(update={"modality": "MR"})}
    )
    assert identity(encoder) != name
    about = encoder.config.model_dump(mode="json")["data"]
    assert {"modality", "channels"} <= set(about)


def test_viewers_show_one_channel_say_which_and_call_nothing_hu(given, run, tmp_path):
    store = sl.open_store(given["data.store"])
    explorer = sl.explore(store, run, case=0, channel=1, size=32)
    scene, whole = explorer.viewer.scene, explorer.subject
    assert explorer.view.input.shape == (1, 2, 32, 32, 32) and whole.shown == "t2, channel 2 of 2"
    assert scene.value_name == "MR" and scene.layers[0].note == whole.shown
    shown = np.clip(explorer.view.input[0, 1].numpy() * 4095, 0, 4095)
    assert np.abs(shown - explorer.view.image).max() < 1
    assert "HU" not in explorer.save_html(tmp_path / "page.html").read_text("utf-8").partition("<script")[0]
    paths = list(sl.load_manifest(given["data.manifest"]).cases[0].channels.values())
    files = [f"{given['data.root']}/{path}" for path in paths]
    assert sl.explore(files, run, size=32).view.input.shape == (1, 2, 32, 32, 32)
    viewer = sl.view(read_channels(files, modality="MR"), channel=1)
    assert tuple(viewer.window) == (0, 4095) and viewer.scene.notes == ["channel 2 of 2 is shown"]
    viewer.figure()


# ---- voxels that are no cubes


def test_anisotropic_voxels_go_through_store_crops_features_and_viewer(cohort, tmp_path):
    manifest, images, _ = cohort
    mm, out = (3.0, 4.0, 6.0), tmp_path / "store"
    where = {"data.manifest": str(manifest), "data.root": str(images), "data.store": str(out)}
    config = sl.load_config("tiny", THREE | where | {"data.spacing": mm, "method.preset": "simmim"})
    run = sl.pretrain(config, tmp_path / "r", progress=False)
    store = sl.open_store(out)
    assert store.spacing == [3.0, 4.0, 6.0] and run.config.data.spacing == mm
    assert np.allclose(np.linalg.norm(store.affine(0)[:3, :3], axis=0), mm)
    volume = sl.read_volume(images / sl.load_manifest(manifest).cases[0].image)
    array, affine = at_spacing(volume.array, volume.affine, mm)
    np.clip(array, volume.array.min(), volume.array.max(), out=array)
    start = np.rint(np.linalg.inv(affine) @ store.affine(0))[:3, 3].astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, store.shape(0), strict=True))
    assert np.abs(store.array(0)[:] - array[box]).max() <= 0.5  # in place, and rounded
    crop = LesionDataset(store, size=16)[0]
    index = np.linalg.inv(crop["affine"]) @ [*crop["center_mm"], 1]
    assert np.abs(index[:3] - 7.5).max() <= 0.5  # the lesion is in the middle
    cubes = LesionDataset(store, size=16, spacing=3.0)[0]
    assert np.allclose(np.linalg.norm(cubes["affine"][:3, :3], axis=0), 3.0)
    encoder = run.encoder()
    features = encoder.features(volume)
    assert features["grid"] == tuple(
        -(-n // encoder.total) * (encoder.total // encoder.stride) for n in array.shape
    )
    assert len(lesion_features(encoder, store, manifest, progress=False, cache=False).x) == len(
        LesionDataset(store)
    )
    sizes = lesion_baselines(store, manifest, progress=False)["size"].x
    assert np.allclose(sizes[:, 0], sizes[:, 2], rtol=0.5)  # by the mask, and as drawn
    explorer = sl.explore(volume, run, size=32)
    assert explorer.viewer.scene.spacing == pytest.approx(mm)
    with pytest.raises(UseError, match="another spacing"):
        sl.pretrain(sl.load_config("tiny", THREE | where), tmp_path / "other", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["01_data", "03_masks_and_attention", "05_organ_clusters", "07_localize"])
def test_an_ordered_notebook_shows_mr_of_several_channels(stem, mr, run, tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    given = {"data": str(mr[0]), "root": str(mr[1]), "workers": 0, "out": str(tmp_path / "out")}
    given |= {"spacing": 4.0, "region": 48, "view": 32} if stem == "01_data" else {"encoder": str(run.path)}
    notebook = REPO / "notebooks" / f"{stem}.ipynb"
    papermill.execute_notebook(notebook, tmp_path / "done.ipynb", given, progress_bar=False, cwd=tmp_path)
    assert "4095 HU" not in (tmp_path / "done.ipynb").read_text(encoding="utf-8")
    assert len([*(tmp_path / "out" / "figures").glob("*.png")]) >= 2
