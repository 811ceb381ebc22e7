"""Two scales against one: what the finer target brings, on the mammography phantom at a CPU size.

For each of several seeds the same small vision transformer is pretrained as MAE (one scale) and as MIRAM
(two scales), for the same number of steps on the same views of all lesions, without labels. Then, from frozen
features, by patient folds that are the same for all:

- probes of pathology and of the five margin classes: AUC (pairs within folds) and average precision, each
  method's mean over seeds and the paired difference, with intervals over patients (all seeds together); a
  network of the same form that was not trained, for each seed, stands beside; so does what supervision reaches,
  a small convolutional network trained on the labels of each fold's other patients ("ceiling");
- how much fine detail of hidden patches the reconstruction at the stored resolution keeps
  (`evaluation.spectrum`): MIRAM's finer decoder against MAE's reconstruction enlarged; interval over seeds.

A CPU of two cores takes about three quarters of an hour; a phantom tells nothing of patients.

    python -m benchmarks.miram [--steps 5000] [--seeds 3] [--runs DIR]

With --runs the pretrainings are kept there, and those that are there are not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smartlab as sl
from benchmarks.harness import machine
from smartlab.core.config import Config
from smartlab.core.places import code_version
from smartlab.core.plots import OKABE_ITO
from smartlab.data.crops.augment import window
from smartlab.data.crops.flat import ImageDataset
from smartlab.data.store.prepare import prepare_store
from smartlab.data.store.store import Store
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.features.features import lesion_features
from smartlab.evaluation.judge import metrics, stats
from smartlab.evaluation.judge.predictions import areas, from_table, to_table
from smartlab.evaluation.judge.result import Estimate
from smartlab.evaluation.learn.probe import probe
from smartlab.evaluation.look.spectrum import detail, enlarged

RESULTS = Path(__file__).parent / "results" / "miram.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "miram.png"
LABELS = {"pathology": "binary", "mass_margins": "multilabel"}
SCORES = ("auc", "average_precision")
METHODS = ("mae", "miram")
SHOWN = (0, 3)  # which views are drawn
FOLDS = 4  # each margin class has at least so many patients among the first 40


def configuration(method: str, seed: int, args: argparse.Namespace) -> Config:
    """`miram-tiny` on so many patients."""
    settings = {"method.preset": method, "seed": seed, "train.steps": args.steps, "train.log_every": 50}
    settings |= {"data.phantom_cases": args.patients, "data.workers": 0, "train.checkpoint_every": args.steps}
    return sl.load_config("miram-tiny", settings | {"train.picture_every": args.steps})


def sharpness(run: sl.Run, store: Store, lesions: int = 64) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fine detail that comes back at the stored resolution, on views of the first lesions, and the views SHOWN."""
    config = run.config
    method = run.method()
    views = ImageDataset(store, view=config.data.view, jitter=0)
    batch = np.stack([views[i]["views"] for i in range(min(lesions, len(views)))])
    x = window(torch.from_numpy(batch), *config.data.window)
    parts = method.reconstruct(x, torch.Generator().manual_seed(0))
    factor = config.data.view // config.mae.input
    guess = parts[factor]["guess"] if factor in parts else enlarged(parts[1], factor)
    hidden = parts[1]["hidden"].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    drawn = {"original": x, "guess": torch.where(hidden > 0, guess, x), "hidden": hidden}
    found = detail(guess, x, hidden, config.encoder.patch * factor)
    return found, {name: part[list(SHOWN), 0].numpy() for name, part in drawn.items()}


def predictions(encoder: Any, store: Store, manifest: Any) -> dict[str, Any]:
    """Probes of both labels over patient folds: label -> predictions."""
    table = lesion_features(encoder, store, manifest, pooling="cls+tokens", cache=False, progress=False)
    return {
        label: from_table(probe(table, label, split="cross", folds=FOLDS, draws=100).table, kind=kind)
        for label, kind in LABELS.items()
    }


