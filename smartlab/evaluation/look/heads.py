"""How differently attention heads look, over a cohort and over training.

As the DAGMaN paper measures it (fig. 4a), for each Swin stage (or ViT block), from `models.reach`, per view:

- reach entropy   entropy, in nats, of the distribution of a head's attention over distance, mean over heads
- reach variance  its variance over heads: how differently far they look
- reach distance  the mean distance, in voxels

And of the heads of semantic attention, per sample, from its [CLS] attention A (heads × N units, each row
summing to 1):

- cosine          mean over pairs of heads of 1 − cos of their maps; 0: all heads alike
- jensen_shannon  Jensen–Shannon divergence over the heads, divided by ln(heads); 0: all alike, 1: disjoint
- entropy         entropy of a head's map over ln N, mean over heads and per head; 1: uniform
- informativeness 1 − entropy/ln N of the mean map; 0: uniform

Over all samples together:

- cka             linear centred kernel alignment, mean over pairs of heads: whether two heads change alike
                  from sample to sample, whatever units they look at; 1: alike, about 0: unrelated. It is the
                  debiased estimator (Song et al. 2012; Nguyen et al. 2021), for the usual one nears 1 for
                  unrelated heads once there are more units than samples.

Intervals: patient bootstrap; for cka, whose estimator a sample drawn twice would mislead, ± t standard
errors by leaving out each patient in turn (jackknife). A sample is a view at a place that the seed
fixes, or a whole scan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats as distributions
from torch import Tensor
from tqdm import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.data.crops.augment import window
from smartlab.data.crops.views import ViewDataset, VolumeDataset
from smartlab.data.store.store import Store
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder, random_encoder, run_of
from smartlab.evaluation.features.grids import scans
from smartlab.evaluation.judge import figures
from smartlab.evaluation.judge.means import patient_means
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.task import Job, Task
from smartlab.masking import head_diversity, informativeness
from smartlab.models.encoder import AnyEncoder, Encoder, dropped_patches
from smartlab.models.reach import reach
from smartlab.models.vit import ViTEncoder
from smartlab.training import checkpoint

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMMON = 6  # units per side of the grid on which maps of whole scans are aligned


def heads(
    source: EncoderSource,
    store: Store,
    *,
    images: Iterable[int] | None = None,
    sample: Literal["views", "scans"] = "views",
    views: int = 4,
    role: str = "teacher",
    noise: float | None = None,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Head diversity of an encoder, or of every checkpoint of a run, with intervals.

    sample: "views": `views` training-sized views per scan; "scans": attention over whole scans.
    noise:  also look through a noisy teacher that drops this share of its input (default: as in
            training; 0: leave that out). Views only: a scan's sliding windows have no noise.
    draws:  not needed any more, since means have t intervals; plans that give it still run.

    metrics: of the newest checkpoint: "cosine", …, "entropy:head 1", …; "noisy cosine", … through the
             noisy teacher; "random cosine", … of an encoder with fresh weights.
    table:   a row per step, teacher (clean, noisy, random) and measure.
    """
    encoders, origin, history = _encoders(source, role)
    newest, last_step = next(reversed(encoders.values())), next(reversed(encoders))
    _check(newest, sample, views)
    dropout = newest.config.teacher.patch_dropout if noise is None else noise
    about = scans(store, images)
    looks = [(step, "clean", encoder, 0.0) for step, encoder in encoders.items()]
    if dropout and sample == "views":
        looks += [(step, "noisy", encoder, dropout) for step, encoder in encoders.items()]
    looks.append((last_step, "random", random_encoder(newest, seed).to(newest.device), 0.0))
    rows: list[dict[str, Any]] = []
    metrics: dict[str, Estimate] = {}
    similarity = np.zeros((0, 0))
    for step, teacher, encoder, share in tqdm(looks, desc="heads", disable=not progress):
        found: dict[str, Estimate] = {}
        if sample == "views":
            attention, patients, reaches = _view_attention(encoder, store, about, views, share, seed)
            found |= measure_reach(reaches, patients)
        else:
            attention, patients = _scan_attention(encoder, store, about)
        if attention:
            found |= measure(attention, patients)
        rows += [{"step": step, "teacher": teacher, "measure": k, **v._asdict()} for k, v in found.items()]
        if step == last_step:
            prefix = "" if teacher == "clean" else f"{teacher} "
            metrics |= {prefix + name: value for name, value in found.items()}
            similarity = _similarity(attention) if teacher == "clean" and attention else similarity
    import pandas as pd

    table = pd.DataFrame(rows)
    facts = origin | {"sample": sample, "views": views if sample == "views" else None, "steps": [*encoders]}
    facts |= {"patch_dropout": dropout, "images": len(about), "patients": about.patient.nunique()}
    facts |= {"data": store.fingerprint, "seed": seed}
    return Result("heads", metrics, table, lambda: _draw(table, similarity, history), facts)


