"""Whole runs: what waiting for data costs, what a second process brings, how long until the first step."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from smartlab.core.config import Config

# one training process, as a user would start it; torch's threads are given, for fairness between 1 and 2
CODE = """
import json, sys, torch
torch.set_num_threads(int(sys.argv[3]))
import smartlab as sl
if __name__ == "__main__":
    sl.pretrain(sl.load_config("tiny", json.loads(sys.argv[1])), sys.argv[2], progress=False)
"""
PHANTOM = {"data.manifest": "phantom-ct", "data.phantom_cases": 12, "train.picture_every": 10**6}


def data_share(config: Config, turns: int) -> dict[str, Any]:
    """The real loop on phantoms and the same step on one batch held ready, in turns."""
    from smartlab.training.pretrain import Pretraining

    data = config.data.model_copy(update={"manifest": "phantom-ct", "phantom_cases": 12})
    config = config.model_copy(update={"data": data})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Pretraining(config, Path(folder) / "run", False, False, None, False)
        try:
            loaded, held = trainer.batches, next(trainer.batches)
            seconds: dict[str, list[float]] = {"real loader": [], "held batch": []}
            waits: list[float] = []
            trainer.one_step()
            for _ in range(turns):
                for name in seconds:
                    trainer.batches = loaded if name == "real loader" else iter([held])  # type: ignore[assignment]
                    began, waited = time.perf_counter(), trainer.loader.wait_seconds
                    trainer.one_step()
                    trainer.step += 1
                    seconds[name].append(time.perf_counter() - began)
                    if name == "real loader":
                        waits.append((trainer.loader.wait_seconds - waited) / seconds[name][-1])
            trainer.batches = loaded
        finally:
            trainer.close()
    return {
        **{name: {"seconds": round(statistics.median(s), 4), "all": s} for name, s in seconds.items()},
        "data_wait_share": round(statistics.median(waits), 4),
    }


def processes(quick: bool) -> dict[str, Any]:
    """`tiny` in one and in two gloo processes with one thread each and the same batch per process."""
    found: dict[str, Any] = {
        "what": "views per second of tiny, one thread per process, two scans per process"
    }
    steps = 8 if quick else 24
    settings = PHANTOM | {
        "train.steps": steps,
        "train.log_every": steps // 2,
        "train.checkpoint_every": 10**6,
    }
    settings |= {"data.workers": 0}
    with tempfile.TemporaryDirectory() as folder:
        launch(settings | {"train.steps": 1}, Path(folder) / "warm", 1)
        for world in (1, 2):
            out = Path(folder) / str(world)
            launch(settings, out, world)
            rows = pd.read_csv(out / "metrics.csv")
            found[str(world)] = round(float(rows.views_per_second.iloc[-1]), 2)
    found["2 / 1"] = round(found["2"] / found["1"], 3)
    return found


def launch(settings: dict[str, Any], out: Path, world: int) -> None:
    """Train in `world` processes and wait for them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    started = []
    for rank in range(world):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if world > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", CODE, json.dumps(settings), str(out), "1"]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE))
    for process in started:
        _, error = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(error.decode()[-2000:])


def start_up() -> dict[str, Any]:
    """From the command line to the end of the first step of `smartlab pretrain tiny`, phantoms and store made."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):  # the first one makes phantoms and reads everything from the disk
            out = Path(folder) / str(number)
            words = ["pretrain", "tiny", "train.steps=1000", "data.phantom_cases=12", "--out", str(out)]
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "smartlab", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            rows = out / "metrics.csv"
            while process.poll() is None and not (rows.is_file() and rows.read_text().count("\n") > 1):
                time.sleep(0.02)
            times.append(round(time.perf_counter() - began, 2))
            failed = process.poll() is not None
            process.kill()
            said, _ = process.communicate()
            if failed:
                raise RuntimeError(said.decode()[-2000:])
    threads = torch.get_num_threads()
    return {
        "seconds": round(statistics.median(times[1:]), 2),
        "first": times[0],
        "all": times,
        "threads": threads,
    }
