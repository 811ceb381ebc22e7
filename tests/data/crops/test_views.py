"""Crops are parts of the stored volumes, the same whoever reads them, and a run can go on anywhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.compose import recipe
from smartlab.data.crops.augment import augment, draw_mirrors, mirror, window
from smartlab.data.crops.views import CropDataset, VolumeDataset, _window_mean, read_crop
from tests.conftest import REPO
from tests.data.store_cohort import make_cohort, manifest, save

ASSETS = REPO / "tests" / "assets"
SMALL = {"region": 48, "view": 32}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four people at 2 mm, about 70 × 60 × 78 voxels, with tumour labels and lesions."""
    folder = tmp_path_factory.mktemp("crops")
    os.environ["SMARTLAB_SALT"] = "tests-only-no-secret"
    man = make_cohort(folder / "raw")
    sl.build_store(man, folder / "raw", folder / "store", workers=0, progress=False)
    return sl.open_store(folder / "store")


def padded_slice(array, start, size, fill):
    """What a crop should hold, the slow and plain way."""
    out = np.full(size, fill, array.dtype)
    for index in np.ndindex(*size):
        at = tuple(np.add(index, start))
        if all(0 <= a < n for a, n in zip(at, array.shape, strict=True)):
            out[index] = array[at]
    return out


any_settings = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# ---- single crops