def _check(encoder: AnyEncoder, sample: str, views: int) -> None:
    if not isinstance(encoder, Encoder | ViTEncoder) or encoder.config.flat:
        raise UseError("not an encoder of scans", found=type(encoder).__name__, expected="one of smartlab's")
    if not encoder.heads and sample == "scans":
        raise UseError(
            "this encoder has no semantic attention to look over whole scans with",
            fix='use sample="views", which measures its stages, or train with semantic.enabled=true',
        )
    if encoder.heads == 1:
        name = "encoder.heads" if encoder.semantic is None else "semantic.heads"
        raise UseError("one head cannot differ from others", found=f"{name}=1", expected="two or more")
    if sample not in ("views", "scans") or views < 1:
        raise UseError(f"sample={sample!r}, views={views}", expected="views or scans, at least one view")


def _encoders(
    source: EncoderSource, role: str
) -> tuple[dict[int | None, AnyEncoder], dict[str, Any], pd.DataFrame | None]:
    """Checkpoint step -> encoder, in order (None for an encoder alone); facts; the run's history."""
    if (run := run_of(source)) is None:
        encoder, facts = as_encoder(source, role)
        return {None: encoder}, facts, None
    steps = sorted(checkpoint.steps(run.path))
    if not steps:
        raise DataError("has no checkpoint yet", path=run.path, fix="wait for the first one to be saved")
    facts = as_encoder(run, role)[1]
    encoders: dict[int | None, Any] = {step: run.encoder(facts["role"], step) for step in steps}
    return encoders, facts, run.history


@torch.no_grad()
def _view_attention(
    encoder: AnyEncoder, store: Store, about: pd.DataFrame, views: int, dropout: float, seed: int
) -> tuple[list[Tensor], np.ndarray, list[dict[str, list[float]]]]:
    """Attention (heads, D, H, W) of every view (none without semantic attention), whose it is, and the reach
    of every stage's heads. Views and noise follow from the seed."""
    data, device = encoder.config.data, next(encoder.parameters()).device
    dataset = ViewDataset(
        store, region=data.view, view=data.view, views=1, seed=seed, images=about.image, draws=views
    )
    generator = torch.Generator().manual_seed(seed)
    maps, reaches = [], []
    for index in range(len(dataset)):
        drawn = torch.from_numpy(
            dataset[index]["views"]
        )  # one view, with an axis of channels where there are several
        x = window((drawn if store.leading else drawn[None]).to(device), *data.window)
        dropped = dropped_patches(encoder, x, dropout, generator) if dropout else None
        found, out = reach(encoder, x, dropped)
        reaches.append(
            {
                name: [float(r.entropy.mean()), float(r.entropy.var(correction=0)), float(r.distance.mean())]
                for name, r in found.items()
            }
        )
        if out.attention is not None:
            maps.append(out.attention[0].float().cpu().unflatten(-1, out.grid))
    return maps, np.tile(about.patient.to_numpy(str), views), reaches


def measure_reach(reaches: list[dict[str, list[float]]], patients: np.ndarray) -> dict[str, Estimate]:
    """By measure and stage, mean over patients: "reach entropy:stage 1", …"""
    names = [f"reach {what}:{stage}" for stage in reaches[0] for what in ("entropy", "variance", "distance")]
    values = np.array([[v for three in sample.values() for v in three] for sample in reaches])
    return dict(zip(names, patient_means(values, patients), strict=True))


