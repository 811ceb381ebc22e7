"""smartlab: attention-guided masked image modelling on medical images.

`import smartlab as sl` is light (no torch); each public name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "load_config": "smartlab.config",
    "Config": "smartlab.config",
    "read_volume": "smartlab.data.readers",
    "read_labels": "smartlab.data.readers",
    "Volume": "smartlab.data.readers",
    "read_mammogram": "smartlab.data.mammography",
    "scan_folder": "smartlab.data.scan",
    "load_manifest": "smartlab.data.manifest",
    "Manifest": "smartlab.data.manifest",
    "verify_manifest": "smartlab.data.verify",
    "build_store": "smartlab.data.store",
    "open_store": "smartlab.data.store",
    "ViewDataset": "smartlab.data.crops",
    "LesionDataset": "smartlab.data.crops",
    "CropLoader": "smartlab.data.crops",
    "ImageDataset": "smartlab.data.images",
    "make_phantom": "smartlab.data.phantom",
    "fetch": "smartlab.data.sources",
    "pretrain": "smartlab.training.loop",
    "Run": "smartlab.training.run",
    "load_encoder": "smartlab.interop",
    "export": "smartlab.interop",
    "evaluate": "smartlab.evaluation.evaluate",
    "plan_protocol": "smartlab.evaluation.protocols.plan",
    "compare": "smartlab.evaluation.compare",
    "Result": "smartlab.evaluation.result",
    "load_results": "smartlab.batch.results",
    "view": "smartlab.viewers.slices",
    "explore": "smartlab.viewers.explore",
    "DataError": "smartlab.errors",
    "UseError": "smartlab.errors",
    "SmartlabError": "smartlab.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # so that editors and type checkers see the real things
    from smartlab.batch.results import load_results
    from smartlab.config import Config, load_config
    from smartlab.data.crops import CropLoader, LesionDataset, ViewDataset
    from smartlab.data.images import ImageDataset
    from smartlab.data.mammography import read_mammogram
    from smartlab.data.manifest import Manifest, load_manifest
    from smartlab.data.phantom import make_phantom
    from smartlab.data.readers import Volume, read_labels, read_volume
    from smartlab.data.scan import scan_folder
    from smartlab.data.sources import fetch
    from smartlab.data.store import build_store, open_store
    from smartlab.data.verify import verify_manifest
    from smartlab.errors import DataError, SmartlabError, UseError
    from smartlab.evaluation.compare import compare
    from smartlab.evaluation.evaluate import evaluate
    from smartlab.evaluation.protocols.plan import plan_protocol
    from smartlab.evaluation.result import Result
    from smartlab.interop import export, load_encoder
    from smartlab.training.loop import pretrain
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
