"""Intervals and tests; patients, never rows, are what was drawn from a population.

- `bootstrap`            any scores, with 95% intervals: patients are drawn with all their rows
- `logit_interval`       a score between 0 and 1 from its variance; Wilson's where all are right or all wrong
- `paired_differences`   the differences of runs' scores on the same cases
- `t_interval`           a mean over draws or seeds, or over cases that patients share
- `log_interval`         a mean of errors, such as Brier's score
- `paired_mean`          the mean difference of a score per case, such as Dice
- `wilson`               a proportion of independent cases
- `areas`                AUC after DeLong et al. 1988, Obuchowski 1997 where patients have several rows, of pairs that
                         may have been counted within folds; `pair_shares` for concordance
- `holm`                 p-values corrected for the size of their family

`compare.py` applies them to tables of predictions. Every interval is nominally 95%. A simulation in the
tests holds each to between 92% and 98%, on 80 to 150 patients, and those that `compare.estimate` gives to at
least 92% on 20 patients and near a perfect score, where percentiles of a bootstrap cover 80 to 90%. One that
cannot be known is not-a-number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy import stats as distributions

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.judge.result import Estimate

LEVEL = 0.95
Z = float(distributions.norm.ppf((1 + LEVEL) / 2))
BIASED = "calibration_error"  # draws have more of it than the sample: value ± t sd instead, which is wide
MOST_DRAWS = 20  # give up on a score that is undefined in more than 19 of 20 draws

Labels = Sequence[Any] | np.ndarray | pd.Series  # whose row is this
Measure = Callable[..., dict[str, float]]  # scores by name, of arrays whose rows are drawn together
Key = TypeVar("Key")  # what names a score


class Difference(NamedTuple):
    """First minus second, its 95% interval, the two-sided p-value for no difference, and patients."""

    value: float
    low: float
    high: float
    p: float
    n: int

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.value, self.low, self.high, self.n)


class Patients:
    """Rows grouped by patient, so that a draw of patients brings all their rows."""

    def __init__(self, patients: Labels, *arrays: np.ndarray) -> None:
        codes, names = pd.factorize(np.asarray(patients), sort=True)
        self.n = len(names)
        if any(len(a) != len(codes) for a in arrays):
            raise UseError("patients and arrays differ in length", found=[len(codes), *map(len, arrays)])
        if (codes < 0).any():
            raise DataError("a row has no patient")
        if self.n < 2:
            raise DataError("an interval needs at least two patients", found=f"{self.n}")
        self.order = np.argsort(codes, kind="stable")
        self.counts = np.bincount(codes)
        self.starts = np.cumsum(self.counts) - self.counts

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Rows of as many patients as there are, drawn with replacement."""
        picks = generator.integers(self.n, size=self.n)
        counts = self.counts[picks]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.order[np.repeat(self.starts[picks], counts) + within]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over each patient's rows along the last axis: (…, rows) to (…, patients)."""
        return np.add.reduceat(values[..., self.order], self.starts, axis=-1)


def bootstrap(
    measure: Measure,
    patients: Labels,
    *arrays: np.ndarray,
    draws: int = 2000,
    seed: int = 0,
    bounded: Mapping[str, int] | None = None,
) -> dict[str, Estimate]:
    """Scores with percentile intervals over draws of patients.

    The percentiles are taken a little further out than 2.5%, as far as t is wider than normal for so many
    patients (Hesterberg 2015). In our simulations this covered as well as BCa or better, without n more
    evaluations of the metric.

    measure: a function of the arrays. A score that is undefined on all rows has no interval; where it is
    undefined in a draw (one class only), more draws are made for it until it has `draws` of them.
    bounded: names of scores between 0 and 1, which get a `logit_interval` by the variance of their draws,
    and how many patients there are of the class with the fewest.

    >>> bootstrap(lambda truth, score: {"brier": ((truth - score) ** 2).mean()}, patients, truth, score)["brier"]
    """
    groups, out = Patients(patients, *arrays), {}
    whole, samples = _resample(measure, groups, arrays, draws, seed)
    for name, value in whole.items():
        if name == BIASED:
            found = error_interval(value, samples[name], groups.n)
            out[name] = found._replace(low=max(0.0, found.low))
        elif bounded and name in bounded:
            variance = float(np.var(samples[name], ddof=1)) * groups.n / (groups.n - 1)
            out[name] = logit_interval(value, variance, groups.n, bounded[name])
        else:
            out[name] = percentile_interval(value, samples[name], groups.n)
    return out