def _scan_attention(
    encoder: AnyEncoder, store: Store, about: pd.DataFrame
) -> tuple[list[Tensor], np.ndarray]:
    dataset = VolumeDataset(store, about.image)
    maps = [encoder.attention(dataset[i]["volume"])[0].float().cpu() for i in range(len(dataset))]
    return maps, about.patient.to_numpy(str)


def measure(attention: list[Tensor], patients: np.ndarray) -> dict[str, Estimate]:
    """Every measure with its interval; attention: (heads, D, H, W) per sample, each head summing to 1."""
    rows = []
    for sample in attention:
        a = sample.flatten(1)[None]
        entropy = torch.special.entr(a).sum(-1)[0] / math.log(a.shape[-1])
        diversity = head_diversity(a)
        alone = [diversity["cosine"], diversity["jensen_shannon"], entropy.mean(), informativeness(a)]
        rows.append([*(float(v) for v in alone), *entropy.tolist()])
    names = ["cosine", "jensen_shannon", "entropy", "informativeness"]
    names += [f"entropy:head {i + 1}" for i in range(len(rows[0]) - len(names))]
    found = dict(zip(names, patient_means(np.array(rows), patients), strict=True))
    return found | {"cka": alignment(attention, patients)}


def alignment(attention: list[Tensor], patients: np.ndarray) -> Estimate:
    """Debiased linear CKA, mean over pairs of heads, with a jackknife interval over patients.

    Maps of different grids are averaged to a common one first. Needs four samples; undefined (not-a-number)
    with fewer, or where a head looks the same way in every sample.
    """
    if len({a.shape for a in attention}) > 1:
        attention = [_normed(F.adaptive_avg_pool3d(a[None], COMMON)[0]) for a in attention]
    maps = torch.stack([a.flatten(1) for a in attention], 1).double()  # (heads, samples, N)
    grams = maps @ maps.transpose(1, 2)  # (heads, samples, samples)
    grams.diagonal(dim1=1, dim2=2).zero_()
    value = _mean_cka(grams)
    names, position = np.unique(patients, return_inverse=True)
    if len(names) < 2:
        return Estimate(value, n=len(names))
    without = []
    for i in range(len(names)):
        kept = torch.from_numpy(np.flatnonzero(position != i))
        without.append(_mean_cka(grams[:, kept][:, :, kept]))
    n = len(names)
    error = math.sqrt((n - 1) / n * float(np.sum((np.array(without) - np.mean(without)) ** 2)))
    half = error * float(distributions.t.ppf(0.975, n - 1))
    return Estimate(value, value - half, min(1.0, value + half), n)


def _normed(a: Tensor) -> Tensor:
    return a / a.sum((1, 2, 3), keepdim=True)


def _mean_cka(grams: Tensor) -> float:
    """grams: (heads, n, n) with zero diagonals. Unbiased HSIC as inner products of U-centred grams."""
    n = grams.shape[-1]
    if n < 4:
        return math.nan
    row = grams.sum(-1, keepdim=True) / (n - 2)
    centred = grams - row - row.transpose(1, 2) + grams.sum((1, 2), keepdim=True) / ((n - 1) * (n - 2))
    centred.diagonal(dim1=1, dim2=2).zero_()
    flat = centred.flatten(1)
    size = flat.norm(dim=1, keepdim=True)
    if bool((size <= 1e-12 * grams.flatten(1).norm(dim=1, keepdim=True)).any()):
        return math.nan
    every = (flat / size) @ (flat / size).T
    h = len(every)
    return float((every.sum() - every.trace()) / (h * (h - 1)))


def _similarity(attention: list[Tensor]) -> np.ndarray:
    """(heads, heads) cosine similarity of the heads' maps, mean over samples."""
    unit = [F.normalize(a.flatten(1), dim=-1) for a in attention]
    return torch.stack([u @ u.T for u in unit]).mean(0).numpy()


REACH = {
    "entropy": "entropy of attention distances",
    "variance": "its variance over heads",
    "distance": "mean distance, voxels",
}
STYLE = {"clean": ("-", "o"), "noisy": ("--", "s"), "random": (":", "^")}  # line and marker of a teacher
CALLED = {teacher: "random weights" if teacher == "random" else f"{teacher} teacher" for teacher in STYLE}
SHADES = {"clean": figures.BLUE, "noisy": figures.OTHERS[0], "random": figures.GREY}


