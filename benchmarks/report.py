"""The table and the plot of a step's benchmark, drawn from its JSON.

python -m benchmarks.report benchmarks/results/step.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WHERE = (
    "teacher",
    "student",
    "heads",
    "losses",
    "mask",
    "metrics",
    "other",
    "backward",
    "optimiser",
    "teacher update",
)


def table(result: dict[str, Any]) -> str:
    """Markdown, from whatever sections were measured."""
    m = result["machine"]
    lines = [
        f"Machine: {m['gpu'] or m['cpu']}, {m['cores']} cores, {m['threads']} threads, "
        f"torch {m['torch']}, load before {m['load_before']}; AVX-512 {m['avx512']}, bf16 units {m['bf16_units']}.",
        "",
        "| what | reference | ours | times faster, wall | times faster, CPU time |",
        "|---|---|---|---|---|",
    ]
    rows = {f"whole step, {result['preset']}": result.get("step")}
    rows |= {f"encoder {name}": v for name, v in result.get("encoder", {}).items()}
    rows |= {f"step, {name}": v for name, v in result.get("scaling", {}).items()}
    for name, row in rows.items():
        for side in [key.removeprefix("reference / ") for key in row or () if key.startswith("reference / ")]:
            r, how = row[f"reference / {side}"], side.removeprefix("ours").replace("again", "checkpointing")
            cells = [f"{spread(row[one]['seconds'])} s" for one in ("reference", side)]
            cells += [spread(r["seconds"]), spread(r["cpu_seconds"])]
            lines.append(f"| {name}{how and ','}{how} | {' | '.join(cells)} |")
    if step := result.get("step"):
        lines += ["", f"Losses apart at most: {step['ours']['losses_apart']}"]
    if memory := result.get("memory"):
        for side in [name for name in memory if "/" not in name]:
            lines += ["", f"Peak memory, {side}: {memory[side]}"]
        share = {k: v for k, v in memory.items() if "/" in k}
        lines += ["", f"Peak memory: {share}"]
    for name in ("floor", "data", "processes", "start_up", "bf16"):
        if name in result:
            lines += ["", f"{name}: {json.dumps(result[name])}"]
    return "\n".join(lines) + "\n"


def spread(values: dict[str, Any]) -> str:
    low, high = values["quartiles"]
    return f"{values['median']:.2f} [{low:.2f}, {high:.2f}]"


def plot(result: dict[str, Any], path: Path) -> None:
    """Where the time of a step goes, both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts: dict[str, dict[str, float]] = result["parts"]
    names = [n for n in WHERE if any(p.get(n, 0) > 0 for p in parts.values())]
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.8 * len(parts)), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for row, times in enumerate(parts.values()):
        left = 0.0
        for colour, name in zip(colours, names, strict=False):
            seconds = times.get(name, 0.0)
            axes.barh(row, seconds, left=left, color=colour, height=0.6, label=name if row == 0 else None)
            left += seconds
        axes.text(left, row, f" {left:.2f} s", va="center")
    axes.set_yticks(range(len(parts)), [name.replace("again", "checkpointing") for name in parts])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(sum(p.values()) for p in parts.values()))
    axes.set_xlabel(
        f"seconds per step, {result['preset']}, {result['step']['views'] if 'step' in result else 2} views"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(result: dict[str, Any], out: Path) -> None:
    """Write the table and the plot beside the JSON."""
    text = table(result)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    if result.get("parts"):
        plot(result, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    report(json.loads(file.read_text(encoding="utf-8")), file)
