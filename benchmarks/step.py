"""A pretraining step beside the step as published (`reference.py`): time, losses, memory, parts, scaling.

    python -m benchmarks.step --out benchmarks/results/step.json [--quick] [--device cuda] [--only step,memory]

Both sides run in one process, in turns, from the same weights, on the same views, with the same masks: after
every turn their losses are compared. A step is everything: teacher, masks, student, heads, losses, backward,
clipping, AdamW, teacher update; data come apart, in `data`. `--device cuda` adds bf16 and torch.compile sides.
"ours sparse" has `student.encode=sparse`: another function, so its losses are told but not compared;
"ours again" has `encoder.checkpointing`, "ours sparse again" both. `floor` is what the arithmetic alone would take;
`bf16` (only when asked for: minutes without bf16 units) compares losses, not times.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.reference import Reference
from benchmarks.running import data_share, processes, start_up
from smartlab.core.clock import Clock
from smartlab.core.config import Config, load_config
from smartlab.training.families import family_of
from smartlab.training.setup import keep_freed_memory, parameter_groups

SECTIONS = (
    "encoder",
    "step",
    "parts",
    "floor",
    "memory",
    "scaling",
    "data",
    "processes",
    "start_up",
    "looks",
    "bf16",
)
BF16 = (
    0.004  # how far apart losses may be, as a share: what rounding once to the eight bits of bf16 may change
)


class Side:
    """One implementation, its optimiser, and one fixed batch of views."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        kind: str = "ours",
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        ours = not kind.startswith("reference")
        torch.manual_seed(0)
        if "sparse" in kind:
            config = changed(config, "student", encode="sparse")
        if "again" in kind:
            config = changed(config, "encoder", checkpointing=True)
        method = family_of(config).method(config) if ours else Reference(config, flash="flash" in kind)
        if weights is not None:
            method.load_state_dict(weights)
        self.method, self.device, self.step = method.to(device).train(), device, 0
        self.optimiser = torch.optim.AdamW(parameter_groups(method), lr=1e-4, fused=True if ours else None)
        self.weights = [p for p in method.parameters() if p.requires_grad]
        self.model: Any = torch.compile(method) if "compile" in kind else method
        self.bf16 = "bf16" in kind
        views = torch.rand(
            config.train.batch, 2, 1, *(config.data.view,) * 3, generator=torch.Generator().manual_seed(1)
        )
        self.views = views.to(device)
        self.losses: list[dict[str, float]] = []
        self.parts = harness.Parts(device)

    def __call__(self) -> None:
        """One whole step."""
        part, generator = self.parts, torch.Generator().manual_seed(self.step)
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with part("other"), cast:
            loss, metrics = self.model(self.views, Clock(self.step, 1000, 100), generator)
        with part("backward"):
            loss.backward()
        with part("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.weights, 3.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        with part("teacher update"):
            self.method.update_teacher(0.996)
        self.step += 1
        self.losses.append({n: v.detach() for n, v in metrics.items() if n.startswith("loss")})

    def in_parts(self) -> None:
        """Time what the method does inside, too."""
        m: Any = self.method
        for name, calls in {
            "teacher": ("look",),
            "mask": ("choose",),
            "metrics": ("watch",),
            "losses": ("predict_voxels", "match_tokens", "match_images"),
        }.items():
            for call in calls:
                setattr(m, call, self.parts.wrap(name, getattr(m, call)))
        modules: list[tuple[str, nn.Module | None]] = [
            ("student", m.student.encoder),
            ("heads", m.reconstruct),
        ]
        for branch in (m.student, m.teacher):
            heads = (branch.patch_head, branch.image_head, branch.global_head) if branch else ()
            modules += [("heads", head) for head in heads]
        for name, module in modules:
            if module is not None:
                module.forward = self.parts.wrap(name, module.forward)  # type: ignore[method-assign]


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def pair(config: Config, device: torch.device) -> dict[str, Side]:
    """Reference and ours with the same weights, ours with a sparse student too; on a GPU also in bf16, and compiled."""
    ours = Side(config, device)
    state = {name: value.clone() for name, value in ours.method.state_dict().items()}
    sides = {"reference": Side(config, device, "reference", state), "ours": ours}
    more = ["ours again", "ours sparse"]
    if device.type == "cuda":
        more += ["reference flash", "ours bf16", "ours bf16 compile", "ours bf16 sparse"]
    return sides | {kind: Side(config, device, kind, state) for kind in more}


def steps(config: Config, device: torch.device, turns: int) -> dict[str, Any]:
    """Whole steps in turns; losses beside each other after the same number of steps."""
    sides = pair(config, device)
    measured: dict[str, Any] = dict(harness.in_turns(sides, turns, 1, device))
    views = 2 * config.train.batch
    for name in [name for name in sides if name != "reference"]:
        measured[f"reference / {name}"] = harness.ratio(measured, "reference", name)
        apart = {
            key: max(
                abs(float(a[key]) - float(b[key]))
                for a, b in zip(sides["reference"].losses, sides[name].losses, strict=True)
            )
            for key in sides[name].losses[0]
            if key in sides["reference"].losses[0]
        }
        if "sparse" not in name:  # another function
            measured[name]["losses_apart"] = apart
    for name in sides:
        measured[name]["views_per_second"] = round(views / measured[name]["seconds"]["median"], 3)
        measured[name]["last_losses"] = {k: round(float(v), 6) for k, v in sides[name].losses[-1].items()}
    return {"views": views, "view": config.data.view, **measured}


def bf16(config: Config, device: torch.device, turns: int) -> dict[str, Any]:
    """Losses of ours under bf16 autocast beside those of the reference in fp32, step after step: no times."""
    config = changed(config, "encoder", drop_path=0.0)  # else each side draws paths of its own
    published = Side(config, device, "reference")
    state = {name: value.clone() for name, value in published.method.state_dict().items()}
    ours = Side(config, device, "ours bf16", state)
    for _ in range(turns):
        published(), ours()
    apart = {
        name: max(
            abs(float(b[name]) / float(a[name]) - 1)
            for a, b in zip(published.losses, ours.losses, strict=True)
        )
        for name in published.losses[0]
    }
    finite = all(
        math.isfinite(value) for side in (published, ours) for row in side.losses for value in row.values()
    )
    return {
        "steps": turns,
        "apart": apart,
        "tolerance": BF16,
        "within": finite and all(value <= BF16 for value in apart.values()),
    }


def floor(config: Config, device: torch.device, size: int = 4096) -> dict[str, Any]:
    """Matrix products of a step, counted, and the time that these alone take at the speed of large ones."""
    from torch.utils.flop_counter import FlopCounterMode

    found: dict[str, Any] = {"gflop": {}, "seconds": {}}
    a = torch.rand(size, size, device=device)
    seconds = harness.in_turns({"product": lambda: torch.mm(a, a)}, 7, 1, device)["product"]["seconds"]
    found["gflop_per_second"] = round(2 * (size / 1000) ** 3 / min(seconds["all"]), 1)
    for name, side in pair(config, device).items():
        if "bf16" in name:
            continue
        side()
        with FlopCounterMode(display=False) as counter:
            side()
        found["gflop"][name] = round(counter.get_total_flops() / 1e9, 1)
        found["seconds"][name] = round(found["gflop"][name] / found["gflop_per_second"], 2)
    return found


def looks(config: Config, device: torch.device, turns: int) -> dict[str, Any]:
    """What the teacher's second look costs: `guide=clean` beside one noisy look, and one look of a clean teacher."""
    smart = load_config(
        "smart", {"train.batch": config.train.batch, "data.view": config.data.view, "data.region": 160}
    )
    teachers: dict[str, dict[str, Any]] = {
        "clean": {},
        "noisy": {"guide": "noisy"},
        "one": {"patch_dropout": 0.0},
    }
    sides = {name: Side(changed(smart, "teacher", **more), device) for name, more in teachers.items()}
    found: dict[str, Any] = dict(harness.in_turns(sides, turns, 1, device))
    return found | {f"clean / {name}": harness.ratio(found, "clean", name) for name in ("noisy", "one")}


def encoder(config: Config, device: torch.device, turns: int) -> dict[str, Any]:
    """The encoder alone, nothing masked: forward, and forward with backward."""
    found = {}
    sides = {n: s.method.student.encoder.swin for n, s in pair(config, device).items() if " " not in n}
    views = torch.rand(2 * config.train.batch, 1, *(config.data.view,) * 3, device=device)

    def forward(swin: Any) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                swin.stages(swin.embed(views))

        return call

    def both(swin: Any) -> Callable[[], None]:
        def call() -> None:
            swin.stages(swin.embed(views))[-1].square().mean().backward()
            swin.zero_grad(set_to_none=True)

        return call

    for name, make in (("forward", forward), ("forward and backward", both)):
        measured = harness.in_turns({n: make(swin) for n, swin in sides.items()}, turns, 1, device)
        found[name] = measured | {"reference / ours": harness.ratio(measured, "reference", "ours")}
    return found


def parts(config: Config, device: torch.device, turns: int) -> dict[str, Any]:
    """Seconds by part of the step; teacher and student include their encoders, `losses` not their heads."""
    # a compiled step is one graph: its parts cannot be told apart from outside
    sides = {name: side for name, side in pair(config, device).items() if "compile" not in name}
    for side in sides.values():
        side.in_parts()
        side()
    for _ in range(turns):
        for side in sides.values():
            side.parts.begin()
            side()
    return {name: side.parts.medians() for name, side in sides.items()}


def memory(words: list[str]) -> dict[str, Any]:
    """Peak of each side, two steps in a process of its own."""
    kinds = ("reference", "ours", "ours again", "ours sparse", "ours sparse again")
    found: dict[str, Any] = {
        k: harness.in_fresh_process("benchmarks.step", "--peak", k, *words) for k in kinds
    }
    for kind in kinds[1:]:
        for what in ("peak_mb", "above_start_mb"):
            found[f"{kind} / reference, {what}"] = round(found[kind][what] / found["reference"][what], 3)
    return found


def peak(config: Config, device: torch.device, kind: str) -> dict[str, float]:
    """Runs in a process of its own: what importing and the interpreter hold is `start_mb`."""
    if kind.startswith("ours") and device.type == "cpu":
        keep_freed_memory()  # as training does
    start = harness.peak_megabytes(device)
    side = Side(config, device, kind)
    side(), side()
    top = harness.peak_megabytes(device)
    return {"start_mb": round(start), "peak_mb": round(top), "above_start_mb": round(top - start)}


def scaling(device: torch.device, quick: bool) -> dict[str, Any]:
    """Both sides over crop size, batch and preset; one turn each, so read ratios, not hundredths."""
    cases: list[tuple[str, dict[str, Any]]] = [("tiny", {}), ("smit", {"data.view": 64})]
    if not quick:
        cases += [("smit", {"data.view": 64, "train.batch": 2}), ("smit", {"data.view": 96})]
        cases += [("smart", {"data.view": 64}), ("smart", {"data.view": 96}), ("tiny", {"data.view": 96})]
    if device.type == "cuda":
        cases += [("smart", {}), ("smit", {"train.batch": 8}), ("smart", {"train.batch": 4})]
    found = {}
    for preset, settings in cases:
        config = load_config(preset, {"train.batch": 1, "data.region": 160, **settings})
        label = f"{preset}, view {config.data.view}, {2 * config.train.batch} views"
        found[label] = steps(config, device, 1)
        say(f"scaling: {label}", found[label]["reference / ours"]["seconds"]["median"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--preset", default="smit")
    parser.add_argument("--view", type=int, help="voxels per side; default: the preset's")
    parser.add_argument("--batch", type=int, default=1, help="scans, two views each")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two turns and few cases")
    asked_for = [
        name for name in SECTIONS if name not in ("looks", "bf16")
    ]  # minutes where a CPU has no bf16 units
    parser.add_argument("--only", default=",".join(asked_for), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    settings: dict[str, Any] = {"train.batch": asked.batch, "train.precision": "fp32"}
    if asked.view:
        settings |= {"data.view": asked.view, "data.region": max(asked.view, 128)}
    config, device = load_config(asked.preset, settings), torch.device(asked.device)
    if asked.peak:
        print(json.dumps(peak(config, device, asked.peak)))
        return
    if device.type == "cpu":
        keep_freed_memory()  # for both sides: the published code would not have it
    result = measure(asked, config, device)
    if asked.out:
        harness.write(result, asked.out)
        from benchmarks.report import report

        report(result, asked.out)
    else:
        print(json.dumps(result, indent=1))


def measure(asked: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    turns = 2 if asked.quick else asked.turns
    words = [
        f"--{key}={value}"
        for key in ("preset", "view", "batch", "threads", "device")
        if (value := getattr(asked, key))
    ]
    every: dict[str, Callable[[], Any]] = {
        "step": lambda: steps(config, device, turns),
        "encoder": lambda: encoder(config, device, turns),
        "parts": lambda: parts(config, device, turns),
        "floor": lambda: floor(config, device),
        "memory": lambda: memory(words),
        "data": lambda: data_share(config, 2 if asked.quick else 4),
        "scaling": lambda: scaling(device, asked.quick),
        "processes": lambda: processes(asked.quick),
        "start_up": start_up,
        "looks": lambda: looks(config, device, turns),
        "bf16": lambda: bf16(config, device, turns),
    }
    result: dict[str, Any] = {
        "what": "a pretraining step beside the same step as published, in turns within one process",
        "preset": asked.preset,
        "config": config.model_dump(mode="json"),
        "machine": harness.machine(),
    }
    for name in asked.only.split(","):
        say(name, "…")
        result[name] = every[name]()
    return result


def say(what: str, value: Any) -> None:
    print(f"{what}: {value}", flush=True)


if __name__ == "__main__":
    main()
