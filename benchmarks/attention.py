"""Does [CLS] attention come to mean something? One recorded run, judged on phantoms it never saw.

Trains `dagman` with the `tiny` preset on `phantom-ct` and looks at the held-out patients' whole scans with
the clean teacher: how informative its [CLS] attention is, and how much of it falls on body, organs and
lesions compared with chance (lift 1). Means over patients with 95% t intervals, for every kept checkpoint
and for an untrained encoder. The guard's story (random masks until attention is informative) is told
from metrics.csv.

    python -m benchmarks.attention --out runs/attention                # 10 minutes on two idle cores
    python -m benchmarks.attention --out runs/attention --look-only    # judge a finished run again
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats

import smartlab as sl
from benchmarks.harness import machine
from smartlab.core.places import code_version
from smartlab.data.crops.regions import is_lesion, unit_shares
from smartlab.data.store.prepare import prepare_store
from smartlab.data.store.store import Store
from smartlab.masking import informativeness, lift
from smartlab.models.encoder import Encoder
from smartlab.training import checkpoint

PATIENTS, STEPS = 60, 2400
RESULTS = Path(__file__).parent / "results" / "attention.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/attention"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--look-only", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("settings", nargs="*", help="further settings, key=value")
    args = parser.parse_args()
    from smartlab.core.config import parse_overrides

    config = sl.load_config(
        "tiny",
        {
            "data.phantom_cases": PATIENTS,
            "train.steps": args.steps,
            "train.checkpoint_every": args.steps // 6,
            "train.keep_last": 6,
            "teacher.momentum": 0.98,
            **parse_overrides(args.settings),
        },
    )
    if not args.look_only:
        sl.pretrain(config, args.out, resume=True)
    report = judge(args.out)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(pd.DataFrame(report["checkpoints"]).to_string())
    print(json.dumps(report["guard"], indent=1))


def judge(folder: Path) -> dict[str, Any]:
    """Everything measured on the held-out patients of a run."""
    run = sl.Run(folder)
    _, store = prepare_store(run.config.data, progress=False)
    cases = store.cases
    held = sorted({int(i) for i in cases.image[cases.split.isin(["val", "test"])]})
    torch.manual_seed(0)
    rows = [{"step": 0, **look(Encoder(run.config).eval(), store, held)}]
    for step in checkpoint.steps(folder):
        rows.append({"step": step, **look(run.encoder("teacher", step), store, held)})
        print(f"step {step}: {rows[-1]}", flush=True)
    history = run.history
    guided = history.step[history.guided > 0]
    seconds = [e["time"] for e in run.events if e["event"] in ("start", "finished")]
    return {
        "what": "lift of the teacher's [CLS] attention over chance on held-out phantoms: mean, 95% t interval",
        "held_out_patients": len(held),
        "checkpoints": rows,
        "guard": {
            "threshold": run.config.mask.informativeness,
            "warmup_epochs": run.config.mask.warmup_epochs,
            "first_guided_step": None if guided.empty else int(guided.iloc[0]),
            "share_guided_after": None
            if guided.empty
            else float((history.guided[history.step >= guided.iloc[0]] > 0).mean()),
        },
        "collapse": history[["step", "feature_std", "effective_rank", "teacher_entropy"]]
        .tail(1)
        .to_dict("records")[0],
        "reconstruction": [float(history.loss_amip.iloc[0]), float(history.loss_amip.tail(10).mean())],
        "started_and_finished": seconds,
        "config": run.config.model_dump(mode="json"),
        "machine": machine(),
        "code": code_version(),
    }


@torch.inference_mode()
def look(encoder: Encoder, store: Store, images: list[int]) -> dict[str, Any]:
    """Informativeness and lifts over the scans, each "mean [low, high]" as a list."""
    found: dict[str, list[float]] = {}
    names = store.label_names
    organs = {v: n for v, n in names.items() if not is_lesion(n)}
    for image in images:
        hu = torch.from_numpy(store.array(image)[:].astype(np.float32))
        labels = torch.from_numpy(store.labels(image)[:])  # type: ignore[index]
        attention = encoder.attention(hu).flatten(2)
        stride, total = encoder.stride, encoder.config.encoder.stride(4)
        pad = [(0, -n % total) for n in reversed(hu.shape)]
        flat = [side for pair in pad for side in pair]
        hu, labels = F.pad(hu, flat, value=-1024.0)[None], F.pad(labels, flat)[None]
        mean = attention.mean(1)
        shares = unit_shares(hu, labels, names, stride)
        for value, name in organs.items():
            shares[name] = F.avg_pool3d((labels == value).float()[:, None], stride).flatten(1)
        shares["solid organ"] = shares["organ"] - shares["lung_left"] - shares["lung_right"]
        found.setdefault("informativeness of views", []).append(view_informativeness(encoder, hu))
        found.setdefault("informativeness of scans", []).append(float(informativeness(mean)))
        for name, share in shares.items():
            if share.sum() > 0:
                found.setdefault(f"lift {name}", []).append(float(lift(mean, share)))
    return {name: interval(values) for name, values in found.items()}


def view_informativeness(encoder: Encoder, hu: torch.Tensor) -> float:
    """Of the clean teacher on views of the training size that tile the middle of the scan."""
    view, units = encoder.config.data.view, encoder.config.data.view // encoder.stride
    middle = hu
    for axis in (1, 2, 3):
        length = hu.shape[axis] // view * view
        middle = middle.narrow(axis, (hu.shape[axis] - length) // 2, length)
    a = encoder.attention(middle[:, None], window=view, overlap=0.0).mean(1)
    for axis in (1, 2, 3):
        a = a.unflatten(axis * 2 - 1, (-1, units))  # (1, views, units, views, units, views, units)
    tiles = a.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, units**3)
    return float(informativeness(tiles).mean())


def interval(values: list[float]) -> list[float]:
    """Mean and 95% t interval over patients."""
    x = np.array(values)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
    return [round(float(v), 4) for v in (x.mean(), x.mean() - half, x.mean() + half)] + [len(x)]


if __name__ == "__main__":
    main()
