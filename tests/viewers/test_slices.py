"""The viewer's Python side: what it accepts, what it draws, what it says, and what it keeps out of notebooks."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import smartlab as sl
from smartlab.core import plots
from smartlab.viewers import Panel, mammography, masks, render, sending
from smartlab.viewers.scene import Packed, build

SHAPE, GRID = (24, 16, 8), (6, 4, 2)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(-1000, 1000, SHAPE).astype(np.int16)
MASK = RNG.random(GRID) < 0.5
HEADS = RNG.random((3, *GRID))
HEADS /= HEADS.sum((1, 2, 3), keepdims=True)


def test_a_slice_is_drawn_as_a_radiologist_sees_it():
    image = np.full(SHAPE, -1000, np.int16)
    image[20:, 12:, 3] = 1000  # right, anterior
    viewer = sl.view(image, window=(-1000, 1000))
    pixels = render.paint(viewer.scene, viewer.scene.layers[0], "axial", 3, window=viewer.window)
    assert (pixels[:4, :4] == 255).all() and pixels.sum() == 4 * 4 * 3 * 255


def test_a_hidden_unit_is_coloured_exactly_over_its_voxels():
    mask = np.zeros(GRID, bool)
    mask[5, 0, 1] = True
    viewer = sl.view(np.zeros(SHAPE, np.int16), mask=mask, window=(0, 100))
    pixels = render.paint(
        viewer.scene, viewer.scene.layers[0], "axial", 4, window=viewer.window, shown=["mask"]
    )
    where = np.zeros(SHAPE[:2], bool)
    where[20:, :4] = True
    assert np.array_equal(pixels.any(-1), np.flip(where.T))
    other = render.paint(
        viewer.scene, viewer.scene.layers[0], "axial", 3, window=viewer.window, shown=["mask"]
    )
    assert not other.any()


def test_a_segmentation_is_shown_as_the_readers_return_it(tmp_path):
    """`labels=sl.read_labels(…)` over the scan it belongs to; as `mask=` it is no pattern of hidden units."""
    import nibabel as nib

    affine = np.diag([2.0, 2, 3, 1])
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[4:9, 3:8, 2:5] = 3
    for name, array, moved in (("ct", IMAGE, 0), ("seg", drawn, 0), ("off", drawn, 40)):
        affine[0, 3] = moved
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    ct, seg = sl.read_volume(tmp_path / "ct.nii.gz"), sl.read_labels(tmp_path / "seg.nii.gz")
    viewer = sl.view(ct, labels=seg, label_names={3: "liver"})
    assert np.array_equal(viewer.scene.labels, drawn) and viewer.scene.names == {3: "liver"}
    with pytest.raises(sl.UseError, match=r"labels do not lie where the image lies.*40\.0 mm"):
        sl.view(ct, labels=sl.read_labels(tmp_path / "off.nii.gz"))
    for segmentation in (seg, seg.array):
        with pytest.raises(sl.UseError, match="Give a segmentation as labels="):
            sl.view(ct, mask=segmentation)
    assert sl.view(ct, mask=seg.array, unit=1).scene.grid == SHAPE


def test_units_may_reach_beyond_the_image_when_their_size_is_said():
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(sl.UseError, match=r"does not follow.*unit=16"):
        sl.view(np.zeros((24, 24, 24), np.int16), mask=mask)
    scene = sl.view(np.zeros((24, 24, 24), np.int16), mask=mask, unit=16).scene
    assert scene.unit_of(0).tolist() == [0] * 16 + [1] * 8
    with pytest.raises(sl.UseError, match="do not cover"):
        sl.view(np.zeros((40, 40, 40), np.int16), mask=mask, unit=16)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40))
def test_fractions_travel_with_the_precision_of_their_range(values):
    array = np.array(values, np.float32).reshape(-1, 1, 1)
    span = float(array.max()) - float(array.min())
    assert np.abs(Packed.of(array).values() - array).max() <= span / 65535 + 1e-6


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.uint8, np.float32, bool])
def test_whole_numbers_travel_exactly(kind):
    values = (
        np.array([0, 1])
        if kind is bool
        else np.array([np.iinfo(np.int16).min if kind is np.int16 else 0, 7, 255])
    )
    values = np.append(values, 65535) if kind is np.uint16 else values
    image = np.broadcast_to(values.astype(kind)[:, None, None], (len(values), 2, 2))
    assert np.array_equal(build(image, [Panel()]).image.values(), image.astype(float))


def received(message):
    """The arrays of a message by name, and its description."""
    content, buffers = message
    sent = {}
    for part, data in zip(content["arrays"], buffers, strict=True):
        bits = part["type"] == "bits"
        array = np.frombuffer(zlib.decompress(data), np.uint8 if bits else part["type"])
        sent[part["name"]] = array if bits else array.reshape(part["shape"])
    return sent, content


def test_what_is_sent_is_what_was_given():
    guess = IMAGE + 0.25
    viewer = sl.view(IMAGE, mask=MASK, attention=torch.as_tensor(HEADS)[None], reconstruction=guess)
    sent, message = received(sending.everything(viewer.scene))
    assert np.array_equal(sent["image"].reshape(SHAPE[::-1]).T, IMAGE)
    assert np.array_equal(
        np.unpackbits(sent["mask0"], count=MASK.size, bitorder="little").reshape(GRID), MASK
    )
    assert np.allclose(sent["attention0"][1:], HEADS) and np.allclose(sent["attention0"][0], HEADS.mean(0))
    assert json.dumps(message)


def test_no_voxel_is_part_of_what_a_notebook_saves():
    small = sl.view(IMAGE, mask=MASK, attention=HEADS)
    large = sl.view(np.tile(IMAGE, (4, 4, 8)), mask=MASK, attention=HEADS)
    states = [{**viewer.get_state(), "_esm": "", "_css": ""} for viewer in (small, large)]
    sizes = [len(json.dumps(state)) for state in states]
    assert sizes[1] < 10_000 and sizes[1] - sizes[0] < 2_000
    assert len(large.still()) < 600_000


def test_a_large_volume_travels_whole_in_blocks(monkeypatch):
    monkeypatch.setattr(sending, "BLOCK", 4000)
    scene = sl.view(IMAGE, reconstruction=IMAGE * 0.5, labels=np.ones(SHAPE, np.uint8)).scene
    planes, start = received(sending.beginning(scene, (3, 4, 5)))
    rows, total = start["block"], SHAPE[1] * SHAPE[2]
    assert 0 < rows < total and {part.get("axis") for part in start["arrays"]} == {None, 0, 1, 2}
    whole = {name: np.zeros((total, SHAPE[0]), part.dtype) for name, part in planes.items() if part.ndim == 3}
    for first in range(0, total, rows):
        parts, _ = received(sending.block(scene, first, rows))
        assert sum(part.nbytes for part in parts.values()) <= 4000
        for name, part in parts.items():
            whole[name][first : first + rows] = part
    for name, packed in {"image": scene.image.raw, "labels": scene.labels}.items():
        assert np.array_equal(whole[name].reshape(SHAPE[::-1]).T, packed)
    assert np.array_equal(whole["reconstruction0"].reshape(SHAPE[::-1]).T, scene.layers[0].reconstruction.raw)


def test_an_update_sends_the_difference_and_python_keeps_step(monkeypatch):
    viewer, sent = sl.view(IMAGE, mask=MASK, attention=HEADS), []
    before = {**viewer.meta, "panels": list(viewer.meta["panels"])}
    monkeypatch.setattr(viewer, "send", lambda content, buffers: sent.append((content, buffers)))
    viewer.update(mask=~MASK, note="0.5 of the liver")
    parts, content = received(sent[0])
    assert list(parts) == ["mask0"] and list(content["meta"]) == ["panels"]
    assert sum(map(len, sent[0][1])) < 200
    assert np.array_equal(viewer.scene.layers[0].mask, ~MASK)
    assert viewer.meta["panels"] == [{"title": "", "note": "0.5 of the liver", "hidden": (~MASK).mean()}]
    assert {**viewer.meta, "panels": 0} == {**before, "panels": 0}
    viewer.update(attention=HEADS[:1])
    assert viewer.meta["heads"] == 1 and np.array_equal(viewer.scene.layers[0].mask, ~MASK)
    viewer.update(attention=False)
    assert "attention" not in viewer.meta["overlays"] and sent[2][0]["gone"] == ["attention0"]
    plain = sl.view(IMAGE)
    monkeypatch.setattr(plain, "send", lambda *_: None)
    plain.update(mask=MASK)
    assert plain.meta["grid"] == list(GRID) and plain.meta["unit_of"][0][:5] == [0, 0, 0, 0, 1]
    with pytest.raises(sl.UseError, match="different grids"):
        viewer.update(mask=MASK[:3])
    with pytest.raises(sl.UseError, match="no panel 1"):
        viewer.update(1, mask=MASK)


@pytest.mark.parametrize("window", [(-160, 240), (-1000, 400)])
def test_a_label_in_the_picture_is_nearest_to_its_own_swatch(window):
    levels = np.linspace(-850, 700, 16).round().astype(int)
    labels = np.zeros((64, 16, 4), np.uint8)
    image = np.zeros(labels.shape, np.int16)
    for v, level in enumerate(levels, 1):
        labels[4 * v - 4 : 4 * v], image[4 * v - 4 : 4 * v] = v, level
    image += RNG.normal(0, 12, image.shape).astype(np.int16)
    viewer = sl.view(image, labels=labels, window=window)
    scene, look = viewer.scene, render.Look(window, ["labels"])
    drawn = render.paint(scene, scene.layers[0], "axial", 1, window=window, shown=["labels"])
    swatches = np.stack([render.swatch(scene, v, look) for v in scene.names]) * 255
    away = np.linalg.norm(drawn[:, :, None].astype(float) - swatches, axis=-1)
    mean = [away[np.flip(labels[:, :, 1].T) == v].mean(0) for v in scene.names]
    assert [int(np.argmin(row)) + 1 for row in mean] == list(scene.names)
    shades = render.label_colours().astype(float)
    apart = np.linalg.norm(shades[:, None] - shades, axis=-1)[~np.eye(24, dtype=bool)]
    assert apart.min() > 60, "and no two of 24 are alike"


def test_attention_has_no_colour_below_an_even_share_and_one_unit_does_not_take_all():
    heads = np.full((1, *GRID), 1.0)
    heads[0, 2, 2, 1], heads[0, 3, 2, 1] = 30, 2
    heads /= heads.sum()
    viewer = sl.view(IMAGE, attention=heads)
    scene = viewer.scene
    share = render.on_slice(heads[0], scene, "axial", 4) * heads[0].size
    plain, drawn = (
        render.paint(scene, scene.layers[0], "axial", 4, window=viewer.window, shown=s)
        for s in ([], ["attention"])
    )
    assert np.array_equal(plain[share < 1], drawn[share < 1]) and not np.array_equal(
        plain[share > 1], drawn[share > 1]
    )
    assert scene.span(-1)[1] < 3 < 15 < scene.span(-1)[2]


def test_a_window_of_ones_own(monkeypatch):
    monkeypatch.setitem(plots.WINDOWS, "stroke", (20, 60))
    viewer = sl.view(IMAGE, window="stroke")
    assert viewer.window == [20, 60] and ["stroke", 20, 60] in viewer.meta["windows"]
    assert sl.view(IMAGE, window="liver").window == [-45, 105]


def test_the_figure_goes_where_it_is_told(tmp_path):
    viewer = sl.view(IMAGE, affine=np.diag([2.0, 2, 3, 1]), window="bone", mask=MASK, title="Where")
    assert len(viewer.figure().axes) == 3 and viewer.figure(5)._suptitle.get_text() == "Where"
    titles = [ax.get_title() for ax in viewer.figure(mm=(10, 4, 6)).axes]
    assert titles == [f"axial {2}", f"coronal {2}", f"sagittal {5}"]
    for bad in (8, (0, 0, 99)):
        with pytest.raises(sl.UseError, match="outside the image"):
            viewer.figure(bad)
    assert Image.open(viewer.save_png(tmp_path / "x.png")).size[0] > 500


def test_strategies_stand_side_by_side():
    viewer = masks.compare(
        IMAGE, {"random": MASK, "attention_high": ~MASK}, attention=HEADS, label_names=None
    )
    assert [p["title"] for p in viewer.meta["panels"]] == ["random", "attention_high"]
    titles = [ax.get_title() for ax in viewer.figure().axes[:2]]
    assert titles == [f"random · {MASK.mean():.0%} hidden", f"attention_high · {(~MASK).mean():.0%} hidden"]
    assert viewer.scene.span(-1)[2] == pytest.approx(HEADS.mean(0).max() * HEADS[0].size, abs=1e-3)


def test_a_viewer_shows_its_picture_and_its_widget(monkeypatch):
    shown, sent, viewer = [], [], sl.view(IMAGE, mask=MASK, title="<b>")
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data))
    monkeypatch.setattr(viewer, "send", lambda *message: sent.append(received(message)))
    viewer._ipython_display_()
    ((parts, content),) = sent  # unasked: what is in sight, and no more
    where = {part.get("axis"): part["at"] for part in content["arrays"] if part["name"] == "image"}
    assert where == {axis: n // 2 for axis, n in enumerate(SHAPE)} and content["block"] and "mask0" in parts
    assert "data:image/png;base64," in shown[0]["text/html"] and "&lt;b&gt;" in shown[0]["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((2, 2, 2, 2))}, r"cannot view this image.*\(2, 2, 2, 2\)"),
        ({"image": np.full(SHAPE, np.nan)}, "NaN"),
        ({"window": "spleen"}, "no window 'spleen'.*lung"),
        ({"window": (5, 5)}, "from low to high"),
        ({"plane": "oblique"}, "no plane 'oblique'"),
        ({"mask": np.zeros(48, bool)}, "not on a grid of units.*Reshape"),
        ({"attention": -HEADS}, "not shares"),
        ({"reconstruction": IMAGE[1:]}, "not like the image"),
        ({"labels": IMAGE}, "labels do not fit"),
        ({"spacing": (1, 1)}, "spacing does not fit"),
        ({"affine": np.eye(3)}, "affine has the wrong shape"),
        ({"panels": []}, "no panels"),
        ({"panels": [Panel("a")], "mask": MASK}, "not both"),
        ({"panels": [Panel("a", MASK), Panel("b", MASK[:3])]}, "different grids"),
    ],
)
def test_wrong_input_is_named(change, message):
    with pytest.raises(sl.UseError, match=message):
        sl.view(**({"image": IMAGE} | change))


def test_the_legend_of_a_narrow_picture_stays_on_it():
    """One small panel with labels: what a mammogram's explorer shows."""
    image, labels = np.zeros((40, 40)), np.zeros((40, 40), int)
    labels[5:9, 5:9], labels[20:30, 20:30] = 1, 2
    viewer = sl.view(image, labels=labels, label_names=["a lesion with a long name", "another"])
    viewer.shown = ["labels"]
    figure = viewer.figure()
    figure.canvas.draw()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width


def test_scales_of_a_mammogram_have_their_columns_named():
    part = {name: torch.rand(1, 1, 8, 8) for name in ("target", "guess", "hidden")}
    figure = mammography.scales({1: part, 2: part}, "title")
    titles = [ax.get_title() for ax in figure.axes]
    assert [t for t in titles if t] == list(mammography.COLUMNS) and titles[0] == "original"
