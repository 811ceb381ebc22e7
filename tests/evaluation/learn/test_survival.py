"""Cox regression against definitions written the slow way, and optima found without gradients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from smartlab.evaluation.learn.survival import fit_cox, fit_cox_tuned, partial_likelihood


def coefficients(model):
    """Log hazard ratios per unit of each feature as given, (d,)."""
    return model.basis.axes @ model.weights


def by_definition(score, time, event):
    """Breslow: for each event, its hazard over those of everyone still at risk."""
    return -sum(
        score[i] - np.log(sum(np.exp(score[j]) for j in range(len(time)) if time[j] >= time[i]))
        for i in range(len(time))
        if event[i]
    )


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 25), ties=st.booleans(), seed=st.integers(0, 10_000))
def test_the_likelihood_is_that_of_the_definition_and_its_gradient_that_of_finite_differences(n, ties, seed):
    r = np.random.default_rng(seed)
    time = r.integers(1, 6, n).astype(float) if ties else r.random(n)
    event, score = r.random(n) < 0.6, 2 * r.normal(size=n)
    value, gradient = partial_likelihood(score, time, event)
    assert value == pytest.approx(by_definition(score, time, event), abs=1e-9)
    for i in range(n):
        step = np.eye(n)[i] * 1e-5
        slope = by_definition(score + step, time, event) - by_definition(score - step, time, event)
        assert gradient[i] == pytest.approx(slope / 2e-5, abs=1e-5)


def test_large_scores_do_not_overflow():
    value, gradient = partial_likelihood(np.array([2000.0, 0, -900]), np.array([1.0, 2, 3]), np.ones(3, bool))
    assert value == pytest.approx(0) and np.isfinite(gradient).all()


def test_two_patients_and_a_penalty_have_a_closed_form():
    """Scores ±1 and the first event at +1: the optimum solves w = 2 C / (1 + exp(2 w))."""
    for strength in (0.1, 1.0, 10.0):
        x, time = np.array([[1.0], [-1.0]]), np.array([1.0, 2.0])
        found = coefficients(fit_cox(x, time, np.array([True, False]), strength))[0]
        assert found == pytest.approx(2 * strength / (1 + np.exp(2 * found)), rel=1e-4)


def test_the_hazard_ratio_of_two_groups_is_the_one_that_a_search_finds():
    r = np.random.default_rng(0)
    group = np.arange(60) % 2
    time, event = r.exponential(1 / np.where(group, 3.0, 1.0)), r.random(60) < 0.8
    best = minimize_scalar(lambda b: by_definition(b * group, time, event), bounds=(-3, 5), method="bounded")
    found = coefficients(fit_cox(group[:, None].astype(float), time, event, strength=1e8))
    assert found[0] == pytest.approx(best.x, abs=1e-3)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_ridge_optimum_is_the_one_that_a_search_without_gradients_finds(strength):
    r = np.random.default_rng(1)
    x = r.normal(size=(30, 3)) @ r.normal(size=(3, 3))
    time, event = np.ceil(8 * r.random(30)), r.random(30) < 0.7
    z = (x - x.mean(0)) / x.std(0)
    best = minimize(
        lambda w: by_definition(z @ w, time, event) + (w**2).sum() / (2 * strength),
        np.zeros(3),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-11, "maxiter": 4000},
    )
    model = fit_cox(x, time, event, strength)
    assert coefficients(model) * x.std(0) == pytest.approx(best.x, abs=2e-4)
    assert model.score(x) == pytest.approx(z @ best.x, abs=1e-3)


def test_more_features_than_events_have_a_finite_answer():
    r = np.random.default_rng(2)
    model = fit_cox(r.normal(size=(20, 200)), r.random(20), r.random(20) < 0.5, strength=10.0)
    assert np.isfinite(coefficients(model)).all() and np.abs(model.score(r.normal(size=(5, 200)))).max() < 50


def test_the_strength_follows_the_signal():
    r = np.random.default_rng(3)
    x, event = r.normal(size=(150, 30)), r.random(150) < 0.8
    signal = fit_cox_tuned(x, r.exponential(np.exp(-2 * x[:, 0])), event)
    noise = fit_cox_tuned(x, r.exponential(size=150), event)
    assert noise.strength < signal.strength
    assert np.abs(coefficients(signal)).argmax() == 0 and coefficients(signal)[0] > 0.5
