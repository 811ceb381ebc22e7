"""Everything that only a GPU can tell, in one call for the day one is there.

    PYTHONPATH=. python -m benchmarks.gpu --minutes 8 --out benchmarks/results/gpu.json

The most telling first; what there is no time for is named in the result, which is written after every part:
losses equal to the CPU's in fp32; whole steps beside the published one (also with MONAI's flash attention for its
teacher) in fp32, bf16 and compiled, for `dagman` (which `smart` is too), `smit` and `swinunetr` at their own sizes; the cost of the teacher's
second, clean look; views a second and peak memory of `dagman` at 128³ by batch. Needs torch, MONAI and this folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.step import Side, changed, steps
from smartlab.core.config import Config, load_config

SMALL = {"data.view": 64, "data.region": 64, "train.batch": 1, "encoder.drop_path": 0.0}


def equal(device: torch.device) -> dict[str, Any]:
    """Losses of three steps on the CPU and on the device, from the same weights and masks."""
    found = {}
    for preset in ("smit", "dagman"):
        config = load_config(preset, SMALL)
        here = Side(config, torch.device("cpu"))
        there = Side(config, device, "ours", {k: v.clone() for k, v in here.method.state_dict().items()})
        for _ in range(3):
            here(), there()
        rows = [(a, b) for a, b in zip(here.losses, there.losses, strict=True)]
        found[preset] = {n: max(abs(float(a[n]) - float(b[n])) for a, b in rows) for n in rows[0][0]}
    return found


def peak(config: Config, device: torch.device, kind: str, turns: int = 3) -> dict[str, Any]:
    """Views a second and peak memory of one side; "out of memory" where it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        side = Side(config, device, kind)
        measured = harness.in_turns({kind: side}, turns, 1, device)[kind]
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory"}
    seconds = measured["seconds"]["median"]
    memory = torch.cuda.max_memory_allocated(device) / 2**30
    return {
        "seconds": seconds,
        "views_per_second": round(2 * config.train.batch / seconds, 2),
        "peak_gib": round(memory, 2),
    }


def second_look(device: torch.device) -> dict[str, Any]:
    """The step as the paper has it beside one whose noisy look also guides."""
    config = load_config("dagman", {"train.batch": 2, "encoder.drop_path": 0.0})
    kind = "ours bf16"
    return {
        "clean look guides": peak(config, device, kind, 5),
        "noisy look guides": peak(changed(config, "teacher", guide="noisy"), device, kind, 5),
    }


def batches(device: torch.device) -> dict[str, Any]:
    """`dagman` at 128³ in bf16, by scans a step (two views each)."""
    found = {}
    for kind in ("ours bf16", "ours bf16 again", "ours bf16 compile"):
        for batch in (1, 4, 8, 16):
            config = load_config("dagman", {"train.batch": batch})
            found[f"{kind}, {batch} scans"] = row = peak(config, device, kind)
            if "failed" in row:
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after so many")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device here; `python -m benchmarks.step` times a CPU")
    device, began = torch.device("cuda"), time.monotonic()
    torch.set_float32_matmul_precision("highest")

    def whole(preset: str) -> Callable[[], Any]:
        return lambda: steps(
            load_config(preset, {"train.batch": 2, "encoder.drop_path": 0.0}), device, asked.turns
        )

    parts: dict[str, Callable[[], Any]] = {
        "equal to the CPU": lambda: equal(device),
        "steps, dagman": whole("dagman"),
        "second look": lambda: second_look(device),
        "steps, smit": whole("smit"),
        "batches": lambda: batches(device),
        "steps, swinunetr": whole("swinunetr"),
    }
    result: dict[str, Any] = {"what": __doc__.split("\n")[0], "machine": harness.machine(), "not_run": []}  # type: ignore[union-attr]
    for name, part in parts.items():
        if time.monotonic() - began > 60 * asked.minutes:
            result["not_run"].append(name)
            continue
        started = time.monotonic()
        try:
            result[name] = part()
        except Exception as error:  # the other parts are worth having
            result[name] = {"failed": f"{type(error).__name__}: {error}"}
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
