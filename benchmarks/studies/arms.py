"""Two studies in arms that differ in little: which masks under which losses; masks and noise on real CT.

    python -m benchmarks.studies.arms masks --out runs/studies/masks      # 4 masks × 2 losses × 3 seeds
    python -m benchmarks.studies.arms noise --out runs/studies/noise      # 2 masks × 2 amounts of dropout × 2 seeds
    python -m benchmarks.studies.arms masks --out … --seeds 1 --steps 400 --only random hint

Every arm is a run of its own in --out, and lies in the result once it has been judged. Stopped, the same command goes
on; results of arms are added to those that are there, and seeds may run beside each other, in processes of their own.

`masks`: the recipe of `recipe.py` on phantoms, shorter. Masks at random, of the most attended (high), of these but for
hints at the very top (hint, as published), and an oracle's: all that is organ, then others at random. Losses as in
`tiny` (regression, and a coarse picture from [CLS]) and as published (prototypes; 0.1 of each; no coarse picture). Judged
by a linear readout of single units on patients held out, the teacher's stage 2, beside the same network untrained.

    Written down before it ran. Primary: balanced accuracy at stage 2, hint minus random, each pair of the same seed and
    losses. Predicted: the oracle helps (above random under both losses), hint lies between random and oracle, and
    the differences between masks are smaller than that between the two losses.

`noise`: real CT alone, 96³ views, semantic attention at stage 3. Masks at random or guided with hints, the noisy
teacher's dropout 0 or 0.7. Judged by how diverse heads are, as the paper has it: the entropy of attention distances,
of the teacher on clean views, by stage, over the last fifth of training; by the organs of the one scan of
`ct_organs` (as `real_ct.py` reads them), which no arm saw; and by attention on sarcomas, beside body as far from its middle, since tumours lie there.

    Written down before it ran. Primary: entropy at stage 3, dropout 0.7 minus 0 under guided masks. Predicted by the
    paper: above zero; and guided masks without dropout lie below random ones. No prediction for the organs: a scan;
    nor for tumours, whose patients were trained on, without labels.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import smartlab as sl
from benchmarks.harness import machine
from benchmarks.studies import real_ct
from benchmarks.studies.recipe import RECIPE, spent
from smartlab.core.clock import Clock
from smartlab.core.config import Config
from smartlab.core.files import held, write_text
from smartlab.core.places import code_version
from smartlab.data.crops.regions import unit_cubes
from smartlab.data.store.prepare import prepare_store
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.judge.result import clean
from smartlab.evaluation.judge.stats import t_interval
from smartlab.evaluation.look.units import units
from smartlab.masking import make_mask
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.training import families, pretrain

Settings = dict[str, Any]
GUIDED = {"mask.strategy": "attention_hint"}
RANDOM = {"mask.strategy": "random"}


class Study(NamedTuple):
    settings: Settings
    factors: tuple[dict[str, Settings], dict[str, Settings]]
    seeds: int
    primary: str
    judge: Callable[[sl.Run, argparse.Namespace], dict[str, list[float]]]


class Oracle(MaskedDistillation):
    """Hides all that is organ, and others at random up to the ratio."""

    organ: Tensor

    def forward(
        self, views: Tensor, clock: Clock, generator: torch.Generator, shares: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert shares is not None
        self.organ = shares["organ"]
        return super().forward(views, clock, generator, shares)

    def choose(self, guide: Any, x: Tensor, clock: Clock, generator: torch.Generator) -> Tensor:
        super().choose(guide, x, clock, generator)  # what it keeps track of
        grid = self.student.encoder.grid(x.shape)
        return make_mask("attention_high", self.organ, self.config.mask.ratio, grid, generator=generator)


def organs_told(config: Config) -> families.Family:
    """The method with the oracle's masks, which are told in every step where organs lie."""
    family = families.family_of(config)
    store = prepare_store(config.data)[1]
    return family._replace(
        method=Oracle, prepare=lambda *given: family.prepare(*given[:-1], store.label_names)
    )


def phantom_units(run: sl.Run, asked: argparse.Namespace, scans: int = 32) -> dict[str, list[float]]:
    """As the recipe is judged, teacher only."""
    store = prepare_store(run.config.data)[1]
    about = store.cases.drop_duplicates("image")
    chosen = [about.image[about.split == "train"], about.image[about.split != "train"]]
    images = [image for some in chosen for image in some.tolist()[:scans]]
    with torch.inference_mode():
        found = units(run.encoder("teacher"), store, images, levels=("stage 2", "tokens"))
    return real_ct.told(found.metrics)


def diversity_and_organs(run: sl.Run, asked: argparse.Namespace) -> dict[str, list[float]]:
    last = run.history[run.history.step > 0.8 * run.config.train.steps]
    entropy = {name: [float(last[name].mean())] for name in last if str(name).startswith("reach_")}
    beside = argparse.Namespace(out=asked.out, beside=None)
    organs = real_ct.real_organs(run, beside, levels=("stage 2",))  # a token is as large as a block
    return {str(name): value for name, value in (entropy | organs | tumours(run, asked)).items()}


