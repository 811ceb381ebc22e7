"""Paint the organs of a phantom, back to front: wall, lungs, heart and vessels, abdomen, bones.

HU of each tissue come in a dict (`tissue_hu`), so that contrast phase and individual variation are
one draw per patient. Geometry is in `body.py`, painting in `canvas.py`.
"""

from __future__ import annotations

import numpy as np

from smartlab.data.phantoms import body as geo
from smartlab.data.phantoms.body import Body
from smartlab.data.phantoms.canvas import Canvas, grow_tree
from smartlab.data.phantoms.curve import Array, path

ORGANS = {
    1: "lung_left",
    2: "lung_right",
    3: "heart",
    4: "aorta",
    5: "liver",
    6: "spleen",
    7: "kidney_left",
    8: "kidney_right",
    9: "stomach",
    10: "spine",
    11: "ribs",
    12: "trachea",
    13: "pancreas",
    14: "gallbladder",
    15: "colon",
    16: "inferior_vena_cava",
}
LABEL = {name: value for value, name in ORGANS.items()}
LUNGS = np.array([LABEL["lung_left"], LABEL["lung_right"]])
OPEN = np.array([0, *LUNGS])  # where fat round a vessel may go

# unenhanced, arterial, portal venous
_PHASES = {
    "muscle": (55, 62, 66),
    "blood": (42, 310, 150),
    "vein": (42, 110, 172),
    "pulmonary": (42, 270, 145),
    "myocardium": (46, 105, 105),
    "liver": (58, 72, 112),
    "spleen": (50, 130, 122),
    "cortex": (34, 205, 190),
    "medulla": (30, 75, 160),
    "pancreas": (42, 105, 92),
    "bowel": (40, 85, 80),
}
PHASES = ("none", "arterial", "portal")


def tissue_hu(phase: str, rng: np.random.Generator) -> dict[str, float]:
    """HU per tissue for one patient in one contrast phase."""
    column = PHASES.index(phase)
    strength = rng.uniform(0.85, 1.15)
    hu = {}
    for name, values in _PHASES.items():
        enhancement = (values[column] - values[0]) * strength
        hu[name] = values[0] + enhancement + rng.normal(0, 2.5)
    if rng.random() < 0.2:  # fatty liver
        hu["liver"] -= rng.uniform(10, 35)
    hu |= {"fat": rng.normal(-104, 4), "skin": 10.0, "lung": rng.uniform(-880, -835)}
    hu |= {"bone": rng.normal(170, 30), "cortical": rng.normal(720, 80), "air": -995.0}
    return {name: float(value) for name, value in hu.items()}


def paint_wall(canvas: Canvas, hu: dict[str, float], rng: np.random.Generator) -> Array:
    """Skin, fat, muscle and the fat-filled cavity. Returns the distance to the cavity."""
    body = canvas.body
    to_skin, to_cavity = np.empty(canvas.shape, np.float32), np.empty(canvas.shape, np.float32)
    for box, f in canvas.slabs(canvas.whole):
        to_skin[box], to_cavity[box] = geo.body_distance(f, body), geo.cavity_distance(f)
    wave = [float(w) for w in rng.uniform(0, 2 * np.pi, 3)]
    for box, f in canvas.slabs(canvas.whole, to_skin):
        skin, cavity = to_skin[box], to_cavity[box]
        canvas.paint(box, skin, hu["skin"])
        canvas.paint(box, skin + 2.2, hu["fat"])
        # fat is thicker on flanks and back and over the belly than over the ribs
        layer = 1.5 + body.fat * (0.6 + 0.4 * geo.ramp(-f.z0, -40, 90)) * (0.9 - 0.25 * f.y0 / 80.0)
        layer = layer + body.breast * np.exp(
            -(((np.abs(f.x0) - 58) / 38) ** 2) - ((f.z0 - 34) / 38) ** 2
        ) * geo.ramp(f.y0, 25.0, 75.0)
        muscle = np.maximum(skin + layer, -cavity)
        canvas.paint(box, muscle, hu["muscle"])
        # planes of fat between the muscles: where a slow wave crosses zero
        bend = 1.6 * np.sin(f.y0 / 29.0 + wave[0]) + 1.2 * np.sin(f.x0 / 37.0 + wave[1])
        plane = 6.5 * np.abs(np.sin(skin / 7.5 + bend + 1.5 * np.sin(f.z0 / 26.0 + wave[2]) + f.x / 21.0))
        plane = plane + 3.0 * np.sin(f.x / 13.0 + wave[1]) * np.sin(f.y0 / 15.0 + wave[0]) + 0.6
        canvas.paint(box, np.maximum(plane, muscle + 2.0), hu["fat"] + 50)
        canvas.paint(box, cavity, hu["fat"] + 4)
    return to_cavity


