"""Write docs/EVIDENCE.md, and the results in other pages, from benchmarks/results: `python docs/make_evidence.py`.

Every number comes from a committed result file; a test holds the pages to them. In the other pages they stand
between `<!-- results: … -->` and `<!-- end -->`, the rest is written by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from smartlab.evaluation.judge.stats import t_interval

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
PAGE = HERE / "EVIDENCE.md"
README = HERE.parent / "README.md"
PLACES = {  # name of a block -> the page it stands in
    "components": README,
    "attention": HERE / "TRAINING.md",
    "primus": HERE / "TRAINING.md",
    "speed": HERE / "SPEED.md",
    "decoders": HERE / "MAMMOGRAPHY.md",
    "scales": HERE / "MAMMOGRAPHY.md",
    "card": HERE.parent / "smartlab" / "weights" / "README.md",
}

ROWS = {  # section and task of real_data.json -> what it is, its score, the difference to show
    ("nodules", "probe"): ("real nodules, linear probe, AUC (folds pooled)", "auc", "auc minus {}"),
    ("nodules", "knn"): ("real nodules, nearest neighbours, AUC (folds pooled)", "auc", "auc minus {}"),
    ("sarcoma", "localize"): ("real sarcomas, attention lift on the tumour", "lesion/lift", "lesion/lift minus {}"),
    ("sarcoma", "segment"): ("real sarcomas, fine-tuned Dice", "dice", "dice minus {}"),
    ("organs", "clusters"): ("one real scan, inter / intra of organs", "features/ratio", "features/ratio minus {}"),
}  # fmt: skip
BASELINES = ("random encoder", "random", "scratch")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def interval(found: Any) -> str:
    """value [low, high], from a list or a mapping."""
    value, low, high = (found[k] for k in ("value", "low", "high")) if isinstance(found, dict) else found[:3]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def beside_untrained(real: dict[str, Any]) -> list[str]:
    """The shipped encoder beside one of the same form that was not trained, task by task."""
    lines = [
        "| task | shipped encoder | minus untrained | n | zero excluded |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (section, task), (title, score, difference) in ROWS.items():
        found = real.get(section, {}).get(task, {}).get("metrics", {})
        apart = next((found[k] for name in BASELINES if (k := difference.format(name)) in found), None)
        if score not in found or apart is None or apart[1] is None:  # one patient: no interval
            continue
        row = [title, interval(found[score]), interval(apart), str(found[score][3]), excluded(apart)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


SHIPPED = {  # task of shipped.json -> what it is, its score, the difference to show
    "organ probe": [("which organ? linear probe, accuracy", "accuracy", "accuracy minus random encoder")],
    "clusters": [
        ("organ purity", "features/knn_purity", "features/knn_purity minus random"),
        ("silhouette of organs", "features/silhouette", "features/silhouette minus random"),
        ("inter / intra of organs", "features/ratio", "features/ratio minus random"),
    ],
    "localize": [("attention lift on lesions", "lesion/lift", "lesion/lift minus random")],
    "nodule probe": [("nodules, linear probe, AUC (folds pooled)", "auc", "auc minus random encoder")],
}


def of_shipped(shipped: dict[str, Any]) -> list[str]:
    """The shipped encoder on held-out phantoms, task by task."""
    lines = [
        "| task | shipped encoder | minus untrained | n | zero excluded |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task, scores in SHIPPED.items():
        for title, score, difference in scores:
            found, apart = shipped["tasks"][task][score], shipped["tasks"][task][difference]
            lines.append(
                f"| {title} | {interval(found)} | {interval(apart)} | {found[3]} | {excluded(apart)} |"
            )
    return lines


READ = {  # what of recipe.json is shown -> its title
    "teacher: stage 2": "units of stride 8 (stage 2), teacher: **the primary measure**",
    "student: stage 2": "the same, student",
    "teacher: tokens": "semantic tokens, teacher",
    "teacher: stage 1": "stride 4 (stage 1), teacher",
    "teacher: stage 3": "stride 16 (stage 3), teacher",
    "teacher, 4 labelled: stage 2": "stage 2, four labelled patients",
    "teacher, 4 labelled: tokens": "semantic tokens, four labelled patients",
}


SEEN = {  # what of real_ct.json is shown -> its title, its score, and what it is held against
    "organs, real": {
        "organs of a real scan, tokens": (
            "tokens/balanced accuracy",
            ("random", "phantoms only", "intensity"),
        ),
        "the same, units of stride 8 (stage 2)": (
            "stage 2/balanced accuracy",
            ("random", "phantoms only", "intensity"),
        ),
    },
    "nodules, real": {"real nodules, AUC": ("auc", ("random encoder", "largest area"))},
    "organs, phantoms": {
        "organs of held-out phantoms, tokens": ("teacher: tokens/balanced accuracy", ("random", "intensity")),
        "the same, stage 2": ("teacher: stage 2/balanced accuracy", ("random", "intensity")),
        "stage 2, four labelled patients": (
            "teacher, 4 labelled: stage 2/balanced accuracy",
            ("random", "intensity"),
        ),
        "tokens, four labelled patients": (
            "teacher, 4 labelled: tokens/balanced accuracy",
            ("random", "intensity"),
        ),
    },
}
OTHERS = {
    "random": "untrained",
    "random encoder": "untrained",
    "phantoms only": "phantoms only",
    "intensity": "HU",
    "largest area": "largest area",
}


def of_real_ct(report: dict[str, Any]) -> list[str]:
    """Scores of the encoder of real scans, and the differences to what stands beside."""
    lines = ["| what is judged | pretrained | n | minus |", "| --- | --- | --- | --- |"]
    for part, scores in SEEN.items():
        for title, (score, others) in scores.items():
            one = report[part][score]
            apart = [f"{OTHERS[o]} {interval(report[part][f'{score} minus {o}'])}" for o in others]
            lines.append(f"| {title} | {interval(one)} | {one[3]} | {', '.join(apart)} |")
    tuned = report.get("segmentation, phantoms", {})
    for few in [n for n in (1, 2, 4) if f"{n} labelled: dice" in tuned]:
        one, apart = (tuned[f"{few} labelled: dice{what}"] for what in ("", ": full minus scratch"))
        title = (
            f"Dice of four organs of held-out phantoms, fine-tuned on {few} labelled scan{'s' * (few > 1)}"
        )
        lines.append(f"| {title} | {interval(one)} | {one[3]} | from scratch {interval(apart)} |")
    return lines


SAME_TIME = {  # task of equal_time.json -> what it is, its score, what the untrained network is called
    "organ probe": ("which organ? accuracy", "accuracy", "random encoder"),
    "clusters": ("organ purity", "features/knn_purity", "random"),
    "localize": ("attention lift on lesions", "lesion/lift", "random"),
    "nodule probe": ("nodules, AUC (folds pooled)", "auc", "random encoder"),
}


def of_equal_time(equal: dict[str, Any]) -> list[str]:
    """Every pretraining of the same time, and what it gains over the same network untrained."""
    titles = [title for title, _, _ in SAME_TIME.values()]
    lines = [
        f"| pretraining | minutes | steps | {' | '.join(titles)} |",
        f"| --- | --- | --- |{' --- |' * len(titles)}",
    ]
    for arm, one in equal["arms"].items():
        cells = []
        for task, (_, score, untrained) in SAME_TIME.items():
            found = one["tasks"][task]
            cells.append(f"{interval(found[score])}; {interval(found[f'{score} minus {untrained}'])}")
        lines.append(f"| {arm} | {one['cpu_minutes']:.1f} | {one['steps']:,} | {' | '.join(cells)} |")
    return lines


def same_time_apart(equal: dict[str, Any], task: str, metric: str, arm: str) -> str:
    """A Primus minus Swin, paired by patient."""
    row = next(
        r for r in equal["compared"][task] if (r["metric"], r["a"], r["b"]) == (metric, "swin, dagman", arm)
    )
    return interval([-row["difference"], -row["high"], -row["low"]])


def of_recipe(recipe: dict[str, Any]) -> list[str]:
    """Balanced accuracy of the readout of units, beside its baselines."""
    others = ("random", "intensity", "position")
    lines = [
        "| what is read | pretrained | untrained | minus untrained | minus HU | minus place |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in READ.items():
        one = recipe["judged"]
        score = f"{name}/balanced accuracy"
        apart = [one[f"{score} minus {other}"] for other in others]
        row = [title, interval(one[score]), interval(one[f"{score}: random"]), *map(interval, apart)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def of_miram(miram: dict[str, Any]) -> str:
    """What frozen features tell of masses, by one scale and two, and what there is to tell."""
    said = []
    for label, name in (("mass_margins", "margins"), ("pathology", "pathology")):
        one = miram["probes"][label]
        said.append(
            f"{name} {interval(one['miram auc'])} with two scales, {interval(one['mae auc'])} with one, "
            f"{interval(one['untrained auc'])} untrained; two minus one {interval(one['miram - mae auc'])}, "
            f"minus untrained {interval(one['miram - untrained auc'])}; a network trained on the labels {interval(one['ceiling auc'])}"
        )
    about, seconds = miram["settings"], miram["cpu_seconds_of_pretraining"]
    each = {name: sum(some) / len(some) for name, some in seconds.items()}
    return f"""`benchmarks.miram`: {about["seeds"]} seeds of {about["steps"]:,} steps on {miram["data"]["patients"]} phantom patients