def tumours(run: sl.Run, asked: argparse.Namespace) -> dict[str, list[float]]:
    """Attention per voxel of real sarcomas over that of the same patient's body as far from its middle; 1 is chance."""
    real = Path(os.environ.get("SMARTLAB_REAL_DATA") or "../shared/data") / "ct_sarcoma"
    man = sl.scan_folder(real, progress=False)
    sl.build_store(man, real, asked.out / "sarcoma", workers=0, spacing=run.config.data.spacing)
    store = sl.open_store(asked.out / "sarcoma")
    nets = {"teacher": run.encoder("teacher"), "random": random_encoder(run.config)}
    lifts: dict[str, list[float]] = {name: [] for name in nets}
    for image in range(len(store)):
        hu, labels = store.array(image)[:], store.labels(image)
        assert labels is not None
        stride = nets["teacher"].stride
        tumour, body = (
            unit_cubes(mask.astype(np.uint8), stride).mean(1)
            for mask in (labels[:] > 0, store.body_mask(image) & (labels[:] == 0))
        )
        with torch.inference_mode():
            looks = {name: net.attention(hu)[0].mean(0).numpy() for name, net in nets.items()}
        place = np.indices(looks["teacher"].shape).reshape(3, -1)
        middle = (place * body).sum(1) / body.sum()
        far = np.rint(np.linalg.norm(place - middle[:, None], axis=0)).astype(int)  # in units
        for name, look in looks.items():
            seen = look.ravel()
            around = np.bincount(far, seen * body) / np.maximum(np.bincount(far, body), 1e-9)
            lifts[name].append(float(seen @ tumour / (around[far] @ tumour)))
    apart = [a - b for a, b in zip(*lifts.values(), strict=True)]
    found = {"tumour": lifts["teacher"], "tumour: random": lifts["random"], "tumour minus random": apart}
    return {name: [*t_interval(values)[:3], len(values)] for name, values in found.items()}


STUDIES = {
    "masks": Study(
        RECIPE | {"train.steps": 600, "mask.warmup_epochs": 2, "train.picture_every": 10**6},
        (
            {
                "random": RANDOM,
                "high": {"mask.strategy": "attention_high"},
                "hint": GUIDED,
                "oracle": RANDOM,
            },
            {
                "tiny": {},
                "published": {
                    "distill.kind": "prototype",
                    "distill.standardise": False,
                    "loss.patch": 0.1,
                    "loss.image": 0.1,
                    "loss.global_image": 0.1,
                    "loss.coarse": 0.0,
                },
            },
        ),
        3,
        "stage 2/balanced accuracy",
        phantom_units,
    ),
    "noise": Study(
        RECIPE
        | {
            "data.region": 112,
            "data.view": 96,
            "semantic.stage": 3,
            "train.steps": 300,
            "mask.warmup_epochs": 2,
            "train.picture_every": 10**6,
        },
        (
            {"random": RANDOM, "hint": GUIDED},
            {"clean": {"teacher.patch_dropout": 0.0}, "noisy": {"teacher.patch_dropout": 0.7}},
        ),
        2,
        "reach_entropy_3",
        diversity_and_organs,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="where the result goes; default: the folder --out")
    parser.add_argument("--seeds", type=int, nargs="*", help="default: all of the study's")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", nargs="*", help="arms by the name of their masks")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    study, path = STUDIES[asked.study], asked.json or asked.out / f"{asked.study}.json"
    settings = dict(study.settings)
    if asked.study == "noise":
        settings["data.manifest"] = str(real_ct.compose(asked.out / "scans", phantoms=0))
    settings["train.steps"] = asked.steps or settings["train.steps"]
    for seed in range(study.seeds) if asked.seeds is None else asked.seeds:
        for second, beside in study.factors[1].items():
            for first, masks in study.factors[0].items():
                arm = f"{first}, {second}"
                if str(seed) in there(path)["arms"].get(arm, {}) or (asked.only and first not in asked.only):
                    continue
                config = sl.load_config("tiny", settings | masks | beside | {"seed": seed})
                made = organs_told if first == "oracle" else families.family_of
                with mock.patch.object(pretrain, "family_of", made):
                    run = sl.pretrain(config, asked.out / f"{first}-{second}-{seed}", resume=True)
                if not run.finished:
                    raise SystemExit(f"stopped at step {run.step}: run the same command again to go on")
                found = {
                    "judged": study.judge(run, asked),
                    "training": spent(run.path),
                    "history": run.history.tail(5).mean(numeric_only=True).to_dict(),
                    "guided": float(run.history.guided.mean()),
                }
                shown = {k: v for k, v in settings.items() if k != "data.manifest"}
                about = {"what": (__doc__ or "").split("\n\n")[0], "settings": shown}
                about |= {"machine": machine(), "code": code_version()}
                with held(asked.out, "another seed writes its result", wait=60):
                    report = there(path) | about
                    report["arms"].setdefault(arm, {})[str(seed)] = found
                    report["contrasts"] = contrasts(study, report["arms"])
                    write_text(path, json.dumps(clean(report), indent=1) + "\n")
                print(arm, seed, found["judged"][study.primary], flush=True)


def there(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {"arms": {}}


def contrasts(study: Study, arms: dict[str, Any]) -> dict[str, list[float]]:
    """The primary figure, every level of a factor minus its first, all else equal: mean and t interval over pairs."""
    found: dict[str, list[float]] = {}
    for which, levels in enumerate(study.factors):
        first = next(iter(levels))
        for level in [name for name in levels if name != first]:
            for other in study.factors[1 - which]:
                names = [(one, other) if which == 0 else (other, one) for one in (level, first)]
                a, b = (arms.get(", ".join(pair), {}) for pair in names)
                pairs = [
                    a[s]["judged"][study.primary][0] - b[s]["judged"][study.primary][0] for s in a if s in b
                ]
                if len(pairs) > 1:
                    e = t_interval(pairs)
                    found[f"{level} minus {first} ({other})"] = [e.value, e.low, e.high, e.n]
    return found


if __name__ == "__main__":
    main()
