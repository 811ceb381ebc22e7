"""Points and their crops: what is sent when, and what is refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

import smartlab as sl
from smartlab.viewers.embedding import embedding

POINTS = np.random.default_rng(0).normal(size=(30, 2))
KINDS = ["liver", "heart", "spleen"] * 10


class Sent(list):
    def __call__(self, message, buffers=None):
        self.append((message, buffers))


def linked(monkeypatch, crops):
    viewer, sent = embedding(POINTS, KINDS, crops, names=[f"case {i}" for i in range(30)]), Sent()
    monkeypatch.setattr(viewer, "send", sent)
    return viewer, sent


def test_only_the_crop_that_is_looked_at_is_read(monkeypatch):
    read = []

    def crop(number):
        read.append(number)
        return np.full((4, 4, 4), number, np.int16)

    viewer, sent = linked(monkeypatch, crop)
    viewer._answer(None, {"kind": "points"}, [])
    assert read == []
    viewer._answer(None, {"kind": "crop", "point": 7}, [])
    assert read == [7]
    message, buffers = sent[1]
    assert message["point"] == 7 and message["meta"]["title"] == "case 7"
    assert (np.frombuffer(zlib.decompress(buffers[0]), np.int16) == 7).all()


def test_points_arrive_with_their_labels_and_names(monkeypatch):
    viewer, sent = linked(monkeypatch, np.zeros((30, 4, 4, 4)))
    viewer._answer(None, {"kind": "points"}, [])
    points, kinds, names = (zlib.decompress(b) for b in sent[0][1])
    assert np.allclose(np.frombuffer(points, np.float32).reshape(-1, 2), POINTS)
    assert [viewer.kinds[i] for i in np.frombuffer(kinds, np.uint16)] == KINDS
    assert names.decode().split("\n")[29] == "case 29"


def test_a_crop_that_cannot_be_read_is_said_where_it_was_asked_for(monkeypatch):
    def crop(number):
        raise sl.DataError("no such case", path="store")

    viewer, sent = linked(monkeypatch, crop)
    viewer._answer(None, {"kind": "crop", "point": 3}, [])
    assert sent[0][0] == {"kind": "trouble", "point": 3, "text": "store: no such case."}


def test_the_static_picture_shows_a_crop_of_each_label_or_the_chosen_one(tmp_path):
    viewer = embedding(POINTS, KINDS, np.zeros((30, 4, 4, 4)))
    titles = [ax.get_title() for part in viewer.figure().subfigs[1:] for ax in part.axes]
    assert titles == ["heart", "liver", "spleen"]
    viewer.chosen = 4
    assert [ax.get_title() for ax in viewer.figure().subfigs[1].axes] == ["axial", "coronal", "sagittal"]
    assert viewer.save_png(tmp_path / "x.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("points", "labels", "message"),
    [
        (POINTS[:, :1], KINDS, r"\(30, 1\).*\(N, 2\)"),
        (POINTS, KINDS[:5], "labels and points differ.*5.*30"),
        (POINTS * np.nan, KINDS, "not places"),
    ],
)
def test_what_does_not_fit_is_named(points, labels, message):
    with pytest.raises(sl.UseError, match=message):
        embedding(points, labels, lambda i: np.zeros((4, 4, 4)))
