"""A step of Primus with hidden patches left out (sparse) beside one that encodes them all (dense), and SMIT's.

    python -m benchmarks.primus --out benchmarks/results/primus.json [--view 96] [--turns 3] [--only dense,sparse]

Masked autoencoding, the student and a light decoder: from the same weights, on the same two views, with the same masks,
in turns within one process; a step is forward, losses, backward, clipping and AdamW. The two are different functions:
a dense student also computes tokens of patches in which nothing is. Beside them SimMIM (dense, a linear head instead
of the decoder) and the whole `smit` step (Swin, teacher and heads). Peak memory is of a fresh process each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.step import Side
from smartlab.core.config import Config, load_config
from smartlab.training.setup import keep_freed_memory

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"method.preset": "mae", "student.encode": "dense"},
    "sparse": {"method.preset": "mae", "student.encode": "sparse"},
    "simmim": {"method.preset": "simmim"},
}
CPU = torch.device("cpu")


def config_of(kind: str, preset: str, view: int) -> Config:
    size = {"data.view": view, "data.region": view, "train.batch": 1, "train.precision": "fp32"}
    if kind == "smit":
        return load_config("smit", size)
    return load_config(preset, size | {"mae.input": view} | KINDS[kind])


def measure(kinds: list[str], preset: str, view: int, turns: int, warm: int) -> dict[str, Any]:
    """Times in turns, views per second, and how many times faster than a dense step the others are."""
    configs = {kind: config_of(kind, preset, view) for kind in kinds}
    dense = Side(configs["dense"], CPU)
    weights = {name: value.clone() for name, value in dense.method.state_dict().items()}
    sides = {"dense": dense, "sparse": Side(configs["sparse"], CPU, weights=weights)}
    sides |= {kind: Side(config, CPU) for kind, config in configs.items() if kind not in sides}
    found: dict[str, Any] = dict(harness.in_turns(sides, turns, warm))
    for kind, config in configs.items():
        found[kind]["views_per_second"] = round(2 / found[kind]["seconds"]["median"], 4)
        found[kind]["parameters"] = sum(p.numel() for p in sides[kind].weights)
        found[kind]["mask_ratio"] = config.mask.ratio
    return found | {
        f"dense / {kind}": harness.ratio(found, "dense", kind) for kind in configs if kind != "dense"
    }


def peak(kind: str, preset: str, view: int) -> dict[str, float]:
    """Megabytes that one step holds at most, and how many of them came with it."""
    start = harness.peak_megabytes()
    side = Side(config_of(kind, preset, view), CPU)
    side()
    return {"peak_mb": harness.peak_megabytes(), "above_start_mb": harness.peak_megabytes() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="primus-s")
    parser.add_argument("--view", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/primus.json"))
    parser.add_argument("--warm", type=int, default=1, help="steps of each that are not counted")
    parser.add_argument("--only", default=",".join((*KINDS, "smit")), help="dense, sparse and which others")
    parser.add_argument("--peak", choices=(*KINDS, "smit"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak, args.preset, args.view)))
        return
    keep_freed_memory()
    kinds, words = args.only.split(","), ("--preset", args.preset, "--view", str(args.view))
    result: dict[str, Any] = {"preset": args.preset, "view": args.view, "views": 2}
    result["machine"] = harness.machine()
    result["step"] = measure(kinds, args.preset, args.view, args.turns, args.warm)
    harness.write(result, args.out)
    result["memory"] = {
        kind: harness.in_fresh_process("benchmarks.primus", "--peak", kind, *words) for kind in kinds
    }
    harness.write(result, args.out)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
