"""Smooth curves through given points, without overshoot: profiles of the body, paths of vessels and bowel."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


class Curve:
    """Smooth curves through the rows of `y` (knots, columns) at the rising `x`, without overshoot.

    Fritsch and Butland 1984, to the last bit what scipy's PchipInterpolator gives. Importing that one
    takes longer than drawing a patient, and it is slow for the hundred short paths of each.
    """

    def __init__(self, x: Array, y: Array) -> None:
        self.x = np.asarray(x, float)
        y, step = np.asarray(y, float), np.diff(self.x)[:, None]
        slope = np.diff(y, axis=0) / step
        tangent = np.empty_like(y)
        if len(y) == 2:
            tangent[:] = slope
        else:
            before, after = slope[:-1], slope[1:]
            w1, w2 = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
            with np.errstate(divide="ignore", invalid="ignore"):
                inner = 1.0 / ((w1 / before + w2 / after) / (w1 + w2))
            tangent[1:-1] = np.where(np.sign(before) * np.sign(after) > 0, inner, 0.0)
            tangent[0] = self._end(step[0], step[1], slope[0], slope[1])
            tangent[-1] = self._end(step[-1], step[-2], slope[-1], slope[-2])
        bend = (tangent[:-1] + tangent[1:] - 2 * slope) / step
        self.terms = (y[:-1], tangent[:-1], (slope - tangent[:-1]) / step - bend, bend / step)

    @staticmethod
    def _end(h0: Array, h1: Array, m0: Array, m1: Array) -> Array:
        d = ((2 * h0 + h1) * m0 - h0 * m1) / (h0 + h1)
        steep = (np.sign(m0) != np.sign(m1)) & (np.abs(d) > 3.0 * np.abs(m0))
        return np.where(np.sign(d) != np.sign(m0), 0.0, np.where(steep, 3.0 * m0, d))

    def __call__(self, at: Array) -> Array:
        """(…,) -> (…, columns)."""
        at = np.asarray(at, float)
        piece = np.clip(np.searchsorted(self.x, at, "right") - 1, 0, len(self.x) - 2)
        s = (at - self.x[piece])[..., None]
        a, b, c, d = (term[piece] for term in self.terms)
        return a + b * s + c * (s * s) + d * (s * s * s)


def path(points: list[tuple[float, ...]], spacing: float) -> Array:
    """A smooth curve through the rows of `points` (x, y, z, radius, …), resampled every `spacing` mm."""
    knots = np.asarray(points, float)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots[:, :3], axis=0), axis=1))])
    steps = np.linspace(0, along[-1], max(2, int(along[-1] / spacing) + 1))
    return Curve(along, knots)(steps).astype(np.float32)
