"""Intervals cover what they say, tests agree with closed forms, and patients stay whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.judge import metrics, stats
from smartlab.evaluation.judge.compare import estimate
from smartlab.evaluation.judge.means import patient_means
from smartlab.evaluation.judge.predictions import to_table
from smartlab.evaluation.look import heads


def binary(seed: int, n: int = 60, shift: float = 1.0):
    """Truth and two correlated scores with ties, one row per patient."""
    r = np.random.default_rng(seed)
    truth = np.append([0, 0, 1, 1], r.integers(0, 2, n - 4))
    base = r.normal(size=n)
    a, b = (np.round(base + r.normal(size=n) + k * truth, 1) for k in (shift, shift / 2))
    return truth, a, b


def clustered(seed: int, patients: int = 100, within: float = 0.64):
    """Patients with 1 to 5 rows of either class that share a score effect: (patient, truth, score)."""
    r = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), r.integers(1, 6, patients))
    truth = (r.random(len(who)) < 0.4).astype(int)
    noise = math.sqrt(within) * r.normal(size=patients)[who] + math.sqrt(1 - within) * r.normal(size=len(who))
    return who, truth, noise + truth


def covariance_by_definition(truth, scores, patients):
    """DeLong and Obuchowski from all pairs of rows, as the papers write it."""
    patients = np.asarray(patients)
    pos, neg = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    k, m, n = len(scores), len(pos), len(neg)
    psi = [np.array([[(s[i] > s[j]) + 0.5 * (s[i] == s[j]) for j in neg] for i in pos]) for s in scores]
    area = np.array([p.mean() for p in psi])
    who = np.unique(patients)
    x = np.array(
        [[(p.mean(1)[patients[pos] == w] - a).sum() for w in who] for p, a in zip(psi, area, strict=True)]
    )
    y = np.array(
        [[(p.mean(0)[patients[neg] == w] - a).sum() for w in who] for p, a in zip(psi, area, strict=True)]
    )
    i10, i01, i = len(np.unique(patients[pos])), len(np.unique(patients[neg])), len(who)
    out = np.empty((k, k))
    for r in range(k):
        for s in range(k):
            s10 = i10 / ((i10 - 1) * m) * (x[r] * x[s]).sum()
            s01 = i01 / ((i01 - 1) * n) * (y[r] * y[s]).sum()
            s11 = i / (i - 1) * ((x[r] * y[s]).sum() + (x[s] * y[r]).sum())
            out[r, s] = s10 / m + s01 / n + s11 / (m * n)
    return area, out


def value(metric):
    """A metric as `bootstrap` takes it."""
    return lambda *arrays: {"value": float(metric(*arrays))}


def delong(truth, scores, patients=None):
    positive, scores = np.asarray(truth) == 1, np.atleast_2d(scores)
    who = np.arange(len(positive)) if patients is None else patients
    return stats.areas(positive, *stats.in_order(positive, scores), who)


def auc_interval(truth, score, patients=None):
    return stats.mean_area(delong(truth, score, patients), [0])


def delong_test(truth, a, b, patients=None):
    return stats.area_difference(delong(truth, np.stack([a, b]), patients), [0], [1])


def paired(measure, who, truth, a, b, **more):
    return {k[0]: d for k, d in stats.paired_differences(measure, who, truth, [a, b], **more).items()}


def concordance(time, event, risk):
    right, pairs = metrics.in_order(time, event, risk)
    return right.sum() / pairs.sum()


# --- DeLong


@pytest.mark.parametrize("seed", range(4))
def test_delong_equals_its_definition_and_the_covariance_of_placements(seed):
    truth, a, b = binary(seed)
    found = delong(truth, np.stack([a, b]))
    area, covariance = covariance_by_definition(truth, [a, b], np.arange(len(truth)))
    assert found.auc == pytest.approx(area)
    assert found.auc == pytest.approx([metrics.auc(truth, a), metrics.auc(truth, b)])
    assert found.covariance == pytest.approx(covariance)
    above = (a[truth == 1][:, None] > a[truth == 0]) + 0.5 * (a[truth == 1][:, None] == a[truth == 0])
    closed = above.mean(1).var(ddof=1) / (truth == 1).sum() + above.mean(0).var(ddof=1) / (truth == 0).sum()
    assert found.covariance[0, 0] == pytest.approx(closed)


@pytest.mark.parametrize("seed", range(4))
def test_delong_of_clustered_rows_equals_obuchowski(seed):
    who, truth, score = clustered(seed, 25)
    other = np.round(score + np.random.default_rng(seed).normal(size=len(score)), 1)
    found = delong(truth, np.stack([score, other]), who)
    area, covariance = covariance_by_definition(truth, [score, other], who)
    assert found.auc == pytest.approx(area) and found.covariance == pytest.approx(covariance)


def test_repeating_every_row_of_every_patient_adds_no_certainty():
    truth, a, b = binary(0)
    patients = np.arange(len(truth))
    twice = [np.tile(x, 2) for x in (truth, a, b, patients)]
    once = delong_test(truth, a, b)
    assert delong_test(*twice)[:4] == pytest.approx(once[:4])
    assert stats.t_interval(twice[1], twice[3]) == pytest.approx(stats.t_interval(a, patients))
    assert delong_test(*twice[:3]).p < once.p  # what taking rows for patients would claim


def test_delong_test_by_hand_from_its_covariance():
    truth, a, b = binary(3)
    area, c = covariance_by_definition(truth, [a, b], np.arange(len(truth)))
    z = (area[0] - area[1]) / math.sqrt(c[0, 0] + c[1, 1] - 2 * c[0, 1])
    found = delong_test(truth, a, b)
    assert found.value == pytest.approx(area[0] - area[1])
    assert found.p == pytest.approx(2 * distributions.norm.sf(abs(z)))
    assert delong_test(truth, b, a).value == pytest.approx(-found.value)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_delong_at_the_edges():
    truth = np.repeat([0, 1], 20)
    perfect, constant = np.arange(40.0), np.zeros(40)
    assert delong_test(truth, perfect, perfect * 2) == stats.Difference(0, 0, 0, 1, 40)
    assert math.isnan(delong_test(truth, perfect, constant).p)  # neither has any variance
    separated = auc_interval(truth, perfect)
    assert separated == stats.wilson(20, 20)._replace(n=40) and separated.low < 0.9
    assert auc_interval(truth, constant)[:3] == (0.5, 0.5, 0.5)  # always so, whatever the sample
    assert math.isnan(auc_interval(np.zeros(40), perfect).value)
    assert math.isnan(
        auc_interval(truth, perfect, np.repeat([0, 1, 2], [10, 10, 20])).low
    )  # one with positives


# --- bootstrap


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_draw_never_splits_a_patient(seed):
    r = np.random.default_rng(seed)
    who = r.integers(0, 12, 60)
    groups = stats.Patients(np.array([f"p{w}" for w in who]))
    rows = groups.draw(r)
    times = np.bincount(rows, minlength=60)
    assert sum(times[who == w][0] for w in np.unique(who)) == groups.n  # as many patients as there are
    for w in np.unique(who):
        assert len(set(times[who == w])) == 1  # all rows of a patient equally often


def test_the_order_of_rows_and_the_type_of_names_do_not_matter():
    who, truth, score = clustered(0)
    shuffle = np.random.default_rng(0).permutation(len(who))
    names = np.array([f"{w:03d}" for w in who])
    before = stats.bootstrap(value(metrics.auc), who, truth, score, draws=200)["value"]
    after = stats.bootstrap(value(metrics.auc), names[shuffle], truth[shuffle], score[shuffle], draws=200)[
        "value"
    ]
    assert after == pytest.approx(before) and before.n == 100
    assert delong(truth[shuffle], score[shuffle], names[shuffle]).covariance == pytest.approx(
        delong(truth, score, who).covariance
    )


def test_bootstrap_names_scores_and_its_seed_decides():
    truth, a, _ = binary(0)
    who = np.arange(len(truth))

    def several(t, s):
        return {"auc": metrics.auc(t, s), "mean": float(s.mean()), "top": float(s.max())}

    one = stats.bootstrap(several, who, truth, a, draws=100, seed=1)
    assert list(one) == ["auc", "mean", "top"]
    assert one == stats.bootstrap(several, who, truth, a, draws=100, seed=1)
    assert one["auc"] != stats.bootstrap(several, who, truth, a, draws=100, seed=2)["auc"]
    assert one["auc"].value == metrics.auc(truth, a) and one["auc"].low < one["auc"].value < one["auc"].high


def test_bootstrap_of_a_mean_has_the_width_of_a_t_interval():
    x = np.random.default_rng(0).normal(size=120)
    drawn = stats.bootstrap(value(np.mean), np.arange(120), x, draws=4000)["value"]
    closed = stats.t_interval(x)
    assert [drawn.low, drawn.high] == pytest.approx([closed.low, closed.high], abs=0.03)


def test_draws_of_one_class_are_made_again():
    truth, score = np.array([1] + [0] * 19), np.append(0.6, np.linspace(0, 1, 19))
    asked = []

    def both(t, s):
        asked.append(t.sum())
        return {"auc": metrics.auc(t, s), "mean": float(s.mean())}

    found = stats.bootstrap(both, np.arange(20), truth, score, draws=400)
    missed = (1 - 1 / 20) ** 20  # of draws have no positive case
    assert len(asked) - 1 == pytest.approx(400 / (1 - missed), rel=0.1)
    assert np.count_nonzero(asked[1:]) == 400 and math.isfinite(found["auc"].low)


def test_degenerate_input_is_refused_or_has_no_interval():
    truth, score, who = np.zeros(10, int), np.linspace(0, 1, 10), np.arange(10)
    undefined = stats.bootstrap(value(metrics.auc), who, truth, score)["value"]
    assert all(map(math.isnan, undefined[:3])) and undefined.n == 10
    with pytest.raises(DataError, match="two patients"):
        stats.bootstrap(value(metrics.auc), np.zeros(10), truth, score)
    with pytest.raises(UseError, match="length"):
        stats.bootstrap(value(metrics.auc), who[:5], truth, score)
    with pytest.raises(DataError, match="no patient"):
        stats.bootstrap(value(metrics.auc), np.array([None] + ["a"] * 9, object), truth, score)
    with pytest.raises(DataError, match="nearly every draw"):
        stats.bootstrap(value(lambda x: 1.0 if len(set(x)) == 10 else math.nan), who, score, draws=100)
    constant = stats.bootstrap(value(metrics.auc), who, who % 2, np.zeros(10), draws=100)["value"]
    assert constant[:3] == (0.5, 0.5, 0.5)


def test_paired_bootstrap_agrees_with_delong_and_the_paired_t_test():
    truth, a, b = binary(1, 150)
    who = np.arange(150)
    drawn = paired(value(metrics.auc), who, truth, a, b)["value"]
    exact = delong_test(truth, a, b)
    assert drawn.value == pytest.approx(exact.value)
    assert drawn[1:3] == pytest.approx(exact[1:3], abs=0.015)
    mean = paired(value(lambda t, x: x.mean()), who, truth, a, b)["value"]
    assert mean[:3] == pytest.approx(stats.paired_mean(a, b, who)[:3], abs=0.03)
    assert paired(value(metrics.auc), who, truth, a, a, draws=100)["value"][:4] == (0, 0, 0, 1)


# --- closed forms


def test_t_interval_and_paired_mean_equal_scipy():
    _, a, b = binary(2)
    expected = distributions.ttest_1samp(a, 0).confidence_interval()
    assert stats.t_interval(a)[1:] == pytest.approx((*expected, len(a)))
    test = distributions.ttest_rel(a, b)
    found = stats.paired_mean(a, b, np.arange(len(a)))
    assert found[1:4] == pytest.approx((*test.confidence_interval(), test.pvalue))
    positive = stats.log_interval(a**2, np.arange(len(a)))
    assert 0 < positive.low < positive.value < positive.high
    assert positive.low * positive.high == pytest.approx(positive.value**2)
    one = stats.t_interval([0.7])
    assert one.value == 0.7 and math.isnan(one.low) and one.n == 1
    assert math.isnan(stats.paired_mean(a, a - 1, np.arange(len(a))).p)  # a difference that never varies
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(DataError, match="finite"):
            stats.t_interval(bad)
    with pytest.raises(DataError, match="9 of 10 pairs"):
        stats.paired_mean(np.append(np.zeros(9), math.nan), np.zeros(10), np.arange(10))


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (81, 263), (10, 10)])
def test_wilson_equals_scipy(successes, n):
    expected = distributions.binomtest(successes, n).proportion_ci(method="wilson")
    assert stats.wilson(successes, n) == pytest.approx((successes / n, *expected, n))


def test_wilson_refuses_what_is_not_a_proportion():
    for successes, n in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(UseError, match="proportion"):
            stats.wilson(successes, n)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, math.nan, 0.02]) == pytest.approx([0.6, math.nan, 0.04], nan_ok=True)
    assert stats.holm([0.9, 0.8]).tolist() == [1, 1] and len(stats.holm([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_no_correction_and_bonferroni(p):
    p = np.array(p)
    found = stats.holm(p)
    assert (found >= p).all() and (found <= np.minimum(1, p * len(p)) + 1e-12).all()
    assert (np.diff(found[np.argsort(p, kind="stable")]) >= 0).all()


# --- coverage: 300 studies of a known population each

STUDIES = range(300)


def coverage(hits) -> None:
    share = np.mean(list(hits), axis=0)
    assert ((share >= 0.92) & (share <= 0.98)).all(), f"covered {share}"


def within(interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def true_auc(shift: float) -> float:
    return float(distributions.norm.cdf(shift / math.sqrt(2)))


@pytest.mark.slow
def test_coverage_of_means_and_proportions():
    def one(seed):
        r = np.random.default_rng(seed)
        dice, few = r.beta(4, 1, 100), r.normal(size=8)
        drawn = stats.bootstrap(value(np.mean), np.arange(100), dice, draws=250, seed=seed)["value"]
        seeds, cases = stats.t_interval(few), stats.t_interval(dice)
        rare = stats.wilson(int(r.binomial(120, 0.1)), 120)
        return within(drawn, 0.8), within(cases, 0.8), within(seeds, 0), within(rare, 0.1)

    coverage(map(one, STUDIES))


@pytest.mark.slow
def test_coverage_for_patients_with_several_cases():
    def one(seed):
        r = np.random.default_rng(seed)
        who = np.repeat(np.arange(80), r.integers(1, 6, 80))
        x = r.normal(size=80)[who] + r.normal(size=len(who))
        drawn = stats.bootstrap(value(np.mean), who, x, draws=250, seed=seed)["value"]
        naive.append(within(stats.t_interval(x), 0))
        return within(stats.t_interval(x, who), 0), within(drawn, 0)

    naive: list[bool] = []
    coverage(map(one, STUDIES))
    assert np.mean(naive) < 0.88  # the simulation is one in which taking rows for patients is wrong


@pytest.mark.slow
@pytest.mark.parametrize(("n", "shift"), [(100, 0.8), (150, 1.8)])
def test_coverage_of_auc(n, shift):
    def one(seed):
        r = np.random.default_rng(seed)
        truth = (r.random(n) < 0.4).astype(int)
        score = r.normal(size=n) + shift * truth
        drawn = stats.bootstrap(value(metrics.auc), np.arange(n), truth, score, draws=250, seed=seed)["value"]
        return within(drawn, true_auc(shift)), within(auc_interval(truth, score), true_auc(shift))

    coverage(map(one, STUDIES))


SMALL = [(20, 0.8), (20, 0.95), (12, 0.9)]


def at_least(hits, lowest: float = 0.92) -> None:
    """With a few patients, or near a bound, intervals may be too wide, and not too narrow."""
    share = np.mean(list(hits), axis=0)
    assert (share >= lowest).all(), f"covered {share}"


@pytest.mark.slow
@pytest.mark.parametrize(("n", "area"), SMALL)
def test_coverage_of_every_score_of_few_patients_and_good_predictions(n, area):
    """What `estimate` prints; percentiles of a bootstrap cover 0.79 to 0.91 of these AUCs."""
    shift = math.sqrt(2) * distributions.norm.ppf(area)

    def study(seed, n):
        r, truth = np.random.default_rng(seed), np.arange(n) % 2
        logit = shift * (r.normal(size=n) + shift * truth) - shift**2 / 2
        return truth, 1 / (1 + np.exp(-logit))

    truth = metrics.scores("binary", *study(10**6, 10**6))
    names = [n for n in truth if n not in ("brier", "calibration_error")]

    def one(seed):
        y, p = study(seed, n)
        table = to_table("binary", list(range(n)), list(range(n)), y, p, ["a", "b"])
        found = estimate(table, draws=100, seed=seed)
        narrow.append(
            within(stats.bootstrap(value(metrics.auc), range(n), y, p, draws=100)["value"], truth["auc"])
        )
        brier.append(within(found["brier"], truth["brier"]))
        return [within(found[name], truth[name]) for name in names]

    brier: list[bool] = []
    narrow: list[bool] = []
    at_least(map(one, STUDIES))
    assert np.mean(brier) > 0.88  # a few confident errors decide it, which a small sample may lack
    assert np.mean(narrow) < 0.94  # the simulation is one in which a bootstrap is too narrow


@pytest.mark.slow
@pytest.mark.parametrize("scans", [3, 4, 6])
def test_coverage_of_the_mean_dice_of_a_few_scans(scans):
    def one(seed):
        dice = np.random.default_rng(seed).beta(8, 2, (scans, 1))
        drawn = stats.bootstrap(value(np.mean), np.arange(scans), dice[:, 0], draws=200, seed=seed)["value"]
        narrow.append(within(drawn, 0.8))
        return (within(patient_means(dice, np.arange(scans))[0], 0.8),)

    narrow: list[bool] = []
    at_least(map(one, range(1000)))
    assert np.mean(narrow) < 0.93  # what a bootstrap covers


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 20])
def test_coverage_of_paired_differences_of_a_few_patients(n):
    def one(seed):
        r = np.random.default_rng(seed)
        truth, a, b = np.arange(n) % 2, *(r.random((2, n)))
        found = paired(value(metrics.brier), np.arange(n), truth, a, b, draws=200, seed=seed)
        return (within(found["value"], 0),)

    coverage(map(one, range(600)))


@pytest.mark.slow
def test_coverage_of_auc_for_patients_with_several_rows():
    def one(seed):
        who, truth, score = clustered(seed)
        drawn = stats.bootstrap(value(metrics.auc), who, truth, score, draws=250, seed=seed)["value"]
        return within(drawn, true_auc(1)), within(auc_interval(truth, score, who), true_auc(1))

    coverage(map(one, STUDIES))


@pytest.mark.slow
def test_coverage_of_the_other_scores_of_a_binary_label():
    """150 patients; calibration error is that of a sample of this size, and its interval is a wide one."""
    shift, n, names = 1.2, 150, ("average_precision", "accuracy", "balanced_accuracy", "brier")

    def study(seed, n):
        r = np.random.default_rng(seed)
        truth = (r.random(n) < 0.4).astype(int)
        logit = shift * (r.normal(size=n) + shift * truth) - shift**2 / 2 + math.log(0.4 / 0.6)
        return truth, 1 / (1 + np.exp(-logit))

    truth = metrics.scores("binary", *study(10**6, 10**6))
    samples = [metrics.scores("binary", *study(10**6 + i, n))["calibration_error"] for i in range(1000)]

    def one(seed):
        found = stats.bootstrap(
            lambda t, p: metrics.scores("binary", t, p), np.arange(n), *study(seed, n), draws=250, seed=seed
        )
        calibration.append(within(found["calibration_error"], float(np.mean(samples))))
        return [within(found[name], truth[name]) for name in names]

    calibration: list[bool] = []
    coverage(map(one, STUDIES))
    assert np.mean(calibration) >= 0.92


@pytest.mark.slow
def test_coverage_and_false_alarms_of_paired_differences():
    """Two equally good runs with correlated scores: 95% of intervals hold 0, 5% of p-values fall below 5%."""

    def both(truth, p):
        found = metrics.scores("binary", truth, p)
        return {name: found[name] for name in ("average_precision", "brier")}

    def one(seed):
        r = np.random.default_rng(seed)
        truth = (r.random(120) < 0.4).astype(int)
        shared = r.normal(size=120) + truth
        a, b = (1 / (1 + np.exp(-(shared + 0.7 * r.normal(size=120)))) for _ in range(2))
        drawn = paired(both, np.arange(120), truth, a, b, draws=250, seed=seed)
        tests = [delong_test(truth, a, b), *drawn.values(), stats.paired_mean(a, b, np.arange(120))]
        assert all((t.p < 0.05) == (not within(t, 0)) for t in tests)
        return [within(t, 0) for t in tests]

    coverage(map(one, STUDIES))


@pytest.mark.slow
def test_coverage_of_concordance():
    def study(seed, n):
        r = np.random.default_rng(seed)
        risk = r.normal(size=n)
        event_at, lost_at = r.exponential(np.exp(-0.8 * risk)), r.uniform(0.2, 3, n)
        return np.minimum(event_at, lost_at), event_at <= lost_at, risk

    def one(seed):
        time, event, risk = study(seed, 100)
        drawn = stats.bootstrap(value(concordance), np.arange(100), time, event, risk, draws=200, seed=seed)
        return within(drawn["value"], truth), within(of_pairs(time, event, risk), truth)

    def few(seed):
        return (within(of_pairs(*study(seed, 20)), truth),)

    def of_pairs(time, event, risk):
        right, pairs = (part[None] for part in metrics.in_order(time, event, risk))
        return stats.mean_area(stats.pair_shares(right, pairs, int(event.sum())))

    truth = np.mean([concordance(*study(10**6 + i, 2000)) for i in range(40)])
    coverage(map(one, STUDIES))
    at_least(map(few, STUDIES))


@pytest.mark.slow
def test_coverage_of_many_means_with_missing_values():
    """Organs that some scans lack, patients with several scans."""

    def one(seed):
        r = np.random.default_rng(seed)
        who = np.repeat(np.arange(40), r.integers(1, 4, 40))
        values = 0.6 + 0.1 * r.normal(size=40)[who, None] + 0.1 * r.normal(size=(len(who), 2))
        values[r.random(len(who)) < 0.4, 1] = np.nan
        return [within(e, 0.6) for e in patient_means(values, who)]

    coverage(map(one, STUDIES))


@pytest.mark.slow
def test_coverage_of_the_alignment_of_heads():
    """Three heads whose maps follow a common cause in part."""

    def study(seed, n):
        r = np.random.default_rng(seed)
        ways = np.random.default_rng(0).normal(size=(3, 4, 27))
        cause = r.normal(size=(n, 1, 4)) + 0.8 * r.normal(size=(n, 3, 4))
        maps = np.exp(0.5 * np.einsum("nhc,hcu->nhu", cause, ways) + 0.2 * r.normal(size=(n, 3, 27)))
        maps /= maps.sum(-1, keepdims=True)
        return list(torch.from_numpy(maps).unflatten(-1, (3, 3, 3)))

    truth = heads._mean_cka(grams(study(10**6, 2000)))
    coverage((within(heads.alignment(study(seed, 40), np.arange(40)), truth),) for seed in STUDIES)


def grams(samples):
    """(heads, n, n) inner products of the maps of samples, without their own."""
    maps = torch.stack([a.flatten(1) for a in samples], 1).double()
    found = maps @ maps.transpose(1, 2)
    found.diagonal(dim1=1, dim2=2).zero_()
    return found