def percentile_interval(value: float, drawn: np.ndarray, patients: int) -> Estimate:
    """The interval of `bootstrap`, from scores of draws (not-a-number where a score has none)."""
    widening = math.sqrt(patients / (patients - 1))
    tail = float(distributions.norm.cdf(distributions.t.ppf((1 - LEVEL) / 2, patients - 1) * widening))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), patients)


def error_interval(value: float, drawn: np.ndarray, patients: int) -> Estimate:
    """The value ± t standard deviations of its draws, for scores that drawing again shifts."""
    half = float(distributions.t.ppf((1 + LEVEL) / 2, patients - 1)) * _spread(drawn, patients)
    return Estimate(float(value), float(value) - half, float(value) + half, patients)


def _spread(drawn: np.ndarray, patients: int) -> float:
    """Standard error from draws, whose variance is (n - 1) / n of the sample's: a third too small for three."""
    return float(np.std(drawn, ddof=1)) * math.sqrt(patients / (patients - 1))


def logit_interval(value: float, variance: float, patients: int, fewest: int) -> Estimate:
    """A score between 0 and 1, on the logit scale so that its interval stays there.

    A perfect score leaves no variance to estimate: the bound is then Wilson's, for as many successes as
    there are patients of the class that has the `fewest`.
    """
    if not math.isfinite(variance):
        return Estimate(value, n=patients)
    if min(value, 1 - value) < 1e-12:
        return wilson(round(value) * fewest, fewest)._replace(n=patients)
    logit, error = math.log(value / (1 - value)), math.sqrt(max(0.0, variance)) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-(logit + side * Z * error))) for side in (-1, 1))
    return Estimate(value, low, high, patients)


def paired_differences(
    measure: Measure,
    patients: Labels,
    truth: np.ndarray,
    predictions: Sequence[np.ndarray],
    draws: int = 2000,
    seed: int = 0,
) -> dict[tuple[str, int, int], Difference]:
    """Score of one less that of another, for every pair i < j of predictions of the same rows, by (score, i, j).

    All are scored on the same draws of patients. The interval is the difference ± t times the standard
    deviation over draws, and the p-value belongs to it: unlike a count of draws it has no floor, which a
    correction for many comparisons would push above 5%.
    """
    pairs = list(combinations(range(len(predictions)), 2))

    def differences(truth: np.ndarray, *predictions: np.ndarray) -> dict[tuple[str, int, int], float]:
        scores = [measure(truth, one) for one in predictions]
        return {(name, i, j): scores[i][name] - scores[j][name] for name in scores[0] for i, j in pairs}

    groups = Patients(patients, truth, *predictions)
    whole, samples = _resample(differences, groups, (truth, *predictions), draws, seed)
    return {
        key: _difference(value, _spread(samples[key], groups.n), groups.n, groups.n - 1)
        for key, value in whole.items()
    }


def _resample(
    measure: Callable[..., dict[Key, float]],
    groups: Patients,
    arrays: Sequence[np.ndarray],
    draws: int,
    seed: int,
) -> tuple[dict[Key, float], dict[Key, np.ndarray]]:
    """Scores of all rows, and `draws` defined scores of each."""
    if draws < 100:
        raise UseError("a bootstrap needs more draws", found=draws, expected="at least 100")
    arrays, generator = [np.asarray(a) for a in arrays], np.random.default_rng(seed)
    whole = measure(*arrays)
    short = {name for name, value in whole.items() if math.isfinite(value)}
    samples: dict[Key, list[float]] = {name: [] for name in whole}
    redrawn = dict.fromkeys(whole, 0)
    for _ in range(draws * MOST_DRAWS):
        if not short:
            break
        rows = groups.draw(generator)
        scores = measure(*(a[rows] for a in arrays))
        for name in tuple(short):
            value = scores[name]
            if not math.isfinite(value):
                redrawn[name] += 1
                continue
            samples[name].append(value)
            if len(samples[name]) == draws:
                short.remove(name)
    if short:
        worst = max(short, key=redrawn.__getitem__)
        raise DataError(
            f"{worst} is undefined in nearly every draw of patients",
            found=f"{redrawn[worst]} of {draws * MOST_DRAWS} draws, {groups.n} patients",
            fix="use more patients of every class",
        )
    return whole, {name: np.array(v or [math.nan, math.nan]) for name, v in samples.items()}