def _draw(table: pd.DataFrame, similarity: np.ndarray, history: pd.DataFrame | None) -> Figure:
    """A panel per measure, over steps where there are several, and how similar the heads are in pairs."""
    semantic, reached = len(similarity) > 0, table.measure.str.startswith("reach")
    figure, axes = figures.panels(4, 3.5, 3.3 - 0.15 * semantic, 1 + semantic)
    for ax in axes.flat:
        ax.axis("off")
    if reached.any():
        for ax, what in zip(axes[-1], REACH, strict=False):
            _by_stage(ax, table[reached & table.measure.str.contains(what)], REACH[what])
        figures.legend(axes[-1, 0])
    if not semantic:
        return figure
    for ax, name in zip(axes[0], ("cosine", "jensen_shannon", "informativeness"), strict=False):
        rows = table[table.measure == name]
        ax.axis("on")
        if rows.step.nunique() > 1:
            _over_steps(ax, rows)
            if history is not None and name == "cosine" and history.head_diversity.notna().any():
                ax.plot(history.step, history.head_diversity, color="#CCCCCC", lw=1, zorder=0, label="logged")
        else:
            found = dict(zip(rows.teacher, _estimates(rows), strict=True))
            figures.listed(ax, found, [SHADES[teacher] for teacher in found], across=False)
        figures.plain(ax, figures.title_of(name), grid="both")
    if axes.flat[0].get_legend_handles_labels()[1]:
        figures.legend(axes.flat[0])
    _pairs(axes[0, 3], similarity)
    return figure


def _estimates(rows: pd.DataFrame) -> list[Estimate]:
    return [Estimate(*one) for one in rows[[*Estimate._fields]].itertuples(index=False)]


def _by_stage(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    """Stages from left to right, newest checkpoint."""
    newest = rows[rows.step.isna() | (rows.step == rows.step.iloc[-1])]
    for shift, (teacher, part) in enumerate(newest.groupby("teacher", sort=False)):
        at, fmt = np.arange(len(part)) + 0.06 * (shift - 1), "".join(STYLE[str(teacher)])
        style: dict[str, Any] = {"fmt": fmt, "markersize": 4, "capsize": 0, "label": CALLED[str(teacher)]}
        figures.intervals(ax, at, _estimates(part), SHADES[str(teacher)], **style)
    names = newest.measure.unique()
    ax.axis("on")
    ax.set_xticks(range(len(names)), [name.split(":")[1] for name in names])
    figures.plain(ax, title, grid="both")


def _over_steps(ax: Axes, rows: pd.DataFrame) -> None:
    for teacher, part in rows.groupby("teacher", sort=False):
        (line, marker), shade, label = STYLE[str(teacher)], SHADES[str(teacher)], CALLED[str(teacher)]
        if teacher == "random":
            ax.axhline(part.value.iloc[0], color=shade, ls=line, label=label)
        else:
            figures.over(ax, part.step, _estimates(part), shade, ls=line, marker=marker, label=label)
    ax.set_xlabel("step")


def _pairs(ax: Axes, similarity: np.ndarray) -> None:
    """Similarity of every two heads."""
    ticks = range(len(similarity))
    ax.axis("on")
    picture = ax.imshow(similarity, cmap="viridis", vmin=min(0.0, similarity.min()), vmax=1)
    ax.set_xticks(ticks, [str(i + 1) for i in ticks])
    ax.set_yticks(ticks, [str(i + 1) for i in ticks])
    ax.set_title("cosine similarity of heads, newest, clean", fontsize=10)
    for (i, j), value in np.ndenumerate(similarity) if len(similarity) <= 8 else ():
        shade = "black" if value > 0.6 else "white"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
    ax.figure.colorbar(picture, ax=ax, shrink=0.8)


class _Heads(Task):
    """Of all checkpoints, where there is a run."""

    def run(self, job: Job, settings: Mapping[str, Any]) -> Result:
        source = run_of(job.source) or job.encoder
        return heads(source, job.store, role=job.role, progress=job.progress, **settings)


TASKS = {"heads": _Heads(heads, headline="cosine", stored=True, inside=True)}
