"""Cox proportional hazards with a ridge penalty, for follow-up that ends in an event or in censoring.

The loss is the negative log partial likelihood with Breslow's treatment of ties, plus ‖w‖² / (2 C), on
features standardised by the training rows. Where a likelihood is flat or has no finite maximum (more
features than events), the penalty gives it one. C is chosen by the cross-validated partial likelihood of
Verweij and van Houwelingen (1993): the likelihood of all patients less that of the training patients,
under weights learned from the latter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from smartlab.evaluation.learn.folds import splits
from smartlab.evaluation.learn.linear import STRENGTHS, Basis


@dataclass(frozen=True)
class Cox:
    """A fitted model: hazards are proportional to exp(score)."""

    basis: Basis
    weights: np.ndarray  # (r,)
    strength: float  # C

    def score(self, x: np.ndarray) -> np.ndarray:
        """Log hazard relative to the mean of the training rows, (n,)."""
        return self.basis(x) @ self.weights


def partial_likelihood(score: np.ndarray, time: np.ndarray, event: np.ndarray) -> tuple[float, np.ndarray]:
    """Negative log partial likelihood (Breslow) of log hazards (n,), and its gradient (n,)."""
    order = np.argsort(time, kind="stable")
    t, seen, eta = time[order], event[order] > 0, score[order]
    first, last = np.searchsorted(t, t, "left"), np.searchsorted(t, t, "right") - 1
    # log of the summed hazards of everyone whose time is not earlier, ties included
    at_risk = np.logaddexp.accumulate(eta[::-1])[::-1][first]
    passed = np.logaddexp.accumulate(np.where(seen, -at_risk, -np.inf))[last]
    gradient = np.empty_like(eta)
    gradient[order] = np.exp(eta + passed) - seen
    return float((at_risk - eta)[seen].sum()), gradient


def fit_cox(x: np.ndarray, time: np.ndarray, event: np.ndarray, strength: float) -> Cox:
    """One model with given C."""
    basis = Basis.of(x)
    return Cox(basis, _solve(basis, basis(x), time, event, strength), strength)


def fit_cox_tuned(
    x: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    *,
    inner: int = 3,
    seed: int = 0,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Cox:
    """A model whose C has the highest cross-validated partial likelihood; rows are patients."""
    held_out = np.zeros(len(strengths))
    for train, _ in splits(np.arange(len(x)), event.astype(int), inner, seed):
        basis = Basis.of(x[train])
        z, weights = basis(x), None
        for i, strength in enumerate(strengths):
            weights = _solve(basis, z[train], time[train], event[train], strength, weights)
            score = z @ weights
            held_out[i] += partial_likelihood(score, time, event)[0]
            held_out[i] -= partial_likelihood(score[train], time[train], event[train])[0]
    return fit_cox(x, time, event, strengths[int(np.argmin(held_out))])


def _solve(
    basis: Basis,
    z: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    strength: float,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Weights (r,) at the minimum, in the basis' coordinates, each divided by its rough curvature."""
    scale = 1 / np.sqrt(event.sum() / len(z) * basis.spread + 1 / strength)

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        w = v * scale
        value, gradient = partial_likelihood(z @ w, time, event)
        return value + (w**2).sum() / (2 * strength), (z.T @ gradient + w / strength) * scale

    begin = np.zeros(z.shape[1]) if start is None else start / scale
    options = {"gtol": 1e-6, "ftol": 1e-12, "maxiter": 500}
    return minimize(objective, begin, jac=True, method="L-BFGS-B", options=options).x * scale