def _difference(value: float, error: float, n: int, freedom: float = math.inf) -> Difference:
    """A difference with its standard error, compared with t (normal for infinite degrees of freedom)."""
    if abs(value) < 1e-12 and error < 1e-12:  # the same predictions, or equally perfect ones
        return Difference(0.0, 0.0, 0.0, 1.0, n)
    if not error > 1e-12:  # a difference without any variation: its error cannot be known
        return Difference(value, math.nan, math.nan, math.nan, n)
    half = error * float(distributions.t.ppf((1 + LEVEL) / 2, freedom))
    p = 2 * float(distributions.t.sf(abs(value) / error, freedom))
    return Difference(value, value - half, value + half, p, n)


def t_interval(values: Sequence[float] | np.ndarray, patients: Labels | None = None) -> Estimate:
    """The mean of independent values (draws, seeds), or of cases that share `patients`.

    With patients, the variance is that of patients' sums (cluster-robust); with one case per patient
    both are the same. A single value has no interval.
    """
    values = np.asarray(values, float)
    if not len(values) or not np.isfinite(values).all():
        raise DataError("a mean needs finite values", found=f"{np.isfinite(values).sum()} of {len(values)}")
    if patients is None and len(values) == 1:
        return Estimate(float(values[0]), n=1)
    mean, error, n = _mean(values, np.arange(len(values)) if patients is None else patients)
    half = error * float(distributions.t.ppf((1 + LEVEL) / 2, n - 1))
    return Estimate(mean, mean - half, mean + half, n)


def log_interval(values: np.ndarray, patients: Labels) -> Estimate:
    """The mean of errors, which are positive and have a long tail: t on the log scale."""
    found = t_interval(values, patients)
    if not found.value > 0:
        return found
    factor = math.exp((found.high - found.value) / found.value)
    return found._replace(low=found.value / factor, high=found.value * factor)


def paired_mean(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, patients: Labels
) -> Difference:
    """The mean of a - b over cases: a paired t-test, by patient where patients have several cases."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    if not np.isfinite(difference).all():
        known = f"{np.isfinite(difference).sum()} of {len(difference)} pairs"
        raise DataError(
            "a paired mean needs finite values", found=known, fix="choose first which cases count"
        )
    mean, error, n = _mean(difference, patients)
    return _difference(mean, error, n, n - 1)


def _mean(values: np.ndarray, patients: Labels) -> tuple[float, float, int]:
    """Mean over rows, its standard error from the sums of patients, and the number of patients."""
    groups = Patients(patients, values)
    mean = float(values.mean())
    residual = groups.sums(values - mean)
    variance = groups.n / (groups.n - 1) * float((residual**2).sum()) / len(values) ** 2
    return mean, math.sqrt(variance), groups.n


def wilson(successes: int, n: int) -> Estimate:
    """A proportion of n independent cases, with Wilson's score interval."""
    if not 0 <= successes <= n or n < 1:
        raise UseError("not a proportion", found=f"{successes} of {n}", expected="0 ≤ successes ≤ n, n ≥ 1")
    share, shrink = successes / n, 1 / (1 + Z**2 / n)
    middle = (share + Z**2 / (2 * n)) * shrink
    half = Z * shrink * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(share, low if successes else 0.0, high if successes < n else 1.0, n)


