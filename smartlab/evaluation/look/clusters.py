"""Whether features of the same organ lie together, without any fine-tuning.

Features are standardised per dimension over the table, then, with classes k = 1 … K (organs), members
x_i of class k, their centroid m_k, and Euclidean distances:

- intra   mean over classes of the root mean square distance of members to their centroid,
          intra_k = √(mean_i ‖x_i − m_k‖²)
- inter   mean over the K(K − 1)/2 pairs of classes of ‖m_k − m_l‖
- ratio   inter / intra; free of scale, so comparable between feature spaces
- silhouette   mean over rows of (b − a) / max(a, b): a, b the mean distance to rows of its own, of the
          nearest other class (Rousseeuw 1987)
- knn_purity   share of a row's k nearest neighbours *in other patients* that are of its organ, mean over
          rows; `knn_purity_chance` is what neighbours drawn at random from other patients would give
- ari, nmi     adjusted Rand index and normalised mutual information of k-means (K clusters) with organs

inter, intra, ratio, silhouette and knn_purity are computed in feature space ("features/…") and in every
embedding ("umap/…"), where distances have no meaning beyond that picture. Stability of UMAP over
seeds: `umap/stability`, the share of a row's k nearest neighbours that two seeds agree on (mean over
rows and pairs of seeds), and `umap/ratio_seed_sd`, the standard deviation of the ratio over seeds.

Intervals are by patient bootstrap. That of inter, intra and ratio is the value ± t standard errors of the
bootstrap, whose own mean is off: drawing rows again adds noise to centroids a second time, and
noise in many dimensions pushes centroids apart. (Once it does so in the values too: compare tables of
the same size only.) For silhouette, knn_purity, ari and nmi the neighbours and the
clusters stay as they are and the patients that are scored are drawn; embeddings stay as they are.

Other features of the same rows may stand `beside`, above all those of a random encoder: "random
features/ratio", "random ari", … are theirs, and "features/ratio minus random", … the differences on the
same rows and draws of patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from smartlab.core.compiled import keep_compiled
from smartlab.core.errors import DataError, UseError, one_of
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge import figures
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.look.separation import (
    CHANCE,
    Separation,
    agreement,
    differences,
    estimates,
    kmeans,
    separation,
    spread,
    standardised,
)
from smartlab.evaluation.task import Job, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMBEDDINGS = ("umap", "pca", "tsne")
MARKERS = ("o", "s", "^", "D", "P", "X", "v", "*")
_LINKS = ("case", "patient", "image", "split", "fold")  # what a viewer needs to find a point's image


def clusters(
    table: FeatureTable,
    *,
    label: str = "organ",
    beside: Mapping[str, FeatureTable] | None = None,
    embeddings: Sequence[str] = EMBEDDINGS,
    k: int = 10,
    umap_seeds: int = 3,
    draws: int = 1000,
    seed: int = 0,
) -> Result:
    """Cluster structure of the rows' features with respect to a label, by default the organ.

    beside:     other features of the same rows, by name.
    embeddings: some of umap, pca, tsne. Without umap-learn (or numba) UMAP is replaced by PCA and
                facts["notes"] says so.
    k:          neighbours of knn_purity and of the stability.

    Classes with a single row have no spread and are left out (facts["left_out"]). With one patient
    there are no neighbours in other patients and no intervals.

    table: a row per feature: case, patient, image, …, the label, its k-means cluster, silhouette, purity
           and coordinates "umap_x", "umap_y", ….

    >>> result = clusters(features_per_organ, embeddings=("pca",))
    >>> result.metrics["features/ratio"], result.metrics["ari"]
    """
    for name in embeddings:
        one_of("no embedding", name, EMBEDDINGS)
    if k < 1 or umap_seeds < 1:
        raise UseError(
            "k and umap_seeds count neighbours and seeds", found=f"{k}, {umap_seeds}", expected="≥ 1"
        )
    kept, y, classes, left_out = _rows(table, label)
    x = standardised(kept.x)
    patients = kept.about.patient.to_numpy(str)
    notes = [] if len(set(patients)) > 1 else ["one patient: no intervals, no neighbours in other patients"]
    if not x.any():
        notes.append("all features are constant: nothing is told apart")
    places, repeats = _embed(x, [*embeddings], umap_seeds, seed, notes)
    about = kept.about[[c for c in _LINKS if c in kept.about]].copy()
    about[label] = [classes[i] for i in y]
    about["cluster"] = kmeans(x, len(classes), seed)
    found = {n: separation(s, y, patients, k, draws, seed) for n, s in ({"features": x} | places).items()}
    ours = found["features"]
    about["silhouette"], about["knn_purity"] = ours.rows["silhouette"], ours.rows["knn_purity"]
    metrics = {
        f"{name}/{kind}" if kind != CHANCE else kind: value
        for name, one in found.items()
        for kind, value in estimates(one, patients).items()
    }
    metrics |= agreement(y, about.cluster.to_numpy(), patients, draws, seed)
    metrics |= _stability(repeats, y, k)
    for name, other in (beside or {}).items():
        theirs = _same_rows(name, other, kept, label)
        metrics |= _beside(name, theirs, ours, y, patients, k, draws, seed)
    metrics = {name: value for name, value in metrics.items() if not np.isnan(value.value)}
    for name, place in places.items():
        about[f"{name}_x"], about[f"{name}_y"] = place[:, 0], place[:, 1]
    facts = dict(table.facts) | {"label": label, "classes": classes, "left_out": left_out, "notes": notes}
    facts |= {"rows": len(y), "patients": len(set(patients)), "k": k, "seed": seed, "draws": draws}
    draw = partial(_draw, places, y, classes, metrics)
    return Result("clusters", metrics, about, draw, facts)


def _rows(table: FeatureTable, label: str) -> tuple[FeatureTable, np.ndarray, list[str], list[str]]:
    """Rows of classes with two rows or more; class positions and names; names left out."""
    kept, values, names = table.labelled(label)
    if values.ndim != 1 or not names:
        raise UseError(
            f"label {label!r} does not sort rows into classes", expected="a binary or multiclass label"
        )
    number = np.bincount(values, minlength=len(names))
    enough = number >= 2
    if enough.sum() < 2:
        raise DataError(
            "clusters need two classes of two rows or more",
            found=f"{enough.sum()} such classes among {(number > 0).sum()}, {len(values)} rows",
            fix="add patients, or take several rows per organ with `organ_tokens`",
        )
    rows = enough[values]
    classes = [name for name, keep in zip(names, enough, strict=True) if keep]
    left_out = [name for name, n in zip(names, number, strict=True) if n == 1]
    return kept.take(rows), (np.cumsum(enough) - 1)[values[rows]], classes, left_out


def _beside(
    name: str,
    x: np.ndarray,
    ours: Separation,
    y: np.ndarray,
    patients: np.ndarray,
    k: int,
    draws: int,
    seed: int,
) -> dict[str, Estimate]:
    """Scores of other features of the same rows, and how much less or more than ours they are."""
    theirs = separation(x, y, patients, k, draws, seed)
    found = {f"{name} features/{kind}": e for kind, e in estimates(theirs, patients).items()}
    del found[f"{name} features/{CHANCE}"]  # that of the features
    agreed = agreement(y, kmeans(x, int(y.max()) + 1, seed), patients, draws, seed)
    found |= {f"{name} {kind}": e for kind, e in agreed.items()}
    apart = differences(ours, theirs, patients)
    return found | {f"features/{kind} minus {name}": e for kind, e in apart.items()}


def _same_rows(name: str, other: FeatureTable, kept: FeatureTable, label: str) -> np.ndarray:
    """Standardised features of another table for the rows of `kept`; refused unless rows are the same."""
    same = _rows(other, label)[0]
    columns = ["case", "patient", f"label:{label}"]
    if len(same) != len(kept) or not (same.about[columns] == kept.about[columns]).all(axis=None):
        raise DataError(
            f"cannot put {name!r} beside the features",
            found=f"{len(same)} rows",
            expected=f"the same {len(kept)} rows in the same order",
        )
    return standardised(same.x)


def _embed(
    x: np.ndarray, wanted: list[str], seeds: int, seed: int, notes: list[str]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Embedding name -> (rows, 2), and the UMAP of every seed."""
    if "umap" in wanted and len(x) < 5:
        notes.append("fewer than five rows: no UMAP, PCA instead")
        wanted = [name for name in wanted if name != "umap"]
    repeats: list[np.ndarray] = []
    if "umap" in wanted:
        try:
            repeats = umap_layouts(x, seeds, seed)
        except ImportError as error:
            notes.append(f"no UMAP, PCA instead: {error}")
    places: dict[str, np.ndarray] = {"umap": repeats[0]} if repeats else {}
    if "pca" in wanted or not places:
        places["pca"] = _pca(x, 2)
    if "tsne" in wanted and len(x) > 3:
        from sklearn.manifold import TSNE

        # 50 components keep what neighbours are made of and save most of the time
        coarse = 0.5 if len(x) < 2000 else 0.8  # far points in larger groups: half the time
        near = min(30, (len(x) - 1) / 3)
        tsne = TSNE(2, perplexity=near, init="pca", random_state=seed, max_iter=500, angle=coarse)
        places["tsne"] = tsne.fit_transform(_pca(x, 50)) if x.any() else np.zeros((len(x), 2), np.float32)
    return places, repeats


