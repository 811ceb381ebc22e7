"""Paint the abdominal organs of a phantom: liver, spleen, kidneys, stomach, pancreas, bowel."""

from __future__ import annotations

import numpy as np

from smartlab.data.phantoms import body as geo
from smartlab.data.phantoms.canvas import Canvas, grow_tree
from smartlab.data.phantoms.curve import Array, path
from smartlab.data.phantoms.organs import LABEL


def paint_abdomen(canvas: Canvas, hu: dict[str, float], cavity: Array, rng: np.random.Generator) -> None:
    """Everything below the diaphragm, far organs first."""
    _paint_diaphragm(canvas, hu, cavity)
    _paint_bowel(canvas, hu, rng)
    _paint_spleen(canvas, hu, cavity)
    _paint_liver(canvas, hu, cavity, rng)
    _paint_stomach(canvas, hu, rng)
    _paint_pancreas(canvas, hu, rng)
    for side in (-1, 1):
        _paint_kidney(canvas, hu, side, rng)
    _paint_vessels(canvas, hu)


def _paint_diaphragm(canvas: Canvas, hu: dict[str, float], cavity: Array) -> None:
    for box, f in canvas.slabs(canvas.box((-115, -85, -110), (115, 85, 25)), cavity):
        sheet = np.abs(0.75 * (f.z - geo.diaphragm(f, canvas.body))) - 1.6
        canvas.paint(box, np.maximum(sheet, cavity[box] + 1.0), hu["muscle"])


def _paint_liver(canvas: Canvas, hu: dict[str, float], cavity: Array, rng: np.random.Generator) -> None:
    whole = canvas.box((-80, -80, -135), (115, 80, 20))
    deep = np.zeros(canvas.shape, bool)
    for box, f in canvas.slabs(whole, cavity):
        d = geo.liver_distance(f, canvas.body, cavity[box])
        canvas.paint(box, d, hu["liver"], LABEL["liver"])
        deep[box] = d < -4.0
    inside = np.flatnonzero(deep[whole])
    if len(inside) < 200:
        return
    # portal and hepatic veins: brighter than the liver with contrast, darker without
    for root, count in (((18, 6, -48), 45), ((20, -2, -10), 40)):
        index = np.stack(np.unravel_index(rng.choice(inside, count), deep[whole].shape), -1)
        index += [s.start for s in whole]
        targets = (index * canvas.step + canvas.origin).astype(np.float32)
        start = geo.undisplace(canvas.body, np.array([root]))[0]
        points, radii = grow_tree(start, targets, 1.1, rng)
        canvas.paint_tubes(points, np.minimum(radii, 5.5), hu["vein"] - 4, only=np.array([LABEL["liver"]]))
    for box, f in canvas.slabs(whole):
        gall = geo.gallbladder_distance(f)
        canvas.paint(box, gall, hu["bowel"])
        canvas.paint(box, gall + 1.2, 8.0, LABEL["gallbladder"])


def _paint_spleen(canvas: Canvas, hu: dict[str, float], cavity: Array) -> None:
    for box, f in canvas.slabs(canvas.box((-112, -75, -90), (-45, 25, 10)), cavity):
        d = geo.ellipsoid(f, (-82, -28, -44), (27, 46, 38), -0.45, -0.25)
        d = geo.smooth_max(d, 0.8 * (f.z - geo.diaphragm(f, canvas.body) + 3.0), 5.0)
        d = geo.smooth_max(d, cavity[box] + 4.5, 5.0)
        hilum = geo.ellipsoid(f, (-54, -8, -44), (17, 19, 20))
        canvas.paint(box, geo.smooth_max(d, -hilum, 6.0), hu["spleen"], LABEL["spleen"])


def _paint_kidney(canvas: Canvas, hu: dict[str, float], side: int, rng: np.random.Generator) -> None:
    z = -98.0 if side > 0 else -88.0
    scale = rng.uniform(0.9, 1.08)
    low, high = sorted((side * 20, side * 92))
    centre, turn, lean = (side * 53, -30.0, z), side * 0.55, side * 0.22
    label = LABEL["kidney_right" if side > 0 else "kidney_left"]
    for box, f in canvas.slabs(canvas.box((low, -75, z - 52), (high, 15, z + 52))):
        outer = geo.ellipsoid(f, centre, (21 * scale, 18 * scale, 37 * scale), turn, lean)
        canvas.paint(box, outer - 4.0, hu["fat"] + 2, 0)
        sinus = geo.ellipsoid(f, (side * 39, -22, z), (13 * scale, 8 * scale, 14 * scale), turn, lean)
        kidney = geo.smooth_max(outer, -sinus, 5.0)
        canvas.paint(box, kidney, hu["cortex"], label)
        # pyramids: the inner zone, interrupted by columns of cortex
        angle = np.arctan2(f.y - centre[1], f.x - centre[0]) * 3.0
        columns = 2.2 * np.cos(f.z * (2 * np.pi / 15.0)) + 1.2 * np.cos(angle)
        canvas.paint(box, outer + 6.0 + columns, hu["medulla"])
        canvas.paint(box, sinus + 1.0, hu["fat"] + 10, 0)
        canvas.paint(box, geo.ellipsoid(f, (side * 38, -21, z - 2), (7, 4, 8), turn, lean), 15.0)