def ceiling(store: Store, probed: dict[str, Any], steps: int = 600) -> dict[str, dict[str, Estimate]]:
    """AUC within folds of a network that is trained on all labels at once, on images the encoders see, by patients."""
    views = ImageDataset(store, view=128, jitter=0)
    items = [views[i] for i in range(len(views))]
    at = {item["case"]: i for i, item in enumerate(items)}
    order = [at[case] for case in probed["pathology"].case]
    x = torch.from_numpy(np.stack([items[i]["views"] for i in order])).float()
    x = F.avg_pool2d((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True), 2)
    truth = np.column_stack([probed["pathology"].truth, probed["mass_margins"].truth])
    y, patients = torch.from_numpy(truth).float(), probed["pathology"].patient
    rng, said = np.random.default_rng(0), []
    for judged in np.array_split(rng.permutation(np.unique(patients)), FOLDS):
        rows = np.isin(patients, judged)
        net = learn(x[~rows], y[~rows], steps, rng)
        with torch.no_grad():
            said.append((np.flatnonzero(rows), net(x[rows]).sigmoid().numpy().astype(float)))
    found = {}
    for label, columns in {"pathology": [0], "mass_margins": list(range(1, y.shape[1]))}.items():
        one = probed[label]
        parts = [(rows, p[:, 0] if label == "pathology" else p[:, columns]) for rows, p in said]
        whole = np.zeros_like(one.probability, float)
        for rows, p in parts:
            whole[rows] = p
        table = to_table(one.kind, one.case, one.patient, one.truth, whole, one.classes, parts)
        whole_areas = areas(from_table(table, kind=one.kind))
        found[label] = {"auc": stats.mean_area(whole_areas, list(range(len(one.ranked))))} | {
            f"auc:{c}": stats.mean_area(whole_areas, [i]) for i, c in enumerate(one.ranked)
        }
    return found