({each["miram"]:.0f} and {each["mae"]:.0f} CPU seconds a pretraining), {miram["n"]["pathology"]} masses, linear probes of frozen features over patient folds, AUC of pairs within folds, intervals over patients.
{said[0][0].upper()}{said[0][1:]}.
{said[1][0].upper()}{said[1][1:]}.
A step of two scales costs {each["miram"] / each["mae"]:.1f} times one of one scale: the runs are equal in steps, not in time."""


PLANTED = {
    "random": "random",
    "oracle": "one object whole, by its truth",
    "both": "both objects whole",
    "attention": "attention with hints, as published",
}


def of_planted(planted: dict[str, Any]) -> list[str]:
    """Accuracy of the class painted at a hidden object, by what masks hid in training; every seed."""
    lines = [
        "| masks in training | class at the hidden place, the other object seen | the other hidden too | of the objects hidden in training | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, title in PLANTED.items():
        seeds = list(planted["arms"].get(arm, {}).values())
        if not seeds:
            continue
        seen, alone = (
            ", ".join(f"{s['accuracy'][k]:.2f}" for s in seeds) for k in ("other seen", "other hidden")
        )
        share = ", ".join(f"{s['training']['hidden_object']:.0%}" for s in seeds)
        lines.append(f"| {title} | {seen} | {alone} | {share} | {len(seeds)} |")
    return lines


def planted_apart(planted: dict[str, Any], one: str, other: str) -> dict[str, float]:
    """Accuracy of two arms, seed by seed: the mean difference with its t interval."""
    a, b = (
        [s["accuracy"]["other seen"] for _, s in sorted(planted["arms"][arm].items())] for arm in (one, other)
    )
    return t_interval([x - y for x, y in zip(a, b, strict=True)])._asdict()


def excluded(apart: list[float]) -> str:
    return "yes" if apart[1] > 0 else "yes, the other way" if apart[2] < 0 else "no"


Arm = tuple[bool, float, str]
ARMS: dict[Arm, str] = {  # semantic attention, noise, masks -> how the page calls it
    (True, 0.0, "random"): "random masks, clean teacher",
    (True, 0.0, "attention_high"): "guided masks, clean teacher",
    (True, 0.3, "random"): "random masks, noisy teacher",
    (True, 0.3, "attention_high"): "guided masks, noisy teacher",
    (False, 0.0, "random"): "no semantic attention, clean teacher",
    (False, 0.3, "random"): "no semantic attention, noisy teacher",
}
WITH = {arm: title for arm, title in ARMS.items() if arm[0]}  # these have attention to look at
COLUMNS = {
    "clusters features/knn_purity": "organ purity",
    "clusters features/silhouette": "silhouette",
    "clusters features/ratio": "inter / intra",
    "probe probe auc": "nodule probe, AUC (folds pooled)",
    "probe fewshot auc@5": "5 nodules a class, AUC",
    "probe fewshot auc@20": "20 nodules a class, AUC",
    "nodules auc": "real nodules, AUC (folds pooled)",
    "localize lesion/lift": "lesion lift",
    "attention jensen_shannon": "heads' divergence",
    "attention informativeness": "informativeness",
    "pretrain guided_share": "share of steps guided",
}


def arm_of(row: dict[str, Any]) -> Arm:
    return row["semantic"], row["dropout"], row["strategy"]


def of_arm(rows: list[dict[str, Any]], arm: Arm) -> dict[str, Any] | None:
    return next((r for r in rows if arm_of(r) == arm and r["value"] is not None), None)


def arms(found: dict[str, Any]) -> list[str]:
    """One row per metric, one column per arm: mean over seeds and its interval."""
    lines = ["| | " + " | ".join(ARMS.values()) + " |", "| --- |" + " --- |" * len(ARMS)]
    most = {r["n"] for r in found["metrics"]["clusters features/knn_purity"]["arms"] if r["semantic"]}
    for name, title in COLUMNS.items():
        if name in found["metrics"]:
            rows = found["metrics"][name]["arms"]
            cells = [interval(row) if (row := of_arm(rows, arm)) else "–" for arm in ARMS]
            fewer = {r["n"] for r in rows if r["semantic"] and r["value"] is not None}
            if fewer != most:
                title += f" ({', '.join(map(str, sorted(fewer)))} seeds)"
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def effect(found: dict[str, Any], name: str, factor: str, where: str | None = None) -> dict[str, Any]:
    """The difference that a factor makes to a metric, everywhere or at one level of the other factor."""
    one = found["metrics"][name]
    rows = (
        one["effects"] + one["semantic"]
        if where is None
        else [r for r in one["within"] if r["where"] == where]
    )
    row = next(r for r in rows if r["factor"] == factor)
    if (row["level"], row["against"]) not in (("attention_high", "random"), (0.3, 0.0), (True, False)):
        raise ValueError(f"{name}: {row['level']} against {row['against']}")
    return row


def verdict(difference: dict[str, Any], better: int = 1) -> str:
    """A plain word for an interval; better: +1 where the claim says more, -1 where it says less."""
    low, high = sorted(better * difference[k] for k in ("low", "high"))
    if low > 0:
        return "Supported at this scale"
    return "Not supported by this recipe and this metric" if high < 0 else "Undecided at this scale"


def differences(found: dict[str, Any], factor: str) -> list[str]:
    """Effects of a factor on every metric, with Holm's p over the factors."""
    lines = ["| metric | difference | p | seeds |", "| --- | --- | --- | --- |"]
    for name, title in COLUMNS.items():
        told = [
            r["factor"] for r in found["metrics"].get(name, {}).get("effects", []) if r["value"] is not None
        ]
        if factor in told and name != "pretrain guided_share":
            one = effect(found, name, factor)
            lines.append(f"| {title} | {signed(one)} | {one['p']:.2g} | {one['n']} |")
    return lines