def _paint_stomach(canvas: Canvas, hu: dict[str, float], rng: np.random.Generator) -> None:
    fill = rng.uniform(0.85, 1.08)
    content = float(rng.choice([12.0, 35.0, 160.0], p=[0.45, 0.4, 0.15]))
    surface = rng.uniform(12, 40)  # gas rises: the patient lies on the back
    drop = min(0.0, canvas.body.dome_left + 2.0)
    for box, f in canvas.slabs(canvas.box((-90, -45, -105), (30, 70, 10))):
        d = geo.ellipsoid(f, (-52, -2, -32 + drop), (29 * fill, 31 * fill, 29))
        d = geo.smooth_min(d, geo.ellipsoid(f, (-40, 24, -58), (20 * fill, 19 * fill, 26)), 12.0)
        d = geo.smooth_min(d, geo.ellipsoid(f, (-6, 36, -76), (27, 14 * fill, 13)), 12.0)
        d = geo.smooth_max(d, 0.8 * (f.z - geo.diaphragm(f, canvas.body) + 3.5), 6.0)
        canvas.paint(box, d - 2.0, hu["fat"], 0)
        canvas.paint(box, d, hu["bowel"] + 8, LABEL["stomach"])
        canvas.paint(box, d + 3.6, content)
        canvas.paint(box, np.maximum(d + 3.6, surface - f.y0), -960.0)


def _paint_pancreas(canvas: Canvas, hu: dict[str, float], rng: np.random.Generator) -> None:
    curve = path(
        [
            (24, 16, -88, 9),
            (20, 18, -74, 10),
            (4, 18, -66, 7.5),
            (-22, 8, -60, 7.5),
            (-48, -8, -52, 7),
            (-62, -14, -48, 5),
        ],
        2.0,
    )
    lobules = 1.0 + 0.14 * np.sin(np.arange(len(curve)) * 1.9 + rng.uniform(0, 6))
    place = geo.undisplace(canvas.body, curve[:, :3] + rng.normal(0, 0.9, (len(curve), 3)))
    canvas.paint_tubes(place, curve[:, 3] * lobules, hu["pancreas"], LABEL["pancreas"])


def _paint_vessels(canvas: Canvas, hu: dict[str, float]) -> None:
    """Branches of aorta and cava: coeliac, mesenteric, portal, splenic and renal vessels."""
    branches: dict[str, list[list[tuple[float, ...]]]] = {
        "vein": [
            [(14, 6, -64, 3.5), (-20, -6, -56, 3.2), (-58, -20, -48, 2.8)],  # splenic vein
            [(8, 20, -140, 3), (10, 18, -100, 3.6), (14, 8, -66, 5), (20, 6, -48, 5.5)],  # to the portal vein
            [(16, -2, -96, 3.5), (34, -16, -97, 3.2)],
            [(14, 0, -88, 3.5), (-4, 10, -87, 3.2), (-34, -15, -88, 3)],
        ],
        "blood": [
            [(-6, 2, -68, 3.5), (-5, 14, -76, 3.2), (0, 22, -110, 2.8), (4, 26, -145, 2.2)],  # mesenteric
            [
                (-7, 2, -58, 3.5),
                (-5, 12, -56, 3.2),
                (12, 12, -56, 2.6),
                (24, 10, -50, 2.2),
            ],  # coeliac, hepatic
            [(-5, 0, -94, 3), (10, -12, -96, 2.6), (36, -20, -98, 2.4)],
            [(-8, 0, -88, 3), (-20, -10, -88, 2.6), (-36, -20, -88, 2.4)],
        ],
    }
    for tissue, paths in branches.items():
        rows = np.concatenate([path(points, 1.5) for points in paths])
        canvas.paint_tubes(geo.undisplace(canvas.body, rows[:, :3]), rows[:, 3], hu[tissue])


def _paint_bowel(canvas: Canvas, hu: dict[str, float], rng: np.random.Generator) -> None:
    """Loops of small bowel, then the colon with gas and stool, and some mesenteric vessels."""
    for _ in range(20 - round(canvas.body.fat / 4)):
        middle = np.array([rng.uniform(-55, 55), rng.uniform(6, 40), rng.uniform(-160, -98)])
        turns = middle + np.cumsum(rng.normal(0, 13, (7, 3)) * [1, 0.55, 0.7], axis=0)
        turns = np.clip(turns, [-72, -2, -175], [72, 46, -92]) + rng.normal(0, 1, (7, 3))
        curve = path([(*t, 8.5) for t in turns], 3.4)
        place = geo.undisplace(canvas.body, curve[:, :3])
        canvas.paint_tubes(place, rng.uniform(8.0, 10.0), hu["bowel"])
        canvas.paint_tubes(place, 6.0, float(rng.choice([22.0, 30.0, 140.0], p=[0.5, 0.35, 0.15])))
    colon = path(
        [
            (80, -12, -176, 15),
            (84, -6, -140, 15),
            (80, 8, -122, 14),
            (50, 40, -122, 13),
            (0, 48, -118, 12),
            (-48, 38, -100, 12),
            (-82, 2, -84, 12),
            (-88, -16, -110, 11),
            (-86, -18, -176, 10),
        ],
        4.0,
    )
    haustra = 1.0 + 0.12 * np.sin(np.arange(len(colon)) * 1.25)
    place = geo.undisplace(canvas.body, colon[:, :3])
    canvas.paint_tubes(place, colon[:, 3] * haustra, hu["bowel"], LABEL["colon"])
    canvas.paint_tubes(place, colon[:, 3] * haustra - 2.2, float(rng.uniform(0, 45)))
    gas = np.sin(np.arange(len(colon)) / rng.uniform(4, 9) + rng.uniform(0, 6)) > -0.1
    up = place[gas] + np.array([0, 3.0, 0], np.float32)
    canvas.paint_tubes(up, (colon[:, 3] * haustra)[gas] - 5.0, -940.0)
