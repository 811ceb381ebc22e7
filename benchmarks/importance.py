"""What the importance map points at, when the teacher sees less and when more is hidden.

    python -m benchmarks.importance --runs runs/components     # after benchmarks.components' two plans

For every pretrained encoder of the plans, on views of the training size that tile held-out scans, by the share of the
teacher's input that is dropped: how informative the map is, how much of it is the same in every view, its lift on body,
organs and lesions, and how many of the units that it hides the clean teacher's map hides too (by chance: the mask
ratio); and what part of each region masks by it hide, by mask ratio (by chance: that ratio). Means over scans, then
over seeds with 95% t intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import smartlab as sl
from benchmarks.attention import interval
from benchmarks.components import FACTORS
from benchmarks.harness import machine
from smartlab.batch.results import load_runs
from smartlab.core.places import code_version
from smartlab.data.crops.augment import window
from smartlab.data.crops.regions import unit_shares
from smartlab.data.store.prepare import prepare_store
from smartlab.data.store.store import Store
from smartlab.evaluation.features.grids import scans
from smartlab.evaluation.judge.result import clean
from smartlab.masking import hidden_share, informativeness, lift, make_mask
from smartlab.models.encoder import dropped_patches

NOISE = (0.0, 0.3, 0.7)  # share of the teacher's units that are dropped; the first is the clean teacher
RATIOS = (0.3, 0.5, 0.7, 0.9)
RESULTS = Path(__file__).parent / "results" / "importance.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/components"))
    parser.add_argument("--scans", type=int, default=16, help="of the test split")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = load_runs(args.runs)
    runs = runs[(runs.step == "pretrain") & (runs.state == "done") & (runs.semantic == True)]  # noqa: E712
    if runs.code.nunique() > 1:
        raise sl.UseError("these runs are of several versions of the code", path=args.runs)
    if runs.empty:
        raise sl.UseError("no pretrained encoder with semantic attention", path=args.runs)
    rows = []
    for _, run in runs.iterrows():
        found = sl.Run(Path(run.folder) / "run")
        _, store = prepare_store(found.config.data, progress=False)
        known = scans(store)
        images = known[known.split == "test"].image.tolist()[: args.scans]
        arm = {name: run[name] for name in FACTORS}
        rows += [{**arm, "seed": run.seed, **row} for row in judge(found, store, images)]
        print(arm, int(run.seed), flush=True)
    table = pd.DataFrame(rows)
    report = {
        "what": "importance maps of the plans' teachers on held-out views: means over seeds, 95% t intervals",
        "patients": len(images),
        "view": found.config.data.view,
        "rows": [
            {**dict(zip([*FACTORS, "noise", "metric"], key, strict=True)), "value": interval([*group.value])}
            for key, group in table.groupby([*FACTORS, "noise", "metric"])
        ],
        "machine": machine(),
        "code": code_version(),
    }
    args.json.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def judge(run: sl.Run, store: Store, images: list[int]) -> list[dict[str, Any]]:
    """One encoder: a row for each share of dropped input and metric, mean over the scans."""
    config, names = run.config, store.label_names
    teacher = run.encoder("teacher")
    found: dict[tuple[float, str], list[float]] = {}
    for image in images:
        hu = tiles(torch.from_numpy(store.array(image)[:].astype(np.float32)), config.data.view)
        labels = tiles(torch.from_numpy(store.labels(image)[:]), config.data.view)  # type: ignore[index]
        shares = unit_shares(hu, labels, names, config.unit)
        views = window(hu, *config.data.window)[:, None]
        maps = {}
        for noise in NOISE:
            generator = torch.Generator().manual_seed(image)
            dropped = dropped_patches(teacher, views, noise, generator) if noise else None
            maps[noise] = teacher(views, dropped=dropped, deep=0).importance.mean(1)
            for name, value in measured(
                maps[noise], maps[NOISE[0]], shares, config.mask.ratio, image
            ).items():
                found.setdefault((noise, name), []).append(value)
    return [{"noise": n, "metric": m, "value": float(np.mean(v))} for (n, m), v in found.items()]


def measured(
    importance: Tensor, still: Tensor, shares: dict[str, Tensor], ratio: float, seed: int
) -> dict[str, float]:
    """Maps (V, N) of one scan's views, under noise and without, and the regions' shares of the units."""

    def masks(of: Tensor, r: float) -> Tensor:
        grid = (of.shape[1], 1, 1)
        return make_mask("attention_high", of, r, grid, generator=torch.Generator().manual_seed(seed))

    found = {
        "informativeness": informativeness(importance).mean(),
        "explained by place": explained_by_place(importance),
        "hidden by the clean map too": hidden_share(masks(importance, ratio), masks(still, ratio).float()),
    }
    for name, share in shares.items():
        if share.sum() > 0:
            found[f"lift {name}"] = lift(importance, share)
            found |= {f"hidden {name} at {r}": hidden_share(masks(importance, r), share) for r in RATIOS}
    return {name: float(value) for name, value in found.items()}


def explained_by_place(importance: Tensor) -> Tensor:
    """How much of the maps (V, N) is the same in every view, whatever it shows: a share of their variance.

    Unrelated maps have 1/V.
    """
    return importance.mean(0).var(correction=0) / importance.var(1, correction=0).mean()


def tiles(scan: Tensor, side: int) -> Tensor:
    """(D, H, W) -> (V, side, side, side), views that tile its middle."""
    for axis in range(3):
        length = scan.shape[axis] // side * side
        scan = scan.narrow(axis, (scan.shape[axis] - length) // 2, length)
    return (
        scan.unfold(0, side, side).unfold(1, side, side).unfold(2, side, side).reshape(-1, side, side, side)
    )


if __name__ == "__main__":
    main()