class Areas(NamedTuple):
    """AUCs (k,), their covariance (k, k), patients, and those of the rarer class (k,)."""

    auc: np.ndarray
    covariance: np.ndarray
    n: int
    rarer: np.ndarray


def in_order(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of scores (k, n): how many rows of the other class each is ordered right against, ties half, and how
    many there are. Midranks give all of them in n log n (Sun and Xu 2014)."""
    positive = np.broadcast_to(positive, scores.shape)
    right, ranks = np.empty(scores.shape), distributions.rankdata(scores, axis=1)
    for yes, score, rank, out in zip(positive, scores, ranks, right, strict=True):
        for one in (yes, ~yes):
            out[one] = rank[one] - distributions.rankdata(score[one])
        out[~yes] = yes.sum() - out[~yes]  # positives are right above, negatives below
    several = positive.sum(1, keepdims=True)
    return right, np.where(positive, scores.shape[1] - several, several).astype(float)


def areas(positive: np.ndarray, right: np.ndarray, pairs: np.ndarray, patients: Labels) -> Areas:
    """AUCs from the counts of `in_order` (k, n), which may have been summed over folds and repeats.

    A row's part in an AUC is how many more of its pairs are right than the AUC says; the covariance is that
    of these parts summed over each patient's rows (Obuchowski 1997). With one row per patient, and all
    pairs counted, this is DeLong's. With fewer than two patients of a class it is not-a-number.
    """
    groups = Patients(patients, right.T)
    sides = [np.broadcast_to(one, right.shape) for one in (positive, ~positive)]
    with np.errstate(invalid="ignore", divide="ignore"):
        area = right.sum(1) / pairs.sum(1)
        part = (right - area[:, None] * pairs) / (pairs.sum(1)[:, None] / 2)
        x, y = (groups.sums(part * one) for one in sides)  # (k, patients)
        seen = [(groups.sums((one & (pairs > 0)).astype(int)) > 0).sum(1) for one in sides]
        wide, other = (z * np.sqrt(n / (n - 1))[:, None] for z, n in zip((x, y), seen, strict=True))
        covariance = wide @ wide.T + other @ other.T + (x @ y.T + y @ x.T) * groups.n / (groups.n - 1)
        apart = (wide + other) @ (wide + other).T  # of different classes, whose sides are of other patients
    same = (sides[0][:, None] == sides[0]).all(-1)
    covariance = np.where(same, covariance, apart)
    return Areas(area, covariance, groups.n, np.minimum(*seen))


def pair_shares(right: np.ndarray, pairs: np.ndarray, fewest: int) -> Areas:
    """The same of pairs without sides, as concordance has them: counts of n patients (k, n); a pair counts for
    both of its patients, and `fewest` of them had an event."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = right.sum(1) / pairs.sum(1)
        part = (right - share[:, None] * pairs) / (pairs.sum(1)[:, None] / 2)
    n = right.shape[1]
    return Areas(share, part @ part.T * n / (n - 1), n, np.full(len(share), fewest))


def mean_area(found: Areas, which: Sequence[int] | np.ndarray | None = None) -> Estimate:
    """The mean of some of the AUCs (all that are defined) with its interval."""
    which = np.flatnonzero(np.isfinite(found.auc)) if which is None else np.asarray(which)
    if not len(which):
        return Estimate(math.nan, n=found.n)
    variance = float(found.covariance[np.ix_(which, which)].mean())
    fewest = int(found.rarer[which].min())
    return logit_interval(float(found.auc[which].mean()), variance, found.n, fewest)


def area_difference(found: Areas, first: Sequence[int], second: Sequence[int]) -> Difference:
    """The mean of some of the AUCs less the mean of others."""
    which = np.array([*first, *second])
    weights = np.repeat([1 / len(first), -1 / len(second)], [len(first), len(second)])
    variance = float(weights @ found.covariance[np.ix_(which, which)] @ weights)
    return _difference(float(weights @ found.auc[which]), math.sqrt(max(0.0, variance)), found.n)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values corrected by Holm's step-down method; not-a-number stays and is not counted."""
    p = np.asarray(p, float)
    out, known = np.full(len(p), math.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    out[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return out