def _pca(x: np.ndarray, components: int) -> np.ndarray:
    """Coordinates along the first principal axes, padded with zeros where there are fewer."""
    from sklearn.decomposition import PCA

    number = min(components, *x.shape)
    if not x.any():
        return np.zeros((len(x), components), np.float32)
    found = PCA(number, svd_solver="covariance_eigh" if len(x) > x.shape[1] else "full").fit_transform(x)
    return np.pad(found, ((0, 0), (0, components - number)))


def umap_layouts(x: np.ndarray, seeds: int, seed: int) -> list[np.ndarray]:
    """UMAP of several seeds, all from exact neighbours and from PCA: what differs is the layout by chance."""
    import warnings

    import torch
    from sklearn.neighbors import NearestNeighbors

    with warnings.catch_warnings(), ExitStack() as after:
        # numba sets the number of OpenMP threads, torch's too: where cores are shared they wait for each other
        after.callback(torch.set_num_threads, torch.get_num_threads())
        warnings.simplefilter("ignore")  # numba's and umap's remarks about threads and reuse
        from umap import UMAP

        keep_compiled("umap")
        number = min(15, len(x) - 1)
        distances, indices = NearestNeighbors(n_neighbors=number).fit(x).kneighbors(x)
        start = _pca(x, 2)
        start = (10 * start / max(np.abs(start).max(), 1e-12)).astype(np.float32)
        return [
            UMAP(
                n_neighbors=number,
                init=start,
                n_epochs=200 if len(x) > 2000 else None,
                random_state=seed + i,
                precomputed_knn=(indices, distances.astype(np.float32)),
            ).fit_transform(x)
            for i in range(seeds)
        ]