def parts(found: dict[str, Any]) -> list[str]:
    """Both components minus neither, by what the claim names."""
    lines = ["| part | metric | difference | seeds | verdict |", "| --- | --- | --- | --- | --- |"]
    for part, name in {
        "clustering": "clusters features/knn_purity",
        "classification, all data": "probe probe auc",
        "classification, few-shot": "probe fewshot auc@20",
        "classification, real nodules": "nodules auc",
        "localisation": "localize lesion/lift",
    }.items():
        one = found["metrics"][name]["both_minus_neither"]
        lines.append(f"| {part} | {COLUMNS[name]} | {signed(one)} | {one['n']} | {verdict(one).lower()} |")
    return lines


def over_training(found: dict[str, Any]) -> list[str]:
    """What the logs say: first and last quarter of the steps, by arm."""
    titles = {
        "attention_informativeness": "informativeness of what guides",
        "head_diversity": "heads' cosine distance",
        "lift_organ": "attention on organs over chance",
        "hidden_organ": "share of organs hidden",
        "hidden_body": "share of the body hidden",
        "teacher_entropy": "teacher entropy",
        "effective_rank": "effective rank",
        "loss_amip": "reconstruction (L1)",
    }
    lines = ["| | " + " | ".join(WITH.values()) + " |", "| --- |" + " --- |" * len(WITH)]
    for name, title in titles.items():
        cells = []
        for arm in WITH:
            rows = {r["quarter"]: r[name] for r in found["training"] if arm_of(r) == arm}
            cells.append(f"{rows[1]:.3f} → {rows[4]:.3f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def cause(importance: dict[str, Any]) -> str:
    """What the maps say of why guided masks do not help; written for maps that point at nothing in particular."""
    value = {(*arm_of(r), r["noise"], r["metric"]): r["value"] for r in importance["rows"]}
    lifts = [value[*arm, 0.0, f"lift {r}"] for arm in WITH for r in ("body", "organ", "lesion")]
    if any(low > 1 or high < 1 for _, low, high, _ in lifts):
        raise ValueError("a lift is clear of chance: this paragraph no longer fits the numbers")
    clean, noisy = (True, 0.0, "attention_high"), (True, 0.3, "attention_high")
    body, place = value[*clean, 0.0, "lift body"], value[*clean, 0.0, "explained by place"]
    agree = value[*noisy, 0.3, "hidden by the clean map too"]
    return f"""So, of the three suspects: *the implementation*: none found; the maps are not a fixed pattern ({place[0]:.0%} of their variance is the same in every view, about
2% would be by chance), and tests hold that a map which points at lesions hides them. *The scale*: attention is selective by now, but for nothing in particular:
in no arm does the interval of the lift on body, organs or lesions exclude chance, and what a map prefers differs from seed to seed (the mean lift on the body under
guided masks and a clean teacher is anywhere from {body[1]:.2f} to {body[2]:.2f}). Masks guided by such a map would hide one kind of tissue more than others, another in another run. *The noise*: of the units that
a noisy teacher's map hides the clean map hides {agree[0]:.0%}, where chance is 70%: its masks are nearer to random ones than to those, which fits that they do less harm. That
is an explanation that fits, not a proof. *The phantom*: not separated from the scale here."""


def map_quality(importance: dict[str, Any]) -> list[str]:
    """Importance maps on held-out views: a row per measure, a column per arm."""
    value = {(*arm_of(r), r["noise"], r["metric"]): r["value"] for r in importance["rows"]}
    lines = ["| | " + " | ".join(WITH.values()) + " |", "| --- |" + " --- |" * len(WITH)]
    rows = [
        ("informativeness", "informativeness", (0.0, 0.3, 0.7)),
        ("explained by place", "share of the maps that is the same in every view", (0.0, 0.3, 0.7)),
        ("hidden by the clean map too", "masked units that the clean map masks too (chance 0.7)", (0.3, 0.7)),
        *((f"lift {region}", f"lift, {region}", (0.0, 0.3, 0.7)) for region in ("body", "organ", "lesion")),
    ]
    for metric, title, noises in rows:
        cells = [" / ".join(f"{value[*arm, noise, metric][0]:.2f}" for noise in noises) for arm in WITH]
        lines.append(f"| {title}, {' / '.join(map(str, noises))} dropped | {' | '.join(cells)} |")
        if metric.startswith("lift"):
            cells = ["{1:.2f} to {2:.2f}".format(*value[*arm, 0.0, metric]) for arm in WITH]
            lines.append(f"| its 95% interval, nothing dropped | {' | '.join(cells)} |")
    ratios = (0.3, 0.5, 0.7, 0.9)
    for region in ("body", "organ", "lesion"):
        cells = [
            " / ".join(f"{value[*arm, 0.0, f'hidden {region} at {r}'][0]:.2f}" for r in ratios)
            for arm in WITH
        ]
        title = f"part of {region} hidden (chance: the ratio), mask ratio {' / '.join(map(str, ratios))}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def repeated(found: dict[str, Any]) -> str:
    """Whether seeds that were added later agree with those of the plan."""
    shown = [name for name in COLUMNS if name in found["metrics"] and name != "pretrain guided_share"]
    cells = [(name, cell) for name in shown for cell in found["metrics"][name]["repeat"]]
    if not cells:
        return ""
    inside = sum(cell["within"] for _, cell in cells)
    primary = [cell for name, cell in cells if name == "clusters features/knn_purity"]
    return (
        f"The plan has three seeds; {cells[0][1]['n_later']} were added to the arms with semantic attention after its verdicts were known. "
        f"Their means lay where 95% of such means should by the first three in {inside} of {len(cells)} cells of this table (which are not independent), "
        f"organ purity in {sum(c['within'] for c in primary)} of {len(primary)}."
    )


def again() -> str:
    """What a repeat of a part of the plan gave."""
    found = load("components-again")
    return (
        f"{found['runs']['pretrain']} of the plan's pretrainings were run again by the same command on later code ({found['core_hours']:.1f} core-hours, "
        f"`benchmarks.components --check`): {found['the_same']} of {found['values']} values are the same to the last digit."
    )


def numbers(found: dict[str, Any]) -> str:
    """Seeds of the arms with semantic attention and of those without."""
    with_it, without = (
        {r["n"] for r in found["metrics"]["clusters features/knn_purity"]["arms"] if r["semantic"] is s}
        for s in (True, False)
    )
    if len(with_it) != 1 or len(without) != 1:
        raise ValueError(f"arms differ in their seeds: {with_it}, {without}")
    return f"{with_it.pop()} seeds an arm ({without.pop()} where there is no semantic attention)"


def by_seeds(found: dict[str, Any], name: str, factor: str) -> str:
    """The effect by the plan's own seeds alone, and by the added ones alone."""
    one = found["metrics"][name]
    first, later = (next((r for r in one[k] if r["factor"] == factor), None) for k in ("planned", "later"))
    if first is None:
        raise ValueError(f"{name}: no effect of {factor}")
    if later is None:
        return f"{signed(first)} over the plan's {first['n']} seeds"
    return f"{signed(first)} over the plan's {first['n']} seeds alone, {later['value']:+.3f} over the {later['n']} added"


def signed(one: dict[str, Any]) -> str:
    return f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def picture() -> None:
    """The three primary figures: every seed a dot, means and their intervals, untrained encoders dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = load("components")
    shown = {
        "clusters features/knn_purity": "Neighbours in other patients\nthat are the same organ",
        "attention jensen_shannon": "Divergence between\nattention heads",
        "nodules auc": "Real nodules:\nAUC of a linear probe",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.6, 3.4), sharey=True, layout="constrained")
    colours = {(True, "random"): "#0072B2", (True, "attention_high"): "#D55E00", (False, "random"): "#777777"}
    for ax, (name, title) in zip(axes, shown.items(), strict=True):
        one = found["metrics"][name]
        for place, arm in enumerate(ARMS):
            row, colour = of_arm(one["arms"], arm), colours[arm[0], arm[2]]
            if row is None:
                continue
            dots = [r["value"] for r in one["each"] if arm_of(r) == arm]
            ax.plot([row["low"], row["high"]], [place] * 2, color=colour, lw=1.5, alpha=0.5)
            ax.plot(row["value"], place, "|", color=colour, ms=17, mew=2.5)
            ax.plot(dots, [place] * len(dots), "o", color=colour, ms=6, mec="white", mew=0.8)
        for value in found["untrained"].get(name, []):
            ax.axvline(value, color="0.5", ls="--", lw=1)
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    axes[0].set_yticks(range(len(ARMS)), list(ARMS.values()), fontsize=9)
    axes[0].invert_yaxis()
    figure.savefig(HERE / "images" / "components.png", dpi=130)
    plt.close(figure)


def page() -> str:
    attention, found, shipped = load("attention"), load("components"), load("shipped")
    recipe, planted, real_ct, equal = (load(n) for n in ("recipe", "planted", "real_ct", "equal_time"))
    earlier = load("equal_time-earlier")
    miram, decoders, real = load("miram"), load("decoders"), load("real_data")
    last, about = attention["checkpoints"][-1], found["settings"]
    nodules = real["nodules"]["probe"]["metrics"]
    probes, growth = miram["probes"], decoders["exponents"]
    kinds = ("softmax", "nystrom", "linformer", "performer")
    cheap = ", ".join(f"{kind} {growth[kind]['seconds_all']:.2f}" for kind in kinds)
    guided = effect(found, "clusters features/knn_purity", "strategy")
    lower = effect(found, "attention jensen_shannon", "strategy", "dropout 0.0")
    restored = effect(found, "attention jensen_shannon", "dropout", "strategy attention_high")
    two = probes["pathology"]["miram - mae auc"]
    importance = load("importance")
    purity = found["metrics"]["clusters features/knn_purity"]
    semantic = effect(found, "clusters features/knn_purity", "semantic")
    text = f"""# What is known, and what is not

Four claims of the papers, and what this repository has measured about each. Everything here is small: an encoder of half a million
weights trained for minutes on synthetic scans. Written by `python docs/make_evidence.py` from `benchmarks/results`; intervals
are 95% over patients, or over seeds where it says so.

**Folds pooled.** Cross-validated AUCs marked so are older than the counting of pairs within folds (`docs/EVALUATION.md`): they were taken over all
folds together, and their intervals are percentiles of a bootstrap. That lies below the truth, by 0.02 to 0.08 for useless features and 20 to
40 patients and by less the more patients there are, for every encoder alike, so that differences are nearly free of it.

**What the paper claims, and at what scale.** DAGMaN (MIDL 2025) pretrained for 800 epochs on 10,412 CT scans on four A100s; guided masks and a
noisy teacher raised the AUC of nodule malignancy from 0.859 to 0.895 fine-tuned, and from 0.629 to 0.642 with a linear probe. No run of
minutes can confirm or refute a gain of 0.013.

**What these runs were.** They were made before the full paper was at hand, with the method as version 0.1 had it: the noisy look guided the masks, 0.3
of the mask units were dropped and not 0.7 of the patch tokens, there were no hints at the top and no GITD, AMPD came after semantic attention. They judge by
organ purity, a weak yardstick: untrained networks come close to it (dashed lines below). A verdict below is that of one recipe under one such
metric, not of the paper's method.

## The arms

`notebooks/plans/components.yaml` and `noise.yaml`, run by `smartlab batch` and gathered by `benchmarks.components` ({found["core_hours"]:.1f} core-hours, on two
shared CPU cores): `tiny` on {about["phantoms"]} phantoms (70% of them to pretrain on), {about["steps"]} steps of {about["views_per_step"]} views of {about["view"]}³ voxels, {numbers(found)}. Judged on
{found["metrics"]["clusters features/knn_purity"]["patients"]} phantoms of the test split. The primary metrics were written into the plans before they ran: organ purity (of an organ's ten nearest
neighbours in *other* patients, how many are the same organ; nothing fine-tuned) and the divergence between attention heads. (Until then the plan's had been the nodule probe's AUC; it
was changed, before any arm ran, because two trial encoders and untrained ones showed that a probe on means over a view sees nothing of such nodules.)

![Arms](images/components.png)

*Dots are seeds, the bar is their mean with a 95% t interval over seeds, dashed lines are untrained encoders (with semantic attention).*

{chr(10).join(arms(found))}

Means over seeds, t intervals: with so few they are wide. {repeated(found)} {again()}

Guided masks need informative attention (informativeness of the clean teacher over
views of the training size; the guard opens at {about["threshold"]} of the noisy teacher's): the share of steps that were guided is in the last row.

With semantic attention (and its two blocks more) instead of without, under random masks, organ purity differs by {signed(semantic)} ({verdict(semantic).lower()}),
the AUC on real nodules by {signed(effect(found, "nodules auc", "semantic"))}, over {semantic["n"]} seeds. What follows is among the arms with semantic attention.

## 1. Attention-guided masking beats random masking

**{verdict(guided)}.** Organ purity, guided minus random masks, all else equal: {signed(guided)} over {guided["n"]} seeds
({by_seeds(found, "clusters features/knn_purity", "strategy")}).
With a clean teacher {signed(effect(found, "clusters features/knn_purity", "strategy", "dropout 0.0"))}, with a noisy one {signed(effect(found, "clusters features/knn_purity", "strategy", "dropout 0.3"))}; under guided masks noise
changes purity by {signed(effect(found, "clusters features/knn_purity", "dropout", "strategy attention_high"))}. {guided["n"]} seeds, {purity["patients"]} scans, one recipe: a reason to look closer, not a law.

{chr(10).join(differences(found, "strategy"))}

What the logs say of the cause, first → last quarter of training, means over seeds and over the (noisy) views of training:

{chr(10).join(over_training(found))}

Random masks hide {found["settings"]["ratio"]:.2f} of anything on average; what guided masks hide more of is what the attention fell on.

**Is the importance map any good?** On views of the training size that tile {importance["patients"]} held-out scans (`benchmarks.importance`; lift: attention on a region
over chance; hidden: the part of it that masks by this map hide), by the share of its input that the teacher does not see, and by mask ratio:

{chr(10).join(map_quality(importance))}

{cause(importance)}

Attention does form: in a longer run of larger views (`benchmarks.attention`, {last["step"]} steps) lesions of held-out phantoms got {interval(last["lift lesion"])}
times their share of it, organs {interval(last["lift organ"])}.

## 2. It lowers head diversity, and the noisy teacher restores it

**Lowers it: {verdict(lower, -1).lower()}.** Divergence between heads (Jensen–Shannon, the clean teacher on held-out scans), guided minus random masks with a
clean teacher: {signed(lower)}.

**The noisy teacher restores it: {verdict(restored).lower()}.** Noise of 0.3 minus none, under guided masks: {signed(restored)}. All else equal, noise changed:

{chr(10).join(differences(found, "dropout"))}

## 3. Features are better for both, full and few-shot, in clusters, in localisation and in segmentation

Guided masks and a noisy teacher together, minus random masks and a clean one:

{chr(10).join(parts(found))}

Segmentation was not compared between arms.

Whether pretraining helps at all: the shipped encoder (`python -m benchmarks.shipped` makes and judges it) beside an untrained one of the same
form, on {shipped["held_out_patients"]} phantoms that it never saw (its recipe is one of two tried; the other was passed over because of its attention on the
lesions of 18 of them, which flatters the lift a little):

{chr(10).join(of_shipped(shipped))}

and on real images, where it learned from phantoms only (`benchmarks.real_data`; `real_data-earlier.json` has every task for the encoder that
was shipped before, fine-tuned segmentation too):

{chr(10).join(beside_untrained(real))}

On the real nodules the largest area of the nodule alone has AUC {interval(nodules["largest area/auc"])}; the encoder minus that: {interval(nodules["auc minus largest area"])}.

## 4. Two scales beat one in mammography, and a linear decoder does it cheaply

**Two scales, for margins: {verdict(probes["mass_margins"]["miram - mae auc"]).lower()}; for pathology: {verdict(two).lower()}.** {of_miram(miram)}

**Cheaply: {"supported" if max(growth[k]["seconds_all"] for k in kinds[1:]) < 1.1 < growth["softmax"]["seconds_all"] else "not supported"}.** Time of a step of the fine decoder grows with its tokens to the power of: {cheap} (`benchmarks.decoders`).

## Can a pretraining of two cores be judged at all?

**Yes, in a readout of units.** Organ purity hardly tells a trained network from an untrained one, so another yardstick was written down first
(`benchmarks/studies/recipe.py`: settings, measure and primary figure were committed before the run was judged): which organ is this one unit, read linearly
from patients that pretraining never saw. DAGMaN with the masks and the noisy teacher of its paper and the losses of `tiny` (regression, and a coarse picture from [CLS]), at a size for a CPU: {recipe["settings"]["train.steps"]:,} steps of two scans' views of 64³ at 3 mm,
{recipe["training"]["core_hours"]:.1f} core-hours on the clock, {recipe["judged"]["teacher: stage 2/balanced accuracy"][3]} held-out phantoms, one seed; masks were guided in {recipe["guided"]:.0%} of the steps. Balanced accuracy:

{chr(10).join(of_recipe(recipe))}

So all three intervals of the primary measure exclude zero. It does not help everywhere: fine units (stage 1) are read better from random weights, and from their place alone;
with four labelled patients the gain in stage 2 is gone and that of the tokens stays.

## Does a pretraining of two cores help on real CT?

**No, as far as it was judged.** By the same recipe, half as wide again, an encoder was pretrained for {real_ct["settings"]["train.steps"]:,} steps ({real_ct["training"]["core_hours"]:.1f} core-hours on the clock) on {real_ct["scans"]["real"]} real scans
(soft-tissue sarcoma, one abdomen of Pancreas-CT) and {real_ct["scans"]["phantoms"]} phantoms together (`benchmarks/studies/real_ct.py`), and judged on what it never saw. One seed. At step {real_ct["warnings"][0]["step"]:,} the run itself warned that
image tokens of different views had become nearly equal. The real organs are those of one
scan, judged block by block of 48 mm: intervals over blocks say nothing of other patients. The first look at them, with blocks of 96 mm and every label a class of its own, left all
features at chance and was given up for this one.

{chr(10).join(of_real_ct(real_ct))}

On held-out phantoms the tokens gain over an untrained network; on the real scan nothing does: its tokens are read like those of random weights, above those of a pretraining on
phantoms alone, and units of stage 2 worse than random weights, HU or place. Nodules are told a little worse than by random weights. So the encoder that comes along is still the one of
phantoms, and **no claim that it helps on real scans is made**. Fine-tuned on one, two or four labelled
phantoms (240 steps, one seed) it is at no point better than the same network from scratch, and with two a little worse.

## Do masks of whole objects teach what goes with what?

The idea behind guided masks is that hiding what belongs together forces a network to infer it from the rest. So it was planted (`benchmarks/studies/planted.py`, predictions
written down before): noise with two objects whose classes determine each other and nothing else does, arms that differ in their masks alone, {planted["settings"]["steps"]} steps each.
Then one object is hidden whole and the network paints it; chance is 0.25. One figure a seed:

{chr(10).join(of_planted(planted))}

Masks that leave nothing to infer from stay at chance with every seed. Masks of whole objects taught two to four of the four classes; minus both objects whole {signed(planted_apart(planted, "oracle", "both"))},
minus random masks {signed(planted_apart(planted, "oracle", "random"))}: the same sign with every seed, and with three seeds neither interval excludes zero. The primary figure, attention with hints minus random masks, is
{signed(planted_apart(planted, "attention", "random"))}, and its sign changes from seed to seed: **whether guided masks teach more than random ones is undecided, and nothing here says that they do**.
Hints show a part of what attention points at, so that objects are hidden less often than by chance. (A first attempt at the attention arm is not in the table: the guard of `tiny` never
opened, so that its masks were random ones; the arm is now guided from the first step, as published.)

## A plain vision transformer beside Swin, for the same time

`primus-tiny` and `tiny` on the same phantoms, each for {equal["minutes"]:g} minutes of a core by the processor's clock (`benchmarks/studies/equal_time.py`; one seed, {equal["held_out_patients"]} held-out phantoms; it was not said
before which is better, but which figure counts: organs). Score; minus the same network untrained:

{chr(10).join(of_equal_time(equal))}

Organs, each Primus minus Swin, paired by patient: masked autoencoding {same_time_apart(equal, "organ probe", "accuracy", "primus, mae")}, DAGMaN {same_time_apart(equal, "organ probe", "accuracy", "primus, dagman")}. Swin and masked
autoencoding with hidden patches left out cannot be told apart here; DAGMaN on a Primus tells organs less well, and its clusters gain nothing over an untrained network's. Attention on
lesions gains with none of the three; Swin's minus a blob in the middle of the scan: {interval(equal["arms"]["swin, dagman"]["tasks"]["localize"]["lesion/lift minus centre"])}. Nodules are at chance for all. A seed and a few steps more or less move
this: in an earlier run (`equal_time-earlier.json`; masks still followed heads of equal weight, and {earlier["arms"]["primus, mae"]["steps"]:,} steps of masked autoencoding took longer than the others) masked autoencoding was ahead of
Swin, {same_time_apart(earlier, "organ probe", "accuracy", "primus, mae")}, and Swin's attention lay on lesions, {interval(earlier["arms"]["swin, dagman"]["tasks"]["localize"]["lesion/lift minus random"])} above an untrained network's.

## What would change the answers

Scale first: real CT by the thousand, a GPU, more seeds. `ct-open` and `lidc-nodules` are shipped as manifests, the plans take them by parameters,
and `smartlab batch components` writes the table. The noise plan's other levels of noise were not run, nor were arms compared in segmentation.
"""
    return text


def blocks() -> dict[str, str]:
    """The parts of other pages that hold results, by name."""
    found, shipped, attention, again = (
        load(n) for n in ("components", "shipped", "attention", "attention-repeat")
    )
    loader, step, decoders, real = (load(n) for n in ("loader", "step", "decoders", "real_data"))
    guided = effect(found, "clusters features/knn_purity", "strategy")
    lower = effect(found, "attention jensen_shannon", "strategy", "dropout 0.0")
    restored = effect(found, "attention jensen_shannon", "dropout", "strategy attention_high")
    bare, noisy = (
        effect(found, "clusters features/knn_purity", "strategy", f"dropout {d}") for d in (0.0, 0.3)
    )
    nodules, detail = real["nodules"]["probe"]["metrics"], load("miram")["detail"]
    last, then = attention["checkpoints"][-1], again["checkpoints"][-1]
    ours, theirs = loader["store"], loader["monai_persistent_dataset"]
    growth = {k: v["seconds_all"] for k, v in decoders["exponents"].items()}
    linear = [growth[k] for k in ("nystrom", "linformer", "performer")]
    at = {r["kind"]: r["seconds"] for r in decoders["rows"] if r["tokens"] == 16384}
    cheap = [at[k] for k in ("nystrom", "linformer", "performer")]
    primus = load("primus")
    kinds, memory = primus["step"], primus["memory"]
    seconds = {n: step["step"][n]["seconds"]["median"] for n in ("reference", "ours", "ours sparse")}
    made = shipped["recipe"]
    return {
        "card": f"""DAGMaN (`{made["preset"]}`), {made["train.steps"]:,} steps of {made["train.batch"]} scans on the training patients of {made["data.phantom_cases"]} drawn CT phantoms. On {shipped["held_out_patients"]} that it never saw, with
intervals over patients:

{chr(10).join(of_shipped(shipped))}

**On real scans it does not beat an untrained network of the same form**, where that could be told:

{chr(10).join(beside_untrained(real))}

An encoder of {load("real_ct")["scans"]["real"]} real scans and phantoms was trained too. It did not beat an untrained one on real scans either, nor training from scratch in segmentation
with few labels, and is not shipped.""",
        "scales": f"""*{of_miram(load("miram"))} The two-scale reconstruction has {detail["miram"]["energy"]["value"]:.1f} times the energy of the
original's fine detail, the enlarged one-scale one {detail["mae"]["energy"]["value"]:.2f} of it; neither follows the original's detail (correlation {detail["miram"]["agreement"]["value"]:.3f} and
{detail["mae"]["agreement"]["value"]:.3f}): it is patch edges, not structure. So what the finer scale brings to margins it does not bring by painting them.*""",
        "components": f"""![What guided masks and a noisy teacher do](docs/images/components.png)

*`smartlab batch components` and `noise`: {len(ARMS)} arms, {numbers(found)}, a dot each, {found["core_hours"]:.1f} core-hours, judged on held-out phantoms and on real nodules;
dashed, untrained encoders. Guided minus random masks, organ purity: {signed(guided)}: **{verdict(guided).lower()}**, with a clean
teacher ({signed(bare)}) more than with a noisy one ({signed(noisy)}). Divergence of heads under guided masks with a clean
teacher: {signed(lower)} (claim: it falls; **{verdict(lower, -1).lower()}**); with noise: {signed(restored)} (claim: it comes back; **{verdict(restored).lower()}**). Claim by claim, with
what was not measured: [docs/EVIDENCE.md](docs/EVIDENCE.md).*

The shipped encoder beside an untrained one, on {shipped["held_out_patients"]} phantoms that it never saw:

{chr(10).join(of_shipped(shipped))}

On real nodules, after phantoms only, its linear probe has AUC {nodules["auc"][0]:.3f} beside {nodules["random encoder/auc"][0]:.3f} untrained, and {nodules["largest area/auc"][0]:.3f} for the nodule's largest area alone.""",
        "attention": f"""*`python -m benchmarks.attention`: DAGMaN on 42 phantoms, {last["step"]:,} steps, judged on the whole scans of {attention["held_out_patients"]} others with the clean teacher. Bands are
95% intervals over patients. At the end lesions get {interval(last["lift lesion"])} times their share of attention, labelled organs {interval(last["lift organ"])}.
A repeat (training on several threads is not repeatable to the last bit) ended with {interval(then["lift lesion"])} and {interval(then["lift organ"])}; its informativeness
fell back from {last["informativeness of views"][0]:.3f} to {then["informativeness of views"][0]:.3f}. That attention forms, not that it helps.*""",
        "primus": f"""*`python -m benchmarks.primus`, in turns in one process on two cores ({primus["machine"]["cpu"]}): a step of {primus["preset"]} on two views of {primus["view"]}³ takes
{kinds["sparse"]["seconds"]["median"]:.2f} s with hidden patches left out and {kinds["dense"]["seconds"]["median"]:.2f} s without, **{kinds["dense / sparse"]["seconds"]["median"]:.1f} times** the views per second, with at most {memory["sparse"]["peak_mb"]:,.0f} MB and
{memory["dense"]["peak_mb"]:,.0f} MB in memory; SimMIM of the same network {kinds["simmim"]["seconds"]["median"]:.2f} s, the whole `smit` step of Swin {kinds["smit"]["seconds"]["median"]:.2f} s. What a Primus learns in the time of a
Swin: [docs/EVIDENCE.md](EVIDENCE.md).*""",
        "speed": f"""From `benchmarks/results/loader.json` (`benchmarks.loader`; two-core {loader["machine"]["cpu"]} virtual machine, one core used, {loader["volumes"]["count"]} volumes of {"×".join(map(str, loader["volumes"]["shape"]))}
made from real CT, page cache warm): {ours["views_per_second_median"]} views of 96³ per second from the store, beside {theirs["views_per_second_median"]} from MONAI's PersistentDataset with the
same crops; {ours["bytes_per_view"] / 1e6:.2f} MB read per view, beside {theirs["bytes_per_view"] / 1e6:.1f} MB. On {loader["real_cases"]["scans"]} real scans the store takes {loader["real_cases"]["share_of_raw"]:.0%} of the raw int16 size of the volumes it holds.

A whole `smit` step (two views of 96³, fp32) takes {seconds["ours"]:.1f} s on two cores with AVX2, the same step as published {seconds["reference"]:.1f} s, with equal losses; {seconds["ours sparse"]:.1f} s
with `student.encode=sparse`, which is another function (below). No GPU has been measured: `make bench-gpu`.""",
        "decoders": f"""*`python -m benchmarks.decoders`, one core: a step of MIRAM's fine decoder takes time that grows with its tokens to the power of {growth["softmax"]:.2f}
with softmax attention, {min(linear):.2f} to {max(linear):.2f} with the linear kinds; at 16,384 tokens {at["softmax"]:.1f} s against {min(cheap):.2f} to {max(cheap):.2f} s. torch's fused softmax
never holds the matrix, so its memory grows linearly too.*""",
    }


def filled(page: Path) -> str:
    """A page with its results filled in."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks().items():
        if PLACES[name] != page:
            continue
        pattern = rf"(<!-- results: {name} -->\n).*?(\n<!-- end -->)"
        text, number = re.subn(pattern, lambda m, b=block: m[1] + b + m[2], text, flags=re.S)
        if number != 1:
            raise SystemExit(f"{page.name} has {number} places for {name}")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for place in dict.fromkeys(PLACES.values()):
        place.write_text(filled(place), encoding="utf-8")
    picture()