def paint_lungs(canvas: Canvas, hu: dict[str, float], cavity: Array, rng: np.random.Generator) -> None:
    """Parenchyma, denser towards the back, with fissures and faint lobular texture."""
    whole = canvas.box((-115, -85, -110), (115, 85, 158))
    sizes = [s.stop - s.start for s in whole]
    coarse = rng.normal(0, 1, [n // 3 + 2 for n in sizes]).astype(np.float32)
    for box, f in canvas.slabs(whole, cavity):
        d = geo.lung_distance(f, canvas.body, cavity[box])
        base = hu["lung"] - 0.55 * (f.y0 + 10.0)
        cell = [(np.arange(a.start, a.stop) - w.start) // 3 for a, w in zip(box, whole, strict=True)]
        texture = coarse[np.ix_(*cell)]
        canvas.paint(box, d, base + 9.0 * texture)
        inside = d < 0
        labels = canvas.labels[box]
        labels[inside & (f.x < 0)] = LABEL["lung_left"]
        labels[inside & (f.x > 0)] = LABEL["lung_right"]
        oblique = np.abs(0.64 * (f.z - 8) + 0.77 * (f.y + 8) + 0.0015 * f.x * f.x - 6) - 0.4
        minor = np.maximum(
            np.abs(f.z - 42 + 0.002 * (f.y - 20) ** 2) - 0.4, np.maximum(8 - f.x, 5 - oblique - f.y)
        )
        fissure = np.maximum(np.minimum(oblique, minor), d + 1.0)
        canvas.paint(box, fissure, hu["lung"] + 130)


def great_vessels(body: Body) -> dict[str, Array]:
    """Paths of the large chest vessels and airways: rows x, y, z, radius, after displacement."""
    low = min(body.dome_left, body.dome_right) + 6
    top = low + 2 + 42 * body.heart  # the base of the heart
    ys = lambda z: float(geo.spine_y(np.array([z]))[0])  # noqa: E731
    rows: dict[str, list[tuple[float, ...]]] = {
        "aorta": [
            (-4, 20, top - 16, 11),
            (8, 26, top + 6, 12),
            (11, 24, 78, 12),
            (5, 12, 94, 11.5),
            (-9, -5, 99, 11),
            (-20, -20, 90, 10.5),
            (-23, ys(60) + 14, 60, 10),
            (-21, ys(0) + 18, 0, 9.5),
            (-11, ys(-40) + 23, -40, 9),
            (-6, ys(-80) + 27, -80, 8.5),
            (-5, ys(-165) + 29, -168, 8),
        ],
        "cava_inferior": [
            (22, 4, low + 8, 10),
            (21, 0, low - 12, 10),
            (20, -8, -55, 9.5),
            (17, ys(-100) + 25, -100, 9),
            (15, ys(-165) + 27, -168, 9),
        ],
        "cava_superior": [(26, 14, top - 10, 9), (24, 14, 80, 8), (19, 16, 112, 7), (24, 12, 134, 6)],
        "brachiocephalic": [(19, 16, 112, 6), (-4, 24, 114, 5.5), (-26, 20, 132, 5)],
        "carotid_right": [(5, 10, 96, 6), (12, 6, 118, 5.5), (15, 4, 165, 4)],
        "carotid_left": [(-3, 4, 98, 4.5), (-12, 2, 125, 4), (-15, 2, 165, 4)],
        "subclavian": [(-15, -8, 96, 5), (-21, -10, 122, 4.5), (-34, -6, 146, 4)],
        "pulmonary_trunk": [(-14, 34, top - 14, 12), (-15, 27, top + 6, 12), (-14, 14, 65, 11)],
        "pulmonary_right": [(-14, 14, 64, 9), (4, 4, 62, 9.5), (24, 0, 60, 8.5), (36, -3, 54, 6.5)],
        "pulmonary_left": [(-14, 14, 65, 9), (-25, 2, 68, 8.5), (-34, -10, 62, 6.5), (-38, -14, 52, 5)],
        "vein_right": [(14, -3, top - 16, 6), (30, -2, top - 14, 5.5), (42, 2, top - 10, 4)],
        "vein_left": [(-16, -6, top - 14, 6), (-30, -6, top - 12, 5), (-42, -4, top - 6, 4)],
        "trachea": [(1, -4, 168, 7.5), (2, -6, 120, 7.5), (2, -9, 76, 7.5)],
        "bronchus_right": [(2, -9, 77, 6.5), (16, -11, 62, 6), (30, -9, 52, 4.5), (40, -12, 38, 3)],
        "bronchus_left": [(2, -9, 77, 6), (-16, -13, 58, 5.5), (-32, -15, 46, 4.5), (-42, -20, 36, 3)],
        "oesophagus": [(-3, -16, 168, 5), (-4, -18, 100, 5), (-4, -16, 40, 5), (-12, -4, low - 14, 6)],
    }
    return {name: path(points, 2.6) for name, points in rows.items()}


def paint_great_vessels(canvas: Canvas, hu: dict[str, float], vessels: dict[str, Array]) -> None:
    """Mediastinal fat round everything first, then walls and lumens."""
    place = {name: geo.undisplace(canvas.body, rows[:, :3]) for name, rows in vessels.items()}
    wrapped = [n for n in vessels if n not in ("vein_right", "vein_left", "cava_inferior")]
    radii = [vessels[n][:, 3] * (0.9 if "bronchus" in n else 1.0) + 2.5 for n in wrapped]
    canvas.paint_tubes(
        np.concatenate([place[n] for n in wrapped]), np.concatenate(radii), hu["fat"] + 12, 0, OPEN
    )
    tissue = {
        "aorta": ("blood", LABEL["aorta"]),
        "cava_inferior": ("vein", LABEL["inferior_vena_cava"]),
        "oesophagus": ("muscle", 0),
    }
    airways = ("trachea", "bronchus_left", "bronchus_right")
    for name in ["oesophagus", *(n for n in vessels if n not in airways and n != "oesophagus")]:
        kind = "pulmonary" if name.startswith(("pulmonary", "vein_")) else "blood"
        if name in ("cava_superior", "brachiocephalic"):
            kind = "vein"
        kind, label = tissue.get(name, (kind, 0))
        canvas.paint_tubes(place[name], vessels[name][:, 3], hu[kind], label)
    for name in airways:
        canvas.paint_tubes(place[name], vessels[name][:, 3] + 1.3, 20.0, 0)
    for name in airways:
        canvas.paint_tubes(place[name], vessels[name][:, 3], hu["air"], LABEL["trachea"])


def paint_lung_trees(
    canvas: Canvas, hu: dict[str, float], vessels: dict[str, Array], rng: np.random.Generator
) -> None:
    """Arteries, veins and bronchi inside each lung, tapering to the pleura."""
    for lung, artery, vein in (
        (LABEL["lung_left"], "pulmonary_left", "vein_left"),
        (LABEL["lung_right"], "pulmonary_right", "vein_right"),
    ):
        voxels = np.flatnonzero(canvas.labels == lung)
        if len(voxels) < 500:
            continue
        for name, count, leaf in ((artery, 520, 0.68), (vein, 330, 0.66)):
            root = geo.undisplace(canvas.body, vessels[name][-1:, :3])[0]
            index = np.stack(np.unravel_index(rng.choice(voxels, count), canvas.shape), -1)
            targets = (index * canvas.step + canvas.origin).astype(np.float32)
            points, radii = grow_tree(root, targets, leaf, rng)
            radii = np.minimum(radii, vessels[name][-1, 3])
            if name == artery:
                wide = radii > 1.7
                beside = points[wide] + np.outer(radii[wide], [0.2, -1.5, 0.1]).astype(np.float32)
                canvas.paint_tubes(beside, 0.95 * radii[wide], -300.0, only=LUNGS)
                canvas.paint_tubes(beside, 0.6 * radii[wide], hu["air"], only=LUNGS)
            canvas.paint_tubes(points, radii, hu["pulmonary"], only=LUNGS)


def paint_heart(canvas: Canvas, hu: dict[str, float]) -> None:
    """Pericardial outline, muscle, and the blood of four chambers."""
    wall = {"left_ventricle": 9.5, "right_ventricle": 4.0, "right_atrium": 2.5, "left_atrium": 2.5}
    for box, f in canvas.slabs(canvas.box((-90, -30, -35), (60, 75, 85))):
        d = geo.heart_distance(f, canvas.body)
        canvas.paint(box, d - 3.0, hu["fat"] + 20)
        canvas.paint(box, d, hu["myocardium"], LABEL["heart"])
        for name, (centre, radii, turn, lean) in geo.heart_chambers(canvas.body).items():
            inner = tuple(r - wall[name] for r in radii)
            # right chambers carry venous blood
            blood = hu["pulmonary"] if name.startswith("right") else hu["blood"]
            canvas.paint(box, geo.ellipsoid(f, centre, inner, turn, lean), blood)


def paint_bones(canvas: Canvas, hu: dict[str, float], cavity: Array) -> None:
    """Ribs and sternum on the shell of the cavity, shoulder blades and clavicles, the spine."""
    _paint_ribs(canvas, hu, cavity)
    for box, f in canvas.slabs(canvas.box((-24, 30, 5), (24, 90, 140))):
        half = 9.0 + 9.0 * geo.ramp(f.z0, 85, 120) - 4.0 * geo.ramp(-f.z0, -45, -15)
        plate = np.maximum(np.abs(cavity[box] - 6.0) - 4.5, np.abs(f.x) - half)
        plate = np.maximum(plate, np.maximum(f.z - 128, 22 - f.z) * 0.7)
        plate = np.where(f.y0 > 0, plate, geo.FAR)
        canvas.paint(box, plate, hu["cortical"] * 0.6)
        canvas.paint(box, plate + 2.2, hu["bone"] * 0.7)
    for side in (-1, 1):
        curve = path(
            [
                (side * x, y, z, r)
                for x, y, z, r in [(16, 38, 133, 5), (45, 30, 143, 4.2), (80, 6, 150, 4), (102, -8, 152, 4.5)]
            ],
            1.5,
        )
        place = geo.undisplace(canvas.body, curve[:, :3])
        canvas.paint_tubes(place, curve[:, 3], hu["cortical"] * 0.75)
        canvas.paint_tubes(place, curve[:, 3] - 2.2, hu["bone"])
    _paint_blades(canvas, hu, cavity)
    _paint_spine(canvas, hu)


def _paint_ribs(canvas: Canvas, hu: dict[str, float], cavity: Array) -> None:
    """Twelve arcs a side that leave the spine, slope down to the flank and end in cartilage."""
    for box, f in canvas.slabs(canvas.whole, cavity, 10.2):
        near = cavity[box]
        shell = np.nonzero((np.abs(near - 4.2) < 6.0) & (f.z0 < 158) & (f.z0 > -125))
        x, y, z, near = f.x[shell], f.y[shell], f.z[shell], near[shell]
        angle = np.arctan2(np.abs(x), geo.cavity_y(f.z0)[0, 0, shell[2]] - y)
        drop = 40.0 * np.minimum(angle, 2.4) * geo.ramp(150 - z, 0, 45)
        drop = drop - 46.0 * geo.ramp(angle, 2.25, 2.95)  # cartilage climbs to the sternum
        at = geo.level(z + drop)
        rib = np.rint(at)
        across = np.abs(at - rib) * 19.7 * 0.78
        d = np.hypot(near - 4.2, across) - 3.5
        some = np.flatnonzero((d < canvas.voxel) & (rib >= 1) & (rib <= 12) & (np.abs(x) > 13))
        shell, d, rib, angle = tuple(a[some] for a in shell), d[some], rib[some], angle[some]
        ends = np.radians([0, 150, 158, 166, 170, 170, 170, 168, 150, 138, 126, 88, 58])[rib.astype(int)]
        d = np.maximum(d, (angle - ends) * 60)
        cartilage = geo.ramp(angle, 2.15, 2.3)
        outer = hu["cortical"] * (1 - cartilage) + 125 * cartilage
        inner = hu["bone"] * (1 - cartilage) + 95 * cartilage
        part, labels = canvas.hu[box], canvas.labels[box]
        values = part[shell]
        values += canvas.cover(d) * (outer - values)
        values += canvas.cover(d + 1.9) * (inner - values)
        part[shell] = values
        labels[tuple(a[d < 0] for a in shell)] = LABEL["ribs"]


def _paint_blades(canvas: Canvas, hu: dict[str, float], cavity: Array) -> None:
    """Shoulder blades: thin plates behind the upper ribs."""
    for side in (-1, 1):
        low, high = sorted((side * 30, side * 112))
        for box, f in canvas.slabs(canvas.box((low, -85, 50), (high, 10, 150))):
            angle = geo.cavity_angle(f)
            upper = geo.ramp(f.z0, 58, 120)
            edge = np.maximum(np.abs(angle - 1.15) - (0.1 + 0.36 * upper), 0) * 70 + np.maximum(
                60 - f.z, f.z - 140
            ) * 0.5 * ((f.z < 60) | (f.z > 140))
            plate = np.maximum(
                np.abs(cavity[box] - 15.5 - 4 * (1 - upper)) - 1.6 - 1.2 * geo.ramp(angle, 1.3, 1.6),
                edge - 1.0,
            )
            canvas.paint(box, plate, hu["cortical"] * 0.62)


def _paint_spine(canvas: Canvas, hu: dict[str, float]) -> None:
    """Vertebral bodies and discs, the canal, arches, processes; muscles on both sides."""
    for box, f in canvas.slabs(canvas.box((-46, -95, -175), (46, 5, 175))):
        radius, y = geo.spine_radius(f.z0), f.y - geo.spine_y(f.z0)
        at = geo.level(f.z)
        offset = (at - np.rint(at)) * (20 + 4 * geo.ramp(-f.z0, 60, 120))  # mm from mid-vertebra
        x = np.abs(f.x)
        body_r = np.hypot(f.x * 0.9, y * (1.06 + 0.1 * (y < 0)))
        waist = radius * (0.9 + 0.0011 * offset * offset)
        canal_y = y + radius + 5.5
        canal = np.hypot(f.x * 0.88, canal_y) - 6.6
        psoas = np.hypot((x - 27 - 5 * geo.ramp(-f.z0, 90, 160)) / 1.0, (y + 3) * 0.9) - 15.0 * geo.ramp(
            -f.z0, 68, 140
        )
        canvas.paint(box, psoas, hu["muscle"])
        back = np.hypot((x - 21) * 0.72, canal_y + 14) - 14.0
        canvas.paint(box, back, hu["muscle"])
        label = LABEL["spine"]
        column = body_r - waist
        disc = np.abs(offset) - 7.6
        canvas.paint(box, column + 0.6, 85.0, label)
        shell = np.maximum(column, disc)
        canvas.paint(box, shell, hu["cortical"] * 0.62, label)
        canvas.paint(box, shell + 1.8, hu["bone"], label)
        ring = np.maximum(
            np.abs(np.hypot(f.x * 0.86, canal_y) - 9.2) - 2.6, np.abs(offset - 2.0) - 6.0 - 3 * (canal_y < -4)
        )
        transverse = np.maximum(np.hypot(canal_y + 3 + 0.12 * x, offset - 3) - 4.0, np.maximum(x - 30, 8 - x))
        spinous = np.maximum(
            x - 2.3, np.maximum(np.abs(canal_y + 20) - 12.5, np.abs(offset - 0.55 * (canal_y + 14)) - 5.5)
        )
        arch = np.minimum(np.minimum(ring, transverse), spinous)
        canvas.paint(box, arch, hu["cortical"] * 0.72, label)
        canvas.paint(box, arch + 1.9, hu["bone"], label)
        canvas.paint(box, canal, 12.0, label)
        canvas.paint(box, canal + 2.6, 38.0, label)
