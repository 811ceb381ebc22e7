"""The fast linear models find what scikit-learn finds, and learn nothing from where they must not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from smartlab.evaluation.learn.linear import Basis, fit, fit_tuned, targets


def correlated(n, d, seed=0):
    r = np.random.default_rng(seed)
    x = r.normal(size=(n, 8)) @ r.normal(size=(8, d)) * 3 + r.normal(size=(n, d)) + 100
    return x.astype(np.float32), r


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("n", "d"), [(200, 30), (40, 90)])
@pytest.mark.parametrize("classes", [2, 4])
def test_probabilities_are_those_of_scikit_learn(n, d, classes, strength):
    x, r = correlated(n, d)
    y = np.digitize(
        x[:, 0] + 3 * r.normal(size=n), np.quantile(x[:, 0], np.linspace(0, 1, classes + 1)[1:-1])
    )
    scaled = StandardScaler().fit_transform(x.astype(float))
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=20000).fit(scaled, y).predict_proba(scaled)
    target, family = targets(y, [str(k) for k in range(classes)])
    ours = fit(x, target, family, strength).predict(x)
    assert ours == pytest.approx(theirs[:, 1:] if classes == 2 else theirs, abs=2e-3)


@pytest.mark.parametrize(("n", "d"), [(200, 30), (40, 90)])
def test_numbers_are_those_of_ridge_regression(n, d):
    x, r = correlated(n, d)
    y = x[:, 0] + r.normal(size=n)
    scaled = StandardScaler().fit_transform(x.astype(float))
    theirs = Ridge(alpha=1 / 0.05).fit(scaled, y).predict(scaled)
    assert fit(x, *targets(y, []), 0.05).predict(x)[:, 0] == pytest.approx(theirs, rel=1e-4)


def test_each_label_gets_a_strength_of_its_own():
    x, r = correlated(300, 20)
    z = StandardScaler().fit_transform(x)
    y = np.column_stack([z[:, 0] > 0, r.random(300) > 0.5]).astype(np.int8)  # one plain, one pure noise
    model = fit_tuned(x, y, ["plain", "noise"], np.arange(300))
    assert model.strength[0] > 10 * model.strength[1]
    alone = fit(x, y[:, :1].astype(float), "sigmoid", model.strength[0])
    assert model.predict(x)[:, 0] == pytest.approx(alone.predict(x)[:, 0], abs=1e-3)


def test_noise_is_penalised_more_than_signal():
    x, r = correlated(200, 100)
    noise = fit_tuned(x, r.integers(0, 2, 200), ["a", "b"], np.arange(200))
    signal = fit_tuned(x, (x[:, 0] > x[:, 0].mean()).astype(int), ["a", "b"], np.arange(200))
    assert noise.strength[0] < signal.strength[0]


def test_columns_without_spread_are_ignored_even_where_the_test_has_some():
    x, r = correlated(60, 5)
    y = r.integers(0, 2, 60)
    constant = np.column_stack([x, np.full(60, 7.0)])
    other = np.column_stack([x, r.normal(size=60) * 1e6])
    target, family = targets(y, ["a", "b"])
    assert fit(constant, target, family, 1.0).predict(other) == pytest.approx(
        fit(x, target, family, 1.0).predict(x), abs=1e-4
    )


def test_constant_features_predict_how_common_a_class_is():
    y = np.array([0, 0, 0, 1])
    found = fit(np.ones((4, 3)), *targets(y, ["a", "b"]), 1.0).predict(np.zeros((2, 3)))
    assert found == pytest.approx(np.full((2, 1), 0.25), abs=1e-3)


def test_the_basis_is_made_of_training_rows_only():
    x, _ = correlated(50, 8)
    basis = Basis.of(x[:40])
    z = basis(x[:40])
    assert z.mean(0) == pytest.approx(0, abs=1e-4)
    assert (z**2).sum(0) == pytest.approx(basis.spread, rel=1e-3)
    assert (z**2).sum() == pytest.approx(40 * 8, rel=1e-3)  # every standardised column has variance one
