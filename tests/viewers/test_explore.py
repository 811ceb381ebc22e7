"""The mask explorer without a browser: what it shows are the arrays of the library, and nothing is computed twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import smartlab as sl
from smartlab.core.config import parse_overrides
from smartlab.core.places import default_encoder
from smartlab.data.crops.augment import window
from smartlab.data.crops.regions import is_lesion
from smartlab.data.images.resample import at_spacing
from smartlab.masking import STRATEGIES, head_diversity, informativeness, make_mask
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.methods.multiscale_mae import MultiscaleMAE
from smartlab.models.encoder import dropped_patches
from smartlab.training import checkpoint
from smartlab.viewers.subject import Model, subject_of
from tests.shared import once, phantoms

LUNG = {"data.view": 64, "data.region": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two phantoms at 2.5 mm, and their store at 2 mm."""
    return once(tmp_path_factory, "explore", phantoms("ct", n=2, shape=(96, 96, 96), spacing=2.5))


@pytest.fixture(scope="module")
def store(folder):
    return sl.open_store(folder / "store")


@pytest.fixture
def explorer(store):
    return sl.explore(store, strategy="attention_high", seed=3)


def run_of(config, method, path):
    """A run folder with untrained weights."""
    path.mkdir()
    config.save(path / "config.yaml")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.save(path, 1, method(config).state_dict(), {}, {})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = sl.load_config("tiny", LUNG | {"data.spacing": 2.5})
    return run_of(config, MaskedDistillation, tmp_path_factory.mktemp("runs") / "a")