@any_settings
@given(st.tuples(*[st.integers(-40, 100)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_a_crop_is_the_slice_of_the_whole_with_air_around(store, start, size):
    whole = store.array(0)[:]
    crop, padded = read_crop(store.array(0), start, size)
    expected = padded_slice(whole, start, size, -1024)
    assert (crop == expected).all()
    inside = all(s >= 0 and s + n <= m for s, n, m in zip(start, size, whole.shape, strict=True))
    assert padded != inside


@any_settings
@given(
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(0, 10_000),
    st.sampled_from([(48, 32), (128, 96), (64, 64), (40, 32), (96, 20)]),
    st.floats(0, 1),
)
def test_views_are_the_voxels_at_their_offsets_and_overlap(store, epoch, index, seed, sizes, overlap):
    region, view = sizes
    data = sl.ViewDataset(store, region=region, view=view, seed=seed, min_overlap=overlap, labels=True)
    item = data[epoch, index]
    whole, labels = store.array(item["image"])[:], store.labels(item["image"])[:]
    assert item["views"].dtype == np.int16 and item["views"].shape == (2, view, view, view)
    for k in range(2):
        box = tuple(slice(max(0, o), max(0, o + view)) for o in item["offsets"][k])
        inside = item["views"][k] != -1024
        assert inside.sum() == (whole[box] != -1024).sum()
        at = tuple(
            slice(max(0, -o), max(0, -o) + b)
            for o, b in zip(item["offsets"][k], whole[box].shape, strict=True)
        )
        assert (item["views"][k][at] == whole[box]).all()
        assert (item["view_labels"][k][at] == labels[box]).all()
    shift = np.abs(item["offsets"][1] - item["offsets"][0])
    assert np.prod(np.maximum(view - shift, 0)) >= overlap * view**3 - 1e-6
    assert (shift <= np.maximum(region - view, view - np.array(whole.shape))).all()
    assert item["padded"] == any(n < view for n in whole.shape)
    again = sl.ViewDataset(store, region=region, view=view, seed=seed, min_overlap=overlap, labels=True)
    assert all(np.array_equal(item[key], again[epoch, index][key]) for key in item)


def test_draws_differ_between_epochs_items_and_seeds(store):
    draws = [
        sl.ViewDataset(store, **SMALL, seed=seed, draws=2)[epoch, index]["offsets"].tolist()
        for seed, epoch, index in itertools.product(range(3), range(3), (0, 4))
    ]
    assert len({str(d) for d in draws}) == len(draws)


@pytest.mark.parametrize("region", [32, 48, 64])
def test_views_start_anywhere_and_are_not_padded(store, region):
    data = sl.ViewDataset(store, region=region, view=32, foreground=0.0)
    shape = np.array(store.shape(0))
    seen = [data[epoch, 0]["offsets"] for epoch in range(300)]
    offsets = np.concatenate(seen)
    assert (offsets.min(0) == 0).all() and (offsets.max(0) == shape - 32).all()
    for axis in range(3):
        assert len(np.unique(offsets[:, axis])) > 0.8 * (shape[axis] - 31)


def test_regions_are_taken_from_the_body(tmp_path):
    """Of a scan that is mostly air, without cropping, views show the body all the same."""
    array = np.full((160, 80, 80), -1000, np.int16)
    array[100:150, 20:60, 20:60] = 40
    save(tmp_path / "a.nii.gz", array, spacing=(2.0, 2.0, 2.0))
    man = manifest([{"id": "a", "patient": "a", "image": "a.nii.gz"}])
    sl.build_store(man, tmp_path, tmp_path / "s", workers=0, crop_body=False, progress=False)
    st_ = sl.open_store(tmp_path / "s")

    def share(foreground):
        data = sl.ViewDataset(st_, region=48, view=32, foreground=foreground)
        return np.mean([(data[e, 0]["views"] > -500).mean() for e in range(40)])

    assert share(0.4) > 0.5 > 0.35 > share(0.0)


@any_settings
@given(st.integers(1, 200), st.sampled_from([32, 48, 64, 128]), st.integers(0, 99))
def test_window_means_are_means_over_voxels(n, region, seed):
    blocks = -(-n // 32)
    share = np.random.default_rng(seed).random(blocks)
    voxels = np.repeat(share, 32)[:n]
    width = -(-region // 32) * 32
    starts = range(0, max(1, n - region + 32), 32) if n > region else [0]
    expected = [voxels[s : s + width].mean() for s in starts]
    assert np.allclose(_window_mean(share, 0, n, region), expected)


def test_settings_that_cannot_work_are_refused(store):
    with pytest.raises(UseError, match="fit into its region"):
        sl.ViewDataset(store, region=32, view=48)
    with pytest.raises(UseError, match="out of range"):
        sl.ViewDataset(store, min_overlap=2)
    with pytest.raises(DataError, match="no images"):
        sl.ViewDataset(store, images=[])
    with pytest.raises(IndexError):
        sl.ViewDataset(store)[0, 4]


# ---- lesions and volumes


def test_lesion_crops_are_centred_and_carry_labels(store):
    data = sl.LesionDataset(store, size=24)
    assert len(data) == 4
    for k in range(4):
        item = data[k]
        assert item["crop"].shape == item["crop_labels"].shape == (24, 24, 24)
        center = item["affine"][:3, :3] @ ([11.5] * 3) + item["affine"][:3, 3]
        assert np.abs(center - item["center_mm"]).max() <= 1.0  # half a voxel
        assert item["labels"] == store.cases.loc[item["case"]].labels
        tumour = np.argwhere(item["crop_labels"] > 0)
        assert len(tumour) > 100 and np.abs(tumour.mean(0) - 11.5).max() < 1.6
        # its voxels are those of the volume at the same world position
        inverse = np.linalg.inv(store.affine(item["image"])) @ item["affine"]
        start = np.rint(inverse[:3, 3]).astype(int)
        whole = store.array(item["image"])[:]
        assert (item["crop"] == padded_slice(whole, start, (24, 24, 24), -1024)).all()


@pytest.mark.parametrize("spacing", [1.0, 3.0])
def test_lesion_crops_can_have_another_spacing(store, spacing):
    item = sl.LesionDataset(store, size=(20, 24, 16), spacing=spacing)[1]
    assert item["crop"].shape == (20, 24, 16)
    assert np.allclose(np.linalg.norm(item["affine"][:3, :3], axis=0), spacing)
    center = item["affine"][:3, :3] @ [9.5, 11.5, 7.5] + item["affine"][:3, 3]
    assert np.allclose(center, item["center_mm"])
    same = sl.LesionDataset(store, size=(20, 24, 16), spacing=2.0)[1]
    whole = store.labels(item["image"])[:]
    if spacing == 3.0:  # the whole tumour is in view: its volume is kept
        volume = (item["crop_labels"] > 0).sum() * spacing**3
        assert abs(volume / ((whole > 0).sum() * 8) - 1) < 0.2
    else:
        assert abs(float(item["crop"].mean()) - float(same["crop"].mean())) < 400
    far = sl.LesionDataset(store, size=200, spacing=3.0)[0]["crop"]
    assert (far == -1024).mean() > 0.8


def test_the_lidc_nodule_is_in_its_crop(real_data, tmp_path):
    """From the shipped manifest through DICOM, resampling and cropping, into the middle of the crop."""
    man = sl.load_manifest("lidc-nodules").select(["LIDC-IDRI-0001-1"])
    report = sl.build_store(man, real_data / "ct_series", tmp_path, workers=0, progress=False)
    assert (report.built, report.failed) == (1, 0)
    item = sl.LesionDataset(sl.open_store(tmp_path), size=40)[0]
    scan = sl.read_volume(real_data / "ct_series" / "LIDC-IDRI-0001")
    lidc = recipe("lidc")
    nodule = lidc.consensus_mask(lidc.Nodule.from_json(ASSETS / "lidc_0001_nodule.json"), scan)
    inverse = np.linalg.inv(item["affine"])
    inside = np.zeros((40, 40, 40), bool)
    index = np.rint(scan.to_world(np.argwhere(nodule)) @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    inside[tuple(index.T)] = True
    assert np.abs(np.argwhere(inside).mean(0) - 19.5).max() < 2
    around = ndimage.binary_dilation(inside, iterations=6) & ~ndimage.binary_dilation(inside, iterations=2)
    around &= item["crop"] > -1024  # the sixteen slices end in the crop
    assert item["crop"][inside].mean() > -300
    lung = item["crop"][around & (item["crop"] < -500)]  # not the chest wall the nodule touches
    assert lung.mean() < -700 and lung.size > 0.7 * around.sum()
    assert item["labels"]["malignancy"] == "malignant"


def test_cases_can_be_chosen_and_unknown_or_lesionless_ones_are_refused(store):
    test = store.cases.index[store.cases.split == "test"]
    with_lesion = [k for k in test if store.cases.center_mm[k] is not None]
    assert [sl.LesionDataset(store, cases=with_lesion)[i]["case"] for i in range(2)] == with_lesion
    with pytest.raises(DataError, match="1 of 3 cases have no lesion"):
        sl.LesionDataset(store, cases=test)
    with pytest.raises(UseError, match="not in the store"):
        sl.LesionDataset(store, cases=["nobody"])


def test_whole_volumes_come_one_by_one(store):
    item = VolumeDataset(store, [2])[0]
    assert item["volume"].shape == item["volume_labels"].shape == store.shape(2)
    assert np.allclose(item["affine"], store.affine(2))


# ---- batches


def batches(loader):
    return [{k: v.numpy() if torch.is_tensor(v) else v for k, v in b.items()} for b in loader]


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(store, workers):
    data = sl.ViewDataset(store, **SMALL, draws=5, labels=True)
    plain = sl.CropLoader(data, 3, seed=1)
    busy = sl.CropLoader(data, 3, seed=1, workers=workers)
    for _ in range(2):  # two epochs
        assert_same(batches(plain), batches(busy))
    assert busy.wait_seconds > 0
    busy.close()


def test_epochs_are_shuffled_and_complete(store):
    loader = sl.CropLoader(sl.ViewDataset(store, **SMALL, draws=3), 4)
    orders = [[i for k in range(len(loader)) for i in loader.indices(epoch, k)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12)) and orders[0] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_saved_state_gives_exactly_the_remaining_batches(store, workers, stop):
    def fresh(n):
        return sl.CropLoader(sl.ViewDataset(store, **SMALL, draws=5), 4, seed=7, workers=n)

    whole = fresh(0)
    expected = [b for _ in range(3) for b in batches(whole)]
    first = fresh(workers)
    seen, state = [], None
    while state is None:
        for batch in first:
            seen.append({k: v.numpy() if torch.is_tensor(v) else v for k, v in batch.items()})
            if len(seen) == stop:
                state = first.state_dict()
                break
    second = fresh(2 - workers)  # another number of workers
    second.load_state_dict(state)
    rest = []
    while len(seen) + len(rest) < len(expected):
        rest += batches(second)
    assert_same(expected, seen + rest)
    first.close()
    second.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_can_go_back_in_the_middle_of_reading_ahead(store, workers):
    loader = sl.CropLoader(sl.ViewDataset(store, **SMALL, draws=5), 4, workers=workers)
    begin = loader.state_dict()
    for number, _ in enumerate(loader):
        if number == 1:
            break
    loader.load_state_dict(begin)
    assert_same(batches(loader), batches(sl.CropLoader(loader.dataset, 4)))
    loader.close()


def test_a_state_of_other_settings_is_refused(store):
    data = sl.ViewDataset(store, **SMALL)
    state = sl.CropLoader(data, 2).state_dict()
    with pytest.raises(UseError, match="another global batch"):
        sl.CropLoader(data, 1).load_state_dict(state)
    sl.CropLoader(data, 1, world=2).load_state_dict(state)  # the same batches, on two ranks


@pytest.mark.parametrize("drop_last", [True, False])
def test_two_ranks_see_together_what_one_process_sees(store, drop_last):
    data = sl.ViewDataset(store, **SMALL, draws=5)
    one = batches(sl.CropLoader(data, 6, seed=2, drop_last=drop_last))
    ranks = [batches(sl.CropLoader(data, 3, seed=2, rank=r, world=2, drop_last=drop_last)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(one) == (3 if drop_last else 4)
    for whole, left, right in zip(one, *ranks, strict=True):
        assert np.array_equal(whole["views"], np.concatenate([left["views"], right["views"]]))


def test_a_batch_stays_what_it_was_when_the_next_ones_come(store):
    loader = sl.CropLoader(sl.ViewDataset(store, **SMALL, draws=6), 2, workers=2)
    kept = list(loader)
    copies = batches(sl.CropLoader(sl.ViewDataset(store, **SMALL, draws=6), 2))
    assert_same([{k: np.asarray(v) for k, v in b.items()} for b in kept], copies)
    loader.close()


def test_lesion_crops_batch_with_their_labels(store):
    loader = sl.CropLoader(sl.LesionDataset(store, size=16), 3, shuffle=False, drop_last=False, workers=1)
    first, second = list(loader)
    assert first["crop"].shape == (3, 16, 16, 16) and second["crop"].shape == (1, 16, 16, 16)
    assert [x["grade"] for x in first["labels"] + second["labels"]] == [0, 1, 2, 3]
    assert first["case"] + second["case"] == list(sl.LesionDataset(store).table.index)
    loader.close()


class Broken(CropDataset):
    fields = {"x": ((2,), np.int16)}  # noqa: RUF012

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 8

    def read(self, epoch, index, out):
        if index == 5 and self.how == "die":
            os._exit(3)
        if index == 5:
            raise DataError("a stored volume is damaged") if self.how == "data" else ValueError("bug")
        out["x"][:] = index
        return {"image": index}


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ("data", DataError, "damaged"),
        ("bug", RuntimeError, "ValueError: bug"),
        ("die", DataError, "worker died.*3"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told(how, error, match):
    loader = sl.CropLoader(Broken(how), 2, workers=2, shuffle=False)
    seen = []
    with pytest.raises(error, match=match):
        for batch in loader:
            seen += batch["image"].tolist()
    assert seen == [0, 1, 2, 3]
    loader.close()


def test_an_empty_epoch_is_refused_not_silent(store):
    with pytest.raises(UseError, match="smaller than one global batch"):
        sl.CropLoader(sl.ViewDataset(store), 5)


TINY_SHM = """
import os, sys
import smartlab as sl
free = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
assert free <= 1 << 20, free
data = sl.ViewDataset(sl.open_store(sys.argv[1]), region=128, view=96, draws=4)
loader = sl.CropLoader(data, 4, workers=2)  # a batch is 14 MB
print(sum(batch["views"].shape[0] for batch in loader))
"""


@pytest.mark.slow
def test_workers_need_no_space_in_dev_shm(store):
    """In a mount namespace of its own, with a /dev/shm of 1 MB."""
    python = f"{sys.executable} -c '{TINY_SHM}' {store.path}"
    command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {python}"]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("may not make a mount namespace here")
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split()[-1] == "16", done.stderr


# ---- on the device


def test_the_window_clips_and_scales():
    hu = torch.tensor([[-1024, -175, 37, 250, 3000]], dtype=torch.int16)
    assert torch.allclose(window(hu, -175, 250), torch.tensor([[0, 0, 212 / 425, 1, 1]]))
    assert window(hu, -175, 250, torch.bfloat16).dtype == torch.bfloat16


def test_augmentation_is_seeded_differs_between_samples_and_stays_in_range():
    x = torch.rand((3, 2, 8, 8, 8), generator=torch.Generator().manual_seed(1))

    def run(seed):
        return augment(x, torch.Generator().manual_seed(seed), intensity=0.3, noise=0.1)

    assert torch.equal(run(5), run(5)) and not torch.equal(run(5), run(6))
    assert run(5).shape == x.shape and run(5).min() >= 0 and run(5).max() <= 1
    same = augment(x[:1, :1].expand(4, 2, 8, 8, 8).contiguous(), torch.Generator().manual_seed(0))
    assert len({float(s.mean()) for s in same.flatten(0, 1)}) == 8
    off = augment(x, torch.Generator().manual_seed(0), flip=False, intensity=0)
    assert torch.equal(off, x)


def test_two_ranks_augment_their_shares_as_one_process_does_the_whole():
    x = torch.rand((4, 2, 8, 8, 8), generator=torch.Generator().manual_seed(1))

    def run(part, shard):
        return augment(part, torch.Generator().manual_seed(3), noise=0.1, shard=shard)

    assert torch.equal(run(x, (0, 1)), torch.cat([run(x[:2], (0, 2)), run(x[2:], (1, 2))]))


def test_mirrors_only_mirror_and_labels_follow():
    x = torch.arange(2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
    mirrors = torch.tensor([[True, False, True], [False, False, False]])
    out = mirror(x, mirrors)
    assert torch.equal(out[0], x[0].flip(0).flip(2)) and torch.equal(out[1], x[1])
    assert torch.equal(mirror(out, mirrors), x)
    drawn = draw_mirrors(torch.zeros(1000, 1, 1, 1), torch.Generator().manual_seed(0)).float().mean(0)
    assert ((drawn - 0.5).abs() < 0.06).all()