def learn(x: Tensor, y: Tensor, steps: int, rng: np.random.Generator) -> nn.Module:
    """A small convolutional network, with mirrored, turned and shifted views."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU()]
    for before, after in ((16, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    net = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, y.shape[1])
    )
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = rng.choice(len(x), 32)
        batch = torch.roll(x[rows], tuple(rng.integers(-6, 7, 2).tolist()), (2, 3))
        mirrored = [axis for axis in (2, 3) if rng.random() < 0.5]
        batch = batch.flip(mirrored) if mirrored else batch
        batch = batch.transpose(2, 3) if rng.random() < 0.5 else batch
        loss = F.binary_cross_entropy_with_logits(net(batch), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return net.eval()


def compare(label: str, found: dict[str, list[Any]], draws: int) -> dict[str, Any]:
    """Means over seeds of every score, and differences, with intervals over patients; AUC within folds."""
    first, scored = found["mae"][0], [s for s in SCORES if s != "auc"]
    seeds = {name: len(runs) for name, runs in found.items()}
    stacked = [run.probability for runs in found.values() for run in runs]

    def means(truth: np.ndarray, *given: np.ndarray) -> dict[str, float]:
        out, rest = {}, list(given)
        for name, count in seeds.items():
            mine, rest = rest[:count], rest[count:]
            each = [metrics.scores(LABELS[label], truth, p, first.classes) for p in mine]
            out |= {
                f"{name} {score}": float(np.mean([s[score] for s in each]))
                for score in each[0]
                if score.split(":")[0] in scored
            }
        for score in [s.removeprefix("mae ") for s in out if s.startswith("mae ")]:
            out[f"miram - mae {score}"] = out[f"miram {score}"] - out[f"mae {score}"]
            out[f"miram - untrained {score}"] = out[f"miram {score}"] - out[f"untrained {score}"]
        return out

    estimates = stats.bootstrap(means, first.patient, first.truth, *stacked, draws=draws) | aucs(found)
    return {name: {k: plain(v) for k, v in value._asdict().items()} for name, value in estimates.items()}


def aucs(found: dict[str, list[Any]]) -> dict[str, Estimate]:
    """AUC over classes and seeds, of each class, and differences."""
    every, ranked, out = [run for runs in found.values() for run in runs], found["mae"][0].ranked, {}
    whole, owners = areas(*every), [name for name, runs in found.items() for _ in runs]
    several = {f"auc:{c}": [i] for i, c in enumerate(ranked)} if len(ranked) > 1 else {}
    for score, classes in ({"auc": list(range(len(ranked)))} | several).items():
        at = {
            name: [j * len(ranked) + i for j, o in enumerate(owners) if o == name for i in classes]
            for name in found
        }
        out |= {f"{name} {score}": stats.mean_area(whole, which) for name, which in at.items()}
        for other in ("mae", "untrained"):
            apart = stats.area_difference(whole, at["miram"], at[other])
            out[f"miram - {other} {score}"] = apart.estimate
    return out


def plain(value: Any) -> Any:
    return round(float(value), 4) if isinstance(value, float) else int(value)


def spent(run: Path, seconds: float) -> float:
    """CPU seconds of a pretraining, remembered beside it: a run that is there already took none now."""
    told = run / "cpu_seconds.txt"
    if not told.exists():
        told.write_text(f"{seconds:.1f}", encoding="utf-8")
    return float(told.read_text(encoding="utf-8"))


def draw(report: dict[str, Any], shown: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Reconstructions of the first seed at the stored resolution, and every score with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    mae, miram = shown["mae"], shown["miram"]
    hidden = np.where(mae["hidden"] > 0, np.nan, mae["original"])
    columns = {"original": mae["original"], "hidden": hidden, "one scale, enlarged": mae["guess"]}
    columns["two scales"] = miram["guess"]
    for row, axes in enumerate(left.subplots(len(SHOWN), len(columns))):
        low, high = np.percentile(mae["original"][row], (0.5, 99.5))
        for ax, (name, images) in zip(axes, columns.items(), strict=True):
            ax.set_facecolor("#3b4a5a")
            ax.imshow(images[row], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(name, fontsize=9)
    names = {"untrained": "untrained", "mae": "one scale", "miram": "two scales"}
    rows = [(label, score) for label in LABELS for score in SCORES]
    ax = right.subplots()
    for k, (method, name) in enumerate(names.items()):
        found = [report["probes"][label][f"{method} {score}"] for label, score in rows]
        value, low, high = (np.array([one[part] for one in found]) for part in ("value", "low", "high"))
        at = np.arange(len(rows)) + 0.22 * (k - 1)
        bars = [value - low, high - value]
        ax.errorbar(value, at, xerr=bars, fmt="o", ms=5, capsize=2, color=OKABE_ITO[(7, 0, 4)[k]], label=name)
    words = {"auc": "AUC", "average_precision": "average precision", "mass_margins": "margins"}
    ax.set_yticks(range(len(rows)), [f"{words.get(a, a)}\n{words[b]}" for a, b in rows], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlabel("linear probe, 95% over patients", fontsize=9)
    right.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8.5, columnspacing=1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--patients", type=int, default=240)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--runs", type=Path, help="folder of the pretrainings; default: one that is deleted")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    manifest, store = prepare_store(configuration("mae", 0, args).data, progress=False)
    print(f"{len(store)} mammograms, {time.process_time() - began:.0f} s of CPU time", flush=True)
    found: dict[str, list[Any]] = {"mae": [], "miram": [], "untrained": []}
    detail_of: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    shown: dict[str, dict[str, np.ndarray]] = {}
    with contextlib.nullcontext(args.runs) if args.runs else tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for method in METHODS:
                config, start = configuration(method, seed, args), time.process_time()
                place = Path(folder) / f"{method}-{seed}"
                run = sl.pretrain(config, place, store=store, resume=True, progress=False)
                if not run.finished:  # asked to stop: what there is would not be comparable
                    raise SystemExit(f"stopped at step {run.step}; the same command goes on from there")
                seconds[method].append(spent(place, time.process_time() - start))
                found[method].append(predictions(run.encoder("student"), store, manifest))
                sharp, views = sharpness(run, store)
                detail_of[method].append(sharp)
                shown.setdefault(method, views)
                print(f"seed {seed} {method}: {seconds[method][-1]} s, {detail_of[method][-1]}", flush=True)
            found["untrained"].append(predictions(random_encoder(config, seed), store, manifest))
    scores = {
        label: compare(label, {name: [r[label] for r in runs] for name, runs in found.items()}, args.draws)
        for label in LABELS
    }
    highest = ceiling(store, found["mae"][0])
    for label, values in highest.items():
        scores[label] |= {
            f"ceiling {name}": {k: plain(v) for k, v in value._asdict().items()}
            for name, value in values.items()
        }
    report = {
        "what": "MIRAM (two scales) against MAE (one scale): linear probes of frozen features and fine detail",
        "smoke": True,
        "data": {"manifest": manifest.name, "patients": args.patients, "fingerprint": store.fingerprint},
        "n": {label: len(found["mae"][0][label].truth) for label in LABELS},
        "settings": {"preset": "miram-tiny", "steps": args.steps, "seeds": args.seeds, "folds": FOLDS}
        | {"auc": "pairs of cases within folds"},
        "probes": scores,
        "detail": {
            method: {
                name: stats.t_interval([one[name] for one in runs])._asdict()
                for name in ("energy", "agreement")
            }
            for method, runs in detail_of.items()
        },
        "cpu_seconds_of_pretraining": seconds,
        "cpu_seconds": round(time.process_time() - began, 1),
        "machine": machine(),
        "code": code_version(),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, shown, args.picture)
    for label, values in scores.items():
        for name in (
            f"{m} {s}" for s in SCORES for m in ("ceiling", "mae", "miram", "untrained", "miram - mae")
        ):
            if (v := values.get(name)) is None:
                continue
            print(f"{label} {name}: {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]")


if __name__ == "__main__":
    main()