def attention_of(explorer):
    """By the encoder alone, from the array that is shown."""
    encoder = sl.load_encoder(default_encoder())
    image = torch.from_numpy(explorer.view.image.astype(np.float32))
    with torch.no_grad():
        return encoder(window(image[None, None], *encoder.config.data.window), received=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_mask_is_that_of_make_mask_with_the_same_seed(explorer, strategy):
    explorer.set(strategy=strategy, ratio=0.4, hint=0.3, temperature=0.5, seed=7)
    how = {"hint": 0.3, "temperature": 0.5, "hint_from": explorer.model.config.mask.hint_from}
    seen = attention_of(explorer)
    expected = make_mask(
        strategy, seen.importance, 0.4, (8, 8, 8), generator=torch.Generator().manual_seed(7), **how
    )
    assert np.array_equal(explorer.mask.ravel(), expected[0].numpy())
    assert np.array_equal(explorer.viewer.scene.layers[0].mask, explorer.mask)


@pytest.mark.parametrize("importance", ["received", "head 2"])
def test_masks_follow_one_head_or_received_attention_where_asked(explorer, importance):
    explorer.set(importance=importance)
    seen = attention_of(explorer)
    followed = seen.received if importance == "received" else seen.attention[:, 1]
    expected = make_mask(
        "attention_high", followed, 0.7, (8, 8, 8), generator=torch.Generator().manual_seed(3)
    )
    assert np.array_equal(explorer.mask.ravel(), expected[0].numpy())


def test_the_noisy_teacher_misses_what_the_seed_says(explorer):
    clean = explorer.attention
    explorer.set(guide="noisy", dropout=0.6, draw=5)
    x = explorer.view.input
    dropped = dropped_patches(explorer.model.encoder, x, 0.6, torch.Generator().manual_seed(5))
    with torch.no_grad():
        noisy = explorer.model.encoder(x, dropped=dropped).importance[0].unflatten(-1, (8, 8, 8))
    np.testing.assert_allclose(explorer.attention, noisy, rtol=1e-5)
    assert np.abs(explorer.attention - clean).max() > 1e-4
    assert explorer.set(guide="clean").attention is not None and np.array_equal(explorer.attention, clean)


def test_the_numbers_are_counted_voxels(explorer):
    explorer.set(against="random", ratio=0.6)
    voxels = explorer.mask.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    names, labels = explorer.subject.names, explorer.view.labels
    nodules = np.isin(labels, [v for v, name in names.items() if is_lesion(name)])
    organs = (labels > 0) & ~nodules
    found = explorer.numbers
    for region, where in {"body": explorer.view.image > -500, "organ": organs, "lesion": nodules}.items():
        assert found["hidden"]["attention_high"][region] == pytest.approx(voxels[where].mean(), abs=1e-6), (
            region
        )
    first, second = explorer.masks.values()
    assert found["overlap"] == pytest.approx((first & second).sum() / first.sum())
    assert found["chance"] == pytest.approx(first.mean()) == pytest.approx(found["overlap_chance"])
    seen = attention_of(explorer).attention
    assert found["informativeness"] == pytest.approx(float(informativeness(seen)), rel=1e-4)
    assert found["head_diversity"] == pytest.approx(float(head_diversity(seen)["cosine"]), rel=1e-4)
    assert f"{found['hidden']['attention_high']['lesion']:.0%}" in explorer._table.value


def test_attention_is_computed_once_per_crop_and_draw_of_noise(explorer, monkeypatch):
    looks = []
    forward = type(explorer.model.encoder).forward
    monkeypatch.setattr(
        type(explorer.model.encoder), "forward", lambda *a, **k: looks.append(1) or forward(*a, **k)
    )
    for seed in range(5):
        explorer.set(
            seed=seed, ratio=0.3 + seed / 10, strategy=STRATEGIES[seed], against="random" if seed % 2 else ""
        )
    assert not looks
    for draw in (1, 2, 1, 2):
        for importance in ("mean", "received", "head 3"):
            explorer.set(guide="noisy", draw=draw, strategy="attention_high", importance=importance)
    assert len(looks) == 2


def test_only_mask_bits_travel(explorer, monkeypatch):
    sent = []
    monkeypatch.setattr(
        type(explorer.viewer), "send", lambda self, content, buffers=(): sent.append((content, buffers))
    )
    explorer.set(ratio=0.5)
    assert len(sent) == 1 and sum(len(str(c)) + sum(map(len, b)) for c, b in sent) < 1000


def test_a_moved_crop_travels_without_the_voxels_that_are_there(explorer, monkeypatch):
    """Where it begins, what its units hide and get of attention; the page cuts it out of the whole scan."""
    sent = []
    monkeypatch.setattr(explorer.viewer, "send", lambda content, buffers=(): sent.append((content, buffers)))
    explorer.set(against="random")
    sent.clear()
    explorer.viewer.picked = [40, 20, 30]
    ((content, buffers),) = sent
    assert {part["name"] for part in content["arrays"]} == {"mask0", "mask1", "attention0", "attention1"}
    assert len(str(content)) + sum(map(len, buffers)) < 30_000
    box = tuple(slice(a, a + 64) for a in content["moved"]["start"])
    whole, crop = explorer.viewer._around.scene, explorer.viewer.scene
    assert np.array_equal(whole.image.values()[box], crop.image.values())
    assert np.array_equal(whole.labels[box], crop.labels)
    assert np.array_equal(crop.image.values(), explorer.view.image), "and it is what the model sees"


def test_cursor_window_and_zoom_stay(explorer):
    viewer = explorer.viewer
    viewer.cursor, viewer.window = [3, 4, 5], [-900.0, 100.0]
    explorer.set(ratio=0.5, strategy="block", guide="noisy")
    assert explorer.viewer is viewer and (viewer.cursor, viewer.window) == ([3, 4, 5], [-900.0, 100.0])
    assert viewer.only == [0] and viewer.plane == "all"
    explorer.set(against="random")
    assert explorer.viewer is viewer and (viewer.cursor, viewer.window) == ([3, 4, 5], [-900.0, 100.0])
    assert [panel["title"] for panel in viewer.meta["panels"]] == ["block", "random"]
    assert viewer.only == [] and viewer.plane == "axial"


def test_the_same_scan_is_explored_however_it_is_given(folder):
    path = sorted((folder / "images" / "images").glob("*.nii.gz"))[0]
    volume, encoder = sl.read_volume(path), sl.load_encoder(default_encoder())
    views = [sl.explore(given, encoder).view for given in (path, str(path), volume)]
    assert all(np.array_equal(views[0].image, view.image) for view in views)
    whole = at_spacing(volume.array, volume.affine, encoder.config.data.spacing)[0]
    array = sl.explore(whole, encoder, center=subject_of(volume, 2.0, False).center).view
    assert np.abs(array.image.astype(int) - views[0].image).max() <= 1
    corner = volume.to_index(views[0].affine[:3, 3])
    assert np.abs(np.linalg.norm(views[0].affine[:3, :3], axis=0) - 2.0).max() < 1e-6
    assert (corner > -1).all() and (corner < np.array(volume.shape)).all()


def test_labels_move_with_their_scan(folder):
    scan, told = (sorted((folder / "images" / kind).glob("*.nii.gz"))[0] for kind in ("images", "labels"))
    subject = subject_of(scan, 2.0, False, labels=told)
    volume, labels = sl.read_volume(scan), sl.read_labels(told)
    value = int(np.bincount(labels.array.ravel())[1:].argmax()) + 1
    middles = [
        where.to_world(np.argwhere(array == value).mean(0))
        for where, array in (
            (volume, labels.array),
            (sl.Volume(subject.array, subject.affine), subject.labels),
        )
    ]
    assert np.abs(middles[0] - middles[1]).max() < 1.0
    with pytest.raises(sl.UseError, match="labels do not lie where the scan lies"):
        subject_of(scan, 2.0, False, labels=labels.array[:-1])


def test_it_begins_at_the_lesion_and_a_double_click_moves_it(store, explorer):
    def place(voxel):
        return explorer.view.affine[:3, :3] @ voxel + explorer.view.affine[:3, 3]

    row = store.cases[store.cases.center_mm.notna()].iloc[0]
    inside = store.labels(int(row.image))
    assert np.abs(place(np.full(3, 31.5)) - row.center_mm).max() < 64, "the lesion is in the view"
    assert inside is not None
    world, before = place(np.array([40, 20, 30])), explorer.viewer
    explorer.viewer.picked = [40, 20, 30]
    assert explorer.viewer is before, "with its window, its zoom and its overlays"
    assert np.abs(place(np.array(explorer.viewer.cursor)) - world).max() < 0.1, (
        "the cursor stays where it was"
    )
    inner = np.linalg.inv(explorer.view.affine) @ [*world, 1]
    shape = np.array(explorer.subject.array.shape)
    free = (explorer.center >= 32) & (explorer.center <= shape - 32)
    assert np.abs(inner[:3] - 32)[free].max(initial=0) < 0.51


def test_the_whole_scan_shows_where_the_view_is_and_moves_it(explorer):
    assert explorer._map is None, "nothing is sent before somebody opens it"
    explorer._where.selected_index = 0
    shape = explorer.subject.array.shape
    for voxel in ([40, 40, 40], [n // 2 for n in shape]):
        explorer._map.picked = voxel
        assert explorer.center.tolist() == voxel
        place = explorer._map.scene.layers[0].mask
        inside = np.argwhere(place)
        start = np.clip(np.array(voxel) - 32, 0, np.array(shape) - 64)
        assert (inside.min(0) == start // 8).all() and (inside.max(0) == (start + 63) // 8).all()


def test_settings_are_words_that_pretrain_takes(explorer):
    explorer.set(
        strategy="attention_hint", ratio=0.55, hint=0.2, guide="noisy", dropout=0.4, importance="received"
    )
    config = sl.load_config("tiny", parse_overrides(explorer.settings))
    assert (config.mask.strategy, config.mask.ratio, config.mask.hint) == ("attention_hint", 0.55, 0.2)
    assert (config.teacher.guide, config.teacher.patch_dropout, config.mask.importance) == (
        "noisy",
        0.4,
        "received",
    )
    trained = explorer.model.config
    assert config.mask.hint_from == trained.mask.hint_from != sl.load_config("tiny").mask.hint_from
    assert config.teacher.dropout_unit == trained.teacher.dropout_unit
    assert explorer._copy.text.split() == explorer.settings
    explorer.set(importance="head 1")
    with pytest.raises(sl.UseError, match="not one head"):
        _ = explorer.settings
    assert not explorer._copy.text and "not one head" in explorer._copy.why
    assert explorer.set(strategy="random").settings == ["mask.strategy=random", "mask.ratio=0.55"]


def test_a_run_shows_what_its_student_fills_in(run, folder):
    explorer = sl.explore(
        sl.open_store(folder / "store"), run, shown="reconstruction", strategy="random", size=64
    )
    method = sl.Run(run).method()
    for ratio in (0.3, 0.6):
        explorer.set(ratio=ratio)
        layer = explorer.viewer.scene.layers[0]
        hidden = explorer.mask.repeat(8, 0).repeat(8, 1).repeat(8, 2)
        with torch.no_grad():
            seen = method.student.encoder(
                explorer.view.input, hidden=torch.from_numpy(explorer.mask.reshape(1, -1))
            )
            guess = method.reconstruct(seen.stages[-1])[0, 0].numpy() * 1400 - 1000
        assert np.array_equal(layer.reconstruction.values()[~hidden], explorer.view.image[~hidden])
        assert np.abs(layer.reconstruction.values()[hidden] - guess[hidden]).max() <= 1


def test_a_reconstruction_nobody_looks_at_is_not_computed(run, store, monkeypatch):
    explorer = sl.explore(store, run, shown="tint", strategy="random")
    calls = []
    rebuild = Model.rebuild
    monkeypatch.setattr(Model, "rebuild", lambda *a: calls.append(1) or rebuild(*a))
    explorer.set(seed=1)
    assert not calls
    explorer.viewer.shown = ["error"]  # by the viewer's own button
    assert len(calls) == 1
    explorer.set(seed=2)
    assert len(calls) == 2
    explorer.viewer.shown = ["reconstruction"]  # of the same mask
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["mae", "dagman"])
def test_a_vision_transformer_of_scans(method, tmp_path):
    """Its own [CLS] guides masks; what is hidden is filled in by its decoder, or by the student."""
    more = {"data.view": 32, "data.region": 32, "mae.input": 32, "data.spacing": 2.5, "method.preset": method}
    config = sl.load_config("primus-tiny", more)
    run = run_of(config, MultiscaleMAE if method == "mae" else MaskedDistillation, tmp_path / "run")
    scan = np.random.default_rng(0).normal(-500, 300, (60, 60, 60)).round()
    explorer = sl.explore(
        scan, run, strategy="attention_high", against="random", shown="reconstruction", size=32
    )
    assert explorer.mask.shape == (4, 4, 4) and explorer.attention.shape == (4, 4, 4, 4)
    top = (
        explorer.attention.mean(0).ravel()
        >= np.sort(explorer.attention.mean(0).ravel())[-explorer.mask.sum()]
    )
    assert np.array_equal(top, explorer.mask.ravel())
    hidden = explorer.mask.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    guess = explorer.viewer.scene.layers[0].reconstruction.values()
    assert (guess == explorer.view.image)[~hidden].all() and (guess != explorer.view.image)[
        hidden
    ].mean() > 0.5
    explorer.set(importance="received")
    assert explorer.mask.sum() == int(hidden.sum()) // 512


def test_mammograms_in_one_plane(tmp_path):
    sl.make_phantom("mammo", tmp_path / "images", n=1, shape=(400, 320), spacing=0.5, progress=False)
    path = sorted((tmp_path / "images").rglob("*.dcm"))[0]
    config = sl.load_config("miram-tiny")
    run = run_of(config, MultiscaleMAE, tmp_path / "run")
    explorer = sl.explore(path, run, strategy="block", against="attention_high", shown="reconstruction")
    assert explorer.view.image.shape == (128, 128) and explorer.mask.shape == (8, 8)
    hidden = explorer.mask.repeat(16, 0).repeat(16, 1)
    guess = explorer.viewer.scene.layers[0].reconstruction.values()[..., 0].T[::-1, ::-1]
    assert (
        np.array_equal(guess[~hidden], explorer.view.image[~hidden])
        and (guess != explorer.view.image)[hidden].mean() > 0.5
    )
    assert set(explorer.numbers["hidden"]["block"]) >= {"breast"}
    assert explorer.settings == ["mask.strategy=block", "mask.ratio=0.75", "mask.p_attention=1"]
    explorer.set(strategy="attention_high", against="")
    with pytest.raises(sl.UseError, match="needs a teacher"):
        _ = explorer.settings
    world, shape = explorer.view.affine @ [100, 60, 0, 1], np.array(explorer.subject.array.shape)
    explorer.viewer.picked = [127 - 60, 127 - 100, 0]  # column 60, row 100 of the view
    free = ((explorer.center >= 64) & (explorer.center <= shape - 64))[:2]
    assert free.any()
    assert np.abs((np.linalg.inv(explorer.view.affine) @ world)[:2] - 64)[free].max() < 0.51
    explorer._where.selected_index = 0
    explorer._map.picked = [shape[1] - 1 - 90, shape[0] - 1 - 120, 0]
    assert explorer.center.tolist() == [120, 90, 0]
    with pytest.raises(sl.UseError, match="one of mammograms"):
        sl.explore(sl.Volume(np.zeros((80, 80, 80), np.int16), np.eye(4)), run)
    with pytest.raises(sl.UseError, match=r"one of CT.*run of mammograms"):
        sl.explore(sl.read_mammogram(path))


def test_what_cannot_be_is_said_at_once(store, tmp_path):
    for wrong, said in (
        ({"stratgy": "block"}, "unknown setting 'stratgy'"),
        ({"strategy": "atention"}, "strategy='atention'"),
        ({"ratio": 1.2}, "ratio=1.2"),
        ({"importance": "head 9"}, "importance='head 9'"),
        ({"shown": "reconstruction"}, "shown='reconstruction'"),
        ({"size": 40}, "size=40"),
        ({"case": "nobody"}, "no case 'nobody'"),
    ):
        with pytest.raises(sl.UseError, match=said):
            sl.explore(store, **wrong)
    with pytest.raises(sl.DataError, match="no-such-scan"):
        sl.explore(tmp_path / "no-such-scan.nii.gz")
    with pytest.raises(sl.UseError, match="cannot explore this"):
        sl.explore(np.zeros((4, 4), np.int16))


def test_without_semantic_attention_only_what_needs_none_is_offered(store, tmp_path):
    config = sl.load_config("tiny", LUNG | {"method.preset": "simmim"})
    explorer = sl.explore(store, run_of(config, MaskedDistillation, tmp_path / "run"))
    assert {value for _, value in explorer.controls.parts["strategy"].options} == {"random", "block"}
    assert explorer.attention is None and "informativeness" not in explorer.numbers
    with pytest.raises(sl.UseError, match="attention_high"):
        explorer.set(strategy="attention_high")


def test_controls_that_change_nothing_now_rest(explorer):
    parts = explorer.controls.parts
    assert parts["hint"].disabled and parts["draw"].disabled and not parts["ratio"].disabled
    explorer.set(strategy="attention_hint", guide="noisy")
    assert not parts["hint"].disabled and not parts["draw"].disabled
    parts["ratio"].value = 0.25  # as a hand does
    assert explorer.choice.ratio == 0.25 and explorer.mask.mean() == 0.25


def test_a_widget_keeps_a_picture_and_no_voxels_in_the_notebook(explorer):
    assert explorer.viewer.still().count("<img") == 1
    state = [
        str(widget.get_state())
        for widget in (*explorer.box.children[0].children, explorer.viewer, explorer._table)
    ]
    assert sum(map(len, state)) < 100_000
    moved = replace(explorer.choice, ratio=0.3)
    explorer.controls.choice = moved
    assert explorer.controls.parts["ratio"].value == 0.3
