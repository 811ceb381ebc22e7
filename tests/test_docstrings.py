"""Every example of a docstring runs, in a folder with the files and on the small cohort that it names.

What an example shows as its result must be what comes; where it shows none, anything may. The presets and
phantoms that examples name are exchanged for small ones of the same name, so that they run as they are written.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import shutil
from unittest.mock import MagicMock

import monai
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from pydantic import Field

import smartlab as sl
from smartlab.core import config, settings
from smartlab.data.cohort import manifest
from tests.batch.test_report import record
from tests.conftest import REPO
from tests.evaluation.finetune.test_trainer import TINY
from tests.shared import once
from tests.training.conftest import FLAT, SMALL

# by the name of what has the docstring
SLOW = {"outcome", "open_cohort", "clusters", "evaluate", "compare", "build_store"}
CHECKED = {"run_batch", "segment", "classify", "read_mask"}  # their arguments are, the work is not done


def examples():
    """(module, name of what has the docstring, docstring) of all docstrings with an example."""
    for path in sorted((REPO / "smartlab").rglob("*.py")):
        module = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    name = "" if isinstance(node, ast.Module) else node.name
                    whole = ".".join(filter(None, [module, name]))
                    yield pytest.param(module, text, id=whole, marks=[pytest.mark.slow] * (name in SLOW))


class AnyResultWhereNoneIsShown(doctest.OutputChecker):
    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Exchanges shipped presets and phantoms for small ones; the folder of what was made of them."""
    patch = pytest.MonkeyPatch()
    of_ct = {"n": 24, "shape": [64, 64, 64], "spacing": 5.0}
    of_mammo = {"n": 6, "shape": [256, 192], "spacing": 1.0}
    few = {"train.steps": 2, "train.checkpoint_every": 2}
    tiny = {
        "tiny": SMALL | TINY | few | {"data.spacing": 5.0, "data.phantom_cases": 24},
        "miram-tiny": FLAT | few | {"data.phantom_cases": 6},
    }

    def make(folder):
        shutil.copytree(config.PRESET_FOLDER, folder / "presets", dirs_exist_ok=True)
        for name, changed in tiny.items():
            settings = sl.load_config(name, changed).model_dump(mode="json")
            (folder / "presets" / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        shutil.copytree(REPO / "data_manifests", folder / "manifests", dirs_exist_ok=True)
        for path in (folder / "manifests").glob("phantom-*.csv"):
            pd.read_csv(path, dtype=str).assign(split="").to_csv(path, index=False)  # too few for a test part
        for name, parameters in (("phantom-ct", of_ct), ("phantom-mammo", of_mammo)):
            shipped = json.loads((REPO / "data_manifests" / f"{name}.json").read_text(encoding="utf-8"))
            shipped["source"]["parameters"] |= parameters
            (folder / "manifests" / f"{name}.json").write_text(json.dumps(shipped), encoding="utf-8")

    made = once(tmp_path_factory, "small-shipped", make)
    patch.setattr(config, "PRESET_FOLDER", made / "presets")
    patch.setattr(manifest, "manifest_folder", lambda: made / "manifests")
    patch.setenv("SMARTLAB_CACHE", str(made / "cache"))

    def train(folder):
        sl.pretrain("tiny", out=folder / "a", progress=False)
        sl.pretrain("miram-tiny", out=folder / "miram", progress=False)

    yield made, once(tmp_path_factory, "small-runs", train)
    patch.undo()


def names_of(place, module, used):
    """What examples take for given, by name; made where `used` says that an example does."""
    made, runs = place
    ct, mammo = made / "cache" / "phantom-ct-24-seed0", made / "cache" / "phantom-mammo-6-seed0-drawing2"
    generator = torch.Generator().manual_seed(0)

    def store():
        of_images = module == "smartlab.data.crops.flat"
        return sl.open_store(f"{mammo}-store-1mm" if of_images else f"{ct}-store-5mm")

    def net():
        from smartlab.evaluation.finetune import segmenter

        return segmenter.build(sl.load_encoder(runs / "a"), 2, pretrained=False, seed=0)

    def views():
        scans = module == "smartlab.models.reach"
        return torch.rand(2, 1, *[32] * (3 if scans else 2), generator=generator)

    def table():
        from smartlab.evaluation.features.features import lesion_features

        return lesion_features(runs / "a", store(), ct, pooling="cls", progress=False)

    def result():
        return sl.evaluate(runs / "a", "probe", ct, label="malignancy", folds=2, draws=100, progress=False)

    def features_per_organ():
        from smartlab.evaluation.features.features import organ_features

        return organ_features(runs / "a", store(), ct, progress=False)

    def auc():
        from smartlab.evaluation.judge.metrics import auc

        return auc

    def umap():
        return np.random.default_rng(0).normal(size=(16, 2))

    def heads():
        return np.random.default_rng(0).dirichlet(np.ones(27), 3).reshape(3, 3, 3, 3)

    def mask():
        return np.random.default_rng(1).random((3, 3, 3)) < 0.7

    makers = {
        "store": store,
        "man": lambda: sl.load_manifest(ct),
        "table": table,
        "volumes": table,
        "untrained": table,
        "first": result,
        "second": result,
        "features_per_organ": features_per_organ,
        "views": views,
        "generator": lambda: generator,
        "method": lambda: sl.Run(runs / "miram").method(),
        "auc": auc,
        "patients": lambda: np.arange(40),
        "truth": lambda: np.arange(40) % 2,
        "score": lambda: np.random.default_rng(0).normal(size=40),
        "attention": lambda: torch.rand(2, 216, generator=generator),
        "volume": lambda: np.random.default_rng(0).integers(-900, 900, (48, 48, 48)).astype(np.int16),
        "image": lambda: torch.rand(1, 1, 16, 16, generator=generator),
        "crop": lambda: np.random.default_rng(0).integers(-900, 900, (48, 48, 48)).astype(np.int16),
        "hidden": mask,
        "heads": heads,
        "net": net,
        "encoder": lambda: sl.load_encoder(runs / "a"),
        "read_volume": lambda: only_bound(sl.read_volume),
        "ViewDataset": lambda: sl.ViewDataset,
        "MaeConfig": lambda: settings.MaeConfig,
        "a": mask,
        "b": mask,
        **dict.fromkeys("qkv", lambda: torch.rand(1, 4, 64, 16, generator=generator)),
        "umap": umap,
        "organs": lambda: ["liver", "heart"] * 8,
        "cases": lambda: list(range(16)),
        "epoch": lambda: 0,
        "index": lambda: 0,
        "step": lambda: lambda views: None,
        "path": lambda: "loader.pt",
    }
    return {name: make() for name, make in makers.items() if name in used}


def furnish(folder, place):
    """The files that examples name, below the folder in which they run."""
    made, runs = place
    ct, mammo = made / "cache" / "phantom-ct-24-seed0", made / "cache" / "phantom-mammo-6-seed0-drawing2"
    (folder / "my").mkdir()
    for path in (ct / "manifest.json", *ct.glob("*.csv")):
        shutil.copy(path, folder / "my")
    (folder / "my" / "images").symlink_to(ct)
    shutil.copytree(f"{ct}-store-5mm", folder / "my" / "store")
    shutil.copytree(runs, folder / "runs")
    (folder / "images").symlink_to(mammo / "images")
    (folder / "scan.nii.gz").symlink_to(next((ct / "images").glob("*.nii.gz")))
    record(folder / "runs" / "components" / "probe" / "p-1", "1", "probe", strategy="random")
    for slice_ in (0, 1, 2, 4, 5):
        path = folder / "data" / "nodules" / "benign" / "exam7" / "Nodule 002" / f"{slice_}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32), 10 * slice_, np.uint8)).save(path)
    patients = sl.load_manifest(ct).patients
    rows = [f"{name},{50 + i},{'+-'[i % 2]}" for i, name in enumerate(patients)]
    (folder / "clinic.csv").write_text("\n".join(["patient,age,egfr", *rows]))
    (folder / "labels.csv").write_text("\n".join(["Case ID,age,EGFR mutation status", *rows]))


@pytest.mark.parametrize(("module", "text"), examples())
def test_an_example_runs_as_it_is_written(module, text, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMARTLAB_CACHE", str(small[0] / "cache"))
    furnish(tmp_path, small)
    if "runs/smit" in text:
        for name in ("smart", "smit"):
            result = names_of(small, module, {"first"})["first"]
            result.save(tmp_path / "runs" / name / "evaluation" / "probe")
    test = doctest.DocTestParser().get_doctest(text, {}, module, None, None)
    found = importlib.import_module(module)
    used = {name for example in test.examples for name in compile(example.source, "", "exec").co_names}
    given = {name: getattr(found, name) for name in used if hasattr(found, name)} | vars(found)
    checked = {name: only_bound(given[name]) for name in CHECKED & used if name in given}
    common = {"sl": sl, "torch": torch, "np": np, "monai": monai, "Field": Field}
    test.globs = common | names_of(small, module, used - set(given)) | given | checked
    runner = doctest.DocTestRunner(AnyResultWhereNoneIsShown(), verbose=False, optionflags=doctest.ELLIPSIS)
    said = []
    assert runner.run(test, out=said.append).failed == 0, "".join(said)
    assert not any(doctest.SKIP in example.options for example in test.examples), "no example is left out"


def only_bound(function):
    """A function that looks whether its arguments are some, and returns what has any result."""

    def check(*args, **more):
        inspect.signature(function).bind(*args, **more)
        return MagicMock()

    return check