def _stability(repeats: list[np.ndarray], y: np.ndarray, k: int) -> dict[str, Estimate]:
    from sklearn.neighbors import NearestNeighbors

    if len(repeats) < 2:
        return {}
    k = min(k, len(y) - 1)
    near = [NearestNeighbors(n_neighbors=k).fit(place).kneighbors(return_distance=False) for place in repeats]
    pairs = [
        np.mean(
            [len(np.intersect1d(a, b, assume_unique=True)) / k for a, b in zip(first, second, strict=True)]
        )
        for first, second in combinations(near, 2)
    ]
    ratios = [spread(place, y, np.ones((1, len(y))))[0, 2] for place in repeats]
    return {
        "umap/stability": Estimate(float(np.mean(pairs)), float(min(pairs)), float(max(pairs)), len(pairs)),
        "umap/ratio_seed_sd": Estimate(float(np.std(ratios, ddof=1)), n=len(ratios)),
    }


def style(index: int) -> dict[str, Any]:
    """Colour and marker of a class: eight Okabe-Ito colours in each of eight shapes."""
    from smartlab.core.plots import OKABE_ITO

    size = len(OKABE_ITO)
    return {"color": OKABE_ITO[index % size], "marker": MARKERS[(index // size) % len(MARKERS)]}


def _draw(
    places: dict[str, np.ndarray], y: np.ndarray, classes: list[str], metrics: dict[str, Estimate]
) -> Figure:
    """The embeddings side by side, coloured by class, with one legend."""
    columns = -(-len(classes) // 20)
    figure, (axes,) = figures.panels(len(places), 4.3 + 1.9 * columns / len(places))
    size = float(np.clip(9000 / len(y), 5, 45))
    for ax, (name, place) in zip(axes, places.items(), strict=True):
        for c, label in enumerate(classes):
            rows = y == c
            ax.scatter(*place[rows].T, s=size, label=label, linewidths=0.3, edgecolors="#333333", **style(c))
        found = metrics.get(f"{name}/ratio")
        shown = {"umap": "UMAP", "pca": "PCA", "tsne": "t-SNE"}[name]
        ax.set_title(shown + (f"   inter/intra {found.value:.2f}" if found else ""), fontsize=10)
        ax.set(xticks=[], yticks=[], box_aspect=1)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        [name.replace("_", " ") for name in labels],
        loc="outside right center",
        ncols=columns,
        frameon=False,
        fontsize=8,
        scatterpoints=1,
        markerscale=max(1.0, (25 / size) ** 0.5),
    )
    return figure


class _Clusters(Task):
    """Of organs, beside those of a random encoder."""

    def run(self, job: Job, settings: Mapping[str, Any]) -> Result:
        rows = job.organs
        if "organ" in job.given.labels:  # every image shows one organ and is a row, as in OrganMNIST3D
            job.pooling, rows = job.pooling or "tokens", job.table
        beside = {"random": rows(job.untrained)} if job.compares else None
        more = {**settings, "label": job.label} if job.label else settings
        return clusters(rows(job.encoder), beside=beside, **more)


TASKS = {"clusters": _Clusters(clusters, headline="features/ratio", named=True)}
