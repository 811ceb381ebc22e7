"""One good file of every format that smartlab reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import yaml

import smartlab as sl
from smartlab.batch import load_plan
from smartlab.core.errors import DataError
from smartlab.data.store import index
from smartlab.interop.weights import export, load_encoder
from smartlab.training import checkpoint
from tests.attack.harness import Target
from tests.batch.toys import write_plan
from tests.data.dicom_factory import itk_image, scan, write_enhanced, write_nifti, write_series
from tests.data.store_cohort import make_cohort

TARGETS: dict[str, Callable[[Path], Target]] = {}


def target(make: Callable[[Path], Target]) -> Callable[[Path], Target]:
    TARGETS[make.__name__] = make
    return make


def _volume(path: Path) -> Callable[[], Any]:
    def read() -> Any:
        volume = sl.read_volume(path)
        return [volume.array, volume.affine]

    return read


# ---- texts


@target
def manifest(folder):
    file = make_cohort(folder, 3).save(folder / "m.json")
    return Target(file, lambda: sl.load_manifest(file).model_dump_json(), text=json)


@target
def cases(folder):
    labels = {"grade": {"kind": "number"}, "kinds": {"kind": "multilabel", "classes": ["a", "b"]}}
    man = make_cohort(folder, 3).model_copy(update={"cases_file": "cases.csv"}, deep=True)
    man = type(man).model_validate(man.model_dump(by_alias=True) | {"labels": labels})
    file = man.save(folder / "m.json")
    return Target(folder / "cases.csv", lambda: sl.load_manifest(file).model_dump_json())


@target
def plan(folder):
    varied = {"grid": {"x": [1, 2], "kind": ["a", "b"]}, "seeds": 2, "exclude": [{"x": 2, "kind": "b"}]}
    steps = [{"name": "a", "notebook": "toy.ipynb"}]
    steps += [{"name": "b", "notebook": "toy.ipynb", "parameters": {"base": "{a}/run"}}]
    file = write_plan(folder, steps=steps, parameters={"a.rate": 0.25}, **varied)
    return Target(file, lambda: repr(load_plan(file)), text=yaml)


@target
def notebook(folder):
    file = write_plan(folder, grid={"x": [1, 2]})
    return Target(folder / "toy.ipynb", lambda: repr(load_plan(file)), text=json)


@target
def config(folder):
    file = sl.load_config("tiny").save(folder / "c.yaml")
    return Target(file, lambda: sl.load_config(file).model_dump_json(), text=yaml)


def _batch(part: str) -> Callable[[Path], Target]:
    """A run of a batch; damage to its record counts as not done, beside one that stays."""

    def make(folder: Path) -> Target:
        from smartlab.batch import records

        for key in "ab":
            home = folder / "toy" / f"r-{key}"
            home.mkdir(parents=True)
            facts = {"step": "toy", "key": key, "identity": key, "state": "done", "settings": {"x": key}}
            records.write(home, facts | {"upstream": {}, "seconds": 1.0, "error": ""})
            result = {
                "step": "toy",
                "parameters": {},
                "metrics": {"score": {"value": 1.0, "low": 0.5, "n": 3}},
            }
            (home / "result.json").write_text(json.dumps(result))
        return Target(
            folder / "toy" / "r-b" / part,
            lambda: [list(records.survey(folder)), sl.load_results(folder).to_json()],
            text=json,
        )

    return make


TARGETS["run_record"], TARGETS["run_result"] = _batch("run.json"), _batch("result.json")


# ---- images


@target
def nifti(folder):
    file = write_nifti(folder / "a.nii", scan())
    return Target(file, _volume(file), header=352)


@target
def nifti_gz(folder):
    file = write_nifti(folder / "a.nii.gz", scan())
    return Target(file, _volume(file), sealed=True)


def _itk(name: str, folder: Path, packed: bool = False) -> Target:
    sitk.WriteImage(itk_image(scan()), str(folder / name), packed)
    return Target(folder / name, _volume(folder / name), header=500)


@target
def nrrd(folder):
    return _itk("a.nrrd", folder)


@target
def nhdr(folder):
    return _itk("a.nhdr", folder)


@target
def mhd(folder):
    return _itk("a.mhd", folder)


@target
def mha_packed(folder):
    return _itk("a.mha", folder, packed=True)


@target
def dicom(folder):
    file = write_series(folder / "series", scan(4))[1]
    return Target(file, _volume(folder / "series"), header=1100)


@target
def dicom_enhanced(folder):
    file = write_enhanced(folder / "e.dcm", scan(3))
    return Target(file, _volume(file), header=3000)


# ---- what smartlab writes


def _store(part: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        man = make_cohort(folder / "raw", 2)
        sl.build_store(man, folder / "raw", folder / "store", workers=0, progress=False)
        file = sorted((folder / "store").glob(part))[0]

        def read() -> Any:
            store = sl.open_store(folder / "store")
            images = [(store.array(i)[:], store.labels(i)[:], store.affine(i)) for i in range(len(store))]
            bodies = [store.body(i) for i in range(len(store))]
            facts = [store.spacing, store.label_names, store.fingerprint, store.voxels]
            return [images, bodies, facts, store.cases.to_json(), store.images.to_json()]

        return Target(file, read, sealed=True)

    return make


for name, part in {
    "store_header": "store.json",
    "store_images": "images-*.jsonl",
    "store_cases": "cases-*.jsonl",
    "store_volume": "volumes/*[!s].b2nd",
    "store_labels": "volumes/*.labels.b2nd",
}.items():
    TARGETS[name] = _store(part)


@target
def store_journal(folder):
    journal = index.Journal(folder)
    journal.start([{"key": "a", "shape": [1, 2]}, {"key": "b", "shape": [3, 4]}])
    journal.add({"key": "c", "shape": [5, 6], "notes": ["x"]})

    def read() -> Any:
        """A damaged line is left out, and its image built again: no row differs."""
        rows = {row["key"]: row for row in journal.read()}
        if len(rows) < 3:
            raise DataError("a row was left out")
        return rows

    return Target(journal.path, read, sealed=True)


def _checkpoint(part: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        torch.manual_seed(0)
        weights = {f"{role}.encoder.a.{i}": torch.randn(40, 8) for role in checkpoint.ROLES for i in range(3)}
        weights["student.head"] = torch.randn(30)
        state = {
            "optimiser": {"state": {0: {"exp_avg": torch.randn(50)}}},
            "loader": {"epoch": 3},
            "images": [1, 2],
        }
        saved = checkpoint.save(folder, 7, weights, state, {"config": json.dumps({"a": 1}), "data": "d"})

        def read() -> Any:
            method, state = checkpoint.load(saved)
            return _plain([method, state, checkpoint.header_of(saved / "teacher.safetensors")])

        return Target(saved / part, read, sealed=True)

    return make


for part in ("state.pt", "student.safetensors", "teacher.safetensors"):
    TARGETS[f"checkpoint_{part.partition('.')[0]}"] = _checkpoint(part)


def _export(kind: str, name: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        torch.manual_seed(0)
        small = {"encoder.preset": "custom", "encoder.embed_dim": 4, "encoder.num_heads": [1, 1, 1, 1]}
        small |= {"encoder.depths": [1, 1, 1, 1], "semantic.heads": 2}
        encoder = _encoder(small)
        file = export(encoder, kind, folder / name)
        return Target(file, lambda: _plain(load_encoder(file).state_dict()), sealed=True)

    return make


def _encoder(settings: dict[str, Any]) -> Any:
    from smartlab.models.build import make_encoder

    return make_encoder(sl.load_config("tiny", settings))


TARGETS["export_safetensors"] = _export("safetensors", "e.safetensors")
TARGETS["export_monai"] = _export("monai", "e.pt")


def _plain(value: Any) -> Any:
    """Tensors as arrays."""
    if isinstance(value, torch.Tensor):
        return np.asarray(value.detach().numpy())
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
