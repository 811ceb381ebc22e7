"""Where the numbers of metrics.csv are shown besides: the trackers of accelerate, without a network.

Whoever keeps theirs on a server says so by the tracker's own variables (WANDB_MODE, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.core.config import Config, flatten
from smartlab.core.errors import UseError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

_MLFLOW = "MLFLOW_TRACKING_URI"
_ours: set[str] = set()  # places of earlier runs of this process, which a later one does not take over


def check_tracker(name: str) -> None:
    """Refuse one that is not installed, before any work."""
    from accelerate.tracking import get_available_trackers

    here = [str(one) for one in get_available_trackers()]
    if name not in (*here, "none"):
        fix = f"install it (pip install {name}), or leave train.track at tensorboard, or at none"
        raise UseError(f"train.track={name} is not installed here", found=", ".join(here), fix=fix)


def open_tracker(config: Config, run: Path, start: int) -> GeneralTracker | None:
    """The tracker of a run that begins, or goes on, at step `start`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    name = config.train.track
    if name == "none":
        return None
    if name == "mlflow" and os.environ.get(_MLFLOW) in (None, *_ours):
        os.environ[_MLFLOW] = (run.absolute() / "mlruns").as_uri()
        _ours.add(os.environ[_MLFLOW])
    mode = os.environ.get("WANDB_MODE", "offline")
    given: dict[str, dict[str, Any]] = {  # the first is the name of the folder, or of the project
        "tensorboard": {"run_name": "tensorboard", "logging_dir": run, "purge_step": start},
        "wandb": {"run_name": "smartlab", "name": run.name, "dir": str(run), "mode": mode},
        "mlflow": {"experiment_name": "smartlab", "run_name": run.name},
        "aim": {"run_name": run.name, "logging_dir": str(run)},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](**given[name])
    tracker.start()
    if name != "tensorboard":  # which would make a run of its own of them
        plain = {
            k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(config.model_dump())
        }
        tracker.store_init_configuration(plain)
    return tracker
