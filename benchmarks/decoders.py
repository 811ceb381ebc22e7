"""What the high-resolution decoder costs as images grow: softmax attention and the three linear kinds.

    python -m benchmarks.decoders [--largest 1024] [--width 64] --json benchmarks/results/decoders.json

One forward and backward pass of MIRAM's decoder at twice the resolution of the input (one block, one image,
float32, one thread), for inputs of 128 to 1024 pixels in patches of 16: 256 to 16384 tokens.

- Time is that of the process on its core, so that what else the machine does hardly counts: the best of several. Memory that was once taken from the system is kept (glibc only): else every tensor above 32 MB is
  given back and asked for again, and the kernel's clearing of its pages, not the attention, is what grows.
- Memory is the peak of what torch's allocator had given out at once, parameters left out (from the profiler, which
  sees the temporaries inside of kernels too).
- `softmax` uses torch's fused kernel, which never holds the whole matrix: its time grows with the square of the
  tokens, its memory does not. `softmax_written_out` holds the matrix, as decoders did before there was such a kernel;
  it is measured up to `--largest-written-out`.
- Exponents are slopes of log cost over log tokens: `all` over every size, `upper` over the largest four.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import machine
from smartlab.core.places import code_version
from smartlab.core.plots import OKABE_ITO
from smartlab.core.settings import Decoding, MaeConfig
from smartlab.models.decoder import Decoder

INPUTS, PATCH, SCALE, CHANNELS = (128, 192, 256, 384, 512, 768, 1024), 16, 2, 96
KINDS = ("softmax", "softmax_written_out", "nystrom", "linformer", "performer")
RESULTS = Path(__file__).parent / "results" / "decoders.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "decoders.png"


class WrittenOut(nn.Module):
    """Softmax attention that holds the whole matrix."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--largest", type=int, default=1024, help="input, pixels")
    parser.add_argument("--largest-written-out", type=int, default=512, help="input, pixels: memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--draw-only", action="store_true", help="draw the results that are there")
    args = parser.parse_args()
    if not args.draw_only:
        report = measure(args)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report = json.loads(args.json.read_text(encoding="utf-8"))
    draw(report, args.picture)
    print(json.dumps(report["exponents"], indent=1))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every kind at every size."""
    torch.set_num_threads(1)
    kept = keep_memory()
    settings, rows = MaeConfig(), []
    for kind in KINDS:
        for size in INPUTS:
            if size > (args.largest_written_out if kind == "softmax_written_out" else args.largest):
                continue
            decoder, step = make(kind, size, args.width, args.heads, settings)
            first = timed(step)  # loads and sets up what there is; nothing beside a long step
            seconds = first if first > 5 else min(timed(step) for _ in range(args.repeats))
            rows.append(
                {
                    "kind": kind,
                    "input": size,
                    "tokens": (SCALE * size // PATCH) ** 2,
                    "seconds": round(seconds, 5),
                    "peak_mb": round(peak_bytes(step) / 2**20, 3),
                    "parameters": sum(p.numel() for p in decoder.parameters()),
                }
            )
            print(rows[-1], flush=True)
    return {
        "what": "one forward and backward pass of the decoder at twice the input's resolution; see benchmarks/decoders.py",
        "settings": {
            "patch": PATCH,
            "width": args.width,
            "heads": args.heads,
            "blocks": 1,
            "batch": 1,
            "memory_kept": kept,
            **{k: getattr(settings, k) for k in ("landmarks", "iterations", "kernel", "rank", "features")},
        },
        "exponents": exponents(rows),
        "rows": rows,
        "machine": machine(),
        "code": code_version(),
    }


def make(kind: str, size: int, width: int, heads: int, settings: MaeConfig) -> tuple[Decoder, Any]:
    """A decoder and a function that does one step of it: a quarter of the patches seen, the rest predicted."""
    torch.manual_seed(0)
    side = size // PATCH
    attention: Any = "softmax" if kind.startswith("softmax") else kind
    decoder = Decoder(CHANNELS, side, PATCH, Decoding(SCALE, attention, 1.0, 1, width, heads), settings)
    if kind == "softmax_written_out":
        for block in decoder.blocks:
            block.attn.core = WrittenOut()  # type: ignore[union-attr, assignment]
    keep = torch.randperm(side**2)[: side**2 // 4].sort().values[None]
    seen = torch.randn(1, 1 + keep.shape[1], CHANNELS)

    def step() -> None:
        decoder(seen, keep).square().mean().backward()
        decoder.zero_grad(set_to_none=True)

    return decoder, step


def keep_memory() -> bool:
    """Have the allocator keep what it has, whatever its size; False where it cannot be told."""
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    return bool(tell(mmap_max, 0)) and bool(tell(trim_threshold, 2**31 - 1))


def timed(step: Any) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def peak_bytes(step: Any) -> int:
    """The most that torch's allocator had given out at once during a step."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Slopes of log cost over log tokens."""
    found = {}
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        tokens = np.log([row["tokens"] for row in own])
        found[kind] = {
            f"{cost}_{part}": round(
                float(np.polyfit(tokens[which], np.log([row[cost] for row in own])[which], 1)[0]), 3
            )
            for cost in ("seconds", "peak_mb")
            for part, which in (("all", slice(None)), ("upper", slice(-4, None)))
        }
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    names = {"softmax": "softmax, fused", "softmax_written_out": "softmax, matrix held", "nystrom": "Nyström"}
    for ax, cost, label in zip(
        axes, ("seconds", "peak_mb"), ("seconds per step, one core", "peak memory, MB"), strict=True
    ):
        for kind, colour in zip(KINDS, OKABE_ITO, strict=False):
            own = [row for row in report["rows"] if row["kind"] == kind]
            slope = report["exponents"][kind][f"{cost}_all"]
            ax.loglog(
                [row["tokens"] for row in own],
                [row[cost] for row in own],
                "o--" if kind == "softmax_written_out" else "o-",
                color=colour,
                lw=5 if kind == "softmax" else 1.5,  # its memory lies below Linformer's line
                ms=9 if kind == "softmax" else 6,
                alpha=0.7 if kind == "softmax" else 1,
                label=f"{names.get(kind, kind.capitalize())}: tokens$^{{{slope:.2f}}}$",
            )
        ax.set_xlabel("tokens of the decoder (input 128 to 1024 pixels)")
        ax.set_ylabel(label)
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(frameon=False, fontsize=9)
    s = report["settings"]
    fig.suptitle(
        f"Decoder at twice the resolution, forward and backward: one block, width {s['width']}, {s['heads']} heads",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    main()
