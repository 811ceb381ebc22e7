"""smartlab: attention-guided masked image modelling on medical images.

`import smartlab as sl` is light (no torch); each public name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "load_config": "smartlab.core.config",
    "Config": "smartlab.core.config",
    "read_volume": "smartlab.data.images.readers",
    "read_channels": "smartlab.data.images.readers",
    "read_labels": "smartlab.data.images.readers",
    "Volume": "smartlab.data.images.readers",
    "read_mammogram": "smartlab.data.images.mammography",
    "scan_folder": "smartlab.data.cohort.scan",
    "load_manifest": "smartlab.data.cohort.manifest",
    "Manifest": "smartlab.data.cohort.manifest",
    "verify_manifest": "smartlab.data.cohort.verify",
    "build_store": "smartlab.data.store.build",
    "open_store": "smartlab.data.store.store",
    "ViewDataset": "smartlab.data.crops.views",
    "LesionDataset": "smartlab.data.crops.views",
    "CropLoader": "smartlab.data.crops.loader",
    "ImageDataset": "smartlab.data.crops.flat",
    "make_phantom": "smartlab.data.phantoms.make",
    "fetch": "smartlab.data.fetch.sources",
    "pretrain": "smartlab.training.pretrain",
    "Run": "smartlab.training.run",
    "load_encoder": "smartlab.interop.weights",
    "export": "smartlab.interop.weights",
    "wrap": "smartlab.interop.wrap",
    "Preprocessing": "smartlab.interop.wrap",
    "evaluate": "smartlab.evaluation.evaluate",
    "plan_protocol": "smartlab.evaluation.protocols.plan",
    "compare": "smartlab.evaluation.judge.compare",
    "Result": "smartlab.evaluation.judge.result",
    "load_results": "smartlab.batch.results",
    "view": "smartlab.viewers.slices",
    "explore": "smartlab.viewers.explore",
    "DataError": "smartlab.core.errors",
    "UseError": "smartlab.core.errors",
    "SmartlabError": "smartlab.core.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # so that editors and type checkers see the real things
    from smartlab.batch.results import load_results
    from smartlab.core.config import Config, load_config
    from smartlab.core.errors import DataError, SmartlabError, UseError
    from smartlab.data.cohort.manifest import Manifest, load_manifest
    from smartlab.data.cohort.scan import scan_folder
    from smartlab.data.cohort.verify import verify_manifest
    from smartlab.data.crops.flat import ImageDataset
    from smartlab.data.crops.loader import CropLoader
    from smartlab.data.crops.views import LesionDataset, ViewDataset
    from smartlab.data.fetch.sources import fetch
    from smartlab.data.images.mammography import read_mammogram
    from smartlab.data.images.readers import Volume, read_channels, read_labels, read_volume
    from smartlab.data.phantoms.make import make_phantom
    from smartlab.data.store.build import build_store
    from smartlab.data.store.store import open_store
    from smartlab.evaluation.evaluate import evaluate
    from smartlab.evaluation.judge.compare import compare
    from smartlab.evaluation.judge.result import Result
    from smartlab.evaluation.protocols.plan import plan_protocol
    from smartlab.interop.weights import export, load_encoder
    from smartlab.interop.wrap import Preprocessing, wrap
    from smartlab.training.pretrain import pretrain
    from smartlab.training.run import Run
    from smartlab.viewers.explore import explore
    from smartlab.viewers.slices import view


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in ("masking", "viewers"):  # used as sl.masking.…, sl.viewers.…
        return importlib.import_module(f"smartlab.{name}")
    raise AttributeError(f"module 'smartlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
